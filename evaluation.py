"""What a model answers for recordings in memory, and how good its answers are.

`train.py evaluate` and `benchmarks/quality.py` run it; training looks at validation through it.
"""

import json
import logging
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from torch import Tensor, nn

from arguments import check_ranges, make_folder
from modeling_ecgmoe.adapters import MultiTask, default_model, folder_of
from modeling_ecgmoe.metrics import MetricResult, bootstrap_interval
from modeling_ecgmoe.tasks import TASKS, Task
from records import DataArguments, EncodedRecords, Records, answers_of_records, batches, load_split

logger = logging.getLogger(__name__)


@torch.inference_mode()
def predict_logits(
    model: Any, records: Records | EncodedRecords, device: torch.device, tasks: list[str] | None = None
) -> dict[str, np.ndarray]:
    """task to logits (records, outputs), on whole recordings; the windows of one are averaged.

    Args:
        model: ECG-MoE, in PEFT or not, or another that has `tasks` and gives `logits`.
    """
    model.eval()
    parts: dict[str, list[Tensor]] = {}
    for batch in batches(records):
        inputs = {"encoder_output": batch["encoded"]} if "encoded" in batch else batch["signal"]
        inputs = send_to_device(inputs, device)
        output = model(**inputs) if tasks is None else model(**inputs, tasks=tasks)
        for name, logits in output.logits.items():
            parts.setdefault(name, []).append(logits.float().cpu())
    return answers_of_records({name: torch.cat(values) for name, values in parts.items()}, model.tasks, records)


def evaluate_quickly(model: nn.Module, records: Records, accelerator: Accelerator) -> dict[str, float]:
    """The main metric of each task, without intervals."""
    logits = predict_logits(model, records, accelerator.device)
    return {
        f"{name}_{TASKS[name].metric}": point_metric(TASKS[name], records.labels[name].numpy(), logits[name])
        for name in logits
        if name in records.labels and name in TASKS
    }


def point_metric(task: Task, labels: np.ndarray, logits: np.ndarray) -> float:
    """The task's main metric, without an interval; NaN where no label can be evaluated."""
    known = np.isfinite(labels)
    if not known.any() or (task.labels and not (np.ptp(np.where(known, labels, 0.5), axis=0) > 0.9).any()):
        return math.nan
    return bootstrap_interval(task.metric, labels, task.answers(logits), resamples=0).value


@dataclass
class EvaluateArguments:
    """What to evaluate, and where the figures go."""

    model: str | None = field(
        default=None,
        metadata={"help": "a folder with adapters beside it, or an id on the Hub; hub/model of the sources otherwise"},
    )
    task: list[str] = field(
        default_factory=list, metadata={"help": "adapters to evaluate, all that are found otherwise"}
    )
    split: str = field(default="validation", metadata={"help": "train, validation or test"})
    out: str = field(default="", metadata={"help": "JSON file for the results; printed as well"})
    resamples: int = field(default=1000, metadata={"help": "bootstrap resamples of patients"})

    def __post_init__(self) -> None:
        check_ranges(self, {"at least 1": ("resamples",)})


def find_model(model: str | None) -> Path:
    """The folder of a model and its feature extractor.

    Args:
        model: a folder, or an id on the Hub; that of the source tree where not given.

    Raises:
        FileNotFoundError: there is none.
    """
    folder = default_model() if model is None else folder_of(model)
    missing = [name for name in ("config.json", "preprocessor_config.json") if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"--model {model or folder} holds no {' and no '.join(missing)}; name the folder of a model"
        )
    return folder


def evaluate(data: DataArguments, arguments: EvaluateArguments) -> dict[str, MetricResult]:
    """The main metric of each adapter with its interval, all of them answered in one pass of the backbone.

    Raises:
        FileNotFoundError: there is no such model or adapter.
        ValueError: there is nothing to evaluate.
    """
    folder = find_model(arguments.model)
    if arguments.out:
        make_folder(Path(arguments.out).parent, "--out in")
    many = MultiTask.from_pretrained(arguments.model or folder, arguments.task or None)
    tasks = [card.task for card in many.cards.values()]
    if not tasks:
        raise ValueError(f"no task adapters lie beside {arguments.model or folder}; name some with --task")
    records = Records(load_split(data, arguments.split), many.extractor, tasks, data.num_proc)
    logits = predict_adapters(many, records)
    results = {}
    for task in tasks:
        if task.name not in records.labels:
            logger.warning("task %s is left out: the data have no column %r", task.name, task.column)
            continue
        labels, answers = records.labels[task.name].numpy(), task.answers(logits[task.name])
        try:
            results[task.name] = bootstrap_interval(
                task.metric, labels, answers, resamples=arguments.resamples, groups=records.patient_ids
            )
        except ValueError as error:  # one task without two classes does not lose the others
            logger.warning("task %s is left out: %s", task.name, error)
    if not results:
        raise ValueError(f"none of the tasks {', '.join(many.cards)} can be evaluated on these data; see above why")
    for name, result in results.items():
        print(f"{name:12} {result.metric:12} {result.value:.4f} ({result.low:.4f} to {result.high:.4f}), n={result.n}")
    if arguments.out:
        values = {name: result.to_dict() for name, result in results.items()}
        Path(arguments.out).write_text(json.dumps(values, indent=2) + "\n")
    return results


@torch.inference_mode()
def predict_adapters(many: MultiTask, records: Records) -> dict[str, np.ndarray]:
    """task to logits (records, outputs) of all adapters."""
    parts: dict[str, list[Tensor]] = {name: [] for name in many.cards}
    for batch in batches(records):
        for name, logits in many.task_logits(many.encoder(**batch["signal"])).items():
            parts[name].append(logits)
    tasks = {name: card.task for name, card in many.cards.items()}
    return answers_of_records({name: torch.cat(values) for name, values in parts.items()}, tasks, records)
