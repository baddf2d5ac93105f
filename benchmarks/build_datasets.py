"""How fast and in how much memory a data set is built, found again in the cache, and read in random order.

    python -m benchmarks.build_datasets --data_dir ptb-xl --repeats 3

Building and finding again run in processes of their own; memory is the sum over all of them (resident, so pages that
they share count twice). Reading goes through `SignalView` and through `with_format("numpy")`, once row by row and once
in batches, over shuffled rows; rows a second are given by the clock on the wall and by the processor's time, which
other work on the machine disturbs less. A column of plain integers shows what the library itself costs.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import psutil

from benchmarks.quality import ROOT, origin
from data_builders import find_builder
from data_builders.signal_view import SignalView

BATCH = 64
SAMPLE_S = 0.05
_CHILD = """
import resource, sys, time
from data_builders import find_builder
name, config, folder, cache, num_proc = sys.argv[1:]
make = find_builder(name)
began = time.perf_counter()
builder = make(config_name=config, data_dir=folder, cache_dir=cache)
builder.download_and_prepare(num_proc=int(num_proc))
rows = sum(len(rows) for rows in builder.as_dataset().values())
inner = time.perf_counter() - began
used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
print(inner, sum(u.ru_utime + u.ru_stime for u in used), rows)
"""


def run_builder(options: argparse.Namespace, cache: str) -> dict[str, float]:
    """Build, or find in the cache, in a new process.

    Returns:
        seconds with and without the start of Python and its imports, seconds of processor time (with the start), rows,
        and the peak of memory in MiB.
    """
    arguments = [options.dataset, options.config_name, str(options.data_dir.resolve()), cache, str(options.num_proc)]
    began = time.perf_counter()
    child = subprocess.Popen(
        [sys.executable, "-c", _CHILD, *arguments],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    peak = 0
    while child.poll() is None:
        peak = max(peak, resident_bytes(psutil.Process(child.pid)))
        time.sleep(SAMPLE_S)
    whole_s = time.perf_counter() - began
    if child.returncode:
        raise RuntimeError(f"the builder ended with status {child.returncode}")
    assert child.stdout is not None
    inner_s, processor_s, rows = map(float, child.stdout.read().split()[-3:])
    peak_mib = peak / 2**20
    return {"whole_s": whole_s, "inner_s": inner_s, "processor_s": processor_s, "rows": rows, "peak_mib": peak_mib}


def resident_bytes(process: psutil.Process) -> int:
    """The resident memory of a process and all that it started; those that are just ending count nothing."""
    total = 0
    try:
        for member in (process, *process.children(recursive=True)):
            total += member.memory_info().rss
    except psutil.NoSuchProcess:
        pass
    return total


def rows_a_second(read: Callable[[], int]) -> tuple[float, float]:
    """By the clock on the wall and by the processor's time."""
    wall, processor = time.perf_counter(), time.process_time()
    rows = read()
    return rows / (time.perf_counter() - wall), rows / (time.process_time() - processor)


def measure_reading(
    rows: datasets.Dataset, count: int, repeats: int, seed: int
) -> dict[str, list[tuple[float, float]]]:
    """Rows a second of every way to read, `repeats` times in turn, on `count` rows in random order."""
    order = np.random.default_rng(seed).permutation(len(rows))[:count].tolist()
    numbers = datasets.Dataset.from_dict({"number": list(range(len(rows)))})
    ways: dict[str, Any] = {
        "SignalView": SignalView(rows),
        'with_format("numpy"), signal alone': rows.select_columns(["signal"]).with_format("numpy"),
        'with_format("numpy"), all columns': rows.with_format("numpy"),
        'with_format("numpy"), one integer': numbers.with_format("numpy"),
    }

    def one_by_one(way: Any, index: list[int]) -> int:
        for row in index:
            way[row]
        return len(index)

    def in_batches(way: Any, index: list[int]) -> int:
        for start in range(0, len(index), BATCH):
            way[index[start : start + BATCH]]
        return len(index)

    found: dict[str, list[tuple[float, float]]] = {}
    in_batches(ways["SignalView"], order)  # the first touch brings the file into memory
    for _ in range(repeats):
        for name, way in ways.items():
            # The slow ways are measured on fewer rows, which changes nothing but the patience it takes.
            index = order if name == "SignalView" else order[: count // 5]
            for how, read in (("row by row", one_by_one), (f"batches of {BATCH}", in_batches)):
                found.setdefault(f"{name}, {how}", []).append(
                    rows_a_second(lambda read=read, way=way, index=index: read(way, index))  # type: ignore[misc]
                )
    return found


def main() -> None:
    """Measure and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", type=Path, required=True)
    parser.add_argument("--dataset", default="ptb_xl")
    parser.add_argument("--config_name", default="100hz")
    parser.add_argument("--num_proc", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rows", type=int, default=10_000, help="read in random order")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/build_datasets.json")
    options = parser.parse_args()
    datasets.disable_progress_bars()
    load = os.getloadavg()[0]  # what else the machine was doing
    built, cached = [], []
    with tempfile.TemporaryDirectory() as temporary:
        for repeat in range(options.repeats):
            cache = str(Path(temporary) / str(repeat))
            built.append(run_builder(options, cache))
            cached += [run_builder(options, cache) for _ in range(2)]
        builder = find_builder(options.dataset)(
            config_name=options.config_name, data_dir=options.data_dir, cache_dir=str(Path(temporary) / "0")
        )
        builder.download_and_prepare()
        reading = measure_reading(builder.as_dataset("train"), options.rows, options.repeats, options.seed)
    rows = [
        _row("build, s", [run["inner_s"] for run in built], "< 90", max),
        _row("build, s of processor time", [run["processor_s"] for run in built], None, max),
        _row("build, peak memory of all processes, MiB", [run["peak_mib"] for run in built], "< 1536", max),
        _row("second call, s", [run["inner_s"] for run in cached], "< 3", max),
        _row("second call with the start of Python, s", [run["whole_s"] for run in cached], "< 3", max),
        _row("second call, s of processor time, start included", [r["processor_s"] for r in cached], None, max),
    ]
    for name, rates in reading.items():
        bar = "> 10,000" if "integer" not in name else None
        rows.append(_row(f"rows/s, {name}", [wall for wall, _ in rates], bar, min))
        rows.append(_row(f"rows/s of processor time, {name}", [processor for _, processor in rates], None, min))
    result: dict[str, Any] = {
        "name": options.out.stem,
        "command": f"python -m benchmarks.build_datasets --data_dir {options.data_dir.name}",
        "seed": options.seed,
        **origin(),
        "data": {
            "set": f"{builder.FACTS.title} {builder.FACTS.version}, {options.config_name}",
            "records": int(built[0]["rows"]),
            "repeats": options.repeats,
            "building_processes": options.num_proc,
        },
        "rows": rows,
    }
    result["hardware"]["load_average_before"] = round(load, 1)
    options.out.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")
    for row in rows:
        print(row)


def _row(what: str, values: list[float], bar: str | None, worst: Callable[[list[float]], float]) -> dict[str, Any]:
    digits = 2 if statistics.median(values) < 100 else 0
    middle = round(statistics.median(values), digits)
    return {"what": what, "median": middle, "worst": round(worst(values), digits), "bar": bar}


if __name__ == "__main__":
    main()
