"""Binary files of recorders: EDF and BDF, SCP-ECG, ISHNE Holter, MFER, and the JSON of AliveCor's Kardia.

The `ecgdatakit` library parses them (BDF: `pyedflib`). Before it is called, the sizes that a header promises are
compared with the file, so that no header takes memory or time that its file does not account for; after it, what it
leaves undecided (missing samples, gaps, leads that start late, names it made up) is decided here.
"""

import json
import re
import struct
import threading
import warnings
from binascii import crc_hqx
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from .leads import find_lead
from .recording import Ecg, EcgFileError, Facts, millivolts_per, shown

MAX_DEVICE_BYTES = 2**27  # three leads for 24 hours at 250 Hz in 16 bits
MAX_SCP_BYTES = 2**20  # SCP-ECG up to version 2 holds short recordings: 12 leads for 10 s take 20 to 300 KiB
MAX_JSON_BYTES = 2**25
# Decoded bit by bit in Python, some 100,000 samples a second; 12 leads for 10 s at 1000 Hz are 120,000.
_MAX_HUFFMAN_VALUES = 2**19
_MAX_BEATS_TIMES_LEADS = 2**16
_MAX_MFER_CHANNELS = 256
_MAX_MFER_DEFINITIONS = 2**16
_INVALID_16 = -(2**15)
# EDF+ writes the kind of a signal before its name.
_OTHER_KIND = re.compile(r"(EEG|EOG|ERG|EMG|MEG|MCG|EP|TEMP|RESP|SAO2|SPO2|PLETH|LIGHT|SOUND|EVENT)\b", re.IGNORECASE)
_EEG_ELECTRODES = {"FP1", "FP2", "F3", "F4", "F7", "F8", "FZ", "CZ", "PZ", "P3", "P4", "O1", "O2", "T3", "T4"}
_parsing = threading.Lock()


@contextmanager
def parsing(kind: str, path: Path) -> Iterator[None]:
    """What a parser of a library raises becomes an `EcgFileError`; its warnings are not shown.

    One thread at a time: Python's list of warning filters belongs to the process.
    """
    with _parsing, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        except ImportError as error:
            raise EcgFileError(f'{kind} files need more packages: pip install "ecg-moe[formats]"') from error
        except (EcgFileError, OSError, MemoryError):
            raise
        except Exception as error:  # the libraries raise whatever their parsing of a damaged file runs into
            reason = shown(f"{type(error).__name__}: {error}".replace(str(path), "it"), 160)
            raise EcgFileError(f"this {kind} file cannot be parsed ({reason}); export it again") from error


def read_bytes(path: Path, limit: int) -> bytes:
    """The content of a file of at most `limit` bytes."""
    size = path.stat().st_size
    if size > limit:
        raise EcgFileError(f"it is larger than {limit} bytes; cut it into shorter records")
    return path.read_bytes()


def to_ecg(
    record: Any,
    facts: Facts,
    *,
    rates: Sequence[float] | None = None,
    names: Sequence[str] | None = None,
    start_samples: Sequence[int] | None = None,
) -> Ecg:
    """The voltage leads of a record of `ecgdatakit`.

    Args:
        record: as its parsers return it, samples raw or physical.
        facts: what the caller says.
        rates: exact sampling rates in Hz, one for each lead, where the library's are rounded.
        names: one for each lead, where the library made its own up.
        start_samples: of each lead, where they do not start together; the missing ones are NaN.

    Raises:
        EcgFileError: no lead is in volts, or the leads do not fit together.
    """
    leads = list(record.leads)
    names = [lead.label for lead in leads] if names is None else list(names)
    rates = [float(lead.sampling_rate) for lead in leads] if rates is None else list(rates)
    starts = [0] * len(leads) if start_samples is None else list(start_samples)
    units = [lead.resolution_unit if lead.is_raw else lead.units for lead in leads]
    chosen = choose_channels(names, units, rates)
    length = max(starts[i] + len(leads[i].samples) for i in chosen)
    if any(starts[i] + len(leads[i].samples) < length for i in chosen) and start_samples is None:
        lengths = sorted({len(leads[i].samples) for i in chosen})
        raise EcgFileError(f"its leads have different numbers of samples {lengths}; copy or export it again")
    signal = np.full((len(chosen), length), np.nan, dtype=np.float32)
    for row, i in enumerate(chosen):
        lead = leads[i]
        gain, offset = (lead.resolution, lead.offset) if lead.is_raw and units[i] else (1.0, 0.0)
        if not (np.isfinite([gain, offset]).all() and gain != 0):
            raise EcgFileError(f"lead {shown(names[i])} has no usable gain; export it again")
        scale = facts.settle_unit(units[i] or None)
        with np.errstate(over="ignore", invalid="ignore"):
            signal[row, starts[i] : starts[i] + len(lead.samples)] = (lead.samples * gain + offset) * scale
    settled = facts.settle_names([names[i] for i in chosen], len(chosen))
    return Ecg(signal, facts.settle_rate(rates[chosen[0]]), settled, describe(record))


def choose_channels(names: Sequence[str], units: Sequence[str], rates: Sequence[float]) -> list[int]:
    """The channels of a recording of many signals that are ECG leads of one sampling rate.

    A channel without a unit counts as a voltage, so that the caller is asked for the unit. Where the rates differ,
    those that are named like leads decide.

    Raises:
        EcgFileError: there is none, or the leads have different rates.
    """
    is_eeg = bool(_EEG_ELECTRODES & {name.upper() for name in names})  # then C3 and C4 are electrodes, not V3 and V4
    chosen = [
        i
        for i, (name, unit) in enumerate(zip(names, units, strict=True))
        if (not unit or millivolts_per(unit) is not None) and not _OTHER_KIND.match(name)
        if not is_eeg or find_lead(name) is None or not name.upper().startswith("C")
    ]
    if is_eeg:
        chosen = [i for i in chosen if find_lead(names[i]) or re.search(r"ECG|EKG", names[i], re.IGNORECASE)]
    if not chosen:
        listed = shown([f"{name} [{unit}]" for name, unit in zip(names, units, strict=True)])
        raise EcgFileError(f"no signal is an ECG in V, mV, uV or nV (signals in the file: {listed})")
    if len({rates[i] for i in chosen}) > 1:
        chosen = [i for i in chosen if find_lead(names[i]) is not None] or chosen
    if len({rates[i] for i in chosen}) > 1:
        found = ", ".join(f"{shown(names[i])} {rates[i]:g} Hz" for i in chosen[:4])
        raise EcgFileError(f"its leads have different sampling rates ({found}); resample it to one rate")
    if any(not units[i] for i in chosen) and any(find_lead(names[i]) and units[i] for i in chosen):
        chosen = [i for i in chosen if units[i] or find_lead(names[i])]
    return chosen


def describe(record: Any) -> dict[str, Any]:
    """The metadata of a record of `ecgdatakit`, as `read_ecg` documents it."""
    patient, recording, device = record.patient, record.recording, record.recording.device
    comments = [" ".join(filter(None, statement)) for statement in record.interpretation.statements]
    comments += [str(record.annotations[key]) for key in ("comments", "comment") if key in record.annotations]
    comments += [event["text"] for event in record.raw_metadata.get("edf_annotations", [])]
    return {
        "patient_id": patient.patient_id,
        "age": patient.age,
        "sex": patient.sex,
        "start": recording.date.isoformat() if recording.date else "",
        "device": " ".join(filter(None, (device.manufacturer, device.model or device.name))),
        "comments": comments,
    }


def read_edf(path: Path, facts: Facts) -> Ecg:
    """EDF and EDF+; the gaps of a discontinuous EDF+ are NaN."""
    _check_edf(path, bytes_per_value=2)
    with parsing("EDF", path):
        from ecgdatakit.parsing.parsers.edf import EDFParser

        record = EDFParser().parse(path)
        exact = record.raw_metadata.get("exact_sampling_rates", {})
        rates = [exact.get(lead.label, float(lead.sampling_rate)) for lead in record.leads]
        onsets = record.raw_metadata.get("record_onsets", [])
        if len(onsets) == record.raw_metadata["num_records"]:
            seconds = onsets[-1] - onsets[0] + record.raw_metadata["record_duration"]
            if sum(rates) * seconds > MAX_DEVICE_BYTES // 2:
                raise EcgFileError(f"with its gaps it is {seconds:.3g} s long; cut it into shorter records")
            for lead, rate in zip(record.leads, rates, strict=True):
                lead.samples = _spread(lead.samples, np.array(onsets), rate)
        return to_ecg(record, facts, rates=rates)


def _check_edf(path: Path, bytes_per_value: int) -> None:
    """Compare the header of an EDF or BDF file with its size.

    Raises:
        EcgFileError: it is no such file, holds less than it promises, or is too large.
    """
    size = path.stat().st_size
    if size > MAX_DEVICE_BYTES:
        raise EcgFileError(f"it is larger than {MAX_DEVICE_BYTES} bytes; cut it into shorter records")
    with path.open("rb") as file:
        header = file.read(256)
        try:
            num_records, num_signals = int(header[236:244]), int(header[252:256])
            if not 0 < num_signals <= size // 256:
                raise ValueError(f"{num_signals} signals")
            file.seek(256 + 216 * num_signals)
            counts = [int(file.read(8)) for _ in range(num_signals)]
        except ValueError as error:
            raise EcgFileError(f"this is not an EDF or BDF header ({shown(error)})") from error
    found = max(0, size - 256 * (num_signals + 1)) // (bytes_per_value * max(1, sum(counts)))
    if min(counts) <= 0 or num_records < -1 or num_records == 0 or found == 0:
        raise EcgFileError("it holds no samples; record or copy it again")
    if found < num_records:
        raise EcgFileError(
            f"the header promises {num_records} data records, found {found}; it is cut off, copy it again"
        )


def _spread(samples: np.ndarray, onsets_s: np.ndarray, rate: float) -> np.ndarray:
    """The samples of data records at the places of their onsets, NaN between them."""
    starts = np.round((onsets_s - onsets_s[0]) * rate)
    per_record = len(samples) // len(starts)
    if np.abs(starts - np.arange(len(starts)) * per_record).max() <= 1:
        return samples
    if (np.diff(starts) < per_record).any():
        raise EcgFileError("its data records overlap; export it again")
    length = int(starts[-1]) + per_record
    spread = np.full(length, np.nan)
    spread[(starts.astype(np.int64)[:, None] + np.arange(per_record)).ravel()] = samples
    return spread


def read_bdf(path: Path, facts: Facts) -> Ecg:
    """BDF and BDF+, the 24-bit sister of EDF."""
    _check_edf(path, bytes_per_value=3)
    with parsing("BDF", path):
        from pyedflib import EdfReader

        with EdfReader(str(path)) as file:
            headers = file.getSignalHeaders()
            names, units = ([str(header[key]) for header in headers] for key in ("label", "dimension"))
            rates = [float(header["sample_frequency"]) for header in headers]
            chosen = choose_channels(names, units, rates)
            lengths = {int(file.getNSamples()[i]) for i in chosen}
            if len(lengths) != 1:
                raise EcgFileError("its leads have different numbers of samples; export it again")
            scales = [facts.settle_unit(units[i] or None) for i in chosen]
            signal = np.stack([file.readSignal(i) * scale for i, scale in zip(chosen, scales, strict=True)])
            metadata = {
                "patient_id": file.getPatientCode(),
                "age": None,
                "sex": {"Male": "M", "Female": "F"}.get(file.getSex(), ""),
                "start": file.getStartdatetime().isoformat(),
                "device": file.getEquipment(),
                "comments": [str(text) for text in file.readAnnotations()[2]],
            }
        settled = facts.settle_names([names[i] for i in chosen], len(chosen))
        return Ecg(signal.astype(np.float32), facts.settle_rate(rates[chosen[0]]), settled, metadata)


def read_scp(path: Path, facts: Facts) -> Ecg:
    """SCP-ECG (EN 1064, ISO 11073-91064) up to version 2, Huffman codes and reference beats undone.

    Bimodal compression with decimated samples and the long-term Section 12 of version 3 are refused: the library does
    not undo them.
    """
    content = read_bytes(path, MAX_SCP_BYTES)
    with parsing("SCP-ECG", path):
        from ecgdatakit.parsing.parsers.scp_ecg import SCPECGParser

        _check_scp(content)
        record = SCPECGParser().parse(path)
        # Leads of 1 to 4 s and 3 to 6 s, say, of a recording that a printer cut into columns.
        starts = [int(lead.annotations.get("start_sample", 1)) - 1 for lead in record.leads]
        starts = [start - min(starts) for start in starts]
        if max(starts) > _MAX_HUFFMAN_VALUES:
            raise EcgFileError(f"a lead starts {max(starts)} samples after another; copy it again")
        ragged = len({(s, len(lead.samples)) for s, lead in zip(starts, record.leads, strict=True)}) > 1
        return to_ecg(record, facts, start_samples=starts if ragged else None)


def _check_scp(content: bytes) -> None:
    """Compare what the sections of an SCP-ECG record promise with their bytes, and the record with its checksum.

    Raises:
        EcgFileError: they do not agree.
        struct.error: it is cut off.
    """
    size, length = struct.unpack_from("<I", content, 2)[0], struct.unpack_from("<I", content, 10)[0]
    if not 22 <= size <= len(content):
        raise EcgFileError(f"the header promises {size} bytes, found {len(content)}; it is cut off, copy it again")
    stored = struct.unpack_from("<H", content)[0]
    if stored and stored != crc_hqx(content[2:size], 0xFFFF):
        raise EcgFileError("its checksum is wrong, so it is damaged; copy it again")
    sections = {}
    for position in range(22, min(6 + length, size) - 9, 10):
        number, section_size, index = struct.unpack_from("<HII", content, position)
        sections[number] = content[index + 15 : max(0, index - 1) + section_size]
    leads, rhythm, beats, cuts = (sections.get(number, b"") for number in (3, 6, 5, 4))
    num_leads = leads[0] if leads else 0
    samples_per_byte = 8 if 2 in sections else 0.5
    counts = [
        1 + last - first for first, last in (struct.unpack_from("<II", leads, 2 + 9 * i) for i in range(num_leads))
    ]
    reference = [0] * num_leads
    if beats and cuts:
        length_ms, interval_us = struct.unpack_from("<H", cuts)[0], struct.unpack_from("<H", beats, 2)[0]
        reference = [round(1000 * length_ms / max(1, interval_us))] * num_leads
        if struct.unpack_from("<H", cuts, 4)[0] * num_leads > _MAX_BEATS_TIMES_LEADS:
            raise EcgFileError("it promises more beats than a short recording holds; copy it again")
    for section, promised in ((rhythm, counts), (beats, reference)):
        sizes = struct.unpack_from(f"<{num_leads}H", section, 6) if section else [0] * num_leads
        for count, num_bytes in zip(promised, sizes, strict=True):
            if section and count > samples_per_byte * num_bytes:
                raise EcgFileError(
                    f"the header promises {count} samples of a lead in {num_bytes} bytes; copy it again"
                )
        if sum(promised) > _MAX_HUFFMAN_VALUES:
            raise EcgFileError(f"it holds {sum(promised)} values, more than {_MAX_HUFFMAN_VALUES}; cut it")


def read_ishne(path: Path, facts: Facts) -> Ecg:
    """ISHNE Holter files; -32768, the standard's mark of a lead fault, becomes NaN.

    The number of samples in the header is not compared with the file: recorders write it in samples, in values, or as
    the capacity of the card.
    """
    if path.stat().st_size > MAX_DEVICE_BYTES:
        raise EcgFileError(f"it is larger than {MAX_DEVICE_BYTES} bytes; cut it into shorter records")
    with parsing("ISHNE Holter", path):
        from ecgdatakit.parsing.parsers.ishne_holter import ISHNEHolterParser

        record = ISHNEHolterParser().parse(path)
        for lead in record.leads:
            lead.samples[lead.samples == _INVALID_16] = np.nan
        # "Lead 1", which the library calls a lead without a name, would be taken for lead I.
        names = ["" if lead.label.startswith("Lead ") else lead.label for lead in record.leads]
        return to_ecg(record, facts, names=names)


def read_mfer(path: Path, facts: Facts) -> Ecg:
    """MFER (ISO 22077), the format of Japanese recorders, uncompressed."""
    content = read_bytes(path, MAX_DEVICE_BYTES)
    with parsing("MFER", path):
        from ecgdatakit.parsing.parsers.mfer import MFERParser

        _check_mfer(content)
        record = MFERParser().parse(path)
        found = record.raw_metadata
        frames = [frame for frame in found["frames"] if frame["waveform_type"] != 9]  # 9 is a dominant beat
        ends = [frame["pointer"] + frame["samples"] for frame in frames]
        pointers = [frame["pointer"] for frame in frames]
        if not record.leads or pointers[1:] != ends[:-1]:
            raise EcgFileError("its frames do not follow each other without a gap; export it in one frame")
        if sum(frame["samples"] for frame in frames) != max(len(lead.samples) for lead in record.leads):
            raise EcgFileError("its frames differ in channels, rate or scale; export them apart")
        stated = found.get("sampling_rate_stated", True)
        rates = found["sampling_rates"]
        # "ECG1", as the standard calls a channel of a monitor, would be taken for lead I.
        names = ["" if re.match(r"ECG\d|Ch\d|Code\d", lead.label) else lead.label for lead in record.leads]
        if not stated:
            facts.settle_rate(None)  # asks for it
        return to_ecg(record, facts, rates=rates if stated else [facts.settle_rate(None)] * len(rates), names=names)


def _check_mfer(content: bytes) -> None:
    """Refuse numbers of channels and definitions that no ECG has: the library makes a table for each of them.

    Raises:
        EcgFileError: they are.
        IndexError: it is cut off.
    """
    position, order = 0, "big"
    for _ in range(_MAX_MFER_DEFINITIONS):
        if position + 1 >= len(content):
            return
        tag, length = content[position], content[position + 1]
        if tag == 0:  # padding
            position += 1
            continue
        if tag == 0x80:  # the end
            return
        position += 2
        if tag == 0x3F:  # a channel's own definitions: its number stands between tag and length
            while length & 0x80:
                length, position = content[position], position + 1
            length, position = content[position], position + 1
        if length == 0x80:  # of indefinite length: its content follows
            continue
        if length > 0x80:
            width = length & 0x7F
            length, position = int.from_bytes(content[position : position + width], "big"), position + width
        value = content[position : position + min(length, 8)]
        if tag == 0x01:
            order = "little" if value[:1] == b"\x01" else "big"
        if tag == 0x05 and int.from_bytes(value, "big" if order == "big" else "little") > _MAX_MFER_CHANNELS:
            raise EcgFileError(f"it promises more than {_MAX_MFER_CHANNELS} channels; export it again")
        if tag != 0x67:  # of a set the content follows
            position += length
    raise EcgFileError(f"it has more than {_MAX_MFER_DEFINITIONS} definitions; export it again")


def read_kardia(path: Path, facts: Facts) -> Ecg:
    """Recordings of AliveCor's Kardia as its interface gives them, JSON; the unfiltered signal."""
    read_bytes(path, MAX_JSON_BYTES)
    with parsing("Kardia JSON", path):
        from ecgdatakit.parsing.parsers.alivecor_kardia import AliveCorKardiaParser

        record = AliveCorKardiaParser().parse(path)
        block = json.loads(path.read_bytes())["data"]["raw"]
        return to_ecg(record, facts, rates=[float(block["frequency"])] * len(record.leads))
