"""Damaged files of every format: each is read or refused with an `EcgFileError`, in seconds and within its memory.

    python -m benchmarks.fuzz_read_ecg
    python -m benchmarks.fuzz_read_ecg --reproduce "SCP-ECG" 17

Small genuine files (see `ecg_writers`) are damaged: bytes flipped, cut out, doubled or taken from another file,
numbers in headers replaced by the worst. Mutation `i` of a format depends on the two alone. A process of its own reads
them; it is watched from outside for time, and inside for memory and for every file that Python opens.
"""

import argparse
import io
import json
import multiprocessing
import os
import random
import re
import resource
import shutil
import struct
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
import zlib
from binascii import crc_hqx
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import scipy.io

from benchmarks.ecg_writers import WRITERS, counts, write_mat, write_philips, write_scp
from data_builders.synthetic import synthetic_ecg, write_wfdb
from modeling_ecgmoe.ecg_files import Ecg, EcgFileError, read_ecg
from modeling_ecgmoe.leads import LEADS

ROOT = Path(__file__).resolve().parents[1]
TIME_LIMIT_S = 5
MEMORY_LIMIT_MIB = 256  # beyond what the process had before; the seeds take less than 10
PACKAGES = ("ecgdatakit", "pydicom", "pyedflib", "wfdb", "scipy", "numpy", "defusedxml")
BAD_NUMBERS = (
    b"0", b"-1", b"1", b"", b"nan", b"inf", b"1e400", b"-1e308", b"999999999999", b"9" * 400, b"0.0001", b"x",
)  # fmt: skip
# What the caller says of every file, where the file does not.
FACTS: dict[str, Any] = {"sampling_rate": 250.0, "lead_names": LEADS, "unit": "mV"}
WATCHED = ("open", "os.listdir", "os.scandir", "os.remove", "os.rename", "os.mkdir", "os.system", "os.exec", "os.fork",
           "subprocess.Popen", "socket.connect", "socket.getaddrinfo", "urllib.Request")  # fmt: skip


@dataclass(frozen=True)
class Seed:
    """A genuine file: the name to read, the files by name, and what the caller has to say."""

    main: str
    files: dict[str, bytes]
    facts: dict[str, Any]


def make_seeds() -> dict[str, list[Seed]]:
    """For each format two genuine files, so that they can be spliced."""
    seeds: dict[str, list[Seed]] = {}
    for number, rate in enumerate((250, 300)):
        ecg = synthetic_ecg(sampling_rate=rate, duration_s=2, noise_mv=0.01, seed=number).ecg
        for name, write, facts in _kinds():
            with tempfile.TemporaryDirectory() as folder:
                path = write(Path(folder), ecg)
                files = {p.name: p.read_bytes() for p in sorted(Path(folder).iterdir())}
                seeds.setdefault(name, []).append(
                    Seed(path.name, files, facts | {"sampling_rate": rate} if facts else {})
                )
    return seeds


def _kinds() -> list[tuple[str, Callable[[Path, Ecg], Path], dict[str, Any]]]:
    """Every format: its name, its writer into a folder, and what the caller has to say."""
    kinds: list[tuple[str, Callable[[Path, Ecg], Path], dict[str, Any]]] = []
    for fmt in ("16", "212", "24", "32", "80", "516"):

        def write_fmt(folder: Path, ecg: Ecg, fmt: str = fmt) -> Path:
            signal, gain = (ecg.signal / 4, 100.0) if fmt == "80" else (ecg.signal, 500.0)
            return write_wfdb(Ecg(signal, ecg.sampling_rate, LEADS), folder, "record", fmt=fmt, gain=gain)

        kinds.append((f"WFDB {fmt}", write_fmt, {}))
    for name, (suffix, write, _) in WRITERS.items():

        def write_file(folder: Path, ecg: Ecg, write: Callable[..., Path] = write, suffix: str = suffix) -> Path:
            return write(folder / f"record{suffix}", ecg)

        kinds.append((name, write_file, {}))
    return [
        *kinds,
        ("SCP-ECG, beats", lambda folder, ecg: write_scp(folder / "record.scp", ecg, beats=True, order=1), {}),
        ("Philips XLI", lambda folder, ecg: write_philips(folder / "record.xml", ecg, compressed=True), {}),
        ("MAT 5", lambda folder, ecg: write_mat(folder / "record.mat", ecg, compressed=False), FACTS),
        ("MAT 7", lambda folder, ecg: write_mat(folder / "record.mat", ecg), FACTS),
        ("MAT 4", _write_mat_4, FACTS | {"unit": "uV"}),
        ("NPY", _write_npy, FACTS),
        ("NPZ", _write_npz, {}),
        ("CSV", _write_csv, {}),
    ]


def _write_mat_4(folder: Path, ecg: Ecg) -> Path:
    scipy.io.savemat(folder / "record.mat", {"val": counts(ecg, 1.0)}, format="4")
    return folder / "record.mat"


def _write_npy(folder: Path, ecg: Ecg) -> Path:
    np.save(folder / "record.npy", ecg.signal)
    return folder / "record.npy"


def _write_npz(folder: Path, ecg: Ecg) -> Path:
    names = np.array(ecg.lead_names)
    np.savez_compressed(
        folder / "record.npz", signal=ecg.signal, sampling_rate=ecg.sampling_rate, lead_names=names, unit="mV"
    )
    return folder / "record.npz"


def _write_csv(folder: Path, ecg: Ecg) -> Path:
    times_ms = np.arange(ecg.signal.shape[1]) * 1000.0 / ecg.sampling_rate
    header = ",".join(["time [ms]", *(f"{name} [mV]" for name in ecg.lead_names)])
    np.savetxt(
        folder / "record.csv", np.column_stack([times_ms, ecg.signal.T]), "%.4f", ",", header=header, comments=""
    )
    return folder / "record.csv"


def mutate(seeds: dict[str, list[Seed]], name: str, index: int) -> Seed:
    """Mutation `index` of a format."""
    rng = random.Random(f"{name}/{index}")
    seed = rng.choice(seeds[name])
    files = dict(seed.files)
    target = rng.choice(sorted(files))
    content = files[target]
    unpack, pack = _WRAPPINGS.get(name.partition(",")[0], (None, None))
    if unpack is None or pack is None or rng.random() < 0.2:
        files[target] = _damage(rng, seeds, name, content)
    else:
        parts = unpack(content)
        part = rng.choice(sorted(parts))
        files[target] = pack(parts | {part: _damage(rng, seeds, name, parts[part])})
    return Seed(seed.main, files, seed.facts)


def _damage(rng: random.Random, seeds: dict[str, list[Seed]], name: str, content: bytes) -> bytes:
    is_text = not content[:2000].translate(None, bytes(range(32, 127)) + b"\t\r\n")
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        other = rng.choice(seeds[rng.choice(sorted(seeds)) if rng.random() < 0.1 else name])
        mutation = rng.choice(_TEXT_MUTATIONS if is_text and rng.random() < 0.7 else _MUTATIONS)
        content = mutation(rng, content, rng.choice(list(other.files.values())))
    return content


def _place(rng: random.Random, content: bytes) -> int:
    """A position, half the time among the first 600 bytes, where headers are."""
    return rng.randrange(max(1, min(len(content), 600 if rng.random() < 0.5 else len(content))))


def _flip(rng: random.Random, content: bytes, _: bytes) -> bytes:
    changed = bytearray(content)
    for _number in range(rng.choice((1, 2, 8, 32))):
        if changed:
            changed[_place(rng, content)] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
    return bytes(changed)


def _cut(rng: random.Random, content: bytes, _: bytes) -> bytes:
    start = _place(rng, content)
    if rng.random() < 0.5:
        return content[:start]
    return content[:start] + content[start + rng.choice((1, 2, 4, 16, 256, len(content) // 2)) :]


def _double(rng: random.Random, content: bytes, _: bytes) -> bytes:
    start = _place(rng, content)
    piece = content[start : start + rng.choice((1, 4, 64, 1024))] * rng.choice((1, 2, 100))
    return content[:start] + piece + content[start:]


def _splice(rng: random.Random, content: bytes, other: bytes) -> bytes:
    start = _place(rng, other)
    return content[: _place(rng, content)] + other[start : start + rng.choice((16, 512, len(other)))]


def _replace_integer(rng: random.Random, content: bytes, _: bytes) -> bytes:
    """An integer in binary, of any width."""
    start, width = _place(rng, content), rng.choice((1, 2, 4, 8))
    value = rng.choice((0, 1, 2**15 - 1, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**62, rng.randrange(2**32)))
    packed = struct.pack(rng.choice("<>") + "Q", value)
    return content[:start] + (packed[:width] if rng.random() < 0.5 else packed[-width:]) + content[start + width :]


def _replace_number(rng: random.Random, content: bytes, _: bytes) -> bytes:
    """A number in text, of the first ones half the time; padded to its width half the time, as in EDF."""
    numbers = list(re.finditer(rb"-?\d+(?:\.\d+)?", content[:200_000]))
    if not numbers:
        return content
    number = numbers[rng.randrange(min(len(numbers), 60 if rng.random() < 0.5 else len(numbers)))]
    text = rng.choice(BAD_NUMBERS)
    if rng.random() < 0.5:
        text = text.ljust(len(number[0]))[: len(number[0])]
    return content[: number.start()] + text + content[number.end() :]


def _replace_word(rng: random.Random, content: bytes, other: bytes) -> bytes:
    """A word by a word of another file: a lead, a unit, an element, a path."""
    words, others = (list(re.finditer(rb"[A-Za-z_./]{1,30}", text[:20_000])) for text in (content, other))
    if not (words and others):
        return content
    word = rng.choice(words)
    text = rng.choice((rng.choice(others)[0], b"../../secret.dat", b"/etc/passwd", b"mV", b"<!DOCTYPE a [", b"\xff"))
    return content[: word.start()] + text + content[word.end() :]


_MUTATIONS = (_flip, _flip, _cut, _double, _splice, _replace_integer, _replace_integer, _replace_number, _replace_word)
_TEXT_MUTATIONS = (_replace_number, _replace_number, _replace_word)


def _pack_scp(parts: dict[str, bytes]) -> bytes:
    """A record whose size and checksum are right, so that it is not refused for these alone."""
    content = parts["record"]
    content = content[:2] + struct.pack("<I", len(content)) + content[6:]
    return struct.pack("<H", crc_hqx(content[2:], 0xFFFF)) + content[2:]


def _unpack_npz(content: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def _pack_npz(parts: dict[str, bytes]) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, part in parts.items():
            archive.writestr(name, part)
    return content.getvalue()


def _unpack_mat(content: bytes) -> dict[str, bytes]:
    parts, position = {"0": content[:128]}, 128
    while position < len(content):
        size = int.from_bytes(content[position + 4 : position + 8], "little")
        parts[str(len(parts))] = zlib.decompress(content[position + 8 : position + 8 + size])
        position += 8 + size
    return parts


def _pack_mat(parts: dict[str, bytes]) -> bytes:
    packed = [zlib.compress(part) for number, part in parts.items() if number != "0"]
    return parts["0"] + b"".join(struct.pack("<II", 15, len(part)) + part for part in packed)


# Formats with checksums are taken apart, damaged inside, and put together again.
_WRAPPINGS: dict[str, tuple[Callable[[bytes], dict[str, bytes]], Callable[[dict[str, bytes]], bytes]]] = {
    "SCP-ECG": (lambda content: {"record": content}, _pack_scp),
    "NPZ": (_unpack_npz, _pack_npz),
    "MAT 7": (_unpack_mat, _pack_mat),
}


def write_mutation(folder: Path, mutation: Seed) -> Path:
    """The files of a mutation in a folder of their own; returns the one to read."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name, content in mutation.files.items():
        (folder / name).write_bytes(content)
    return folder / mutation.main


def judge(path: Path, facts: dict[str, Any]) -> str:
    """ "read", "refused", or what is wrong with how the file was taken."""
    try:
        ecg = read_ecg(path, **facts)
    except EcgFileError as error:
        if "does not fit into memory" in str(error):
            return "MemoryError"
        return "refused" if "\n" not in str(error) else "a message of several lines"
    except Exception as error:  # noqa: BLE001  this is what is looked for
        frame = traceback.extract_tb(error.__traceback__)[-1]
        return f"{type(error).__name__} in {Path(frame.filename).name}:{frame.lineno}"
    sound = ecg.signal.dtype == np.float32 and ecg.signal.ndim == 2 and ecg.signal.size > 0
    sound = sound and len(ecg.lead_names) == len(ecg.signal) and not np.isinf(ecg.signal).any()
    return "read" if sound and 50 <= ecg.sampling_rate <= 10_000 else "an unsound recording"


def work(channel: Connection, folder: Path, seeds: dict[str, list[Seed]], name: str) -> None:
    """The process that reads a format: takes an index, gives what came of it, CPU seconds and MiB beyond the start."""
    warnings.simplefilter("ignore")
    for seed in seeds[name]:
        outcome = judge(write_mutation(folder, seed), seed.facts)
        if outcome != "read":
            raise AssertionError(f"the genuine {name} file gives: {outcome}")
    opened: list[str] = []
    is_reading = False
    own = str(folder) + os.sep
    libraries = tuple({str(Path(place).resolve()) + os.sep for place in (sys.prefix, sys.base_prefix, ROOT)})

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if not is_reading or event not in WATCHED:
            return
        path = os.path.realpath(os.fsdecode(arguments[0])) if isinstance(arguments[0], (str, bytes, Path)) else ""
        # A library may still import or list parts of itself.
        is_import = path.startswith(libraries) and event in ("open", "os.listdir", "os.scandir")
        if not (is_import or (event == "open" and path.startswith(own))):
            opened.append(f"{event} {arguments[0]!r}")

    sys.addaudithook(watch)
    before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    address_bytes = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limit = address_bytes + 4 * MEMORY_LIMIT_MIB * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    channel.send("ready")
    while (index := channel.recv()) is not None:
        mutation = mutate(seeds, name, index)
        path = write_mutation(folder, mutation)
        opened.clear()
        began = time.process_time()
        is_reading = True
        outcome = judge(path, mutation.facts)
        is_reading = False
        took_s = time.process_time() - began
        more_mib = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kib) / 1024
        if opened:
            outcome = f"outside its folder: {opened[0]}"
        elif more_mib > MEMORY_LIMIT_MIB:
            outcome = f"{more_mib:.0f} MiB"
        channel.send((outcome, took_s, more_mib))


class Reader:
    """A process that reads mutations of a format, started anew when it hangs or dies."""

    def __init__(self, folder: Path, seeds: dict[str, list[Seed]], name: str) -> None:
        self.folder, self.seeds, self.name = folder, seeds, name
        self._start()

    def _start(self) -> None:
        self.channel, other = multiprocessing.Pipe()
        context = multiprocessing.get_context("fork")
        self.process = context.Process(target=work, args=(other, self.folder, self.seeds, self.name), daemon=True)
        self.process.start()
        other.close()
        if self.channel.recv() != "ready":
            raise RuntimeError("the reading process did not start")

    def read(self, index: int) -> tuple[str, float, float]:
        """What came of a mutation, CPU seconds, and MiB that the process has taken."""
        self.channel.send(index)
        outcome = ""
        try:
            if self.channel.poll(TIME_LIMIT_S):
                result = self.channel.recv()
                if result[2] <= MEMORY_LIMIT_MIB / 2:  # the peak of a process never falls: measure the next afresh
                    return result
                outcome = result[0]
            else:
                outcome, result = "longer than the limit", ("", TIME_LIMIT_S, 0.0)
        except EOFError:
            result = ("", 0.0, 0.0)
        self.process.kill()
        self.process.join()
        outcome = outcome or f"the process died ({self.process.exitcode})"
        self._start()
        return outcome, result[1], result[2]

    def stop(self) -> None:
        """End the process."""
        self.channel.send(None)
        self.process.join()


def fuzz(num_files: int, names: list[str]) -> tuple[list[dict[str, Any]], list[str]]:
    """Read `num_files` mutations, as many of each format; gives a row for each format, and the failures."""
    seeds = make_seeds()
    names = names or list(seeds)
    rows, failures = [], []
    with tempfile.TemporaryDirectory() as temporary:
        for place, name in enumerate(names):
            share = num_files // len(names) + (place < num_files % len(names))
            outcomes: Counter[str] = Counter()
            longest_s = most_mib = 0.0
            reader = Reader(Path(temporary).resolve() / "folder", seeds, name)
            for index in range(share):
                outcome, took_s, more_mib = reader.read(index)
                longest_s, most_mib = max(longest_s, took_s), max(most_mib, more_mib)
                if outcome not in ("read", "refused"):
                    failures.append(f"{name} {index}: {outcome}")
                    print(failures[-1], flush=True)
                outcomes[outcome if outcome in ("read", "refused") else "failed"] += 1
            rows.append({
                "format": name,
                "files": share,
                "read": outcomes["read"],
                "refused": outcomes["refused"],
                "failed": outcomes["failed"],
                "longest, s": round(longest_s, 3),
                "memory, MiB": round(most_mib, 1),
            })  # fmt: skip
            print(rows[-1], flush=True)
            reader.stop()
    return rows, failures


def main() -> None:
    """Fuzz and write the result file, or read one mutation again."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=20_000)
    parser.add_argument("--formats", nargs="*", default=[], help="all where left out")
    parser.add_argument("--reproduce", nargs=2, metavar=("FORMAT", "INDEX"), help="write and read one mutation")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/fuzz_read_ecg.json")
    options = parser.parse_args()
    if options.reproduce:
        name, index = options.reproduce
        mutation = mutate(make_seeds(), name, int(index))
        path = write_mutation(Path(tempfile.gettempdir()) / "fuzz_read_ecg", mutation)
        print(path, flush=True)
        print(read_ecg(path, **mutation.facts))
        return
    rows, failures = fuzz(options.files, options.formats)
    from benchmarks.quality import origin  # loads torch, which no reader needs

    result = {
        "name": options.out.stem,
        "command": "python -m benchmarks.fuzz_read_ecg",
        "seed": 0,
        **origin(),
        "versions": {name: version(name) for name in PACKAGES},
        "data": {
            "set": "damaged files of synthetic ECGs",
            "files": options.files,
            "s_at_most": TIME_LIMIT_S,
            "MiB_at_most": MEMORY_LIMIT_MIB,
            "failures": len(failures),
        },
        "rows": rows,
    }
    options.out.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
