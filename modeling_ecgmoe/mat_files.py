"""MATLAB files up to version 7: their matrices of numbers, and nothing else that they may hold.

Read here and not by scipy, whose reader takes a damaged file's word for types and sizes: it asks for gigabytes, and
some files crash the process. Format: MathWorks, "MAT-File Format", versions 4 and 5.
"""

import math
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np

from .array_files import ecg_of_array
from .recording import Ecg, EcgFileError, Facts, shown

MAX_MAT_BYTES = 2**28
SIGNAL_NAMES = ("signal", "val")  # ours, and CinC's
RATE_NAMES = ("sampling_rate", "fs", "Fs")

_HDF5 = b"\x89HDF\r\n\x1a\n"
_MATRIX, _COMPRESSED = 14, 15
_NUMBER_CLASSES = range(6, 16)  # double, single, and the integers of 8 to 64 bits
_COMPLEX = 0x08
_DTYPES = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8"}
_DTYPES_4 = ("f8", "f4", "i4", "i2", "u2", "u1")
_MAX_NAME = 64
_SNIFFED_BYTES = 2**16
Order = Literal["little", "big"]


def read_mat(path: Path, facts: Facts) -> Ecg:
    """The matrix `signal` or `val`, or the only one, and the number `sampling_rate` or `fs`.

    CinC's `val` holds the converter's counts: their unit is the caller's to say.
    """
    if path.stat().st_size > MAX_MAT_BYTES:
        raise EcgFileError(f"it is larger than {MAX_MAT_BYTES} bytes; cut it into shorter records")
    content = path.read_bytes()
    if content.startswith(_HDF5) or content[512:].startswith(_HDF5):
        raise EcgFileError("this is a MAT file of version 7.3 (HDF5); save it with MATLAB's -v7, or as NPZ")
    arrays = dict(_read_4(content) if _is_version_4(content) else _read_5(content))
    matrices = [name for name, array in arrays.items() if array.ndim == 2 and array.size > 1]
    chosen = [name for name in SIGNAL_NAMES if name in matrices] or matrices
    if len(chosen) != 1 and chosen[:1] != ["signal"]:
        raise EcgFileError(f"expected one matrix called 'signal' or 'val', found {shown(sorted(matrices))}; rename it")
    rates = [float(arrays[name].item()) for name in RATE_NAMES if name in arrays and arrays[name].size == 1]
    return ecg_of_array(arrays[chosen[0]], facts, next(iter(rates), None), None, None)


def looks_like_mat(path: Path) -> bool:
    """Whether one of the first variables of a MAT file is a matrix called as in `SIGNAL_NAMES`."""
    with path.open("rb") as file:
        start = file.read(_SNIFFED_BYTES)
    if _is_version_4(start):
        return start[20:].startswith(tuple(name.encode() + b"\0" for name in SIGNAL_NAMES))
    order = _order_of(start)
    position = 128
    while position + 8 <= len(start):
        kind, size = (int.from_bytes(start[position + i : position + i + 4], order) for i in (0, 4))
        head = start[position + 8 : position + 8 + size]
        try:
            if kind == _COMPRESSED:
                head = zlib.decompressobj().decompress(head, 512)[8:]
            name = next((data for number, (_, data) in enumerate(_elements(head, order)) if number == 2), b"")
        except (EcgFileError, zlib.error):
            return False
        if name.decode("latin-1") in SIGNAL_NAMES:
            return True
        position += 8 + size
    return False


def _is_version_4(content: bytes) -> bool:
    return 0 in content[:4]  # a number of at most 4052; later versions begin with text


def _order_of(content: bytes) -> Order:
    return "little" if content[126:128] == b"IM" else "big"


def _read_4(content: bytes) -> Iterator[tuple[str, np.ndarray]]:
    """The real matrices of a version 4 file: each is five numbers, its name, and its values column by column.

    Raises:
        EcgFileError: a matrix promises more than there is.
    """
    position = 0
    while position + 20 <= len(content):
        kind = int.from_bytes(content[position : position + 4], "little")
        order: Order = "little" if kind < 5000 else "big"
        kind, rows, columns, imaginary, length = (
            int.from_bytes(content[position + 4 * i : position + 4 * i + 4], order) for i in range(5)
        )
        precision = kind // 10 % 10
        if precision >= len(_DTYPES_4) or kind % 1000 // 100 or not 0 < length <= _MAX_NAME:
            raise EcgFileError("this is not a MAT file; save it again")
        dtype = np.dtype(_DTYPES_4[precision]).newbyteorder("<" if order == "little" else ">")
        start, size = position + 20 + length, rows * columns * dtype.itemsize
        position = start + size * (2 if imaginary else 1)
        if position > len(content):
            raise EcgFileError(f"a matrix promises {size} bytes, found {max(0, len(content) - start)}; save it again")
        if kind % 10 == 0 and not imaginary:
            name = content[start - length : start].split(b"\0")[0].decode("latin-1")
            yield name, np.frombuffer(content, dtype, rows * columns, start).reshape(rows, columns, order="F")


def _read_5(content: bytes) -> Iterator[tuple[str, np.ndarray]]:
    """The real matrices of numbers of a version 5 file, compressed (version 7) or not.

    Raises:
        EcgFileError: it is cut off, unpacks to more than `MAX_MAT_BYTES`, or promises more than there is.
    """
    order = _order_of(content)
    total = 0
    for kind, data in _elements(content[128:], order, is_padded=False):
        if kind == _COMPRESSED:
            unpacker = zlib.decompressobj()
            try:
                unpacked = unpacker.decompress(data, MAX_MAT_BYTES + 1 - total)
            except zlib.error as error:
                raise EcgFileError(f"this is not a whole MAT file ({shown(error)}); save it again") from error
            total += len(unpacked)
            if total > MAX_MAT_BYTES:
                raise EcgFileError(f"it unpacks to more than {MAX_MAT_BYTES} bytes; cut it into shorter records")
            kind, data = next(_elements(unpacked, order), (0, b""))
        if kind == _MATRIX:
            parts = list(_elements(data, order))
            if len(parts) >= 4 and parts[0][1][:1]:
                flags, (_, sizes), (_, name), (number, values) = parts[0][1], *parts[1:4]
                class_and_flags = flags[:2] if order == "little" else flags[3:1:-1]
                if class_and_flags[0] in _NUMBER_CLASSES and not class_and_flags[1] & _COMPLEX:
                    yield name.decode("latin-1"), _matrix(sizes, number, values, order)


def _matrix(sizes: bytes, number: int, values: bytes, order: Order) -> np.ndarray:
    """A matrix from its dimensions and its values column by column, whatever type they were saved in."""
    sign = "<" if order == "little" else ">"
    if number not in _DTYPES or len(sizes) % 4 or not 0 < len(sizes) <= 128:
        raise EcgFileError("a matrix is of no type of MATLAB's; save it again")
    dtype = np.dtype(f"{sign}{_DTYPES[number]}")
    shape = np.frombuffer(sizes, f"{sign}i4").tolist()
    count = math.prod(shape)
    if min(shape) < 0 or count * dtype.itemsize > len(values):
        raise EcgFileError(f"a matrix promises {count} values, found {len(values) // dtype.itemsize}; save it again")
    return np.frombuffer(values, dtype, count).reshape(shape, order="F")


def _elements(content: bytes, order: Order, *, is_padded: bool = True) -> Iterator[tuple[int, bytes]]:
    """Type and bytes of each element; within variables they are padded to eight bytes.

    Raises:
        EcgFileError: an element promises more than there is.
    """
    position = 0
    while position + 8 <= len(content):
        kind = int.from_bytes(content[position : position + 4], order)
        size = int.from_bytes(content[position + 4 : position + 8], order)
        start = position + 8
        if kind >> 16:  # a short element: length and type share a word, its bytes follow at once
            kind, size, start = kind & 0xFFFF, kind >> 16, position + 4
            position += 8
        else:
            position = start + size + (-size % 8 if is_padded else 0)
        if start + size > len(content) or (start == position - 4 and size > 4):
            raise EcgFileError(f"an element promises {size} bytes, found {len(content) - start}; save it again")
        yield kind, content[start : start + size]
