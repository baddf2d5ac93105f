"""Damaged and hostile files of recorders: refused in one line, before memory is taken, and nothing else is opened."""

import io
import os
import re
import struct
import tracemalloc
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pydicom
import pytest
import scipy.io

from benchmarks.ecg_writers import (
    WRITERS,
    counts,
    dicom_group,
    mfer_tag,
    scp_record,
    scp_sections,
    write_aecg,
    write_dicom,
    write_edf,
    write_ishne,
    write_kardia,
    write_mat,
    write_mfer,
    write_mortara,
    write_muse,
    write_philips,
    xli_chunk,
)
from benchmarks.fuzz_read_ecg import judge, make_seeds, mutate, write_mutation
from data_builders.synthetic import synthetic_ecg
from modeling_ecgmoe import mat_files, xml_files
from modeling_ecgmoe.ecg_files import Ecg, EcgFileError, EcgFileWarning, find_ecgs, read_ecg
from modeling_ecgmoe.leads import LEADS

TRUTH = synthetic_ecg(sampling_rate=250, duration_s=4, noise_mv=0.005).ecg
MAX_BYTES = 2**25  # what a refusal may take; the files have 24,000 to 100,000 bytes
SEEDS = make_seeds()


@pytest.fixture
def little_memory() -> Iterator[None]:
    """The test fails where Python and numpy take more than `MAX_BYTES` at any time."""
    tracemalloc.start()
    yield
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < MAX_BYTES


def refuse(path: Path, message: str) -> None:
    with pytest.raises(EcgFileError, match=message) as caught:
        read_ecg(path)
    assert "\n" not in str(caught.value)


def replace(path: Path, old: str | bytes, new: str | bytes) -> Path:
    """The same file with one piece of it exchanged."""
    old, new = (text.encode() if isinstance(text, str) else text for text in (old, new))
    content = path.read_bytes()
    assert old in content
    path.write_bytes(content.replace(old, new, 1))
    return path


def overwrite(path: Path, position: int, new: bytes) -> Path:
    content = path.read_bytes()
    path.write_bytes(content[:position] + new + content[position + len(new) :])
    return path


@pytest.mark.parametrize("kind", sorted(WRITERS.keys() - {"ISHNE"}))  # whose header does not say how long it is
@pytest.mark.parametrize("part", [0.0, 0.02, 0.5, 0.98])
def test_a_truncated_file_is_refused(kind: str, part: float, tmp_path: Path) -> None:
    suffix, write, _ = WRITERS[kind]
    path = write(tmp_path / f"record{suffix}", TRUTH)
    content = path.read_bytes()
    path.write_bytes(content[: int(part * len(content))])
    refuse(path, ".")


# Twelve leads and the annotations.
EDF_FIELDS = {name: 256 + 13 * offset for name, offset in
              {"unit": 96, "lowest": 104, "highest": 112, "lowest_digital": 120, "samples": 216}.items()}  # fmt: skip
EDF_LIES = {
    "too many data records": (236, b"99999999", "promises 99999999 data records, found 4"),
    "no data records": (236, b"0       ", "holds no samples"),
    "more signals than bytes": (252, b"9999", "not an EDF or BDF header"),
    "no signals": (252, b"0   ", "not an EDF or BDF header"),
    "signals that are no number": (252, b"many", "not an EDF or BDF header"),
    "records without duration": (244, b"0       ", "cannot be parsed"),
    "records of a day": (244, b"86400   ", "data records overlap"),
    "too many samples": (EDF_FIELDS["samples"], b"99999999", "holds no samples"),
    "a range of nothing": (EDF_FIELDS["highest"], b"-8000   ", "does not give its unit"),
    "a range that is no number": (EDF_FIELDS["highest"], b"nan     ", "no usable gain"),
    "a range without end": (EDF_FIELDS["highest"], b"1e999   ", "no usable gain"),
    "no unit of voltage": (EDF_FIELDS["unit"], b"mmHg    " * 12, "no signal is an ECG in V, mV, uV or nV"),
    "volts": (EDF_FIELDS["unit"], b"V       " * 12, "is the gain or unit right"),
}


@pytest.mark.parametrize(("position", "field", "message"), EDF_LIES.values(), ids=EDF_LIES)
@pytest.mark.usefixtures("little_memory")
def test_an_edf_header_that_lies_is_refused(position: int, field: bytes, message: str, tmp_path: Path) -> None:
    refuse(overwrite(write_edf(tmp_path / "ecg.edf", TRUTH), position, field), re.escape(message))


def change_dicom(change: Callable[[pydicom.Dataset], None]) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        group = dicom_group(TRUTH)
        change(group)
        return write_dicom(folder / "ecg.dcm", TRUTH, [group])

    return write


def set_channels(**values: object) -> Callable[[pydicom.Dataset], None]:
    def change(group: pydicom.Dataset) -> None:
        for channel in group.ChannelDefinitionSequence:
            for name, value in values.items():
                setattr(channel, name, value)

    return change


DICOM_LIES = {
    "too many samples": (lambda g: setattr(g, "NumberOfWaveformSamples", 2**32 - 1), "promises 103079215080 bytes"),
    "no samples": (lambda g: setattr(g, "NumberOfWaveformSamples", 0), "promises 0 bytes"),
    "no rate": (lambda g: setattr(g, "SamplingFrequency", 0), "sampling rate is 0 Hz"),
    "no channels described": (lambda g: setattr(g, "ChannelDefinitionSequence", []), "no recording in V"),
    "no sensitivity": (set_channels(ChannelSensitivity=None), "has no sensitivity"),
    "volts": (set_channels(ChannelSensitivity=2500000), "is the gain or unit right"),
    "a group a year later": (lambda g: setattr(g, "SamplingFrequency", 20_000), "sampling rate is 20000 Hz"),
    "sound": (lambda g: setattr(g, "WaveformSampleInterpretation", "MB"), "not allowed in an ECG"),
}


@pytest.mark.parametrize(("change", "message"), DICOM_LIES.values(), ids=DICOM_LIES)
@pytest.mark.usefixtures("little_memory")
def test_a_dicom_object_that_lies_is_refused(
    change: Callable[[pydicom.Dataset], None], message: str, tmp_path: Path
) -> None:
    refuse(change_dicom(change)(tmp_path), re.escape(message))


@pytest.mark.usefixtures("little_memory")
def test_groups_of_a_dicom_object_years_apart_are_refused(tmp_path: Path) -> None:
    groups = [dicom_group(TRUTH), dicom_group(Ecg(TRUTH.signal, 250, LEADS), offset_ms=1e14)]
    refuse(write_dicom(tmp_path / "ecg.dcm", TRUTH, groups), "more than 268435456 values")


def test_a_dicom_object_that_would_have_to_be_inflated_is_refused(tmp_path: Path) -> None:
    data = pydicom.dcmread(write_dicom(tmp_path / "ecg.dcm", TRUTH))
    data.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2.1.99"
    data.save_as(tmp_path / "deflated.dcm")
    refuse(tmp_path / "deflated.dcm", "deflated")


def scp_with(section: int, position: int, new: bytes, **how: bool) -> bytes:
    sections = scp_sections(TRUTH, **how)  # type: ignore[arg-type]
    body = sections[section]
    return scp_record(sections | {section: body[:position] + new + body[position + len(new) :]})


SCP_LIES = {
    "too many samples": (scp_with(3, 6, struct.pack("<I", 2**32 - 1)), "promises 4294967295 samples of a lead"),
    "a lead that ends before it starts": (scp_with(3, 2, struct.pack("<I", 5000)), "invalid sample range"),
    "more leads than there are": (scp_with(3, 0, b"\xff"), "cannot be parsed"),
    "no interval": (scp_with(6, 2, b"\0\0"), "interval is 0"),
    "no amplitude": (scp_with(6, 0, b"\0\0"), "does not give its unit"),
    "reference beats of a minute": (scp_with(4, 0, b"\xff\xff", beats=True), "samples of a lead in"),
    "unknown differences": (scp_with(6, 4, b"\x07"), "unknown difference"),
    "decimated samples": (scp_with(6, 5, b"\x01"), "bimodal"),
    "no leads": (scp_record({1: b"\xff\0\0", 6: b"\0" * 40}), "Section 3"),
    "no section at all": (scp_record({}), "Section 3"),
}


@pytest.mark.parametrize(("content", "message"), SCP_LIES.values(), ids=SCP_LIES)
@pytest.mark.usefixtures("little_memory")
def test_an_scp_record_that_lies_is_refused(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "ecg.scp").write_bytes(content)
    refuse(tmp_path / "ecg.scp", message)


def test_an_scp_record_with_a_wrong_checksum_is_refused(tmp_path: Path) -> None:
    content = scp_record(scp_sections(TRUTH))
    (tmp_path / "ecg.scp").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    refuse(tmp_path / "ecg.scp", "checksum is wrong")


@pytest.mark.parametrize(
    ("position", "new", "message"),
    [
        (10, struct.pack("<i", 2**31 - 1), "past the end of the file"),
        (10, struct.pack("<i", -5), "negative"),
        (156, struct.pack("<h", 0), "lead count"),
        (156, struct.pack("<h", 13), "lead count"),
        (272, struct.pack("<h", 0), "sampling rate"),
        (206, struct.pack("<12h", *[0] * 12), "does not give its unit"),
        (206, struct.pack("<12h", *[1] * 12), "is the gain or unit right"),
    ],
)
@pytest.mark.usefixtures("little_memory")
def test_an_ishne_header_that_lies_is_refused(position: int, new: bytes, message: str, tmp_path: Path) -> None:
    refuse(overwrite(write_ishne(tmp_path / "holter.ecg", TRUTH), position, new), message)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (mfer_tag(0x05, struct.pack("<I", 12)), mfer_tag(0x05, struct.pack("<I", 2**31)), "more than 256 channels"),
        (mfer_tag(0x04, struct.pack("<I", 1000)), mfer_tag(0x04, struct.pack("<I", 2**31)), "cannot be parsed"),
        (mfer_tag(0x0B, struct.pack("<bbI", 0, 0, 250)), b"", "does not give its sampling rate"),
        (mfer_tag(0x0C, struct.pack("<bbI", 0, -7, 25)), b"", "does not give its unit"),
        (b"\x40\x13MFR", b"\0" * 70_000 + b"\x40\x13MFR", "more than 65536 definitions"),
    ],
)
@pytest.mark.usefixtures("little_memory")
def test_mfer_definitions_that_lie_are_refused(old: bytes, new: bytes, message: str, tmp_path: Path) -> None:
    refuse(replace(write_mfer(tmp_path / "ecg.mwf", TRUTH), old, new), message)


XML_WRITERS = {"aecg": write_aecg, "muse": write_muse, "philips": write_philips, "mortara": write_mortara}
LAUGHS = '<!DOCTYPE a [<!ENTITY l0 "ha">' + "".join(
    f'<!ENTITY l{i} "{"".join([f"&l{i - 1};"] * 10)}">' for i in range(1, 30)
)  # fmt: skip


@pytest.mark.parametrize("kind", XML_WRITERS)
@pytest.mark.parametrize("doctype", [f"{LAUGHS}]>", '<!DOCTYPE a [<!ENTITY l29 SYSTEM "secret.txt">]>'])
@pytest.mark.usefixtures("little_memory")
def test_entities_in_xml_are_refused(kind: str, doctype: str, tmp_path: Path) -> None:
    (tmp_path / "secret.txt").write_text("P-SECRET", encoding="utf-8")
    path = XML_WRITERS[kind](tmp_path / "ecg.xml", TRUTH)
    text = re.sub(r"<!DOCTYPE[^>]*>", "", path.read_text(encoding="utf-8")).replace("P-17", "&l29;")
    path.write_text(text.replace("?>", f"?>{doctype}", 1), encoding="utf-8")
    refuse(path, "entity")


XML_LIES = {
    "no increment": ("aecg", 'increment value="0.004"', 'increment value="0"', "No usable time increment"),
    "an increment of a year": ("aecg", 'value="0.004"', 'value="3e7"', "No usable time increment"),
    "an increment in metres": ("aecg", 'value="0.004" unit="s"', 'value="0.004" unit="m"', "increment unit"),
    "no scale": ("aecg", '<scale value="2.5" unit="uV"/>', "", "does not give its unit"),
    "a scale that is no number": ("aecg", 'scale value="2.5"', 'scale value="nan"', "has no scale"),
    "digits that are none": ("aecg", "<digits>", "<digits>one two ", "Invalid digits"),
    "a lead that is longer": ("aecg", "<digits>", "<digits>1 2 3 ", "different numbers of samples"),
    "counts that do not fit": ("muse", "<LeadSampleCountTotal>1000", "<LeadSampleCountTotal>999", "cannot be parsed"),
    "no unit": ("muse", "MICROVOLTS", "FURLONGS", "does not give its unit"),
    "no rate": ("muse", "<SampleBase>250", "<SampleBase>0", "SampleBase"),
    "an endless exponent": ("muse", "<SampleExponent>0", "<SampleExponent>1e9", "cannot be parsed"),
    "a lead that starts later": ("muse", "LeadTimeOffset>0<", "LeadTimeOffset>2500<", "start later"),
    "a duration of years": ("philips", 'durationperchannel="4000"', 'durationperchannel="4e15"', "bytes"),
    "no resolution": ("philips", "<resolution>2.5</resolution>", "", "does not give its unit"),
    "an unknown version": ("philips", "1.04", "9.99", "unsupported"),
    "no unit of counts": ("mortara", 'UNITS_PER_MV="400"', "", "does not give its unit"),
}  # fmt: skip


@pytest.mark.parametrize(("kind", "old", "new", "message"), XML_LIES.values(), ids=XML_LIES)
@pytest.mark.usefixtures("little_memory")
def test_xml_that_lies_is_refused(kind: str, old: str, new: str, message: str, tmp_path: Path) -> None:
    path = XML_WRITERS[kind](tmp_path / "ecg.xml", TRUTH)
    if kind == "muse":  # of its two waveforms the rhythm comes last
        head, rhythm, tail = path.read_bytes().partition(b"<WaveformType>Rhythm")
        assert old.encode() in tail
        path.write_bytes(head + rhythm + tail.replace(old.encode(), new.encode()))
    else:
        replace(path, old, new)
    refuse(path, message)


def test_xml_that_is_no_ecg_is_answered_with_what_is(tmp_path: Path) -> None:
    (tmp_path / "page.xml").write_text("<?xml version='1.0'?><html><ECG/></html>", encoding="utf-8")
    refuse(tmp_path / "page.xml", "AnnotatedECG, RestingECG, restingecgdata, ECG.*found 'html'")


def test_several_recordings_in_one_xml_are_refused(tmp_path: Path) -> None:
    path = write_aecg(tmp_path / "ecg.xml", TRUTH)
    text = path.read_text(encoding="utf-8")
    series = text[text.index("<component><series>") : text.index("</AnnotatedECG>")]
    path.write_text(text.replace("</AnnotatedECG>", f"{series}</AnnotatedECG>"), encoding="utf-8")
    refuse(path, "holds 2 rhythm recordings")


def test_an_xli_stream_that_unpacks_to_too_much_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_philips(tmp_path / "ecg.xml", TRUTH, compressed=True)
    assert read_ecg(path).signal.shape == (12, 1000)
    monkeypatch.setattr(xml_files, "_MAX_XML_VALUES", 11_000)
    refuse(path, "unpacks to more than 11000 values")


@pytest.mark.parametrize("values", [np.zeros(2000), np.arange(2000) % 7, counts(TRUTH)[1]])
def test_the_length_of_an_lzw_stream_is_known_before_it_is_unpacked(values: np.ndarray) -> None:
    assert xml_files._lzw_length(xli_chunk(values)[8:]) == 2 * len(values)


def test_limb_leads_of_philips_that_contradict_each_other_are_refused(tmp_path: Path) -> None:
    signal = TRUTH.signal.copy()
    signal[2] = 0.0  # what compression leaves of III
    refuse(write_philips(tmp_path / "ecg.xml", Ecg(signal, 250, LEADS)), "III is not II - I")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"frequency": 250.0', '"frequency": 0', "frequency"),
        ('"frequency": 250.0', '"frequency": Infinity', "frequency"),
        ('"amplitudeResolution": 2500', '"amplitudeResolution": null', "does not give its unit"),
        ('"leadI": [', '"leadI": [NaN, "x", ', "cannot be parsed"),
        ('"leadI": [', '"leadI": [1, 2, ', "different numbers of samples"),
        ('"raw"', '"cooked"', "no ECG data"),
        ("{", "[" * 100_000, "cannot be parsed"),
    ],
)
@pytest.mark.usefixtures("little_memory")
def test_json_that_lies_is_refused(old: str, new: str, message: str, tmp_path: Path) -> None:
    refuse(replace(write_kardia(tmp_path / "ecg.json", TRUTH), old, new), message)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({}, "expected one matrix"),
        ({"signal": np.array(["text"])}, "expected one matrix"),
        ({"signal": np.array([[{"a": 1}]], dtype=object)}, "expected one matrix"),
        (
            {"a": np.zeros((2, 9)), "b": np.zeros((2, 9))},
            "one matrix called 'signal' or 'val', found .*a.*b",
        ),
        ({"signal": np.zeros((2, 9), complex)}, "expected one matrix"),
        ({"signal": np.full((2, 9), np.inf)}, "infinite values"),
    ],
)
def test_a_matlab_file_without_a_matrix_of_numbers_is_refused(
    variables: dict[str, np.ndarray], message: str, tmp_path: Path
) -> None:
    scipy.io.savemat(tmp_path / "ecg.mat", variables)
    with pytest.raises(EcgFileError, match=message):
        read_ecg(tmp_path / "ecg.mat", sampling_rate=250, lead_names=["I", "II"], unit="mV")


def test_a_matlab_file_that_unpacks_to_too_much_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_mat(tmp_path / "ecg.mat", Ecg(np.zeros((12, 20_000), np.float32), 250, LEADS))
    assert path.stat().st_size < 5_000
    monkeypatch.setattr(mat_files, "MAX_MAT_BYTES", 500_000)
    refuse(path, "unpacks to more than 500000 bytes")


def test_a_matlab_file_of_version_7_3_is_refused_with_the_way_out(tmp_path: Path) -> None:
    (tmp_path / "ecg.mat").write_bytes(b"MATLAB 7.3 MAT-file".ljust(512) + b"\x89HDF\r\n\x1a\n")
    refuse(tmp_path / "ecg.mat", "save it with MATLAB's -v7")


def test_leads_that_were_scaled_one_by_one_are_read_with_a_warning(
    tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    signal = TRUTH.signal / np.ptp(TRUTH.signal, axis=1, keepdims=True)
    np.savez(tmp_path / "ecg", signal=signal, sampling_rate=250, lead_names=np.array(LEADS), unit="mV")
    with pytest.warns(EcgFileWarning, match="scaled one by one"):
        read_ecg(tmp_path / "ecg.npz")
    np.savez(tmp_path / "ecg", signal=TRUTH.signal, sampling_rate=250, lead_names=np.array(LEADS), unit="mV")
    read_ecg(tmp_path / "ecg.npz")
    assert len(recwarn) == 0


@pytest.mark.parametrize("kind", SEEDS)
def test_damaged_files_are_read_or_refused(kind: str, tmp_path: Path) -> None:
    assert judge(write_mutation(tmp_path / "genuine", SEEDS[kind][0]), SEEDS[kind][0].facts) == "read"
    outcomes = set()
    for index in range(20):
        mutation = mutate(SEEDS, kind, index)
        outcomes.add(judge(write_mutation(tmp_path / "damaged", mutation), mutation.facts))
    assert outcomes <= {"read", "refused"}
    assert "refused" in outcomes


def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "ecg.edf")
    refuse(tmp_path / "ecg.edf", "found a folder or device")


def test_characters_that_do_not_exist_are_refused(tmp_path: Path) -> None:
    names = np.array(["I"]).view(np.uint32)
    names[:] = 0x110000
    np.savez(tmp_path / "ecg", signal=TRUTH.signal[:1], sampling_rate=250, lead_names=names.view("U1"), unit="mV")
    refuse(tmp_path / "ecg.npz", "characters that do not exist")


def test_a_table_whose_header_follows_a_comment_is_found_in_a_folder(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("# device X\n\ntime_s,I [mV],II [mV]\n0.0,0.1,0.2\n")
    assert find_ecgs([tmp_path]) == [tmp_path / "a.csv"]


def test_a_damaged_archive_of_any_compression_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_LZMA) as archive:
        content = io.BytesIO()
        np.save(content, np.random.default_rng(0).normal(size=(12, 3000)))
        archive.writestr("signal.npy", content.getvalue())
    data = bytearray(path.read_bytes())
    data[2000:2040] = bytes(40)
    path.write_bytes(bytes(data))
    with pytest.raises(EcgFileError, match="not a whole NPZ archive"):
        read_ecg(path, sampling_rate=250, lead_names=LEADS, unit="mV")
