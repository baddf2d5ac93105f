"""What plain CNNs answer for training records that they have not seen: targets without memory of the labels.

    python -m benchmarks.cross_fit benchmarks/configs/cross_fit.json

The training folds are divided into parts. One network for each part learns from all others, with the arguments of
`train.py pretrain`, and answers for it. `benchmarks.soft_labels --answers FILE` averages the answers with a model's.
"""

import dataclasses
import logging
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.plain_cnn import PlainCnn
from evaluation import predict_logits
from head_start import start_at_base_rates
from modeling_ecgmoe.feature_extraction_ecgmoe import EcgMoeFeatureExtractor
from modeling_ecgmoe.tasks import TASKS
from records import DataArguments, load_split, part_of
from train import TrainingArguments, accelerator_for, fit, parse_arguments, splits_for


@dataclass
class CrossFitArguments:
    """How to divide the training split, and where the answers go."""

    parts: int = field(default=4, metadata={"help": "networks to train, each without one part of the folds"})
    out: str = field(default="runs/cross_fit.safetensors", metadata={"help": "the answers"})


def parts_of(folds: np.ndarray, count: int) -> list[np.ndarray]:
    """The indices of the records of each part: folds that follow each other.

    Raises:
        ValueError: there are fewer folds than parts.
    """
    known = np.unique(folds)
    if not 2 <= count <= len(known):
        raise ValueError(f"parts must lie between 2 and {len(known)}, the number of training folds, found {count}")
    return [np.flatnonzero(np.isin(folds, some)) for some in np.array_split(known, count)]


def cross_fit(data: DataArguments, arguments: TrainingArguments, how: CrossFitArguments) -> dict[str, Tensor]:
    """Train all networks; returns task to answers (records, outputs) in the labels' unit, in the split's order."""
    extractor, first = EcgMoeFeatureExtractor(), PlainCnn()
    records, validation = splits_for(first, extractor, data, arguments)
    rows = load_split(data, "train").with_format(None)
    fold_of = dict(zip(rows["record_id"][:], rows["fold"][:], strict=True))
    parts = parts_of(np.array([fold_of[record] for record in records.record_ids]), how.parts)
    answers: dict[str, Tensor] = {}
    for number, part in enumerate(parts):
        own = dataclasses.replace(
            arguments, seed=arguments.seed + number, output_dir=f"{arguments.output_dir}/part_{number}"
        )
        accelerator = accelerator_for(own)
        model = PlainCnn()
        for name in first.tasks.keys() - model.tasks.keys():
            model.add_task(first.tasks[name])
        others = part_of(records, np.setdiff1d(np.arange(len(records)), part))
        start_at_base_rates(model, others.labels)
        fit(model, extractor, others, validation, data, own, accelerator)
        trained = PlainCnn.from_pretrained(Path(own.output_dir) / "model")
        for name, logits in predict_logits(trained, part_of(records, part), torch.device("cpu")).items():
            answer = torch.from_numpy(TASKS[name].answers(logits).astype(np.float32))
            whole = answers.setdefault(name, torch.full((len(records), answer.shape[1]), torch.nan))
            whole[torch.from_numpy(part)] = answer
    return answers


def main(argv: list[str]) -> None:
    """Write the answers."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    data, arguments, how = parse_arguments((DataArguments, TrainingArguments, CrossFitArguments), argv)
    answers = cross_fit(data, arguments, how)
    Path(how.out).parent.mkdir(parents=True, exist_ok=True)
    save_file(answers, how.out)


if __name__ == "__main__":
    main(sys.argv[1:])
