"""Answers of other models for the training split, learned from beside the true labels (Hinton et al. 2015).

`python -m benchmarks.soft_labels` writes them.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file

from modeling_ecgmoe.tasks import Task
from records import Records


def soften(records: Records, tasks: list[Task], file: str | Path, share: float, hard: Sequence[str] = ()) -> None:
    """Move each known label of `records` by `share` of the way to the answer in `file`.

    A task that starts from a measurement keeps its labels, and so does one that the file does not answer.

    Args:
        file: task to answers (records, outputs), in the labels' unit and in the records' order.
        share: 0 for the labels alone, 1 for the answers alone.
        hard: names of tasks that keep their labels too.

    Raises:
        ValueError: the share is none, a task to keep is unknown, or the answers are of other recordings.
        FileNotFoundError: there is no such file.
    """
    if not 0.0 <= share <= 1.0:
        raise ValueError(f"soft_share must lie between 0 and 1, found {share}")
    if unknown := sorted(set(hard) - {task.name for task in tasks}):
        raise ValueError(
            f"hard_labels names {', '.join(unknown)}; the tasks are {', '.join(task.name for task in tasks)}"
        )
    if not Path(file).is_file():
        raise FileNotFoundError(f"{file} does not exist; python -m benchmarks.soft_labels writes it")
    answers = load_file(file)
    for task in tasks:
        if task.prior or task.name in hard or task.name not in answers or task.name not in records.labels:
            continue
        labels, answer = records.labels[task.name], answers[task.name].to(records.labels[task.name].dtype)
        if labels.shape != answer.shape:
            raise ValueError(
                f"{file} answers task {task.name} as {tuple(answer.shape)}, expected {tuple(labels.shape)} as in "
                "these recordings; write it for the same training split"
            )
        records.labels[task.name] = torch.lerp(labels, answer, share)  # NaN stays NaN
