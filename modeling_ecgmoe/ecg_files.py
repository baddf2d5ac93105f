"""From an ECG file to millivolts: `read_ecg` reads one record, `find_ecgs` finds the records in folders.

What a file does not say (sampling rate, unit, lead names) is asked for, never assumed. What it does say is believed
only as far as it is possible: a rate no recorder has, amplitudes no heart makes, or a header that contradicts its own
data are refused with an `EcgFileError`.

To add a format: write a function `(path, facts) -> Ecg` and enter its suffix in `READERS`.
"""

import warnings
import zipfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from .array_files import (
    DELIMITERS,
    looks_like_table,
    read_npy,
    read_npy_header,
    read_npz,
    read_table,
)
from .device_files import read_bdf, read_edf, read_ishne, read_kardia, read_mfer, read_scp
from .dicom_files import ECG_CLASSES, read_dicom
from .mat_files import looks_like_mat, read_mat
from .recording import Ecg, EcgFileError, EcgFileWarning, Facts, check_amplitude, shown
from .wfdb_files import find_header, read_header, read_wfdb
from .xml_files import looks_like_ecg_xml, read_xml

__all__ = ["Ecg", "EcgFileError", "EcgFileWarning", "find_ecgs", "find_others", "read_ecg"]

Reader = Callable[[Path, Facts], Ecg]


def read_ecg(
    path: str | Path,
    *,
    sampling_rate: float | None = None,
    lead_names: Sequence[str] | None = None,
    unit: str | None = None,
    with_metadata: bool = False,
) -> Ecg:
    """Read one ECG file.

    Read are WFDB, EDF(+), BDF(+), DICOM, SCP-ECG, ISHNE Holter, MFER, XML by HL7 (aECG), GE MUSE, Philips and Mortara,
    JSON by Kardia, MAT, NPY, NPZ, CSV and TSV. Where the first bytes show the format, they count and not the suffix.

    Args:
        path: the file; of a WFDB record its header, a signal file, or their common name without suffix.
        sampling_rate: in Hz, for files that do not give it.
        lead_names: one for each lead in file order, for files that do not name them.
        unit: "V", "mV", "uV" or "nV", for files that do not give it.
        with_metadata: also return what else the file says; it may identify the patient. `start` is text, mostly
            ISO 8601; recorders' files also have `patient_id`, `age` (years or None), `sex` ("M", "F", else empty or
            "U"), `device` and `comments` (statements and remarks), WFDB records `record_name` and `comments`.

    Warns:
        EcgFileWarning: every lead was scaled by itself, so that the file's millivolts are none.

    Raises:
        FileNotFoundError: there is no such file.
        EcgFileError: (a ValueError) the file cannot be read, contradicts itself or the arguments, lacks a fact that
            must be passed, or needs packages that are not installed.
    """
    path = _complete_path(Path(path))
    is_file = path.is_file()
    if not (is_file or path.exists()):
        raise FileNotFoundError(f"no such file: {path}")
    facts = Facts(sampling_rate, None if lead_names is None else tuple(lead_names), unit)
    try:
        reader = _reader_of(path) if is_file else None  # from a pipe nothing would ever come
        if reader is None:
            found = f"suffix {shown(path.suffix)}" if is_file else "a folder or device"
            raise EcgFileError(f"expected an ECG file ({', '.join(READERS)}), found {found}")
        ecg = reader(path, facts)
        remark = check_amplitude(ecg.signal)
    except OSError as error:
        raise EcgFileError(f"the file cannot be read: {error.strerror or shown(error)}") from error
    except MemoryError as error:
        raise EcgFileError("the recording does not fit into memory; cut it into shorter records") from error
    if remark:
        warnings.warn(f"{path.name}: {remark}", EcgFileWarning, stacklevel=2)
    return replace(ecg, metadata=ecg.metadata if with_metadata else {}, remark=remark)


def find_ecgs(paths: Iterable[str | Path]) -> list[Path]:
    """The ECG files behind a mixture of files and folders, each once.

    Folders are walked; files in them that are not ECGs are passed over, and the files of a WFDB record count as one,
    its header. A path that is named itself is always returned, so that its reader reports what is wrong with it, and
    so is what lies in a folder and can only be a damaged recording.

    Returns:
        in the order of `paths`, sorted within a folder.
    """
    found: dict[Path, Path] = {}  # a path however it is written, to the path as it was given
    for path in map(Path, paths):
        if not path.is_dir():
            path = _complete_path(path)
            found.setdefault(path.absolute(), path)
            continue
        candidates = sorted(p for p in path.rglob("*") if p.suffix.lower() in (*READERS, "") and p.is_file())
        headers = [p for p in candidates if p.suffix.lower() == ".hea"]
        segments = {p for header in headers for p in _segment_headers(header)}
        records = {header.with_suffix("") for header in headers}
        for candidate in candidates:
            is_signal_file = candidate.suffix.lower() in (".dat", ".mat") and candidate.with_suffix("") in records
            if not is_signal_file and candidate not in segments and _looks_like_ecg(candidate):
                found.setdefault(candidate.absolute(), candidate)
    return list(found.values())


def find_others(paths: Iterable[str | Path], found: Iterable[Path]) -> list[Path]:
    """The files in folders that belong to none of the recordings which `find_ecgs` found there.

    Hidden files are not counted, nor is what lies beside a WFDB header under its name, such as annotations.
    """
    files = {p.absolute() for folder in map(Path, paths) if folder.is_dir() for p in folder.rglob("*") if p.is_file()}
    records = {path.absolute() for path in found}
    # A header is a recording, or a segment of one.
    stems = {path.with_suffix("") for path in files if path.suffix.lower() == ".hea"}
    others = (path for path in files - records if path.with_suffix("") not in stems)
    return sorted(path for path in others if not path.name.startswith("."))


def _complete_path(path: Path) -> Path:
    """The header of a WFDB record that was named by another of its files or without a suffix; else the path itself."""
    if path.suffix.lower() in (".hea", ".dat", ".mat"):
        return find_header(path) or path
    if path.suffix.lower() in READERS or path.is_dir():
        return path
    return find_header(path.with_name(f"{path.name}.hea")) or path


def _reader_of(path: Path) -> Reader | None:
    """The reader of a file by what stands at its beginning, or by its suffix where that says nothing."""
    suffix = path.suffix.lower()
    if suffix not in _TEXT_SUFFIXES:
        with path.open("rb") as file:
            start = file.read(256)
        for position, magic, reader in SIGNATURES:
            if start[position:].startswith(magic):
                return reader
    return READERS.get(suffix)


def _segment_headers(header: Path) -> list[Path]:
    """The headers of the segments that belong to a multi-segment WFDB record."""
    try:
        with header.open("rb") as file:
            lines = file.read(4096).splitlines()
        record_line = next((line for line in lines if line.strip() and not line.lstrip().startswith(b"#")), b"")
        if b"/" not in record_line.partition(b" ")[0]:  # "name/segments"; most headers need not be parsed
            return []
        return [header.with_name(f"{name}{header.suffix}") for name, _ in read_header(header).segments if name != "~"]
    except (EcgFileError, OSError):
        return []


def _looks_like_ecg(path: Path) -> bool:
    """Whether a file that nobody named is worth reading, by its first bytes, if only to be told what is wrong."""
    suffix = path.suffix.lower()
    if suffix in _OWN_SUFFIXES:
        return True
    try:
        if suffix in DELIMITERS:
            return looks_like_table(path)
        with path.open("rb") as file:
            start = file.read(4096)
            if not start:
                return suffix in READERS
            reader = _reader_of(path)
            if reader is read_npy:
                file.seek(0)
                return len(read_npy_header(file)[0]) == 2
        if reader is read_npz:
            with zipfile.ZipFile(path) as archive:
                return "signal.npy" in archive.namelist()
        if reader is read_dicom:
            return ECG_CLASSES in start
        if reader is read_xml:
            return looks_like_ecg_xml(start)
        if reader is read_kardia:
            return b'"recordedAt"' in start
        if reader is read_mat:
            return looks_like_mat(path)
        return any(start[place:].startswith(magic) for place, magic, _ in SIGNATURES)
    except (EcgFileError, OSError, zipfile.BadZipFile):
        return suffix in READERS and suffix not in DELIMITERS


def _read_wfdb_file(path: Path, facts: Facts) -> Ecg:
    record = read_wfdb(path)
    for unit in set(record.units) if facts.unit is not None else ():
        facts.settle_unit(unit)
    names = facts.settle_names(record.names, record.signal.shape[0])
    metadata = {
        "record_name": record.header.record_name,
        "start": record.header.start,
        "comments": list(record.header.comments),
    }
    return Ecg(record.signal, facts.settle_rate(record.sampling_rate), names, metadata)


READERS: dict[str, Reader] = {
    ".hea": _read_wfdb_file,
    ".dat": _read_wfdb_file,
    ".mat": read_mat,  # beside a header a WFDB signal file
    ".npy": read_npy,
    ".npz": read_npz,
    **dict.fromkeys(DELIMITERS, read_table),
    ".edf": read_edf,
    ".bdf": read_bdf,
    ".dcm": read_dicom,
    ".dicom": read_dicom,
    ".scp": read_scp,
    ".ecg": read_ishne,
    ".xml": read_xml,
    ".mwf": read_mfer,
    ".mfer": read_mfer,
    ".json": read_kardia,
}
# What stands where in a file of a format. Older SCP-ECG and MFER files have nothing of the kind.
SIGNATURES: tuple[tuple[int, bytes, Reader], ...] = (
    (0, b"0       ", read_edf),
    (0, b"\xffBIOSEMI", read_bdf),
    (128, b"DICM", read_dicom),
    (16, b"SCPECG", read_scp),
    (0, b"ISHNE1.0", read_ishne),
    (0, b"\x93NUMPY", read_npy),
    (0, b"PK\x03\x04", read_npz),
    (0, b"MATLAB 5.0 MAT-file", read_mat),
    (0, b"\x89HDF", read_mat),
    (0, b"<?xml", read_xml),
)
_OWN_SUFFIXES = (".hea", ".edf", ".bdf", ".scp", ".ecg", ".mwf", ".mfer")  # of recordings alone
_TEXT_SUFFIXES = (".hea", *DELIMITERS)
