"""Small ECG files in the formats of recorders, each by a writer that knows nothing of the readers.

EDF and BDF come from `pyedflib`, DICOM from `pydicom`, MAT from `scipy`; the others are written byte by byte or line
by line after their public descriptions: SCP-ECG EN 1064, ISHNE Badilini 1998, MFER ISO 22077-1, HL7 aECG ANSI/HL7 V3
ECG R1-2004, GE's restecg.dtd, Philips' sierraecg schema, Mortara's ELI export, AliveCor's Kardia API.
"""

import base64
import json
import struct
from binascii import crc_hqx
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import scipy.io
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.sequence import Sequence as DicomSequence
from pydicom.uid import UID, ExplicitVRLittleEndian, TwelveLeadECGWaveformStorage
from pyedflib import FILETYPE_BDFPLUS, FILETYPE_EDFPLUS, EdfWriter

from modeling_ecgmoe.ecg_files import Ecg
from modeling_ecgmoe.leads import LEADS

STEP_UV = 2.5  # of the converters that the writers stand for
SCP_CODES = {"I": 1, "II": 2, "V1": 3, "V2": 4, "V3": 5, "V4": 6, "V5": 7, "V6": 8,
             "III": 61, "aVR": 62, "aVL": 63, "aVF": 64}  # fmt: skip
ISHNE_CODES = {name: 5 + number for number, name in enumerate(LEADS)}


def counts(ecg: Ecg, step_uv: float = STEP_UV) -> np.ndarray:
    """The recording as a converter of `step_uv` per step gives it, int16 (leads, samples)."""
    return np.round(ecg.signal * (1000.0 / step_uv)).astype("<i2")


def write_edf(path: Path, ecg: Ecg, file_type: int = FILETYPE_EDFPLUS, extra: Sequence[dict[str, Any]] = ()) -> Path:
    """EDF+ with an annotation; `extra` are headers of further signals, which hold a ramp."""
    signal_headers: list[Any] = [
        {"label": f"ECG {name}", "dimension": "uV", "sample_frequency": ecg.sampling_rate,
         "physical_min": -8000.0, "physical_max": 8000.0,
         "digital_min": -32768 if file_type == FILETYPE_EDFPLUS else -(2**23),
         "digital_max": 32767 if file_type == FILETYPE_EDFPLUS else 2**23 - 1}
        for name in ecg.lead_names
    ]  # fmt: skip
    with EdfWriter(str(path), len(signal_headers) + len(extra), file_type=file_type) as file:
        file.setSignalHeaders([*signal_headers, *extra])
        file.setPatientCode("P-17")
        file.setSex(0)
        file.setEquipment("Recorder")
        rates = [round(header["sample_frequency"]) for header in extra]
        duration_s = ecg.signal.shape[1] / ecg.sampling_rate
        ramps = [np.linspace(-1.0, 1.0, round(rate * duration_s)) for rate in rates]
        file.writeSamples([*(ecg.signal.astype(np.float64) * 1000.0), *ramps])
        file.writeAnnotation(1.0, -1, "patient moved")
    return path


def write_bdf(path: Path, ecg: Ecg) -> Path:
    return write_edf(path, ecg, FILETYPE_BDFPLUS)


def dicom_group(ecg: Ecg, label: str = "RHYTHM", offset_ms: float = 0.0, unit: str = "uV") -> Dataset:
    """A multiplex group of a recording: 16-bit samples, a correction factor and a baseline to be undone."""
    group = Dataset()
    group.MultiplexGroupTimeOffset = offset_ms
    group.WaveformOriginality = "ORIGINAL"
    group.NumberOfWaveformChannels, group.NumberOfWaveformSamples = ecg.signal.shape
    group.SamplingFrequency = ecg.sampling_rate
    group.MultiplexGroupLabel = label
    channels = []
    for name in ecg.lead_names:
        channel, source, units = Dataset(), Dataset(), Dataset()
        source.CodeValue, source.CodingSchemeDesignator = f"5.6.3-9-{SCP_CODES[name]}", "SCPECG"
        source.CodeMeaning = f"Lead {name}"
        units.CodeValue, units.CodingSchemeDesignator, units.CodeMeaning = unit, "UCUM", "microvolt"
        channel.ChannelSourceSequence = DicomSequence([source])
        channel.ChannelSensitivity, channel.ChannelSensitivityCorrectionFactor = STEP_UV / 2, 2.0
        channel.ChannelSensitivityUnitsSequence = DicomSequence([units])
        channel.ChannelBaseline = 100.0
        channel.WaveformBitsStored = 16
        channels.append(channel)
    group.ChannelDefinitionSequence = DicomSequence(channels)
    group.WaveformBitsAllocated, group.WaveformSampleInterpretation = 16, "SS"
    raw = np.where(np.isnan(ecg.signal), -32768.0, np.round((ecg.signal * 1000.0 - 100.0) / STEP_UV)).astype("<i2")
    group.WaveformPaddingValue = struct.pack("<h", -32768)
    group.WaveformData = raw.T.tobytes()
    return group


def write_dicom(path: Path, ecg: Ecg, groups: Sequence[Dataset] | None = None) -> Path:
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = TwelveLeadECGWaveformStorage
    meta.MediaStorageSOPInstanceUID = UID("1.2.826.0.1.3680043.8.498.1")
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    data.SOPClassUID, data.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    data.PatientID, data.PatientAge, data.PatientSex = "P-17", "054Y", "F"
    data.AcquisitionDateTime = "20240229101112"
    data.Manufacturer, data.ManufacturerModelName = "Maker", "Cart"
    data.WaveformSequence = DicomSequence([dicom_group(ecg)] if groups is None else groups)
    data.save_as(path, enforce_file_format=True)
    return path


def scp_section(number: int, body: bytes) -> bytes:
    body += b"\0" * (len(body) % 2)
    rest = struct.pack("<HIBB", number, 16 + len(body), 20, 20) + b"\0" * 6 + body
    if number == 0:
        rest = rest[:8] + b"SCPECG" + rest[14:]
    return struct.pack("<H", crc_hqx(rest, 0xFFFF)) + rest


def scp_record(sections: dict[int, bytes]) -> bytes:
    """A whole SCP-ECG record of section bodies, with Section 0 and all checksums."""
    packed = {number: scp_section(number, body) for number, body in sections.items()}
    position, pointers = 7 + 16 + 10 * (1 + len(packed)), b""
    length = 16 + 10 * (1 + len(packed))
    pointers = struct.pack("<HII", 0, length, 7)
    for number, section in packed.items():
        pointers += struct.pack("<HII", number, len(section), position)
        position += len(section)
    rest = scp_section(0, pointers) + b"".join(packed.values())
    rest = struct.pack("<I", 6 + len(rest)) + rest
    return struct.pack("<H", crc_hqx(rest, 0xFFFF)) + rest


def scp_huffman(values: np.ndarray) -> bytes:
    """Values in the standard's default Huffman code (EN 1064, Annex C)."""
    bits = []
    for value in values.tolist():
        if value == 0:
            bits.append("0")
        elif abs(value) <= 8:
            bits.append("1" * abs(value) + "0" + ("1" if value < 0 else "0"))
        elif -128 <= value <= 127:
            bits.append("1111111110" + f"{value & 0xFF:08b}")
        else:
            bits.append("1111111111" + f"{value & 0xFFFF:016b}")
    text = "".join(bits)
    text += "0" * (-len(text) % 16)
    return int(text, 2).to_bytes(len(text) // 8, "big")


def scp_differences(values: np.ndarray, order: int) -> np.ndarray:
    """Second differences keep two first samples, first differences one."""
    values = values.astype(np.int64)
    for _ in range(order):
        values = np.concatenate([values[:1], np.diff(values)])
    if order == 2:  # the first two samples stay as they are
        values[1] += 2 * values[0]
    return values


def scp_sections(
    ecg: Ecg, *, huffman: bool = True, order: int = 2, beats: bool = False, starts: Sequence[int] | None = None
) -> dict[int, bytes]:
    """The section bodies of a recording; with `beats` a reference beat is taken out around three places."""
    raw = counts(ecg).astype(np.int64)
    num_leads, num_samples = raw.shape
    starts = [1] * num_leads if starts is None else list(starts)
    interval_us = round(1e6 / ecg.sampling_rate)
    tags = b""
    for tag, value in ((2, b"P-17\0"), (4, struct.pack("<HB", 54, 1)), (8, b"\x02"),
                       (25, struct.pack("<HBB", 2024, 2, 29)), (26, b"\x0a\x0b\x0c"), (255, b"")):  # fmt: skip
        tags += struct.pack("<BH", tag, len(value)) + value
    flags = (0x01 if beats else 0) | 0x04 | (num_leads << 3 & 0xF8)
    ranges = b"".join(
        struct.pack("<IIB", start, start + num_samples - 1, SCP_CODES[name])
        for start, name in zip(starts, ecg.lead_names, strict=True)
    )
    sections = {1: tags, 3: bytes([num_leads, flags]) + ranges}
    if huffman:
        sections = {1: tags, 2: struct.pack("<H", 19999), 3: sections[3]}

    def pack(rows: np.ndarray) -> bytes:
        coded = [scp_differences(row, order) for row in rows]
        streams = [scp_huffman(row) if huffman else row.astype("<i2").tobytes() for row in coded]
        head = struct.pack("<HHBB", round(1000 * STEP_UV), interval_us, order, 0)
        return head + struct.pack(f"<{num_leads}H", *map(len, streams)) + b"".join(streams)

    if beats:
        length = num_samples // 5
        reference = np.round(300 * np.hanning(length)).astype(np.int64) * np.arange(1, num_leads + 1)[:, None] // 4
        places = [1 + length // 2, 1 + 2 * length, 1 + 7 * length // 2]
        for start in places:
            raw[:, start - 1 : start - 1 + length] -= reference
        zones = b"".join(struct.pack("<HIII", 0, p, p + length // 2, p + length - 1) for p in places)
        zones += b"".join(struct.pack("<II", p, p + length - 1) for p in places)
        length_ms = round(1000 * length / ecg.sampling_rate)
        sections[4] = struct.pack("<HHH", length_ms, length // 2 + 1, len(places)) + zones
        sections[5] = pack(reference)
    sections[6] = pack(raw)
    return dict(sorted(sections.items()))


def write_scp(path: Path, ecg: Ecg, **how: Any) -> Path:
    path.write_bytes(scp_record(scp_sections(ecg, **how)))
    return path


def ishne_header(ecg: Ecg, comment: bytes = b"resting") -> bytes:
    """All 522 bytes and the comment block; leads of unknown name have code 0."""
    num_leads = len(ecg.lead_names)
    fill = lambda values: [*values, *([-9] * (12 - num_leads))]  # noqa: E731
    fixed = struct.pack("<iiii", len(comment), ecg.signal.shape[1], 522, 522 + len(comment))
    fixed += struct.pack("<h40s40s20shh", 1, b"Ada", b"Test", b"P-17", 2, 1)
    fixed += struct.pack("<9h", 1, 1, 1970, 29, 2, 2024, 1, 3, 2024) + struct.pack("<3h", 10, 11, 12)
    fixed += struct.pack("<h", num_leads)
    fixed += struct.pack("<12h", *fill(ISHNE_CODES.get(name, 0) for name in ecg.lead_names))
    fixed += struct.pack("<12h", *fill([1] * num_leads))
    fixed += struct.pack("<12h", *fill([round(1000 * STEP_UV)] * num_leads))
    fixed += struct.pack("<h40sh80s80s88s", 0, b"digital", round(ecg.sampling_rate), b"", b"", b"")
    checksum = struct.pack("<H", crc_hqx(fixed + comment, 0xFFFF))
    return b"ISHNE1.0" + checksum + fixed + comment


def write_ishne(path: Path, ecg: Ecg) -> Path:
    raw = np.where(np.isnan(ecg.signal), -32768.0, np.round(ecg.signal * (1000.0 / STEP_UV))).astype("<i2")
    path.write_bytes(ishne_header(ecg) + raw.T.tobytes())
    return path


def mfer_tag(tag: int, value: bytes) -> bytes:
    size = bytes([len(value)]) if len(value) < 128 else bytes([0x84]) + len(value).to_bytes(4, "big")
    return bytes([tag]) + size + value


def write_mfer(path: Path, ecg: Ecg) -> Path:
    raw = counts(ecg)
    num_leads, num_samples = raw.shape
    content = mfer_tag(0x40, b"MFR ECG12 synthetic") + mfer_tag(0x01, b"\x01")
    content += mfer_tag(0x82, b"P-17") + mfer_tag(0x84, b"\x02")
    content += mfer_tag(0x0B, struct.pack("<bbI", 0, 0, round(ecg.sampling_rate)))
    content += mfer_tag(0x0C, struct.pack("<bbI", 0, -7, round(10 * STEP_UV)))
    content += mfer_tag(0x0A, b"\x00") + mfer_tag(0x04, struct.pack("<I", num_samples))
    content += mfer_tag(0x05, struct.pack("<I", num_leads)) + mfer_tag(0x06, struct.pack("<I", 1))
    for number, name in enumerate(ecg.lead_names):
        lead = mfer_tag(0x09, struct.pack("<H", SCP_CODES[name]))
        content += bytes([0x3F, number, len(lead)]) + lead
    path.write_bytes(content + mfer_tag(0x1E, raw.tobytes()) + b"\x80\x00")
    return path


def write_kardia(path: Path, ecg: Ecg) -> Path:
    names = {"I": "leadI", "II": "leadII", "III": "leadIII", "aVR": "AVR", "aVL": "AVL", "aVF": "AVF"}
    rows = dict(zip(ecg.lead_names, counts(ecg).tolist(), strict=True))
    block = {
        "frequency": ecg.sampling_rate,
        "mainsFrequency": 50,
        "amplitudeResolution": round(1000 * STEP_UV),
        "numLeads": 6,
        "samples": {key: rows[name] for name, key in names.items() if name in rows},
    }
    record = {"id": "x1", "patientID": "P-17", "recordedAt": "2024-02-29T10:11:12Z", "data": {"raw": block}}
    path.write_text(json.dumps(record), encoding="utf-8")
    return path


def write_aecg(path: Path, ecg: Ecg) -> Path:
    """Millivolts as an origin of 100 uV and a scale of `STEP_UV`."""
    raw = np.round((ecg.signal * 1000.0 - 100.0) / STEP_UV).astype(int)
    sequences = "".join(
        f'<component><sequence><code code="MDC_ECG_LEAD_{name.upper()}" codeSystem="2.16.840.1.113883.6.24"/>'
        f'<value xsi:type="SLIST_PQ"><origin value="100" unit="uV"/><scale value="{STEP_UV}" unit="uV"/>'
        f"<digits>{' '.join(map(str, row))}</digits></value></sequence></component>"
        for name, row in zip(ecg.lead_names, raw.tolist(), strict=True)
    )
    path.write_text(
        '<?xml version="1.0" encoding="UTF-8"?>\n'
        '<AnnotatedECG xmlns="urn:hl7-org:v3" xmlns:xsi="http://www.w3.org/2001/XMLSchema-instance">'
        '<id root="61d1a24f-b47e-41aa-ae95-f8ac302f4eeb"/>'
        '<effectiveTime><low value="20240229101112"/><high value="20240229101122"/></effectiveTime>'
        '<componentOf><timepointEvent><componentOf><subjectAssignment><subject><trialSubject><id extension="P-17"/>'
        '<subjectDemographicPerson><administrativeGenderCode code="F"/></subjectDemographicPerson></trialSubject>'
        "</subject></subjectAssignment></componentOf></timepointEvent></componentOf>"
        '<component><series><code code="RHYTHM" codeSystem="2.16.840.1.113883.5.4"/><component><sequenceSet>'
        '<component><sequence><code code="TIME_ABSOLUTE" codeSystem="2.16.840.1.113883.5.4"/>'
        '<value xsi:type="GLIST_TS"><head value="20240229101112"/>'
        f'<increment value="{1 / ecg.sampling_rate!r}" unit="s"/></value></sequence></component>'
        f"{sequences}</sequenceSet></component></series></component></AnnotatedECG>\n",
        encoding="utf-8",
    )
    return path


def write_muse(path: Path, ecg: Ecg) -> Path:
    """The eight independent leads as MUSE stores them, and one median beat that must not be taken for them."""
    rows = dict(zip(ecg.lead_names, counts(ecg), strict=True))
    kept = [name for name in ("I", "II", "V1", "V2", "V3", "V4", "V5", "V6") if name in rows]

    def waveform(kind: str, length: int) -> str:
        leads = "".join(
            f"<LeadData><LeadByteCountTotal>{2 * length}</LeadByteCountTotal><LeadTimeOffset>0</LeadTimeOffset>"
            f"<LeadSampleCountTotal>{length}</LeadSampleCountTotal>"
            f"<LeadAmplitudeUnitsPerBit>{STEP_UV}</LeadAmplitudeUnitsPerBit>"
            "<LeadAmplitudeUnits>MICROVOLTS</LeadAmplitudeUnits><LeadSampleSize>2</LeadSampleSize>"
            f"<LeadID>{name}</LeadID>"
            f"<WaveFormData>{base64.b64encode(rows[name][:length].tobytes()).decode()}</WaveFormData></LeadData>"
            for name in kept
        )
        return (
            f"<Waveform><WaveformType>{kind}</WaveformType><SampleBase>{round(ecg.sampling_rate)}</SampleBase>"
            f"<SampleExponent>0</SampleExponent>{leads}</Waveform>"
        )

    path.write_text(
        '<?xml version="1.0" encoding="ISO-8859-1"?>\n<!DOCTYPE RestingECG SYSTEM "restecg.dtd">\n<RestingECG>'
        "<MuseInfo><MuseVersion>9.0</MuseVersion></MuseInfo>"
        "<PatientDemographics><PatientID>P-17</PatientID><PatientAge>54</PatientAge><AgeUnits>YEARS</AgeUnits>"
        "<Gender>FEMALE</Gender></PatientDemographics>"
        "<TestDemographics><AcquisitionTime>10:11:12</AcquisitionTime><AcquisitionDate>02-29-2024</AcquisitionDate>"
        "<AcquisitionDevice>MAC55</AcquisitionDevice></TestDemographics>"
        "<Diagnosis><DiagnosisStatement><StmtFlag>ENDSLINE</StmtFlag><StmtText>Normal ECG</StmtText>"
        "</DiagnosisStatement></Diagnosis>"
        f"{waveform('Median', 100)}{waveform('Rhythm', rows[kept[0]].size)}</RestingECG>\n",
        encoding="latin-1",
    )
    return path


def xli_chunk(values: np.ndarray) -> bytes:
    """A lead in Philips' XLI: second differences, high bytes before low bytes, LZW with 10-bit codes."""
    x = values.astype(np.int64)
    # The decoder: z = 2 y - x - last, last = delta - 64; the two first values stand as they are.
    predicted = 2 * x[1:-1] - x[:-2] - x[2:]
    deltas = np.concatenate([x[:2], predicted[1:] + 64, [64]])
    words = (deltas & 0xFFFF).astype(">u2")
    data = (words >> 8).astype(np.uint8).tobytes() + (words & 0xFF).astype(np.uint8).tobytes()
    table: dict[bytes, int] = {bytes([i]): i for i in range(256)}
    codes, current = [], b""
    for byte in data:
        longer = current + bytes([byte])
        if longer in table:
            current = longer
            continue
        codes.append(table[current])
        if len(table) <= 2**10 - 2:
            table[longer] = len(table)
        current = bytes([byte])
    bits = "".join(f"{code:010b}" for code in [*codes, table[current]])
    bits += "0" * (-len(bits) % 8)
    body = int(bits, 2).to_bytes(len(bits) // 8, "big")
    return struct.pack("<iHh", len(body), 0, int(predicted[0])) + body


def write_philips(path: Path, ecg: Ecg, compressed: bool = False, encoding: str = "utf-8") -> Path:
    """All twelve leads in LEADS' order; compressed, four limb leads are what Einthoven's relations leave."""
    raw = counts(ecg).astype(np.int64)
    attributes = 'compressflag="False"'
    data = raw.astype("<i2").tobytes()
    if compressed:
        lead_i, lead_ii, third = raw[0], raw[1], raw[2]
        rest = raw.copy()
        rest[2] = lead_ii - lead_i - third
        rest[3] = -raw[3] - (lead_i + lead_ii) // 2
        rest[4] = (lead_i - third) // 2 - raw[4]
        rest[5] = (lead_ii + third) // 2 - raw[5]
        attributes, data = 'compressflag="True" compressmethod="XLI"', b"".join(map(xli_chunk, rest))
    text = (
        f'<?xml version="1.0" encoding="{encoding}"?>\n'
        '<restingecgdata xmlns="http://www3.medical.philips.com">'
        "<documentinfo><documenttype>SierraECG</documenttype><documentversion>1.04</documentversion></documentinfo>"
        '<dataacquisition date="2024-02-29" time="10:11:12"><machine machineid="1">PageWriter</machine>'
        f"<signalcharacteristics><samplingrate>{round(ecg.sampling_rate)}</samplingrate>"
        f"<resolution>{STEP_UV}</resolution><signaloffset>0</signaloffset><signalsigned>True</signalsigned>"
        f"<numberchannelsallocated>{len(raw)}</numberchannelsallocated><leadset>STD-12</leadset>"
        "</signalcharacteristics></dataacquisition>"
        "<patient><generalpatientdata><patientid>P-17</patientid><age><years>54</years></age><sex>Female</sex>"
        "</generalpatientdata></patient>"
        f'<waveforms><parsedwaveforms dataencoding="Base64" {attributes} numberofleads="{len(raw)}"'
        f' leadlabels="{" ".join(ecg.lead_names)}" samplespersecond="{round(ecg.sampling_rate)}"'
        f' durationperchannel="{round(1000 * ecg.duration_s)}">{base64.b64encode(data).decode()}</parsedwaveforms>'
        "</waveforms></restingecgdata>\n"
    )
    path.write_bytes(text.encode(encoding))
    return path


def write_mortara(path: Path, ecg: Ecg) -> Path:
    channels = "".join(
        f'<CHANNEL NAME="{name}" UNITS_PER_MV="{1000 / STEP_UV:g}" DURATION="{row.size}" BITS="16" FORMAT="SIGNED"'
        f' SAMPLE_FREQ="{ecg.sampling_rate:g}" ENCODING="BASE64" DATA="{base64.b64encode(row.tobytes()).decode()}"/>'
        for name, row in zip(ecg.lead_names, counts(ecg), strict=True)
    )
    path.write_text(
        '<?xml version="1.0" encoding="UTF-8"?>\n<ECG ACQUISITION_TIME="20240229101112" AGE="54" AGE_UNITS="YEARS">'
        f'<SUBJECT ID="P-17" GENDER="Female"/>{channels}</ECG>\n',
        encoding="utf-8",
    )
    return path


def write_mat(path: Path, ecg: Ecg, compressed: bool = True) -> Path:
    scipy.io.savemat(path, {"signal": ecg.signal, "fs": ecg.sampling_rate}, do_compression=compressed)
    return path


# Each format: the file's suffix, its writer, and the largest error in mV that its resolution explains.
WRITERS: dict[str, tuple[str, Callable[..., Path], float]] = {
    "EDF+": (".edf", write_edf, 0.000245),
    "BDF+": (".bdf", write_bdf, 0.000002),
    "DICOM": (".dcm", write_dicom, STEP_UV / 2000 * 1.001),
    "SCP-ECG": (".scp", write_scp, STEP_UV / 2000 * 1.001),
    "ISHNE": (".ecg", write_ishne, STEP_UV / 2000 * 1.001),
    "MFER": (".mwf", write_mfer, STEP_UV / 2000 * 1.001),
    "Kardia": (".json", write_kardia, STEP_UV / 2000 * 1.001),
    "HL7 aECG": (".xml", write_aecg, STEP_UV / 2000 * 1.001),
    "GE MUSE": (".xml", write_muse, STEP_UV / 2000 * 1.001),
    "Philips": (".xml", write_philips, STEP_UV / 2000 * 1.001),
    "Mortara": (".xml", write_mortara, STEP_UV / 2000 * 1.001),
}
