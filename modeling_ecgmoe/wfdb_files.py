"""WFDB records (PhysioNet's header + signal files), read with distrust: a header is a stranger's text.

Everything the header promises is compared with the files on disk before memory is taken, and no header can make this
module open a file outside its own folder. Format: WFDB header(5) and signal(5) manual pages.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from shutil import copyfile
from tempfile import TemporaryDirectory

import numpy as np

from .recording import MAX_VALUES, EcgFileError, millivolts_per, shown

MAX_HEADER_BYTES = 2**20

_BYTES_PER_VALUE = {
    "8": 1.0, "16": 2.0, "24": 3.0, "32": 4.0, "61": 2.0, "80": 1.0, "160": 2.0, "212": 1.5,
    "310": 4 / 3, "311": 4 / 3,
}  # fmt: skip
_COMPRESSED_FORMATS = ("508", "516", "524")
# A FLAC frame of a constant signal packs some 4,000 samples into a dozen bytes; no honest file promises more.
_MAX_VALUES_PER_COMPRESSED_BYTE = 4096
_NO_SIGNAL = "0"
_INVALID_16 = -(2**15)

# Numbers of at most 15 digits: whatever a header says stays exact in 64 bits.
_RECORD_LINE = re.compile(
    r"(?P<name>[^\s/]+)(?:/(?P<num_segments>\d{1,15}))?\s+(?P<num_signals>\d{1,15})(?:\s+(?P<rate>[^\s/]+)(?:/\S*)?"
    r"(?:\s+(?P<num_samples>\d{1,15})(?:\s+(?P<start>.*))?)?)?"
)
_SIGNAL_LINE = re.compile(
    r"""
    (?P<file>\S+)
    \s+ (?P<format>\d{1,3}) (?:x(?P<samples_per_frame>\d{1,15}))? (?::(?P<skew>\d{1,15}))? (?:\+(?P<offset>\d{1,15}))?
    (?:\s+ (?P<gain>[-+\d.eE]+) (?:\((?P<baseline>-?\d{1,15})\))? (?:/(?P<unit>\S+))?
        (?:\s+ (?P<resolution>-?\d{1,15})
            (?:\s+ (?P<zero>-?\d{1,15})
                (?:\s+ (?P<initial>-?\d{1,15})
                    (?:\s+ (?P<checksum>-?\d{1,15})
                        (?:\s+ (?P<block_size>-?\d{1,15}) (?:\s+ (?P<description>.*\S))? )? )? )? )? )? )?
    \s*
    """,
    re.VERBOSE,
)


@dataclass(frozen=True)
class WfdbSignal:
    """One signal line of a header. `gain` is in ADC units per `unit`; 0 where the header gives none."""

    file: str
    format: str
    samples_per_frame: int
    skew: int
    offset: int
    gain: float
    baseline: int
    unit: str
    description: str


@dataclass(frozen=True)
class WfdbHeader:
    """A header as written, nothing filled in: `sampling_rate` and `num_samples` are None where it gives none."""

    record_name: str
    sampling_rate: float | None
    num_samples: int | None
    start: str
    signals: tuple[WfdbSignal, ...] = ()
    segments: tuple[tuple[str, int], ...] = ()
    comments: tuple[str, ...] = ()


@dataclass
class WfdbRecord:
    """The channels of a record that hold a voltage. `names` are the header's descriptions, "" where there is none."""

    signal: np.ndarray
    sampling_rate: float | None
    names: list[str]
    header: WfdbHeader
    units: list[str] = field(default_factory=list)


def read_header(path: Path) -> WfdbHeader:
    """Parse a `.hea` file.

    Raises:
        EcgFileError: the text is not a WFDB header.
    """
    with path.open("rb") as file:
        content = file.read(MAX_HEADER_BYTES + 1)
    if len(content) > MAX_HEADER_BYTES:
        raise EcgFileError(f"the header is longer than {MAX_HEADER_BYTES} bytes; this is not a WFDB header")
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError:
        text = content.decode("latin-1")
    lines, comments = [], []
    for line in text.splitlines():
        line = line.strip()
        if line.startswith("#"):
            comments.append(line[1:].strip())
        elif line:
            lines.append(line)
    record = _RECORD_LINE.fullmatch(lines[0]) if lines else None
    if record is None:
        found = shown(lines[0]) if lines else "no line"
        raise EcgFileError(f"the header's first line must be 'name signals rate samples', found {found}")
    num_lines = int(record["num_segments"] or record["num_signals"])
    if num_lines != len(lines) - 1:
        kind = "segments" if record["num_segments"] else "signals"
        raise EcgFileError(f"the header promises {num_lines} {kind} and lists {len(lines) - 1}; copy it again")
    try:
        rate = float(record["rate"]) if record["rate"] else None
    except ValueError as error:
        raise EcgFileError(f"the header's sampling rate {shown(record['rate'])} is not a number") from error
    num_samples = int(record["num_samples"]) if record["num_samples"] else None
    is_master = record["num_segments"] is not None
    return WfdbHeader(
        record_name=record["name"],
        sampling_rate=rate,
        num_samples=num_samples,
        start=record["start"] or "",
        signals=() if is_master else tuple(_parse_signal_line(line) for line in lines[1:]),
        segments=tuple(_parse_segment_line(line) for line in lines[1:]) if is_master else (),
        comments=tuple(comments),
    )


def _parse_signal_line(line: str) -> WfdbSignal:
    match = _SIGNAL_LINE.fullmatch(line)
    if match is None:
        raise EcgFileError(f"the header's signal line {shown(line)} does not follow the WFDB format; repair it")
    try:
        gain = float(match["gain"] or 0.0)
    except ValueError as error:
        raise EcgFileError(f"the gain in the header's signal line {shown(line)} is not a number") from error
    baseline = match["baseline"] if match["baseline"] is not None else match["zero"]
    return WfdbSignal(
        file=match["file"],
        format=match["format"],
        samples_per_frame=int(match["samples_per_frame"] or 1),
        skew=int(match["skew"] or 0),
        offset=int(match["offset"] or 0),
        gain=gain,
        baseline=int(baseline or 0),
        unit=match["unit"] or "mV",  # header(5): millivolts where the unit is left out
        description=match["description"] or "",
    )


def _parse_segment_line(line: str) -> tuple[str, int]:
    name, *rest = line.split()
    if len(rest) != 1 or not rest[0].isdecimal():
        raise EcgFileError(f"the header's segment line {shown(line)} must be 'name samples'; repair it")
    return name, int(rest[0])


def read_wfdb(path: Path) -> WfdbRecord:
    """Read the voltage channels of a record.

    Args:
        path: the header or one of the signal files of the same stem.

    Returns:
        signal float32 (channels, samples) in mV, NaN where the file marks a sample as invalid.

    Raises:
        EcgFileError: the record is damaged or incomplete, reaches outside its folder, or its header promises what its
            files do not hold.
    """
    header_path = find_header(path)
    if header_path is None:
        name = path.with_suffix(".hea").name
        raise EcgFileError(f"its header {shown(name)} is missing; copy it next to the signal file")
    header = read_header(header_path)
    return _read_segments(header_path, header) if header.segments else _read_signals(header_path, header)


def find_header(path: Path) -> Path | None:
    """The header of the record that a file belongs to, its suffix in small letters or in capitals."""
    if path.suffix in (".hea", ".HEA") and path.is_file():
        return path
    return next((p for suffix in (".hea", ".HEA") if (p := path.with_suffix(suffix)).is_file()), None)


def _read_signals(header_path: Path, header: WfdbHeader) -> WfdbRecord:
    """A record in one segment."""
    num_frames, paths = _check_files(header_path, header)
    channels = _voltage_channels(header)
    signals = [header.signals[channel] for channel in channels]
    if all(s.format == "16" and s.samples_per_frame == 1 and s.skew == 0 for s in header.signals):
        signal, samples_per_frame = _read_format_16(paths, header, channels, num_frames), 1
    else:
        signal, samples_per_frame = _read_with_wfdb(header_path, paths, header, channels)
    rate = None if header.sampling_rate is None else header.sampling_rate * samples_per_frame
    return WfdbRecord(signal, rate, [s.description for s in signals], header, [s.unit for s in signals])


def _voltage_channels(header: WfdbHeader) -> list[int]:
    """The channels measured in volts; blood pressure, respiration and the like are left out."""
    channels = [
        i for i, s in enumerate(header.signals) if s.format != _NO_SIGNAL and millivolts_per(s.unit) is not None
    ]
    if not channels:
        units = ", ".join(sorted({shown(s.unit) for s in header.signals})) or "none"
        raise EcgFileError(f"no signal is in V, mV, uV or nV (units in the header: {units}); is this an ECG?")
    for channel in channels:
        signal = header.signals[channel]
        if not (np.isfinite(signal.gain) and signal.gain != 0):
            raise EcgFileError(
                f"signal {shown(signal.description or channel + 1)} has no gain, so its millivolts are unknown; write "
                "the gain into the header"
            )
    return channels


def find_signal_file(header_path: Path, name: str) -> Path:
    """The file that a header names, which must lie in the header's own folder.

    A header that is itself a symbolic link (as in a download cache) may have its signal file beside either end. Copies
    that went through DOS have names in capitals, which the header writes in small letters.

    Raises:
        EcgFileError: the name leads elsewhere, or there is no such file.
    """
    if not re.fullmatch(r"[^/\\:\x00]+", name) or name in (".", ".."):
        raise EcgFileError(f"the header names {shown(name)}, outside its own folder; only a plain file name is read")
    path = next((p for n in (name, name.upper()) if (p := header_path.parent / n).is_file()), None)
    if path is None:
        raise EcgFileError(f"the header names {shown(name)}, which is missing; copy it next to the header")
    if path.is_symlink():
        folders = {header_path.parent.resolve(), header_path.resolve().parent}
        if path.resolve().parent not in folders:
            raise EcgFileError(
                f"the header names {shown(name)}, a link to outside its own folder; copy the file itself"
            )
    return path


def _check_files(header_path: Path, header: WfdbHeader) -> tuple[int, dict[str, Path]]:
    """Compare the header with its signal files.

    Returns:
        The number of frames (samples of a one-per-frame signal), and the files by their names in the header.

    Raises:
        EcgFileError: see `read_wfdb`.
    """
    groups: dict[str, list[WfdbSignal]] = {}
    for signal in header.signals:
        if signal.format != _NO_SIGNAL:
            groups.setdefault(signal.file, []).append(signal)
    if not groups:
        raise EcgFileError("the header lists no signal; is this the right header?")
    num_frames = header.num_samples or None
    paths: dict[str, Path] = {}
    for name, signals in groups.items():
        path = paths[name] = find_signal_file(header_path, name)
        num_bytes = path.stat().st_size - signals[0].offset
        if any(s.samples_per_frame < 1 for s in signals):
            raise EcgFileError(f"the header gives a signal of {shown(name)} no samples per frame; repair it")
        values_per_frame = sum(s.samples_per_frame for s in signals)
        formats = {s.format for s in signals}
        if len(formats) != 1:
            raise EcgFileError(f"{shown(name)} is given in several formats {sorted(formats)}; repair the header")
        (fmt,) = formats
        if fmt in _COMPRESSED_FORMATS:
            if num_frames is None:
                raise EcgFileError(
                    "the header does not say how many samples there are; add the number to its first line"
                )
            found = max(num_bytes, 0) * _MAX_VALUES_PER_COMPRESSED_BYTE // values_per_frame
        elif fmt in _BYTES_PER_VALUE:
            found = int(max(num_bytes, 0) / (values_per_frame * _BYTES_PER_VALUE[fmt]) + 1e-6)
        else:
            raise EcgFileError(
                f"signal format {fmt} is not one of {', '.join((*_BYTES_PER_VALUE, *_COMPRESSED_FORMATS))}"
            )
        if num_frames is None:
            num_frames = found
        if found < num_frames:
            raise EcgFileError(
                f"the header promises {num_frames} samples a lead, {shown(name)} holds {found}; it is cut off, copy "
                "it again"
            )
    assert num_frames is not None
    if num_frames == 0:
        raise EcgFileError("it holds no samples; record or copy it again")
    num_values = num_frames * sum(s.samples_per_frame for s in header.signals)
    if num_values > MAX_VALUES:
        raise EcgFileError(f"it holds {num_values} values, more than {MAX_VALUES}; cut it into shorter records")
    return num_frames, paths


def _read_format_16(paths: dict[str, Path], header: WfdbHeader, channels: list[int], num_frames: int) -> np.ndarray:
    """Little-endian 16-bit samples, interleaved: nearly every 12-lead set, several times faster than by `wfdb`.

    Returns:
        float32 (channels, frames) in mV, NaN where the file marks a sample as invalid.
    """
    blocks: dict[int, np.ndarray] = {}
    for name in {header.signals[channel].file for channel in channels}:
        members = [i for i, s in enumerate(header.signals) if s.file == name]
        count, offset = num_frames * len(members), header.signals[members[0]].offset
        values = np.fromfile(paths[name], dtype="<i2", count=count, offset=offset)
        if values.size < count:
            raise EcgFileError(f"{shown(name)} became shorter while it was read; copy it again")
        rows = [row for row, channel in enumerate(channels) if channel in members]
        lines = [header.signals[channels[row]] for row in rows]
        raw = np.ascontiguousarray(values.reshape(num_frames, len(members)).T)
        if len(rows) < len(members):
            raw = raw[[members.index(channels[row]) for row in rows]]
        scales = np.array([[(millivolts_per(line.unit) or np.nan) / line.gain] for line in lines])
        baselines = np.array([[line.baseline] for line in lines])
        block = np.empty(raw.shape, dtype=np.float32)
        with np.errstate(over="ignore"):  # an absurd gain gives infinities, which are refused later
            # Computed in double precision: a large baseline costs no digits.
            np.multiply(raw - baselines if baselines.any() else raw, scales, out=block, casting="same_kind")
        if values.min() == _INVALID_16:
            block[raw == _INVALID_16] = np.nan
        if len(rows) == len(channels):
            return block
        blocks |= dict(zip(rows, block, strict=True))
    return np.stack([blocks[row] for row in range(len(channels))])


def _read_with_wfdb(
    header_path: Path, paths: dict[str, Path], header: WfdbHeader, channels: list[int]
) -> tuple[np.ndarray, int]:
    """Any other format through the `wfdb` library, after `_check_files`.

    Returns:
        float32 (channels, samples) in mV and the samples per frame.
    """
    frames = {header.signals[channel].samples_per_frame for channel in channels}
    # Leads of one record sampled at different rates are averaged down to the frame rate, as the library does.
    samples_per_frame = frames.pop() if len(frames) == 1 else 1
    with _named_as_written(header_path, paths) as named:
        record = _call_wfdb(named, channels=channels, smooth_frames=samples_per_frame == 1)
    rows = record.p_signal.T if samples_per_frame == 1 else record.e_p_signal
    scales = [millivolts_per(header.signals[channel].unit) or np.nan for channel in channels]
    signal = np.stack([np.asarray(row, np.float64) * scale for row, scale in zip(rows, scales, strict=True)])
    with np.errstate(over="ignore"):
        return signal.astype(np.float32), samples_per_frame


def _read_segments(header_path: Path, header: WfdbHeader) -> WfdbRecord:
    """A record in several segments, each a record of its own in the same folder; what a segment lacks is NaN.

    A segment called "~" is a gap, one of length 0 only lists the signals. Segments may have different signals, which
    are matched by their descriptions, or by their position where they have none.
    """
    total = sum(num_samples for _, num_samples in header.segments)
    pieces: list[tuple[int, WfdbRecord]] = []
    start = 0
    for name, num_samples in header.segments:
        if name != "~" and num_samples:
            path = find_signal_file(header_path, f"{name}.hea")
            segment = read_header(path)
            if segment.segments:
                raise EcgFileError(f"its segment {shown(name)} has segments itself, which WFDB does not allow")
            if total * len(segment.signals) > MAX_VALUES:
                raise EcgFileError(f"it holds more than {MAX_VALUES} values; cut it into shorter records")
            piece = _read_signals(path, segment)
            if piece.signal.shape[1] != num_samples:
                raise EcgFileError(
                    f"the header promises {num_samples} samples of segment {shown(name)}, found "
                    f"{piece.signal.shape[1]}; copy it again"
                )
            if piece.sampling_rate not in (None, header.sampling_rate):
                raise EcgFileError(
                    f"segment {shown(name)} has another sampling rate than the record; read it by itself"
                )
            pieces.append((start, piece))
        start += num_samples
    if not pieces:
        raise EcgFileError("it holds no samples; record or copy it again")
    units = {
        description: unit for _, piece in pieces for description, unit in zip(_keys(piece), piece.units, strict=True)
    }
    keys = list(units)
    if total * len(keys) > MAX_VALUES:
        raise EcgFileError(f"it holds more than {MAX_VALUES} values; cut it into shorter records")
    signal = np.full((len(keys), total), np.nan, dtype=np.float32)
    for start, piece in pieces:
        signal[[keys.index(key) for key in _keys(piece)], start : start + piece.signal.shape[1]] = piece.signal
    return WfdbRecord(signal, header.sampling_rate, [name for name, _ in keys], header, list(units.values()))


def _keys(record: WfdbRecord) -> list[tuple[str, int]]:
    """What a channel is recognised by in other segments: its name, or its position where it has none."""
    return [(name, 0 if name else position) for position, name in enumerate(record.names)]


@contextmanager
def _named_as_written(header_path: Path, paths: dict[str, Path]) -> Iterator[Path]:
    """The header with its signal files under the names that it writes, copied where they are in capitals."""
    if header_path.suffix == ".hea" and all(path.name == name for name, path in paths.items()):
        yield header_path
        return
    with TemporaryDirectory() as folder:
        for name, path in paths.items():
            copyfile(path, Path(folder) / name)
        yield Path(copyfile(header_path, Path(folder) / f"{header_path.stem}.hea"))


def _call_wfdb(header_path: Path, **options: object):  # type: ignore[no-untyped-def]
    try:
        import wfdb
    except ImportError as error:
        raise EcgFileError("this WFDB signal format needs the wfdb package: pip install wfdb") from error
    try:
        # An absolute local path and no `pn_dir`: the library has nothing to fetch.
        return wfdb.rdrecord(str(header_path.absolute().with_suffix("")), return_res=64, **options)
    except Exception as error:  # the library raises whatever its parsing of a damaged file runs into
        raise EcgFileError(f"the wfdb library cannot read it ({type(error).__name__}: {shown(error)})") from error
