"""Reading ECG files: what is read is what was written, and what must not be believed is refused with one line."""

import io
import re
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import wfdb
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_builders.synthetic import SyntheticEcg, synthetic_ecg, write_wfdb
from modeling_ecgmoe.ecg_files import Ecg, EcgFileError, find_ecgs, find_others, read_ecg
from modeling_ecgmoe.leads import LEADS

WriteRecord = Callable[..., tuple[Path, SyntheticEcg]]


def write_raw(folder: Path, header: str, **files: bytes) -> Path:
    """A record from its bytes: `rec.hea` and a file for each keyword, "_" standing for the dot of its name."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name.replace("_", ".")).write_bytes(content)
    path = folder / "rec.hea"
    path.write_bytes(header.encode("utf-8", "surrogatepass"))
    return path


def int16(*values: int) -> bytes:
    return np.array(values, dtype="<i2").tobytes()


def qrs_values(num_samples: int = 500, num_leads: int = 1) -> np.ndarray:
    """Samples of an ECG of about 1 mV in steps of 1 uV, int16 (samples, leads)."""
    signal = synthetic_ecg(sampling_rate=250, duration_s=num_samples / 250).ecg.signal[:num_leads]
    return np.round(signal.T * 1000).astype("<i2")


# What is read


def test_a_record_is_read_as_it_was_written(write_record: WriteRecord) -> None:
    path, truth = write_record(sampling_rate=500)
    ecg = read_ecg(path)
    assert ecg.signal.dtype == np.float32
    assert ecg.signal.shape == (12, 5000)
    assert ecg.sampling_rate == 500
    assert ecg.lead_names == LEADS
    assert ecg.duration_s == 10.0
    np.testing.assert_allclose(ecg.signal, truth.ecg.signal, atol=0.00051)  # half a step of 1 uV


@pytest.mark.parametrize("fmt", ["16", "24", "32", "80", "212", "516", "524"])
def test_every_signal_format_gives_what_the_wfdb_library_gives(write_record: WriteRecord, fmt: str) -> None:
    gain = 50.0 if fmt == "80" else 1000.0  # eight bits reach from -128 to 127
    path, truth = write_record(fmt=fmt, gain=gain)
    ecg = read_ecg(path)
    np.testing.assert_allclose(ecg.signal, wfdb.rdrecord(str(path.with_suffix(""))).p_signal.T, atol=1e-6)
    np.testing.assert_allclose(ecg.signal, truth.ecg.signal, atol=0.51 / gain)


def test_gain_baseline_and_unit_become_millivolts(tmp_path: Path) -> None:
    lines = ("2(10)/uV 16 0 0 0 0 I", "0.5/V 16 0 0 0 0 II", "100/mv 16 0 0 0 0 V1")
    header = "\n".join(["rec 3 250 3", *(f"rec.dat 16 {line}" for line in lines)])
    path = write_raw(tmp_path, header, rec_dat=int16(2010, 0, 0, 10, 0, 100, -1990, 0, -50))
    expected = np.array([[1, 0, -1], [0, 0, 0], [0, 1, -0.5]])
    np.testing.assert_allclose(read_ecg(path).signal, expected, atol=1e-6)


def test_the_zero_of_the_converter_is_the_baseline_where_none_is_given(tmp_path: Path) -> None:
    path = write_raw(tmp_path, "rec 1 360 3\nrec.dat 16 200 11 1024 0 0 0 MLII\n", rec_dat=int16(1024, 1224, 824))
    np.testing.assert_allclose(read_ecg(path).signal, [[0, 1, -1]], atol=1e-6)


def test_the_mark_of_an_invalid_sample_becomes_nan(tmp_path: Path) -> None:
    path = write_raw(tmp_path, "rec 1 250 3\nrec.dat 16 1000/mV 16 0 0 0 0 I\n", rec_dat=int16(0, -32768, 500))
    np.testing.assert_array_equal(read_ecg(path).signal, np.array([[0, np.nan, 0.5]], dtype=np.float32))


@pytest.mark.parametrize("fmt", ["16", "212"])
def test_missing_samples_survive_a_round_trip(tmp_path: Path, fmt: str) -> None:
    signal = synthetic_ecg(sampling_rate=250).ecg.signal.copy()
    signal[3, 100:200] = np.nan
    ecg = read_ecg(write_wfdb(Ecg(signal, 250, LEADS), tmp_path, "gap", fmt=fmt))
    np.testing.assert_array_equal(np.isnan(ecg.signal), np.isnan(signal))


def test_a_record_may_spread_over_several_signal_files(tmp_path: Path) -> None:
    lines = ("a.dat 16 100/mV 16 0 0 0 0 I", "b.dat 16+4 100/mV 16 0 0 0 0 II", "a.dat 16 100/mV 16 0 0 0 0 V1")
    path = write_raw(
        tmp_path, "\n".join(["rec 3 250 2", *lines]), a_dat=int16(1, 2, 3, 4), b_dat=b"skip" + int16(50, 60)
    )
    np.testing.assert_allclose(read_ecg(path).signal, [[0.01, 0.03], [0.5, 0.6], [0.02, 0.04]], atol=1e-6)


def test_channels_that_are_no_voltage_are_left_out(tmp_path: Path) -> None:
    header = "rec 2 250 2\nrec.dat 16 100/mmHg 16 0 0 0 0 ABP\nrec.dat 16 100/mV 16 0 0 0 0 II\n"
    ecg = read_ecg(write_raw(tmp_path, header, rec_dat=int16(9000, 10, 9100, 20)))
    assert ecg.lead_names == ("II",)
    np.testing.assert_allclose(ecg.signal, [[0.1, 0.2]], atol=1e-6)


def test_several_samples_a_frame_raise_the_sampling_rate(tmp_path: Path) -> None:
    header = "rec 1 125 2\nrec.dat 16x4 100/mV 16 0 0 0 0 II\n"
    ecg = read_ecg(write_raw(tmp_path, header, rec_dat=int16(10, 20, 30, 40, 50, 60, 70, 80)))
    assert ecg.sampling_rate == 500
    np.testing.assert_allclose(ecg.signal, [[0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8]], atol=1e-6)


@pytest.mark.parametrize(("fmt", "content"), [("16", int16(*range(40))), ("80", bytes(range(100, 140)))])
def test_the_number_of_samples_may_be_left_to_the_file(tmp_path: Path, fmt: str, content: bytes) -> None:
    header = f"rec 2 250\nrec.dat {fmt} 10/mV 16 0 0 0 0 I\nrec.dat {fmt} 10/mV 16 0 0 0 0 II\n"
    assert read_ecg(write_raw(tmp_path, header, rec_dat=content)).signal.shape == (2, 20)


def test_a_record_in_segments_is_read_with_its_gap(tmp_path: Path) -> None:
    signal = synthetic_ecg(sampling_rate=250, duration_s=4).ecg.signal
    write_wfdb(Ecg(signal[:, :400], 250, LEADS), tmp_path, "seg1")
    write_wfdb(Ecg(signal[:, 400:], 250, LEADS), tmp_path, "seg2")
    (tmp_path / "whole.hea").write_text("whole/3 12 250 1100\nseg1 400\n~ 100\nseg2 600\n")
    ecg = read_ecg(tmp_path / "whole.hea")
    np.testing.assert_allclose(ecg.signal[:, :400], signal[:, :400], atol=0.00051)
    assert np.isnan(ecg.signal[:, 400:500]).all()
    np.testing.assert_allclose(ecg.signal[:, 500:], signal[:, 400:], atol=0.00051)


@pytest.mark.parametrize("name", ["record.hea", "record.dat", "record"])
def test_a_record_may_be_named_by_any_of_its_files(write_record: WriteRecord, name: str) -> None:
    path, _ = write_record()
    np.testing.assert_array_equal(read_ecg(path.with_name(name)).signal, read_ecg(path).signal)


def test_what_else_the_file_says_is_given_only_when_asked_for(tmp_path: Path) -> None:
    path = write_wfdb(synthetic_ecg(sampling_rate=250).ecg, tmp_path, "rec", comments=["Age: 54", "Sex: Female"])
    assert read_ecg(path).metadata == {}
    assert read_ecg(path, with_metadata=True).metadata["comments"] == ["Age: 54", "Sex: Female"]


def test_a_download_cache_of_links_is_read(write_record: WriteRecord, tmp_path: Path) -> None:
    path, _ = write_record()
    for folder in ("blobs", "snapshot"):
        (tmp_path / folder).mkdir()
    for suffix, blob in ((".hea", "0a1b"), (".dat", "9f8e")):
        (tmp_path / "blobs" / blob).write_bytes(path.with_suffix(suffix).read_bytes())
        (tmp_path / "snapshot" / f"record{suffix}").symlink_to(f"../blobs/{blob}")
    np.testing.assert_array_equal(read_ecg(tmp_path / "snapshot" / "record.hea").signal, read_ecg(path).signal)


# What is refused

HEADER = "rec 1 250 500\nrec.dat 16 1000/mV 16 0 0 0 0 I\n"
BAD_HEADERS = {
    "an empty header": ("", "no line"),
    "a text that is no header": ("Dear doctor,\nplease find enclosed\n", "name signals rate samples"),
    "a binary header": ("\x00\x01\x02 \x7f", "name signals rate samples"),
    "fewer signal lines than promised": (HEADER.replace("rec 1", "rec 2"), "promises 2 signals and lists 1"),
    "a broken signal line": (HEADER.replace("16 1000/mV", "sixteen"), "does not follow the WFDB format"),
    "a number of thousands of digits": (HEADER.replace(" 500\n", f" {'9' * 5000}\n"), "name signals rate samples"),
    "a signal file that is missing": (HEADER.replace("rec.dat", "other.dat"), "'other.dat', which is missing"),
    "an absolute signal file": (HEADER.replace("rec.dat", "/etc/passwd"), "outside its own folder"),
    "a signal file above": (HEADER.replace("rec.dat", "../rec.dat"), "outside its own folder"),
    "a signal file below": (HEADER.replace("rec.dat", "sub/rec.dat"), "outside its own folder"),
    "a signal file of another drive": (HEADER.replace("rec.dat", "C:rec.dat"), "outside its own folder"),
    "a signal file in a cloud": (HEADER.replace("rec.dat", "s3://bucket/rec.dat"), "outside its own folder"),
    "a signal file that is a folder": (HEADER.replace("rec.dat", "sub"), "'sub', which is missing"),
    "more samples than the file holds": (HEADER.replace(" 500\n", " 501\n"), "promises 501 samples a lead"),
    "absurdly many samples": (HEADER.replace(" 500\n", " 999999999999\n"), "promises 999999999999 samples"),
    "an offset beyond the file": (HEADER.replace("dat 16", "dat 16+5000"), "holds 0"),
    "no samples per frame": (HEADER.replace("dat 16", "dat 16x0"), "no samples per frame"),
    "an unknown signal format": (HEADER.replace("dat 16", "dat 17"), "signal format 17"),
    "a compressed file of absurd length": (HEADER.replace("500\nrec.dat 16", "99999999\nrec.dat 516"), "promises"),
    "a compressed file that is none": (HEADER.replace("dat 16", "dat 516"), "wfdb library cannot read it"),
    "no sampling rate": (HEADER.replace(" 250 500\n", "\n"), "does not give its sampling rate; pass"),
    "a sampling rate of zero": (HEADER.replace(" 250 ", " 0 "), "sampling rate is 0 Hz"),
    "a sampling rate of ten": (HEADER.replace(" 250 ", " 10 "), "sampling rate is 10 Hz, expected 50 to 10000 Hz"),
    "a sampling rate of a million": (HEADER.replace(" 250 ", " 1e6 "), "sampling rate is 1e"),
    "a sampling rate that is no number": (HEADER.replace(" 250 ", " 2.5.0 "), "is not a number"),
    "no gain": (HEADER.replace(" 1000/mV 16 0 0 0 0 I", ""), "has no gain"),
    "a gain of zero": (HEADER.replace("1000/mV", "0/mV"), "has no gain"),
    "an unknown unit": (HEADER.replace("/mV", "/furlong"), "furlong"),
    "no lead name": (HEADER.replace(" I\n", "\n"), "does not name its 1 leads; pass lead_names"),
    "microvolts called millivolts": (HEADER.replace("1000/mV", "1/mV"), "is the gain or unit right"),
    "volts called millivolts": (HEADER.replace("1000/mV", "1000000/mV"), "is the gain or unit right"),
}  # fmt: skip


@pytest.mark.parametrize(("header", "message"), BAD_HEADERS.values(), ids=BAD_HEADERS)
def test_a_bad_header_is_refused_in_one_line(tmp_path: Path, header: str, message: str) -> None:
    (tmp_path / "record" / "sub").mkdir(parents=True)
    values = qrs_values().tobytes()
    for place in ("", "record/sub/"):  # so that only the refusal keeps the reader from them
        (tmp_path / f"{place}rec.dat").write_bytes(values)
    path = write_raw(tmp_path / "record", header, rec_dat=values)
    with pytest.raises(EcgFileError, match=re.escape(message)) as caught:
        read_ecg(path)
    assert "\n" not in str(caught.value)


def test_the_good_twin_of_the_bad_headers_is_read(tmp_path: Path) -> None:
    path = write_raw(tmp_path, HEADER, rec_dat=qrs_values().tobytes())
    np.testing.assert_allclose(read_ecg(path).signal, qrs_values().T / 1000, atol=1e-6)


@pytest.mark.parametrize("fmt", ["16", "212", "24", "32"])
def test_a_truncated_signal_file_says_expected_and_found(write_record: WriteRecord, fmt: str) -> None:
    path, _ = write_record(fmt=fmt)
    signal_file = path.with_suffix(".dat")
    content = signal_file.read_bytes()
    signal_file.write_bytes(content[: len(content) // 2])
    with pytest.raises(EcgFileError, match=r"promises 2500 samples a lead, 'record.dat' holds 1250"):
        read_ecg(path)


def test_a_link_to_outside_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "secret.dat").write_bytes(qrs_values().tobytes())
    path = write_raw(tmp_path / "record", HEADER)
    (tmp_path / "record" / "rec.dat").symlink_to(tmp_path / "secret.dat")
    with pytest.raises(EcgFileError, match="a link to outside its own folder"):
        read_ecg(path)


def test_a_record_without_samples_is_refused(tmp_path: Path) -> None:
    path = write_raw(tmp_path, "rec 1 250 0\nrec.dat 16 1000/mV 16 0 0 0 0 I\n", rec_dat=b"")
    with pytest.raises(EcgFileError, match="holds no samples"):
        read_ecg(path)


def test_a_signal_file_without_its_header_is_refused(write_record: WriteRecord) -> None:
    path, _ = write_record()
    path.unlink()
    with pytest.raises(EcgFileError, match=r"header 'record.hea' is missing"):
        read_ecg(path.with_suffix(".dat"))


@pytest.mark.parametrize("segment", ["../seg 400", "/etc/seg 400", "nowhere 400", "whole 400", "seg", "seg 401"])
def test_a_bad_segment_is_refused(tmp_path: Path, segment: str) -> None:
    for folder in (tmp_path, tmp_path / "record"):
        write_wfdb(synthetic_ecg(sampling_rate=100, duration_s=4).ecg, folder, "seg")
    (tmp_path / "record" / "whole.hea").write_text(f"whole/1 12 100 400\n{segment}\n")
    with pytest.raises(EcgFileError):
        read_ecg(tmp_path / "record" / "whole.hea")


def test_a_file_that_is_not_there_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_ecg(tmp_path / "nowhere.hea")


def test_an_unknown_suffix_is_answered_with_the_known_ones(tmp_path: Path) -> None:
    (tmp_path / "scan.jpg").write_bytes(b"\xff\xd8")
    with pytest.raises(EcgFileError, match=r"\.hea.*\.csv.*found suffix '\.jpg'"):
        read_ecg(tmp_path / "scan.jpg")


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    field=st.integers(0, len(HEADER.split(" ")) - 1),
    text=st.one_of(
        st.sampled_from(["", "0", "-1", "~", "..", "/", "1e400", "nan", "212", "16x4", "16:3", "1/3", "0(0)", "\x00"]),
        st.text(max_size=8),
    ),
)
def test_whatever_stands_in_a_header_it_is_read_or_refused(tmp_path: Path, field: int, text: str) -> None:
    fields = HEADER.split(" ")
    fields[field] = text
    path = write_raw(tmp_path, " ".join(fields), rec_dat=qrs_values().tobytes())
    refusal = ""
    try:
        assert read_ecg(path).signal.shape[0] == 1
    except EcgFileError as error:
        refusal = str(error)
    assert "\n" not in refusal


# What the caller says


def test_facts_that_the_file_lacks_may_be_passed(tmp_path: Path) -> None:
    header = "rec 1\nrec.dat 16 1000/mV 16 0 0 0 0 ECG\n"
    path = write_raw(tmp_path, header, rec_dat=qrs_values().tobytes())
    ecg = read_ecg(path, sampling_rate=300, lead_names=["I"])
    assert (ecg.sampling_rate, ecg.lead_names) == (300, ("I",))


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"sampling_rate": 500}, "sampling rate is 250 Hz in the file and 500 Hz as passed"),
        ({"lead_names": ["II", *LEADS[1:]]}, "names a lead 'I', passed was 'II'"),
        ({"lead_names": ["I", "II"]}, "2 lead names were passed for 12 leads"),
        ({"unit": "uV"}, "unit is 'mV' in the file and 'uV' as passed"),
    ],
)
def test_a_contradiction_between_caller_and_file_is_an_error(
    write_record: WriteRecord, facts: dict[str, object], message: str
) -> None:
    path, _ = write_record()
    with pytest.raises(EcgFileError, match=message):
        read_ecg(path, **facts)  # type: ignore[arg-type]


# Arrays and tables


def test_an_array_is_read_in_either_orientation(tmp_path: Path) -> None:
    signal = synthetic_ecg(sampling_rate=250).ecg.signal
    for name, array in (("rows", signal * 1000), ("columns", np.round(signal.T * 1000).astype(np.int16))):
        np.save(tmp_path / name, array)
        ecg = read_ecg(tmp_path / f"{name}.npy", sampling_rate=250, lead_names=LEADS, unit="uV")
        np.testing.assert_allclose(ecg.signal, signal, atol=0.00051)


@pytest.mark.parametrize("missing", ["sampling_rate", "lead_names", "unit"])
def test_an_array_needs_every_fact(tmp_path: Path, missing: str) -> None:
    np.save(tmp_path / "ecg", synthetic_ecg(sampling_rate=250).ecg.signal)
    facts = {"sampling_rate": 250, "lead_names": LEADS, "unit": "mV"}
    del facts[missing]
    with pytest.raises(EcgFileError, match=f"pass {missing}"):
        read_ecg(tmp_path / "ecg.npy", **facts)  # type: ignore[arg-type]


def test_an_archive_brings_its_own_facts(tmp_path: Path) -> None:
    truth = synthetic_ecg(sampling_rate=400).ecg
    np.savez(tmp_path / "ecg", signal=truth.signal, sampling_rate=400, lead_names=np.array(LEADS), unit="mV")
    ecg = read_ecg(tmp_path / "ecg.npz")
    np.testing.assert_array_equal(ecg.signal, truth.signal)
    assert (ecg.sampling_rate, ecg.lead_names) == (400, LEADS)


class Bomb:
    """A pickle that writes a file when it is opened."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return Path.write_text, (self.path, "boom")


@pytest.mark.parametrize("suffix", ["npy", "npz"])
def test_a_pickle_in_an_array_is_never_opened(tmp_path: Path, suffix: str) -> None:
    array = np.array([[Bomb(tmp_path / "boom")]], dtype=object)
    path = tmp_path / f"ecg.{suffix}"
    if suffix == "npy":
        np.save(path, array)
    else:
        np.savez(path, signal=array)
    with pytest.raises(EcgFileError, match="expected an array of numbers"):
        read_ecg(path, sampling_rate=250, lead_names=["I"], unit="mV")
    assert not (tmp_path / "boom").exists()


@pytest.mark.parametrize("shape", [(12, 10**9), (-12, -100), (12, 101), (10**30, 10**30)])
def test_an_array_whose_header_lies_is_refused_before_memory_is_taken(tmp_path: Path, shape: tuple[int, int]) -> None:
    content = io.BytesIO()
    np.lib.format.write_array_header_1_0(content, {"descr": "<f4", "fortran_order": False, "shape": shape})
    content.write(np.zeros((12, 100), np.float32).tobytes())
    (tmp_path / "ecg.npy").write_bytes(content.getvalue())
    with zipfile.ZipFile(tmp_path / "ecg.npz", "w") as archive:
        archive.writestr("signal.npy", content.getvalue())
    for suffix in ("npy", "npz"):
        with pytest.raises(EcgFileError, match=r"promises|expected an array"):
            read_ecg(tmp_path / f"ecg.{suffix}", sampling_rate=250, lead_names=LEADS, unit="mV")


@pytest.mark.parametrize("suffix", ["npy", "npz"])
def test_a_truncated_array_is_refused(tmp_path: Path, suffix: str) -> None:
    signal = synthetic_ecg(sampling_rate=250).ecg.signal
    path = tmp_path / f"ecg.{suffix}"
    if suffix == "npy":
        np.save(path, signal)
    else:
        np.savez(path, signal=signal)
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(EcgFileError):
        read_ecg(path, sampling_rate=250, lead_names=LEADS, unit="mV")


def write_table(path: Path, header: str, rows: np.ndarray, delimiter: str = ",") -> Path:
    lines = [delimiter.join("" if np.isnan(value) else f"{value:.4f}" for value in row) for row in rows]
    path.write_text("\n".join([header, *lines]) + "\n", encoding="utf-8")
    return path


def test_a_table_gives_rate_and_unit_in_its_header(tmp_path: Path) -> None:
    signal = synthetic_ecg(sampling_rate=250, duration_s=2).ecg.signal
    rows = np.column_stack([np.arange(500) * 4.0, signal[0] * 1000, signal[6] * 1000])
    ecg = read_ecg(write_table(tmp_path / "ecg.csv", "time [ms],I [uV],V1 (uV)", rows))
    assert ecg.sampling_rate == pytest.approx(250)
    assert ecg.lead_names == ("I", "V1")
    np.testing.assert_allclose(ecg.signal, signal[[0, 6]], atol=1e-6)


def test_a_table_of_semicolons_may_have_decimal_commas(tmp_path: Path) -> None:
    signal = synthetic_ecg(sampling_rate=250, duration_s=2).ecg.signal
    path = write_table(tmp_path / "ecg.csv", "Zeit;I;II", np.column_stack([np.arange(500), *signal[:2]]), ";")
    path.write_text(path.read_text(encoding="utf-8").replace(".", ","), encoding="utf-8")
    ecg = read_ecg(path, sampling_rate=250, unit="mV")
    assert ecg.lead_names == ("I", "II")
    np.testing.assert_allclose(ecg.signal, signal[:2], atol=0.0001)


def test_empty_cells_of_a_table_are_missing_samples(tmp_path: Path) -> None:
    rows = synthetic_ecg(sampling_rate=250, duration_s=2).ecg.signal[:2].T.copy()
    rows[10:20, 1] = np.nan
    ecg = read_ecg(write_table(tmp_path / "ecg.tsv", "I [mV]\tII [mV]", rows, "\t"), sampling_rate=250)
    np.testing.assert_array_equal(np.isnan(ecg.signal), np.isnan(rows.T))


def test_running_column_numbers_are_not_taken_for_leads(tmp_path: Path) -> None:
    rows = synthetic_ecg(sampling_rate=250, duration_s=2).ecg.signal.T
    path = write_table(tmp_path / "ecg.csv", ",".join(map(str, range(12))), rows)
    with pytest.raises(EcgFileError, match="names no leads; pass lead_names"):
        read_ecg(path, sampling_rate=250, unit="mV")
    ecg = read_ecg(path, sampling_rate=250, unit="mV", lead_names=LEADS)
    assert ecg.signal.shape == (12, 500)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "holds no samples"),
        ("I [mV]\n", "holds no samples"),
        ("heart,liver\n1,2\n", "name none of the leads"),
        ("I [mV],II [mV]\n0.1,0.2\n0.1\n", "sample 2 has 1 cells, the first line 2"),
        ("I [mV]\n0.1\nwell\n", "sample 2 has a cell that is not a number: 'well'"),
        ("I [mV],II [uV]\n0.1,0.2\n", "several units"),
        ("time [s],I [uV],II\n0.0,0.1,0.2\n", "several units (none, uV)"),
        ("I [bpm]\n0.1\n", "'bpm' is not a voltage"),
        ("I\n0.1\n", "pass sampling_rate (--sampling_rate), in Hz and unit (--unit): V, mV, uV or nV"),
        ("time [s],I [mV]\n0,0.1\n0.004,0.2\n5,0.1\n", "do not rise evenly"),
        ("time [h],I [mV]\n0,0.1\n1,0.2\n", "pass sampling_rate"),
    ],
)
def test_a_bad_table_is_refused(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "ecg.csv").write_text(content, encoding="utf-8")
    with pytest.raises(EcgFileError, match=re.escape(message)):
        read_ecg(tmp_path / "ecg.csv")


# What is found


def test_a_folder_gives_each_record_once_and_nothing_else(write_record: WriteRecord) -> None:
    paths = [write_record(name)[0] for name in ("b", "a", "c")]
    folder = paths[0].parent
    (folder / "README.txt").write_text("I, the author\n", encoding="utf-8")
    (folder / "metadata.csv").write_text("ecg_id,age\n1,54\n", encoding="utf-8")
    (folder / "a.atr").write_bytes(b"\0\0")
    np.save(folder / "labels", np.arange(3))
    np.save(folder / "deep", np.zeros((12, 100)))
    (folder / "sub").mkdir()
    (folder / "sub" / "table.csv").write_text("I [mV],II [mV]\n0,0\n", encoding="utf-8")
    found = find_ecgs([folder])
    assert [path.relative_to(folder).as_posix() for path in found] == [
        "a.hea", "b.hea", "c.hea", "deep.npy", "sub/table.csv",
    ]  # fmt: skip
    others = find_others([folder, folder / "sub", paths[0]], found)
    assert [path.name for path in others] == ["README.txt", "labels.npy", "metadata.csv"]


def test_a_path_that_is_named_is_returned_whatever_it_is(write_record: WriteRecord) -> None:
    path, _ = write_record()
    folder = path.parent
    named = [folder / "nowhere.hea", path.with_suffix(".dat"), path, folder / "record", folder, folder / "scan.jpg"]
    assert find_ecgs(named) == [folder / "nowhere.hea", path, folder / "scan.jpg"]


def test_a_record_counts_once_however_its_path_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.save(tmp_path / "a.npy", np.zeros((2, 10)))
    monkeypatch.chdir(tmp_path)
    assert find_ecgs([Path("a.npy"), tmp_path, tmp_path / "a.npy"]) == [Path("a.npy")]


def test_the_segments_of_a_record_do_not_count_as_records(write_record: WriteRecord) -> None:
    path, _ = write_record("seg1")
    (path.parent / "whole.hea").write_text("whole/1 12 250 2500\nseg1 2500\n", encoding="utf-8")
    assert find_ecgs([path.parent]) == [path.parent / "whole.hea"]
    assert find_others([path.parent], [path.parent / "whole.hea"]) == []


# Real recordings


@pytest.mark.parametrize(
    "folder", ["training2017", "challenge-2021", "ludb", "mit-bih-arrhythmia-database-1.0.0", "ptb-xl-500hz"]
)
def test_real_records_agree_with_the_wfdb_library(test_data: Path, folder: str) -> None:
    paths = find_ecgs([test_data / folder])
    assert paths
    for path in paths[:: max(1, len(paths) // 8)]:
        ecg = read_ecg(path)
        oracle = wfdb.rdrecord(str(path.with_suffix("")))
        np.testing.assert_allclose(ecg.signal, oracle.p_signal.T, atol=1e-5)
        assert (ecg.sampling_rate, list(ecg.lead_names)) == (oracle.fs, oracle.sig_name)
