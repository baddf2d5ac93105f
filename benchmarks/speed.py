"""What an answer costs: ECG-MoE for one task and for five beside networks that others use, on one thread.

    python -m benchmarks.speed [--onnx FILE] [--only NAME ...]

All run in one process, in turns, on random weights where they are not ours; each reads a 12-lead ECG of 10 s at its
own rate. `ms` is process time for a record, the best turn and, in brackets, the median. `times five tasks` is the
median, over the turns, of the cost against ECG-MoE's five tasks in the same turn, with a 95 % bootstrap interval. What
is not installed is left out and named. Networks of more than 10 GFLOP read 4 records where others read 32, since a
larger batch would not make a record cheaper. Floating-point operations are counted by torch, which counts no Fourier
transforms; one multiplication with one addition is two.
"""

import argparse
import copy
import json
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count

from benchmarks.plain_cnn import PlainCnn
from benchmarks.quality import ROOT, origin
from benchmarks.speed_peers import PEERS, NotInstalled, OnnxModel
from benchmarks.xresnet import XResNet1d101
from data_builders.synthetic import synthetic_ecg, write_wfdb
from modeling_ecgmoe.adapters import SIGNAL_KEYS, MultiTask
from modeling_ecgmoe.ecg_files import read_ecg
from modeling_ecgmoe.leads import LEADS
from modeling_ecgmoe.tasks import TASKS

FIVE_TASKS = ("age", "sex", "rr_interval", "arrhythmia", "superclass")
REFERENCE = "ECG-MoE, five tasks"
BATCH_SIZES = (1, 32)
SLOW_FLOP, MOST_RECORDS_OF_SLOW = 10e9, 4


@dataclass
class Runner:
    """One row: a model, or several that answer together, and its calls for each batch size.

    Args:
        name: its name in the table; input: what it reads.
        parameters: of all its models.
        call: batch size to a function that answers a batch of `records[batch size]` recordings.
        ms: batch size to milliseconds a record, one for each turn in which it ran, and None elsewhere.
    """

    name: str
    input: str
    parameters: int
    call: dict[int, Callable[[], Any]]
    records: dict[int, int] = field(default_factory=lambda: {size: size for size in BATCH_SIZES})
    ms: dict[int, list[float | None]] = field(default_factory=dict)


def signals(count: int, sampling_rate: int) -> list[np.ndarray]:
    """Synthetic 12-lead recordings of 10 s, in mV."""
    return [
        synthetic_ecg(sampling_rate=sampling_rate, rate_bpm=55 + 2 * index, noise_mv=0.01, seed=index).ecg.signal
        for index in range(count)
    ]


def own_runners(model: str, onnx: Path | None) -> tuple[list[Runner], MultiTask]:
    """ECG-MoE for one task and five, five copies of it, and the conventional networks at its rate."""
    five = MultiTask.from_pretrained(model, FIVE_TASKS)
    ones = [MultiTask.from_pretrained(model, [name]) for name in FIVE_TASKS]
    rate = five.extractor.sampling_rate
    windows = [five.extractor.extract(signal, rate, LEADS) for signal in signals(max(BATCH_SIZES), rate)]
    features = {size: five.extractor.pad(windows[:size], return_tensors="pt") for size in BATCH_SIZES}
    inputs = {size: {name: features[size][name] for name in SIGNAL_KEYS} for size in BATCH_SIZES}

    def together(answering: Sequence[MultiTask]) -> dict[int, Callable[[], Any]]:
        def answer(size: int) -> None:
            for many in answering:
                many.task_logits(many.encoder(**inputs[size]))

        return {size: partial(answer, size) for size in BATCH_SIZES}

    def apart(models: Sequence[nn.Module]) -> dict[int, Callable[[], Any]]:
        def answer(size: int) -> None:
            for name, one in zip(FIVE_TASKS, models, strict=True):
                one(**inputs[size], tasks=[name])

        return {size: partial(answer, size) for size in BATCH_SIZES}

    def alone(net: nn.Module) -> dict[int, Callable[[], Any]]:
        net.eval()
        return {size: partial(net, inputs[size]["input_values"]) for size in BATCH_SIZES}

    copies = [copy.deepcopy(five.model) for _ in FIVE_TASKS]
    size_of = {name: size(five.model.ecgmoe) + five.adapter_size(name) for name in FIVE_TASKS}
    adapted = size(five.model.ecgmoe) + sum(map(five.adapter_size, FIVE_TASKS))
    conventional = XResNet1d101({name: TASKS[name] for name in FIVE_TASKS})
    plain = PlainCnn()
    own = f"12 x 1000 at {rate} Hz"
    runners = [
        Runner(REFERENCE, own, adapted, together([five])),
        Runner("ECG-MoE, one task", own, size_of[FIVE_TASKS[0]], together(ones[:1])),
        Runner("ECG-MoE, five fine-tuned copies", own, 5 * size(five.model.ecgmoe), apart(copies)),
        Runner(
            "the same, each folded as the one pass is",
            own,
            5 * size(five.model.ecgmoe),
            together(ones),
        ),
        Runner("conventional: xresnet1d101, five heads", own, size(conventional), alone(conventional)),
        Runner("the same, normalisations folded", own, size(conventional), alone(conventional.folded())),
        Runner("plain CNN, seven heads", own, size(plain), alone(plain)),
    ]
    if onnx is not None:
        session = OnnxModel(onnx)
        calls: dict[int, Callable[[], Any]] = {n: partial(session, inputs[n]) for n in BATCH_SIZES}
        runners.insert(1, Runner("ECG-MoE, ONNX Runtime", own, adapted, calls))
    return runners, five


def size(net: nn.Module) -> int:
    """How many parameters it has."""
    return sum(parameter.numel() for parameter in net.parameters())


def peer_runners(only: Sequence[str]) -> tuple[list[Runner], list[str]]:
    """The peers that can be run here, and why others cannot."""
    runners, missing = [], []
    for name, (shape, build) in PEERS.items():
        if only and not any(part in name for part in only):
            continue
        try:
            with torch.inference_mode(False):
                net = build().eval()
        except NotInstalled as error:
            missing.append(f"{name}: {error}")
            continue
        one = partial(net, torch.randn(shape))
        records = {n: min(n, MOST_RECORDS_OF_SLOW) if _count(one) > SLOW_FLOP else n for n in BATCH_SIZES}
        calls: dict[int, Callable[[], Any]] = {
            n: partial(net, torch.randn(count * shape[0], *shape[1:])) for n, count in records.items()
        }
        runners.append(Runner(name, net.input_words, size(net), calls, records))
    return runners, missing


def _convolution(x_shape: list[int], w_shape: list[int], *_: Any, out_shape: list[int], **__: Any) -> int:
    return conv_flop_count(x_shape, w_shape, out_shape)


def _count(call: Callable[[], Any]) -> int:
    """Floating-point operations that torch sees in a call, those of oneDNN's convolutions too."""
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.mkldnn_convolution: _convolution}) as counter:
        call()
    return counter.get_total_flops()


def measure(runners: Sequence[Runner], batch_size: int, seconds: float) -> None:
    """Run all in turns until each has had its share of the time; the slow ones sit out of most turns.

    Each turn has an order of its own: whoever always follows the largest network finds the caches empty.
    """
    costs = {}
    for runner in runners:
        began = time.process_time()
        runner.call[batch_size]()  # warms up too
        costs[runner.name] = time.process_time() - began
        runner.ms[batch_size] = []
    turns = int(np.clip(seconds / sum(min(c, costs[REFERENCE] * 20) for c in costs.values()), 5, 200))
    rng = np.random.default_rng(0)
    for turn in range(turns):
        for index in rng.permutation(len(runners)):
            runner = runners[index]
            every = max(1, round(turns / max(3.0, seconds / len(runners) / costs[runner.name])))
            if turn % every:
                runner.ms[batch_size].append(None)
                continue
            began = time.process_time()
            runner.call[batch_size]()
            runner.ms[batch_size].append((time.process_time() - began) * 1000 / runner.records[batch_size])


def ratio(runner: Runner, reference: Runner, batch_size: int, seed: int = 0) -> str:
    """Median and 95 % bootstrap interval of the cost against the reference in the same turn."""
    pairs = zip(runner.ms[batch_size], reference.ms[batch_size], strict=True)
    each = np.array([a / b for a, b in pairs if a is not None and b is not None])
    draws = np.random.default_rng(seed).integers(0, len(each), (2000, len(each)))
    low, high = np.percentile(np.median(each[draws], axis=1), [2.5, 97.5])
    return f"{_digits(float(np.median(each)))} [{_digits(low)}, {_digits(high)}]"


def steps(many: MultiTask, repeats: int) -> list[dict[str, Any]]:
    """What comes before the network, for a 12-lead record of 10 s at 500 Hz."""
    ecg = synthetic_ecg(sampling_rate=500, noise_mv=0.01, seed=0).ecg
    with tempfile.TemporaryDirectory() as temporary:
        write_wfdb(ecg, Path(temporary), "record")
        header = Path(temporary) / "record.hea"
        calls: dict[str, Callable[[], Any]] = {
            "reading a WFDB file": lambda: read_ecg(header),
            "feature extraction, R peaks included": lambda: many.prepare(
                ecg.signal, ecg.sampling_rate, ecg.lead_names
            ),
        }
        rows = []
        for name, call in calls.items():
            ms = []
            for _ in range(repeats):
                began = time.process_time()
                call()
                ms.append((time.process_time() - began) * 1000)
            rows.append({"model": name, "input": "12 x 5000 at 500 Hz", "batch_1_ms": _best_and_median(ms)})
    return rows


def _best_and_median(ms: Sequence[float | None]) -> str:
    known = [value for value in ms if value is not None]
    return f"{_digits(min(known))} ({_digits(float(np.median(known)))})"


def _digits(value: float) -> str:
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


def main() -> None:
    """Measure and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="hub/model")
    parser.add_argument("--onnx", type=Path, help="ECG-MoE as exported, timed with ONNX Runtime")
    parser.add_argument("--only", nargs="*", default=[], help="peers whose name has one of these words")
    parser.add_argument("--seconds", type=float, default=120.0, help="process time for each batch size, about")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/speed.json")
    options = parser.parse_args()
    own, many = own_runners(options.model, options.onnx)
    peers, missing = peer_runners(options.only)
    runners = [*own, *peers]
    reference = runners[0]
    for batch_size in BATCH_SIZES:
        measure(runners, batch_size, options.seconds)
    rows: list[dict[str, Any]] = []
    for runner in runners:
        flops = _count(runner.call[1])
        row: dict[str, Any] = {
            "model": runner.name,
            "input": runner.input,
            "parameters, M": round(runner.parameters / 1e6, 2),
            "GFLOP": round(flops / 1e9, 2) if flops else None,
        }
        for batch_size in BATCH_SIZES:
            row[f"batch_{batch_size}_ms"] = _best_and_median(runner.ms[batch_size])
            row[f"batch_{batch_size}_times_five_tasks"] = ratio(runner, reference, batch_size)
        rows.append(row)
        print(row, flush=True)
    rows += steps(many, repeats=200)
    for line in missing:
        print("left out:", line)
    result = {
        "name": options.out.stem,
        "command": "python -m benchmarks.speed" + (" --onnx FILE" if options.onnx else ""),
        "seed": 0,
        **origin(),
        "data": {"set": "synthetic ECGs, 12 leads, 10 s", "left_out": "; ".join(missing) or "nothing left out"},
        "rows": rows,
    }
    options.out.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    torch.manual_seed(0)
    torch.set_num_threads(1)
    with torch.inference_mode():
        main()
