"""From an ECG file to millivolts: `read_ecg` reads one record, `find_ecgs` finds the records in folders.

What a file does not say (sampling rate, unit, lead names) is asked for, never assumed. What it does say is believed
only as far as it is possible: a rate no recorder has, amplitudes no heart makes, or a header that contradicts its own
data are refused with an `EcgFileError`.

To add a format: write a function `(path, facts) -> Ecg` and enter its suffix in `READERS`.
"""

import csv
import io
import re
import zipfile
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .leads import LEADS, find_lead
from .wfdb_files import MAX_VALUES, EcgFileError, millivolts_per, read_header, read_wfdb, shown

__all__ = ["Ecg", "EcgFileError", "find_ecgs", "read_ecg"]

MIN_SAMPLING_RATE = 50.0  # below, the QRS complex (up to 25 Hz) is lost; also catches a period given for a rate
MAX_SAMPLING_RATE = 10_000.0
# A lead's swing is the distance of the 2nd and 98th percentile. In folds 1 to 9 of PTB-XL the median swing of the
# leads lies between 0.14 and 3.3 mV, the largest between 0.37 and 13.4 mV: microvolts taken for millivolts give a
# median above 100, volts taken for millivolts a largest below 0.014.
MAX_MEDIAN_SWING_MV = 20.0
MIN_LARGEST_SWING_MV = 0.02

_MAX_TEXT_BYTES = 2**28
_UNIT_IN_BRACKETS = re.compile(r"(?P<name>.*?)\s*[\[(]\s*(?P<unit>[^\])]+?)\s*[\])]")
_SECONDS = {"s": 1.0, "sec": 1.0, "seconds": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6}


@dataclass(frozen=True, eq=False)
class Ecg:
    """One recording.

    Args:
        signal: float32 (leads, samples) in mV, NaN where missing.
        sampling_rate: in Hz.
        lead_names: one for each row of `signal`, spelled as in the file.
        metadata: what else the file says, empty unless asked for: it may identify the patient.
    """

    signal: np.ndarray
    sampling_rate: float
    lead_names: tuple[str, ...]
    metadata: dict[str, Any] = field(default_factory=dict)

    @property
    def duration_s(self) -> float:
        """Length of the recording in seconds."""
        return self.signal.shape[1] / self.sampling_rate


@dataclass(frozen=True)
class _Facts:
    """What the caller says about a file, None where it is left to the file."""

    sampling_rate: float | None = None
    lead_names: tuple[str, ...] | None = None
    unit: str | None = None

    def settle_rate(self, own: float | None) -> float:
        """The sampling rate, from the file or the caller, who must agree."""
        given = self.sampling_rate
        if own is not None and given is not None and abs(own - given) > 1e-3 * given:
            raise EcgFileError(f"its sampling rate is {own:g} Hz in the file and {given:g} Hz as passed; pass none")
        rate = own if own is not None else given
        if rate is None:
            raise EcgFileError("the file does not give its sampling rate; pass sampling_rate (--sampling_rate), in Hz")
        if not MIN_SAMPLING_RATE <= rate <= MAX_SAMPLING_RATE:
            raise EcgFileError(
                f"its sampling rate is {rate:g} Hz, expected {MIN_SAMPLING_RATE:g} to {MAX_SAMPLING_RATE:g} Hz; "
                "correct it"
            )
        return float(rate)

    def settle_names(self, own: Sequence[str] | None, num_leads: int) -> tuple[str, ...]:
        """The lead names, from the file or the caller; the caller may name what the file calls by no lead's name."""
        given = self.lead_names
        if own is not None and not any(own):
            own = None
        if given is not None and len(given) != num_leads:
            raise EcgFileError(f"{len(given)} lead names were passed for {num_leads} leads; pass one for each")
        if own is None and given is None:
            raise EcgFileError(
                f"the file does not name its {num_leads} leads; pass lead_names (--leads), in file order"
            )
        if own is None or given is None:
            return tuple((own or given) or ())
        for own_name, given_name in zip(own, given, strict=True):
            lead = find_lead(own_name)
            if lead is not None and lead != find_lead(given_name):
                raise EcgFileError(
                    f"the file names a lead {shown(own_name)}, passed was {shown(given_name)}; pass none"
                )
        return given

    def settle_unit(self, own: str | None) -> float:
        """How many mV one unit of the file is; file and caller must agree."""
        scales = {}
        for unit in (own, self.unit):
            if unit is not None:
                scale = millivolts_per(unit)
                if scale is None:
                    raise EcgFileError(f"unit {shown(unit)} is not a voltage; expected V, mV, uV or nV")
                scales[unit] = scale
        if not scales:
            raise EcgFileError("the file does not give its unit; pass unit (--unit): V, mV, uV or nV")
        if len(set(scales.values())) > 1:
            raise EcgFileError(f"its unit is {shown(own)} in the file and {shown(self.unit)} as passed; pass none")
        return next(iter(scales.values()))


def read_ecg(
    path: str | Path,
    *,
    sampling_rate: float | None = None,
    lead_names: Sequence[str] | None = None,
    unit: str | None = None,
    with_metadata: bool = False,
) -> Ecg:
    """Read one ECG file.

    Args:
        path: a WFDB record (header, signal file, or their common name without suffix), NPY, NPZ, CSV or TSV file.
        sampling_rate: in Hz, for files that do not give it.
        lead_names: one for each lead in file order, for files that do not name them.
        unit: "V", "mV", "uV" or "nV", for files that do not give it.
        with_metadata: also return what else the file says (comments, date); it may identify the patient.

    Raises:
        FileNotFoundError: there is no such file.
        EcgFileError: (a ValueError) the file cannot be read, contradicts itself or the arguments, or lacks a fact that
            must be passed.
    """
    path = _complete_path(Path(path))
    if not path.exists():
        raise FileNotFoundError(f"no such file: {path}")
    reader = READERS.get(path.suffix.lower())
    if reader is None or path.is_dir():
        found = "a folder" if path.is_dir() else f"suffix {shown(path.suffix)}"
        raise EcgFileError(f"expected an ECG file ({', '.join(READERS)}), found {found}")
    facts = _Facts(sampling_rate, None if lead_names is None else tuple(lead_names), unit)
    try:
        ecg = reader(path, facts)
    except OSError as error:
        raise EcgFileError(f"the file cannot be read: {error.strerror or shown(error)}") from error
    except MemoryError as error:
        raise EcgFileError("the recording does not fit into memory; cut it into shorter records") from error
    _check_amplitude(ecg.signal)
    return ecg if with_metadata else Ecg(ecg.signal, ecg.sampling_rate, ecg.lead_names)


def find_ecgs(paths: Iterable[str | Path]) -> list[Path]:
    """The ECG files behind a mixture of files and folders, each once.

    Folders are walked; files in them that are not ECGs are passed over, and the files of a WFDB record count as one,
    its header. A path that is named itself is always returned, so that its reader reports what is wrong with it.

    Returns:
        in the order of `paths`, sorted within a folder.
    """
    found: dict[Path, Path] = {}  # a path however it is written, to the path as it was given
    for path in map(Path, paths):
        if not path.is_dir():
            path = _complete_path(path)
            found.setdefault(path.absolute(), path)
            continue
        candidates = sorted(p for p in path.rglob("*") if p.suffix.lower() in READERS and p.is_file())
        segments = {p for header in candidates if header.suffix == ".hea" for p in _segment_headers(header)}
        for candidate in candidates:
            if candidate not in segments and _looks_like_ecg(candidate):
                found.setdefault(candidate.absolute(), candidate)
    return list(found.values())


def _complete_path(path: Path) -> Path:
    """The header of a WFDB record that was named by another of its files or without a suffix; else the path itself."""
    header = path.with_suffix(".hea") if path.suffix.lower() in _WFDB_SUFFIXES else Path(f"{path}.hea")
    has_reader = path.suffix.lower() in READERS and path.suffix.lower() not in _WFDB_SUFFIXES
    return header if not has_reader and not path.is_dir() and header.is_file() else path


def _segment_headers(header: Path) -> list[Path]:
    """The headers of the segments that belong to a multi-segment WFDB record."""
    try:
        with header.open("rb") as file:
            lines = file.read(4096).splitlines()
        record_line = next((line for line in lines if line.strip() and not line.lstrip().startswith(b"#")), b"")
        if b"/" not in record_line.partition(b" ")[0]:  # "name/segments"; most headers need not be parsed
            return []
        return [header.with_name(f"{name}.hea") for name, _ in read_header(header).segments if name != "~"]
    except (EcgFileError, OSError):
        return []


def _looks_like_ecg(path: Path) -> bool:
    """Whether a file that nobody named is worth reading: any header, any array of two axes, any table of leads."""
    suffix = path.suffix.lower()
    try:
        if suffix == ".hea":
            return True
        if suffix == ".npy":
            with path.open("rb") as file:
                return len(_read_npy_header(file)[0]) == 2
        if suffix == ".npz":
            with zipfile.ZipFile(path) as archive:
                return "signal.npy" in archive.namelist()
        if suffix in _DELIMITERS:
            with path.open("rb") as file:
                line = file.readline(2**16).decode("utf-8-sig")
            cells = _split_line(line, suffix)
            return any(find_lead(_split_unit(c)[0]) for c in cells) and not any(_is_number(c) for c in cells)
    except (EcgFileError, OSError, zipfile.BadZipFile, UnicodeDecodeError):
        return False
    return False  # .dat and .mat are reached through their headers


def _check_amplitude(signal: np.ndarray) -> None:
    """Refuse amplitudes that only a wrong unit or gain explains.

    Raises:
        EcgFileError: see `MAX_MEDIAN_SWING_MV` and `MIN_LARGEST_SWING_MV`.
    """
    if signal.shape[0] == 0 or signal.shape[1] == 0:
        raise EcgFileError("it holds no samples; record or copy it again")
    if np.isinf(signal).any():
        raise EcgFileError("it holds infinite values; mark missing samples as NaN")
    sample = signal[:, :: max(1, signal.shape[1] // 500)]
    sample = sample[np.isfinite(sample).any(axis=1)]
    if not sample.size:
        return
    percentile = np.nanpercentile if np.isnan(sample).any() else np.percentile
    low, high = percentile(sample, [2, 98], axis=1)
    swings = (high - low)[high > low]
    if not swings.size:
        return
    median, largest = float(np.median(swings)), float(swings.max())
    if median > MAX_MEDIAN_SWING_MV:
        raise EcgFileError(f"its leads swing by {median:.3g} mV, an ECG's by 0.1 to 5 mV; is the gain or unit right?")
    if largest < MIN_LARGEST_SWING_MV:
        raise EcgFileError(f"no lead swings by more than {largest * 1000:.3g} uV; is the gain or unit right?")


def _read_wfdb_file(path: Path, facts: _Facts) -> Ecg:
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


def _read_npy_header(file: Any) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, order and type of an NPY stream, its position left at the first value.

    Raises:
        EcgFileError: this is not an NPY file.
    """
    try:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        return read(file)
    except Exception as error:  # numpy lets through whatever its parsing of a damaged header runs into
        raise EcgFileError("this is not an NPY array; write it with numpy.save") from error


def _parse_npy(content: bytes) -> np.ndarray:
    """An array from the bytes of an NPY file, its size compared with what the header promises; pickles are refused."""
    file = io.BytesIO(content)
    shape, is_fortran, dtype = _read_npy_header(file)
    if dtype.kind not in "fiuU" or dtype.itemsize == 0 or min(shape, default=0) < 0:
        raise EcgFileError(
            f"expected an array of numbers, found shape {shape} of type {shown(dtype)}; save plain numbers"
        )
    num_values, found = 1, len(content) - file.tell()
    for length in shape:
        num_values *= length
    if num_values * dtype.itemsize != found:
        raise EcgFileError(
            f"the array's header promises {num_values * dtype.itemsize} bytes, found {found}; save it again"
        )
    return np.frombuffer(content, dtype, num_values, file.tell()).reshape(shape, order="F" if is_fortran else "C")


def _read_npy(path: Path, facts: _Facts) -> Ecg:
    if path.stat().st_size > 8 * MAX_VALUES:
        raise EcgFileError(f"it is larger than {8 * MAX_VALUES} bytes; cut it into shorter records")
    return _from_array(_parse_npy(path.read_bytes()), facts, None, None, None)


def _read_npz(path: Path, facts: _Facts) -> Ecg:
    """An archive of `signal` and, as far as known, `sampling_rate`, `lead_names`, `unit`."""
    arrays = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for info in archive.infolist():
                name = info.filename.removesuffix(".npy")
                if name not in ("signal", "sampling_rate", "lead_names", "unit"):
                    continue
                if info.file_size > 8 * MAX_VALUES:
                    raise EcgFileError(f"{name} is larger than {8 * MAX_VALUES} bytes; cut it into shorter records")
                with archive.open(info) as member:
                    arrays[name] = _parse_npy(member.read(info.file_size))
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, OSError, zlib.error) as error:
        raise EcgFileError(f"this is not a whole NPZ archive ({shown(error)}); save it with numpy.savez") from error
    if "signal" not in arrays:
        raise EcgFileError("the archive holds no array named 'signal'; save it with numpy.savez(path, signal=...)")
    try:
        rate = float(arrays["sampling_rate"].item()) if "sampling_rate" in arrays else None
        unit = str(arrays["unit"].item()) if "unit" in arrays else None
    except ValueError as error:
        raise EcgFileError("sampling_rate must be one number and unit one text in the archive") from error
    names = [str(name) for name in arrays["lead_names"].ravel()] if "lead_names" in arrays else None
    return _from_array(arrays["signal"], facts, rate, names, unit)


def _from_array(
    array: np.ndarray, facts: _Facts, rate: float | None, names: list[str] | None, unit: str | None
) -> Ecg:
    if array.ndim != 2 or array.dtype.kind not in "fiu" or array.size == 0:
        raise EcgFileError(
            f"expected numbers of shape (leads, samples), found shape {array.shape}, type {array.dtype}"
        )
    num_names = len(names or facts.lead_names or ())
    if num_names and num_names != array.shape[0] and num_names == array.shape[1]:
        array = array.T  # (samples, leads): the names leave no doubt
    settled = facts.settle_names(names, array.shape[0])
    scale = facts.settle_unit(unit)
    with np.errstate(over="ignore"):
        signal = np.multiply(array, scale, dtype=np.float64).astype(np.float32)
    return Ecg(signal, facts.settle_rate(rate), settled)


def _split_line(line: str, suffix: str) -> list[str]:
    delimiter = max(_DELIMITERS[suffix], key=line.count)
    return [cell.strip() for cell in next(csv.reader([line.strip("\r\n")], delimiter=delimiter), [])]


def _split_unit(cell: str) -> tuple[str, str | None]:
    match = _UNIT_IN_BRACKETS.fullmatch(cell)
    return (match["name"], match["unit"]) if match else (cell, None)


def _is_number(cell: str) -> bool:
    try:
        float(cell.replace(",", "."))
    except ValueError:
        return False
    return True


def _read_table(path: Path, facts: _Facts) -> Ecg:
    """A table with one column a lead; a column "time [s]" gives the sampling rate, "I [uV]" name and unit."""
    if path.stat().st_size > _MAX_TEXT_BYTES:
        raise EcgFileError(f"it is larger than {_MAX_TEXT_BYTES} bytes; cut it into shorter records")
    try:
        lines = path.read_bytes().decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise EcgFileError("it is not text in UTF-8; save it again as UTF-8") from error
    lines = [line for line in lines if line.strip() and not line.startswith("#")]
    if not lines:
        raise EcgFileError("it holds no samples; record or copy it again")
    suffix = path.suffix.lower()
    header = _split_line(lines[0], suffix)
    delimiter = max(_DELIMITERS[suffix], key=lines[0].count)
    if all(_is_number(cell) for cell in header):
        if facts.lead_names is None:
            raise EcgFileError("its first line names no leads; pass lead_names (--leads), one for each column")
        # The running numbers 0, 1, 2... that data frames write for unnamed columns are a header, not a sample.
        is_running = header == [str(i) for i in range(len(header))]
        values = _parse_rows(lines[is_running:], delimiter, len(header))
        return _from_array(values, facts, None, None, None)
    values = _parse_rows(lines[1:], delimiter, len(header))
    names_units = [_split_unit(cell) for cell in header]
    columns = [i for i, (name, _) in enumerate(names_units) if find_lead(name) is not None]
    if not columns:
        raise EcgFileError(f"its columns {shown(header)} name none of the leads {', '.join(LEADS)}; rename them")
    units = {unit for i in columns if (unit := names_units[i][1]) is not None}
    if len(units) > 1:
        raise EcgFileError(f"its columns have several units {sorted(units)}; write all leads in one unit")
    rate = next((r for i, (name, unit) in enumerate(names_units) if (r := _rate_of(name, unit, values[i]))), None)
    names = [names_units[i][0] for i in columns]
    return _from_array(values[columns], facts, rate, names, next(iter(units), None))


def _parse_rows(lines: list[str], delimiter: str, num_columns: int) -> np.ndarray:
    """The values of a table, (columns, rows); empty cells are NaN.

    Raises:
        EcgFileError: a row has another number of cells, or a cell is not a number.
    """
    if not lines:
        raise EcgFileError("it holds no samples; record or copy it again")
    values = np.empty((len(lines), num_columns))
    for number, line in enumerate(lines):
        cells = line.split(delimiter)
        if len(cells) != num_columns:
            raise EcgFileError(
                f"sample {number + 1} has {len(cells)} cells, the first line {num_columns}; repair the table"
            )
        try:
            values[number] = [
                float(cell.replace(",", ".")) if (cell := text.strip().strip('"')) else np.nan for text in cells
            ]
        except ValueError as error:
            raise EcgFileError(f"sample {number + 1} has a cell that is not a number: {shown(line)}") from error
    return values.T


def _rate_of(name: str, unit: str | None, values: np.ndarray) -> float | None:
    """The sampling rate from a column of times, None where it is not one or its unit is not known."""
    match = re.fullmatch(r"(time|t|timestamp)(?:_(s|ms|us))?", name.strip().lower())
    unit = unit or (match[2] if match else None)
    if match is None or unit not in _SECONDS or len(values) < 2:
        return None
    steps = np.diff(values)
    step = float(np.median(steps))
    if not (np.isfinite(steps).all() and step > 0 and np.abs(steps - step).max() <= 0.5 * step):
        raise EcgFileError("its times do not rise evenly; cut the recording at the gap")
    return (len(values) - 1) / (float(values[-1] - values[0]) * _SECONDS[unit])


_DELIMITERS = {".csv": (",", ";", "\t"), ".tsv": ("\t", ",", ";")}
_WFDB_SUFFIXES = (".hea", ".dat", ".mat")
READERS: dict[str, Callable[[Path, _Facts], Ecg]] = {
    **dict.fromkeys(_WFDB_SUFFIXES, _read_wfdb_file),
    ".npy": _read_npy,
    ".npz": _read_npz,
    **dict.fromkeys(_DELIMITERS, _read_table),
}
