"""Arrays and tables: NPY, NPZ, CSV and TSV."""

import csv
import io
import lzma
import re
import sys
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from .leads import LEADS, find_lead
from .recording import MAX_VALUES, Ecg, EcgFileError, Facts, shown

_MAX_TEXT_BYTES = 2**28
_UNIT_IN_BRACKETS = re.compile(r"(?P<name>.*?)\s*[\[(]\s*(?P<unit>[^\])]+?)\s*[\])]")
_SECONDS = {"s": 1.0, "sec": 1.0, "seconds": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6}
DELIMITERS = {".csv": (",", ";", "\t"), ".tsv": ("\t", ",", ";")}


def read_npy_header(file: Any) -> tuple[tuple[int, ...], bool, np.dtype]:
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
    shape, is_fortran, dtype = read_npy_header(file)
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
    array = np.frombuffer(content, dtype, num_values, file.tell())
    if dtype.kind == "U" and (array.view(f"{dtype.byteorder}u4".replace("=", "")) > sys.maxunicode).any():
        raise EcgFileError("the array holds characters that do not exist; save it again")
    return array.reshape(shape, order="F" if is_fortran else "C")


def read_npy(path: Path, facts: Facts) -> Ecg:
    if path.stat().st_size > 8 * MAX_VALUES:
        raise EcgFileError(f"it is larger than {8 * MAX_VALUES} bytes; cut it into shorter records")
    return ecg_of_array(_parse_npy(path.read_bytes()), facts, None, None, None)


def read_npz(path: Path, facts: Facts) -> Ecg:
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
    except (
        zipfile.BadZipFile,
        NotImplementedError,
        RuntimeError,
        EOFError,
        OSError,
        zlib.error,
        lzma.LZMAError,
    ) as error:
        raise EcgFileError(f"this is not a whole NPZ archive ({shown(error)}); save it with numpy.savez") from error
    if "signal" not in arrays:
        raise EcgFileError("the archive holds no array named 'signal'; save it with numpy.savez(path, signal=...)")
    try:
        rate = float(arrays["sampling_rate"].item()) if "sampling_rate" in arrays else None
        unit = str(arrays["unit"].item()) if "unit" in arrays else None
    except ValueError as error:
        raise EcgFileError("sampling_rate must be one number and unit one text in the archive") from error
    names = [str(name) for name in arrays["lead_names"].ravel()] if "lead_names" in arrays else None
    return ecg_of_array(arrays["signal"], facts, rate, names, unit)


def ecg_of_array(
    array: np.ndarray, facts: Facts, rate: float | None, names: list[str] | None, unit: str | None
) -> Ecg:
    if array.ndim != 2 or array.dtype.kind not in "fiu" or array.size == 0:
        raise EcgFileError(
            f"expected numbers of shape (leads, samples), found shape {array.shape}, type {array.dtype}"
        )
    num_names = len(names or facts.lead_names or ())
    if num_names and num_names != array.shape[0] and num_names == array.shape[1]:
        array = array.T  # (samples, leads): the names leave no doubt
    # Without names as many as the shorter side, since (samples, leads) is common.
    num_leads = array.shape[0] if num_names else min(array.shape)
    settled_rate, settled, scale = facts.settle(rate, names, num_leads, unit)
    with np.errstate(over="ignore", invalid="ignore"):
        signal = np.multiply(array, scale, dtype=np.float64).astype(np.float32)
    return Ecg(signal, settled_rate, settled)


def _split_line(line: str, suffix: str) -> list[str]:
    delimiter = max(DELIMITERS[suffix], key=line.count)
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


def read_table(path: Path, facts: Facts) -> Ecg:
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
    delimiter = max(DELIMITERS[suffix], key=lines[0].count)
    if all(_is_number(cell) for cell in header):
        if facts.lead_names is None:
            raise EcgFileError("its first line names no leads; pass lead_names (--leads), one for each column")
        # The running numbers 0, 1, 2... that data frames write for unnamed columns are a header, not a sample.
        is_running = header == [str(i) for i in range(len(header))]
        values = _parse_rows(lines[is_running:], delimiter, len(header))
        return ecg_of_array(values, facts, None, None, None)
    values = _parse_rows(lines[1:], delimiter, len(header))
    names_units = [_split_unit(cell) for cell in header]
    columns = [i for i, (name, _) in enumerate(names_units) if find_lead(name) is not None]
    if not columns:
        raise EcgFileError(f"its columns {shown(header)} name none of the leads {', '.join(LEADS)}; rename them")
    units = {names_units[i][1] for i in columns}
    if len(units) > 1:
        found = ", ".join(sorted(unit or "none" for unit in units))
        raise EcgFileError(
            f"its columns have several units ({found}); write all leads in one unit, and say it of each"
        )
    rate = next((r for i, (name, unit) in enumerate(names_units) if (r := _rate_of(name, unit, values[i]))), None)
    if rate is None and facts.sampling_rate is not None:
        for i, (name, unit) in enumerate(names_units):
            _check_times(name, unit, values[i], facts.sampling_rate)
    names = [names_units[i][0] for i in columns]
    return ecg_of_array(values[columns], facts, rate, names, next(iter(units), None))


def looks_like_table(path: Path) -> bool:
    """Whether the first line of a table, but for blank ones and comments, names leads and holds no number."""
    with path.open("rb") as file:
        lines = io.BytesIO(file.read(2**16)).readlines()
    try:
        texts = [line.decode("utf-8-sig") for line in lines]
        line = next((text for text in texts if text.strip() and not text.startswith("#")), "")
        cells = _split_line(line, path.suffix.lower())
    except UnicodeDecodeError:
        return False
    return any(find_lead(_split_unit(c)[0]) for c in cells) and not any(_is_number(c) for c in cells)


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


def _check_times(name: str, unit: str | None, values: np.ndarray, sampling_rate: float) -> None:
    """Refuse a rate that a column of times contradicts, in whatever unit its times are; 0, 1, 2... may be no times."""
    if unit is not None or name.strip().lower() not in ("time", "t", "timestamp") or len(values) < 2:
        return
    step = float(values[-1] - values[0]) / (len(values) - 1)
    rates = [1.0 / (step * seconds) for seconds in set(_SECONDS.values())] if step > 0 and step != 1.0 else []
    if rates and all(abs(rate - sampling_rate) > 0.01 * sampling_rate for rate in rates):
        raise EcgFileError(
            f"its column {shown(name)} rises by {step:g} a sample, and passed was {sampling_rate:g} Hz; pass the "
            "right rate, or write the unit behind the column's name, as time [s]"
        )


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
