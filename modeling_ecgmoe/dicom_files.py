"""DICOM waveforms, read by `pydicom` (PS3.3 C.10.9): the multiplex groups that are no averaged beats, put together.

Carts write the twelve leads in one group, or three leads every 2.5 s in four groups; other groups hold median beats.
"""

import re
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from .device_files import MAX_DEVICE_BYTES, choose_channels, parsing, read_bytes
from .leads import find_lead
from .recording import MAX_VALUES, Ecg, EcgFileError, Facts, millivolts_per, shown

ECG_CLASSES = b"1.2.840.10008.5.1.4.1.1.9.1."  # what the class of every ECG object starts with
_DEFLATED = b"1.2.840.10008.1.2.1.99"  # its transfer syntax, which could unpack to any size
_AVERAGED = re.compile(r"median|representative|average|template", re.IGNORECASE)
_DTYPES = {(8, "SB"): "i1", (8, "UB"): "u1", (16, "SS"): "i2", (16, "US"): "u2", (32, "SL"): "i4", (32, "UL"): "u4"}
# Lead codes of SCP-ECG, which DICOM took over ("5.6.3-9-1", "2:1"; PS3.16 CID 3001).
_LEADS_BY_CODE = {
    1: "I", 2: "II", 3: "V1", 4: "V2", 5: "V3", 6: "V4", 7: "V5", 8: "V6", 61: "III", 62: "aVR", 63: "aVL", 64: "aVF",
}  # fmt: skip


def read_dicom(path: Path, facts: Facts) -> Ecg:
    """A DICOM object of waveforms."""
    content = read_bytes(path, MAX_DEVICE_BYTES)
    if _DEFLATED in content:
        raise EcgFileError("it is compressed as a whole (deflated); save it in explicit VR little endian")
    with parsing("DICOM", path):
        from pydicom import dcmread

        data = dcmread(BytesIO(content))  # of a file, `pydicom` would ask for as many bytes as a damaged length says
        syntax = data.file_meta.get("TransferSyntaxUID")
        is_little = syntax is None or bool(syntax.is_little_endian)
        groups = [
            _Group(group, is_little)
            for group in data.get("WaveformSequence") or []
            if not _AVERAGED.search(str(group.get("MultiplexGroupLabel", "")))
            if any(millivolts_per(_unit_of(channel)) for channel in group.ChannelDefinitionSequence)
        ]
        if not groups:
            raise EcgFileError("it holds no recording in V, mV, uV or nV; is this an ECG?")
        return _join(groups, facts, _describe(data))


class _Group:
    """A multiplex group: the ECG leads among its channels, decoded to mV."""

    def __init__(self, group: Any, is_little: bool) -> None:
        num_channels, num_samples = int(group.NumberOfWaveformChannels), int(group.NumberOfWaveformSamples)
        kind = (int(group.WaveformBitsAllocated), str(group.WaveformSampleInterpretation))
        if kind not in _DTYPES:
            raise EcgFileError(f"samples of {kind[0]} bits, {shown(kind[1])}, are not allowed in an ECG")
        dtype = np.dtype(_DTYPES[kind]).newbyteorder("<" if is_little else ">")
        promised, found = num_channels * num_samples * dtype.itemsize, len(group.WaveformData)
        if min(num_channels, num_samples) < 1 or promised > found:
            raise EcgFileError(f"the header promises {promised} bytes of samples, found {found}; copy it again")
        channels = list(group.ChannelDefinitionSequence)
        if len(channels) != num_channels:
            raise EcgFileError(f"it describes {len(channels)} of {num_channels} channels; export it again")
        self.rate = float(group.SamplingFrequency)
        self.delay_s = float(group.get("MultiplexGroupTimeOffset") or 0.0) / 1000.0
        names, units = [_name_of(channel) for channel in channels], [_unit_of(channel) for channel in channels]
        self.chosen = choose_channels(names, units, [self.rate] * num_channels)
        self.names, self.units = [names[i] for i in self.chosen], [units[i] for i in self.chosen]
        raw = np.frombuffer(group.WaveformData, dtype, num_channels * num_samples).reshape(num_samples, -1).T
        padding = group.get("WaveformPaddingValue")
        self.signal = np.empty((len(self.chosen), num_samples))
        for row, i in enumerate(self.chosen):
            gain, offset = _gain_of(channels[i])
            self.signal[row] = raw[i] * gain + offset
            if isinstance(padding, bytes) and len(padding) >= dtype.itemsize:
                self.signal[row][raw[i] == np.frombuffer(padding, dtype, 1)[0]] = np.nan

    @property
    def num_leads(self) -> int:
        """How many of the twelve leads are in it."""
        return len({find_lead(name) for name in self.names} - {None})


def _join(groups: list[_Group], facts: Facts, metadata: dict[str, Any]) -> Ecg:
    """The group with most leads, and what the others of its sampling rate add in leads or in time; NaN elsewhere.

    Raises:
        EcgFileError: a group of another rate holds leads that the others lack, or the groups are too far apart.
    """
    main = max(groups, key=lambda group: group.num_leads)
    rate = facts.settle_rate(main.rate)
    joined = [main, *(group for group in groups if group is not main and group.rate == main.rate)]
    names = list(dict.fromkeys(name for group in joined for name in group.names))
    lost = {name for group in groups for name in group.names if find_lead(name)} - set(names)
    if lost:
        raise EcgFileError(f"its leads {shown(sorted(lost))} have another sampling rate; export leads of one rate")
    first_s = min(group.delay_s for group in joined)
    starts = [round((group.delay_s - first_s) * rate) for group in joined]
    length = max(start + group.signal.shape[1] for start, group in zip(starts, joined, strict=True))
    if length * len(names) > MAX_VALUES:
        raise EcgFileError(f"it holds more than {MAX_VALUES} values; cut it into shorter records")
    signal = np.full((len(names), length), np.nan, dtype=np.float32)
    for start, group in zip(starts, joined, strict=True):
        for name, unit, row in zip(group.names, group.units, group.signal, strict=True):
            place = signal[names.index(name), start : start + len(row)]
            empty = np.isnan(place)
            with np.errstate(over="ignore"):
                place[empty] = (row * facts.settle_unit(unit or None))[empty]
    return Ecg(signal, rate, facts.settle_names(names, len(names)), metadata)


def _code_of(item: Any, sequence: str) -> tuple[str, str]:
    """Value and meaning of the first code in a sequence, empty where there is none."""
    codes = item.get(sequence)
    return (str(codes[0].get("CodeValue", "")), str(codes[0].get("CodeMeaning", ""))) if codes else ("", "")


def _name_of(channel: Any) -> str:
    """The lead of a channel by its code, else by the code's meaning ("Lead I (Einthoven)"), else by its label."""
    value, meaning = _code_of(channel, "ChannelSourceSequence")
    number = re.search(r"(?:^2:|^5\.6\.3-9-)(\d{1,3})$", value)
    if number and int(number[1]) in _LEADS_BY_CODE:
        return _LEADS_BY_CODE[int(number[1])]
    return re.split(r"[,(]", meaning)[0].strip() or str(channel.get("ChannelLabel", ""))


def _unit_of(channel: Any) -> str:
    value, meaning = _code_of(channel, "ChannelSensitivityUnitsSequence")
    return meaning if millivolts_per(value) is None and millivolts_per(meaning) is not None else value


def _gain_of(channel: Any) -> tuple[float, float]:
    """Gain and offset of a channel in its unit: sensitivity times correction factor, and the baseline."""
    gain = float(channel.get("ChannelSensitivity") or 0.0)
    gain *= float(channel.get("ChannelSensitivityCorrectionFactor") or 1.0)
    offset = float(channel.get("ChannelBaseline") or 0.0)
    if not (np.isfinite([gain, offset]).all() and gain != 0):
        raise EcgFileError(f"channel {shown(_name_of(channel))} has no sensitivity; export it again")
    return gain, offset


def _describe(data: Any) -> dict[str, Any]:
    age = re.fullmatch(r"(\d{3})Y", str(data.get("PatientAge", "")))
    start = str(data.get("AcquisitionDateTime", "") or "")
    annotations = data.get("WaveformAnnotationSequence") or []
    texts = [str(item.get("UnformattedTextValue", "")) for item in annotations]
    return {
        "patient_id": str(data.get("PatientID", "")),
        "age": int(age[1]) if age else None,
        "sex": str(data.get("PatientSex", "")),
        "start": start,
        "device": f"{data.get('Manufacturer', '')} {data.get('ManufacturerModelName', '')}".strip(),
        "comments": [text for text in texts if text],
    }
