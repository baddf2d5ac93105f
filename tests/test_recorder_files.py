"""Files of recorders: what independent writers wrote is read back in millivolts, format by format."""

import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pyedflib
import pytest
import scipy.io
from pydicom.data import get_testdata_file

from benchmarks.ecg_writers import (
    STEP_UV,
    WRITERS,
    counts,
    dicom_group,
    ishne_header,
    mfer_tag,
    write_bdf,
    write_dicom,
    write_edf,
    write_ishne,
    write_kardia,
    write_mat,
    write_mfer,
    write_muse,
    write_philips,
    write_scp,
)
from data_builders.synthetic import synthetic_ecg, write_wfdb
from modeling_ecgmoe.ecg_files import Ecg, EcgFileError, find_ecgs, read_ecg
from modeling_ecgmoe.leads import LEADS, arrange_leads, find_lead

HALF_STEP_MV = STEP_UV / 2000 * 1.001


@pytest.fixture(scope="module")
def truth() -> Ecg:
    return synthetic_ecg(sampling_rate=250, duration_s=4, noise_mv=0.005, wander_mv=0.05).ecg


def rows_of(truth: Ecg, names: Sequence[str]) -> np.ndarray:
    """The true signal in the order of the names as read."""
    return truth.signal[[LEADS.index(find_lead(name) or "") for name in names]]


# What is read


@pytest.mark.parametrize("kind", WRITERS)
def test_a_file_is_read_as_it_was_written(kind: str, tmp_path: Path, truth: Ecg) -> None:
    suffix, write, tolerance_mv = WRITERS[kind]
    ecg = read_ecg(write(tmp_path / f"record{suffix}", truth))
    assert (ecg.signal.dtype, ecg.signal.shape[1], ecg.sampling_rate) == (np.float32, 1000, 250)
    assert len(ecg.lead_names) == {"GE MUSE": 8, "Kardia": 6}.get(kind, 12)
    np.testing.assert_allclose(ecg.signal, rows_of(truth, ecg.lead_names), atol=tolerance_mv)
    assert ecg.metadata == {}


@pytest.mark.parametrize("kind", sorted(WRITERS.keys() - {"GE MUSE", "Kardia"}))  # whose order is fixed
def test_the_order_of_the_leads_is_the_file_s(kind: str, tmp_path: Path, truth: Ecg) -> None:
    suffix, write, tolerance_mv = WRITERS[kind]
    order = [6, 1, 11, 0]
    chosen = Ecg(truth.signal[order], 250, tuple(LEADS[i] for i in order))
    ecg = read_ecg(write(tmp_path / f"record{suffix}", chosen))
    assert [find_lead(name) for name in ecg.lead_names] == ["V1", "II", "V6", "I"]
    np.testing.assert_allclose(ecg.signal, truth.signal[order], atol=tolerance_mv)


@pytest.mark.parametrize("kind", WRITERS)
def test_metadata_is_given_only_when_asked_for(kind: str, tmp_path: Path, truth: Ecg) -> None:
    suffix, write, _ = WRITERS[kind]
    found = read_ecg(write(tmp_path / f"record{suffix}", truth), with_metadata=True).metadata
    assert found["patient_id"] == "P-17"
    assert set(found) == {"patient_id", "age", "sex", "start", "device", "comments"}
    if kind in ("DICOM", "SCP-ECG", "ISHNE", "GE MUSE", "Philips", "Mortara"):
        assert (found["age"], found["sex"]) == (54, "F")
    if kind not in ("EDF+", "BDF+", "MFER"):
        assert re.sub(r"\D", "", found["start"]).startswith("20240229101112")


@pytest.mark.parametrize("kind", sorted(WRITERS.keys() - {"MFER", "Kardia"}))  # which begin with nothing certain
def test_the_content_decides_and_not_the_suffix(kind: str, tmp_path: Path, truth: Ecg) -> None:
    suffix, write, _ = WRITERS[kind]
    expected = read_ecg(write(tmp_path / f"record{suffix}", truth)).signal
    for name in ("image0001", "record.ecg", "record.dat"):
        (tmp_path / name).write_bytes((tmp_path / f"record{suffix}").read_bytes())
        np.testing.assert_array_equal(read_ecg(tmp_path / name).signal, expected)


def test_eight_leads_of_muse_become_twelve_by_einthoven(tmp_path: Path, truth: Ecg) -> None:
    ecg = read_ecg(write_muse(tmp_path / "muse.xml", truth))
    signal, used = arrange_leads(ecg.signal, ecg.lead_names)
    assert used == ["I", "II", "V1", "V2", "V3", "V4", "V5", "V6"]
    np.testing.assert_allclose(signal, truth.signal, atol=2 * HALF_STEP_MV)


@pytest.mark.parametrize(
    "how", [{"huffman": h, "order": o, "beats": b} for h in (True, False) for o in (0, 1, 2) for b in (True, False)]
)
def test_every_compression_of_scp_is_undone(how: dict[str, Any], tmp_path: Path, truth: Ecg) -> None:
    ecg = read_ecg(write_scp(tmp_path / "ecg.scp", truth, **how))
    np.testing.assert_allclose(ecg.signal, truth.signal, atol=HALF_STEP_MV)


def test_leads_of_scp_that_start_later_are_missing_before(tmp_path: Path, truth: Ecg) -> None:
    pair = Ecg(truth.signal[:2], 250, LEADS[:2])
    ecg = read_ecg(write_scp(tmp_path / "ecg.scp", pair, starts=[1, 501]))
    assert ecg.signal.shape == (2, 1500)
    np.testing.assert_allclose(ecg.signal[0, :1000], truth.signal[0], atol=HALF_STEP_MV)
    np.testing.assert_allclose(ecg.signal[1, 500:], truth.signal[1], atol=HALF_STEP_MV)
    assert np.isnan(ecg.signal[0, 1000:]).all()
    assert np.isnan(ecg.signal[1, :500]).all()


def test_xli_compression_of_philips_is_undone(tmp_path: Path, truth: Ecg) -> None:
    ecg = read_ecg(write_philips(tmp_path / "ecg.xml", truth, compressed=True))
    np.testing.assert_allclose(ecg.signal, truth.signal, atol=HALF_STEP_MV)


def test_philips_in_utf_16_is_read(tmp_path: Path, truth: Ecg) -> None:
    ecg = read_ecg(write_philips(tmp_path / "ecg.xml", truth, encoding="utf-16"))
    np.testing.assert_allclose(ecg.signal, truth.signal, atol=HALF_STEP_MV)


@pytest.mark.parametrize("write", [write_edf, write_bdf])
def test_edf_and_bdf_agree_with_pyedflib(write: Callable[..., Path], tmp_path: Path, truth: Ecg) -> None:
    path = write(tmp_path / "ecg.edf", truth)
    with pyedflib.EdfReader(str(path)) as file:
        oracle = np.stack([file.readSignal(i) for i in range(12)]) / 1000.0
    np.testing.assert_allclose(read_ecg(path).signal, oracle, atol=1e-6)


def test_signals_of_edf_that_are_no_ecg_are_left_out(tmp_path: Path, truth: Ecg) -> None:
    plain = {"physical_min": -2.0, "physical_max": 2.0, "digital_min": -2000, "digital_max": 2000}
    extra = [
        plain | {"label": "Resp chest", "dimension": "L", "sample_frequency": 25},
        plain | {"label": "EEG C3-A2", "dimension": "uV", "sample_frequency": 125},
        plain | {"label": "F3", "dimension": "uV", "sample_frequency": 250},
        plain | {"label": "C3", "dimension": "uV", "sample_frequency": 250},  # an electrode on the head, not V3
    ]
    ecg = read_ecg(write_edf(tmp_path / "sleep.edf", Ecg(truth.signal[:2], 250, LEADS[:2]), extra=extra))
    assert ecg.lead_names == ("I", "II")
    np.testing.assert_allclose(ecg.signal, truth.signal[:2], atol=0.000245)


def test_gaps_of_a_discontinuous_edf_are_missing_samples(tmp_path: Path, truth: Ecg) -> None:
    path = write_edf(tmp_path / "ecg.edf", truth)
    content = bytearray(path.read_bytes())
    content[192:197] = b"EDF+D"
    late = bytes(content).index(b"+2\x14\x14")  # the third data record, of one second each
    content[late : late + 4] = b"+7\x14\x14"
    later = bytes(content).index(b"+3\x14\x14")
    content[later : later + 4] = b"+8\x14\x14"
    path.write_bytes(content)
    ecg = read_ecg(path)
    assert ecg.signal.shape == (12, 9 * 250)
    np.testing.assert_allclose(ecg.signal[:, :500], truth.signal[:, :500], atol=0.000245)
    assert np.isnan(ecg.signal[:, 500:1750]).all()
    np.testing.assert_allclose(ecg.signal[:, 1750:], truth.signal[:, 500:], atol=0.000245)


def test_the_marks_of_missing_samples_become_nan(tmp_path: Path, truth: Ecg) -> None:
    signal = truth.signal.copy()
    signal[3, 100:200] = np.nan
    for path in (
        write_dicom(tmp_path / "ecg.dcm", Ecg(signal, 250, LEADS)),
        write_ishne(tmp_path / "ecg.ecg", Ecg(signal, 250, LEADS)),
    ):
        np.testing.assert_array_equal(np.isnan(read_ecg(path).signal), np.isnan(signal))


def test_a_dicom_object_of_a_real_cart_agrees_with_pydicom() -> None:
    path = get_testdata_file("waveform_ecg.dcm")
    ecg, oracle = read_ecg(path), pydicom.dcmread(path).waveform_array(0)
    assert (ecg.sampling_rate, ecg.lead_names) == (1000, LEADS)
    np.testing.assert_allclose(ecg.signal, oracle.T / 1000.0, atol=1e-6)
    np.testing.assert_allclose(ecg.signal[2], ecg.signal[1] - ecg.signal[0], atol=1e-6)


def test_columns_of_a_dicom_page_are_put_side_by_side(tmp_path: Path, truth: Ecg) -> None:
    places = [(slice(3 * number, 3 * number + 3), slice(250 * number, 250 * number + 250)) for number in range(3)]
    columns = [Ecg(truth.signal[rows, inside], 250, LEADS[rows]) for rows, inside in places]
    groups = [dicom_group(column, "COLUMN", 1000.0 * number) for number, column in enumerate(columns)]
    beat = dicom_group(Ecg(truth.signal[:, :150], 250, LEADS), "MEDIAN BEAT")
    ecg = read_ecg(write_dicom(tmp_path / "page.dcm", truth, [*groups, beat]))
    assert ecg.lead_names == LEADS[:9]
    for rows, inside in places:
        np.testing.assert_allclose(ecg.signal[rows, inside], truth.signal[rows, inside], atol=HALF_STEP_MV)
        assert np.isfinite(ecg.signal[rows]).sum() == 3 * 250


def test_a_matlab_file_is_read_by_the_names_of_its_variables(tmp_path: Path, truth: Ecg) -> None:
    for number, compressed in enumerate((True, False)):
        path = write_mat(tmp_path / f"{number}.mat", truth, compressed)
        ecg = read_ecg(path, lead_names=LEADS, unit="mV")
        assert ecg.sampling_rate == 250
        np.testing.assert_array_equal(ecg.signal, truth.signal)


def test_the_counts_of_cinc_need_their_unit(tmp_path: Path, truth: Ecg) -> None:
    scipy.io.savemat(tmp_path / "A0001.mat", {"val": counts(truth, step_uv=1.0)}, format="4")
    with pytest.raises(EcgFileError, match="pass unit"):
        read_ecg(tmp_path / "A0001.mat", sampling_rate=250, lead_names=LEADS)
    ecg = read_ecg(tmp_path / "A0001.mat", sampling_rate=250, lead_names=LEADS, unit="uV")
    np.testing.assert_allclose(ecg.signal, truth.signal, atol=0.00051)


@pytest.mark.parametrize("suffix", [".ecg", ".mwf"])
def test_leads_that_the_file_does_not_name_are_not_guessed(suffix: str, tmp_path: Path, truth: Ecg) -> None:
    pair = Ecg(truth.signal[:2], 250, LEADS[:2])
    if suffix == ".ecg":
        path = tmp_path / "holter.ecg"
        nameless = Ecg(pair.signal, 250, ("?", "?"))
        path.write_bytes(ishne_header(nameless) + counts(pair).T.tobytes())
    else:
        path = write_mfer(tmp_path / "monitor.mwf", pair)
        content = path.read_bytes()
        for number, code in enumerate((4166, 4167)):  # "ECG1" and "ECG2" of a monitor
            lead = mfer_tag(0x09, bytes([number + 1, 0]))
            content = content.replace(lead, mfer_tag(0x09, code.to_bytes(2, "little")))
        path.write_bytes(content)
    with pytest.raises(EcgFileError, match="does not name its 2 leads; pass lead_names"):
        read_ecg(path)
    assert read_ecg(path, lead_names=["V5", "II"]).lead_names == ("V5", "II")


def test_a_rate_that_is_no_whole_number_is_kept(tmp_path: Path, truth: Ecg) -> None:
    kardia = Ecg(truth.signal[:6], 299.5, LEADS[:6])
    assert read_ecg(write_kardia(tmp_path / "ecg.json", kardia)).sampling_rate == 299.5


# What is found


def test_folders_are_searched_for_every_format_and_nothing_else(tmp_path: Path, truth: Ecg) -> None:
    paths = [
        write(tmp_path / f"{kind.replace(' ', '')}{suffix}", truth) for kind, (suffix, write, _) in WRITERS.items()
    ]
    paths.append(write_mat(tmp_path / "matlab.mat", truth))
    (tmp_path / "IM0001").write_bytes(paths[2].read_bytes())
    (tmp_path / "README").write_text("I, the author", encoding="utf-8")
    (tmp_path / "pom.xml").write_text('<?xml version="1.0"?>\n<project/>', encoding="utf-8")
    (tmp_path / "page.xml").write_text("<html><RestingECG/></html>", encoding="utf-8")
    (tmp_path / "settings.json").write_text("{}", encoding="utf-8")
    (tmp_path / "video.dat").write_bytes(b"\0" * 1000)
    scipy.io.savemat(tmp_path / "results.mat", {"accuracy": np.zeros((3, 3))})
    scan = pydicom.dcmread(paths[2])
    scan.file_meta.MediaStorageSOPClassUID = scan.SOPClassUID = "1.2.840.10008.5.1.4.1.1.2"
    scan.save_as(tmp_path / "scan.dcm")
    assert find_ecgs([tmp_path]) == sorted([*paths, tmp_path / "IM0001"])


def test_what_can_only_be_a_damaged_recording_is_found_and_its_reader_says_so(tmp_path: Path, truth: Ecg) -> None:
    np.savez(tmp_path / "archive.npz", signal=truth.signal, sampling_rate=truth.sampling_rate, unit="mV")
    content = {
        "half.npz": (tmp_path / "archive.npz").read_bytes()[:5000],
        "head.npy": b"\x93NUMPY\x01",
        "empty.edf": b"",
        "empty.dcm": b"",
        "empty.mat": b"",
        "zeros.edf": b"\0" * 4096,
        "notes.ecg": b"Dear doctor",
    }
    for name, damaged in content.items():
        (tmp_path / name).write_bytes(damaged)
    (tmp_path / "RECORDS").write_bytes(b"")
    (tmp_path / "empty.txt").write_bytes(b"")
    assert {path.name for path in find_ecgs([tmp_path])} == {*content, "archive.npz"}
    for name in content:
        with pytest.raises(EcgFileError):
            read_ecg(tmp_path / name)


def test_records_with_names_in_capitals_are_found_and_read(tmp_path: Path, truth: Ecg) -> None:
    for fmt, name in (("16", "a"), ("212", "b")):
        path = write_wfdb(truth, tmp_path / "small", name, fmt=fmt)
        (tmp_path / "capitals").mkdir(exist_ok=True)
        for suffix in (".hea", ".dat"):
            content = path.with_suffix(suffix).read_bytes()
            (tmp_path / "capitals" / f"{name}{suffix}".upper()).write_bytes(content)
    found = find_ecgs([tmp_path / "capitals"])
    assert [path.name for path in found] == ["A.HEA", "B.HEA"]
    for path, small in zip(found, "ab", strict=True):
        np.testing.assert_array_equal(read_ecg(path).signal, read_ecg(tmp_path / "small" / f"{small}.hea").signal)
        np.testing.assert_array_equal(read_ecg(path.with_suffix(".DAT")).signal, read_ecg(path).signal)


def test_the_readers_are_not_imported_before_they_are_needed() -> None:
    code = (
        "import sys, modeling_ecgmoe.ecg_files\n"
        "heavy = {'ecgdatakit', 'pydicom', 'pyedflib', 'scipy', 'wfdb', 'pandas', 'torch', 'defusedxml'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_without_the_extra_the_way_out_is_named(tmp_path: Path, truth: Ecg, monkeypatch: pytest.MonkeyPatch) -> None:
    for suffix, package in ((".scp", "ecgdatakit.parsing.parsers.scp_ecg"), (".dcm", "pydicom"), (".bdf", "pyedflib")):
        _, write, _ = next(row for row in WRITERS.values() if row[0] == suffix)
        path = write(tmp_path / f"record{suffix}", truth)
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(EcgFileError, match=r'pip install "ecg-moe\[formats\]"'):
            read_ecg(path)
