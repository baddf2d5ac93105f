"""What the exported graph keeps of the model's answers: ONNX, its 8-bit variant, and preprocessing in numpy alone.

    python -m benchmarks.export --data_dir ptb-xl

The model is exported as `ecgmoe export --int8` does, with ranges from records of the training split, and asked about
the validation split. Differences from PyTorch have 95 % bootstrap intervals over patients, on the same resamples.
Times are CPU times on one thread, in turns; the ratio to PyTorch is what holds on other machines.
"""

import json
import runpy
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import HfArgumentParser

from benchmarks.quality import PACKAGES, ROOT, origin
from modeling_ecgmoe.adapters import MultiTask
from modeling_ecgmoe.export_model import INT8, PROGRAMS, onnx_runner, trace, write_int8, write_onnx
from modeling_ecgmoe.leads import LEADS, find_lead
from modeling_ecgmoe.metrics import bootstrap_difference, bootstrap_interval
from modeling_ecgmoe.tasks import TASKS
from records import DataArguments, Records, batches, load_split

Inputs = dict[str, np.ndarray]
Run = Callable[[Inputs], dict[str, np.ndarray]]
TORCH, ONNX, EIGHT_BITS, NUMPY = "PyTorch", "ONNX", "ONNX, 8 bits", "ONNX, inputs by examples/run_onnx.py"


@dataclass
class ExportArguments:
    """What to compare."""

    model: str = field(default="hub/model", metadata={"help": "ECG-MoE, with its adapters beside it"})
    calibration: int = field(default=128, metadata={"help": "training records that show the ranges of numbers"})
    out: Path = field(default=Path("benchmarks/results/export.json"), metadata={"help": "result file"})
    resamples: int = field(default=1000, metadata={"help": "bootstrap resamples"})
    rounds: int = field(default=20, metadata={"help": "batches of 32 that are timed"})


def feeds(records: Records, size: int = 32) -> Iterator[Inputs]:
    """The records in batches, as a graph takes them."""
    for batch in batches(records, size):
        yield {name: value.numpy() for name, value in batch["signal"].items()}


def answers_of(run: Run, inputs: Iterator[Inputs]) -> dict[str, np.ndarray]:
    """task to logits (records, outputs)."""
    parts: dict[str, list[np.ndarray]] = {}
    for batch in inputs:
        for name, logits in run(batch).items():
            parts.setdefault(name, []).append(logits)
    return {name: np.concatenate(values) for name, values in parts.items()}


def numpy_feeds(many: MultiTask, rows: Any) -> Iterator[Inputs]:
    """The rows one by one, prepared by the example for runtimes without torch."""
    prepare = runpy.run_path(str(ROOT / "examples" / "run_onnx.py"))["prepare"]
    for row in rows.with_format("numpy"):
        names = [find_lead(str(name)) for name in row["lead_names"]]
        order = [names.index(lead) for lead in LEADS]
        yield prepare(np.asarray(row["signal"])[order], float(row["sampling_rate"]), many.extractor.to_dict())


def times_ms(runs: dict[str, Run], records: Records, rounds: int) -> dict[str, float]:
    """The least CPU time a record of each, from batches that all answer in turns."""
    spent: dict[str, list[float]] = {name: [] for name in runs}
    for _, batch in zip(range(rounds), feeds(records), strict=False):
        for name, run in runs.items():
            began = time.process_time()
            run(batch)
            spent[name].append(1000 * (time.process_time() - began) / len(batch["input_values"]))
    return {name: min(values) for name, values in spent.items()}


def main() -> None:
    """Export, measure and write the file."""
    data, arguments = HfArgumentParser((DataArguments, ExportArguments)).parse_args_into_dataclasses()
    torch.set_num_threads(1)
    many = MultiTask.from_pretrained(arguments.model)
    tasks = [TASKS[name] for name in many.cards]
    rows = load_split(data, "validation")
    records = Records(rows, many.extractor, tasks, data.num_proc)
    few = replace(data, max_records=arguments.calibration)
    shown = Records(load_split(few, "train"), many.extractor, tasks)

    @torch.inference_mode()
    def run_torch(inputs: Inputs) -> dict[str, np.ndarray]:
        encoded = many.encoder(**{name: torch.from_numpy(value) for name, value in inputs.items()})
        return {name: logits.numpy() for name, logits in many.task_logits(encoded).items()}

    with tempfile.TemporaryDirectory() as temporary:
        files = {ONNX: Path(temporary) / PROGRAMS["onnx"], EIGHT_BITS: Path(temporary) / INT8}
        examples = [
            many.extractor.extract(np.asarray(row["signal"]), float(row["sampling_rate"]), list(row["lead_names"]))
            for row in rows.with_format("numpy").select(range(2))
        ]
        write_onnx(trace(many, examples), list(many.cards), files[ONNX])
        write_int8(files[ONNX], files[EIGHT_BITS], list(feeds(shown)))
        runs = {TORCH: run_torch} | {name: onnx_runner(path, threads=1) for name, path in files.items()}
        sizes = {name: path.stat().st_size / 2**20 for name, path in files.items()}
    found = {name: answers_of(run, feeds(records)) for name, run in runs.items()}
    found[NUMPY] = answers_of(runs[ONNX], numpy_feeds(many, rows))
    spent = times_ms(runs, records, arguments.rounds)

    def metrics(name: str, measure: Callable[..., Any], reference: str | None = None) -> dict[str, Any]:
        out = {}
        for task in tasks:
            answers = [task.answers(found[row][task.name]) for row in (reference, name) if row is not None]
            targets = records.labels[task.name].numpy()
            options = {"resamples": arguments.resamples, "groups": records.patient_ids}
            out[task.name] = measure(task.metric, targets, *answers, **options).to_dict()
        return out

    result = {
        "name": arguments.out.stem,
        "command": "python -m benchmarks.export --data_dir ptb-xl",
        "seed": 0,
        **origin((*PACKAGES, "onnx", "onnxscript", "onnxruntime")),
        "data": {"set": "PTB-XL 1.0.3, 100 Hz, fold 9", "records": len(records)},
        "rows": [
            {
                "runtime": name,
                "MiB": round(sizes[name], 1) if name in sizes else None,
                "CPU ms a record": round(spent[name], 2) if name in spent else None,
                "times PyTorch": round(spent[name] / spent[TORCH], 2) if name in spent else None,
                "metrics": metrics(name, bootstrap_interval),
            }
            for name in found
        ],
        "differences": {
            name: {
                "largest_of_a_logit": {
                    task: float(np.abs(logits - found[TORCH][task]).max()) for task, logits in found[name].items()
                },
                "metrics": metrics(name, bootstrap_difference, TORCH),
            }
            for name in found
            if name != TORCH
        },
    }
    arguments.out.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")
    for name, difference in result["differences"].items():
        print(name, f"{max(difference['largest_of_a_logit'].values()):.2g}")
        for task, value in difference["metrics"].items():
            print(f"  {task:12} {value['value']:+.4f} ({value['low']:+.4f} to {value['high']:+.4f})")
    print({row["runtime"]: (row["MiB"], row["CPU ms a record"], row["times PyTorch"]) for row in result["rows"]})


if __name__ == "__main__":
    main()
