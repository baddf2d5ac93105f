"""How far runs of one recipe lie apart that differ in their seed alone: fold 9, joint heads.

    python -m benchmarks.seeds --data_dir ptb-xl --models runs/base/model runs/seed1/model runs/seed2/model

Runs are of ECG-MoE or of the plain CNN. Their recipe is read from the `training.json` beside the weights.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import HfArgumentParser

from benchmarks.quality import origin
from benchmarks.soft_labels import load_model
from evaluation import point_metric, predict_logits
from modeling_ecgmoe.feature_extraction_ecgmoe import EcgMoeFeatureExtractor
from modeling_ecgmoe.tasks import TASKS
from records import DataArguments, Records, load_split

NOT_THE_RECIPE = ("seed", "output_dir", "resume", "evaluate_every")


@dataclass
class SeedsArguments:
    """Which runs to compare."""

    models: list[str] = field(default_factory=list, metadata={"help": "folders of two or more runs"})
    split: str = field(default="validation", metadata={"help": "validation or test"})
    out: Path = field(default=Path("benchmarks/results/seeds.json"), metadata={"help": "result file"})


def read_run(folder: Path) -> dict[str, Any]:
    """The arguments that a run was trained with.

    Raises:
        FileNotFoundError: the folder does not say.
    """
    file = folder / "training.json"
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist; name a model that train.py pretrain made")
    run: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return run


def recipe_of(run: dict[str, Any], beside: Sequence[str] = NOT_THE_RECIPE) -> dict[str, Any]:
    """A run's arguments but for those `beside` the recipe."""
    return {name: value for name, value in run.items() if name not in beside}


def differing(recipe: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """The arguments in which two recipes differ."""
    return sorted(name for name in recipe | other if recipe.get(name) != other.get(name))


def read_recipes(folders: list[Path]) -> tuple[list[int], dict[str, Any]]:
    """The seed of each run, and the recipe that all share.

    Raises:
        FileNotFoundError: a folder does not say how it was trained.
        ValueError: there are fewer than two runs, they differ in more than their seed, or two have the same seed.
    """
    if len(folders) < 2:
        raise ValueError(f"name two or more runs, found {len(folders)}")
    runs = [read_run(folder) for folder in folders]
    recipes = [recipe_of(run) for run in runs]
    for folder, recipe in zip(folders, recipes, strict=True):
        if other := differing(recipe, recipes[0]):
            raise ValueError(f"{folder} differs from {folders[0]} in {', '.join(other)}, not in its seed alone")
    seeds = [run["seed"] for run in runs]
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"each run needs a seed of its own, found {seeds}")
    return seeds, recipes[0]


def main() -> None:
    """Measure each run and write the spread."""
    data, arguments = HfArgumentParser((DataArguments, SeedsArguments)).parse_args_into_dataclasses()
    folders = [Path(folder) for folder in arguments.models]
    seeds, recipe = read_recipes(folders)
    extractor = EcgMoeFeatureExtractor.from_pretrained(folders[0])
    models = [load_model(folder) for folder in folders]
    tasks = list(models[0].tasks.values())
    records = Records(load_split(data, arguments.split), extractor, tasks, data.num_proc)
    values: dict[str, list[float]] = {}
    for model in models:
        logits = predict_logits(model, records, torch.device("cpu"))
        for name in (task.name for task in tasks if task.name in records.labels):
            labels = records.labels[name].numpy()
            values.setdefault(name, []).append(point_metric(TASKS[name], labels, logits[name]))
    rows = [
        {
            "answer": f"{name.replace('_', ' ')}, {TASKS[name].metric.replace('_', ' ')}",
            **{f"seed {seed}": round(value, 4) for seed, value in zip(seeds, each, strict=True)},
            "standard deviation": round(float(np.std(each, ddof=1)), 4),
        }
        for name, each in values.items()
        if np.isfinite(each).all()  # no label of the kind is in these records otherwise
    ]
    result = {
        "name": arguments.out.stem,
        "command": "python -m benchmarks.seeds --data_dir ptb-xl --models RUN ...",
        "seed": seeds[0],
        **origin(),
        "data": {"set": f"PTB-XL 1.0.3, 100 Hz, {arguments.split}", "records": len(records.record_ids)},
        "details": {"recipe": recipe},
        "rows": rows,
    }
    arguments.out.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    for row in rows:
        print(row)


if __name__ == "__main__":
    main()
