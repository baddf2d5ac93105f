"""What the published recipe gives without one of the model's parts: whole trainings beside the published model's own.

    python -m benchmarks.controls --data_dir ptb-xl --models runs/dense/model runs/rhythm_only/model

`benchmarks.ablations` compares short trainings; here a part has as long to pay as the model that is published. A run
is one of `train.py pretrain benchmarks/configs/pretrain.json --model_config FILE`; its `training.json` must agree with
that of the model it is compared to. Joint heads on fold 9; each difference has an interval over patients, the same
patients drawn for both. How far runs of other seeds lie apart is for `benchmarks.seeds` to say.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import HfArgumentParser

from benchmarks.ablations import answers_of
from benchmarks.few_labels import short
from benchmarks.quality import origin
from benchmarks.seeds import NOT_THE_RECIPE, differing, read_run, recipe_of
from modeling_ecgmoe.configuration_ecgmoe import EcgMoeConfig
from modeling_ecgmoe.feature_extraction_ecgmoe import EcgMoeFeatureExtractor
from modeling_ecgmoe.metrics import bootstrap_difference, bootstrap_interval
from modeling_ecgmoe.modeling_ecgmoe import EcgMoeForTasks
from modeling_ecgmoe.tasks import TASKS
from records import DataArguments, Records, load_split

# Which part is missing is what the runs are about.
NOT_COMPARED = (*NOT_THE_RECIPE, "model_config")


@dataclass
class ControlsArguments:
    """Which runs to compare with which model."""

    models: list[str] = field(default_factory=list, metadata={"help": "folders of runs without a part"})
    full: str = field(default="hub/model", metadata={"help": "folder of the model that has all parts"})
    tasks: list[str] = field(
        default_factory=lambda: ["statements", "superclass", "arrhythmia", "age", "sex"],
        metadata={"help": "tasks to report"},
    )
    split: str = field(default="validation", metadata={"help": "train, validation or test"})
    resamples: int = field(default=1000, metadata={"help": "bootstrap resamples of patients"})
    out: Path = field(default=Path("benchmarks/results/controls.json"), metadata={"help": "result file"})


def check_recipe(folder: Path, full: Path) -> None:
    """Whether a run was trained as the full model was.

    Raises:
        FileNotFoundError: one of them does not say.
        ValueError: it was not.
    """
    if other := differing(*(recipe_of(read_run(each), NOT_COMPARED) for each in (folder, full))):
        raise ValueError(f"{folder} was not trained as {full} was: {', '.join(other)} differ; train it anew")


def changes(config: EcgMoeConfig, full: EcgMoeConfig) -> dict[str, Any]:
    """The fields of a configuration that differ from those of the full model, in JSON."""
    plain, plain_full = (json.loads(json.dumps(c.to_dict(), default=list)) for c in (config, full))
    names = sorted(set(EcgMoeConfig.__annotations__) - {"tasks"})
    return {name: plain[name] for name in names if plain.get(name) != plain_full.get(name)}


def main() -> None:
    """Measure each run and write its difference to the full model."""
    data, arguments = HfArgumentParser((DataArguments, ControlsArguments)).parse_args_into_dataclasses()
    full, folders = Path(arguments.full), [Path(folder) for folder in arguments.models]
    for folder in folders:
        check_recipe(folder, full)
    run = read_run(full)
    extractor = EcgMoeFeatureExtractor.from_pretrained(full)
    tasks = [TASKS[name] for name in arguments.tasks]
    records = Records(load_split(data, arguments.split), extractor, tasks, data.num_proc)
    options: dict[str, Any] = {"resamples": arguments.resamples, "groups": records.patient_ids}
    models = [EcgMoeForTasks.from_pretrained(folder, dtype=torch.float32) for folder in (full, *folders)]
    reference, rows = answers_of(models[0], records), []
    for model in models:
        answers = reference if model is models[0] else answers_of(model, records)
        changed = changes(model.config, models[0].config)
        row: dict[str, Any] = {
            "model": ", ".join(f"{name} {json.dumps(value)}" for name, value in changed.items()) or "full",
            "parameters": sum(p.numel() for p in model.parameters()),
        }
        for task in tasks:
            labels, found = records.labels[task.name].numpy(), answers[task.name]
            row[task.name] = short(bootstrap_interval(task.metric, labels, found, **options).to_dict(), task)
            difference = None
            if model is not models[0]:
                pair = reference[task.name], found
                difference = short(bootstrap_difference(task.metric, labels, *pair, **options).to_dict(), task)
            row[f"{task.name} minus full"] = difference
        rows.append(row)
        print({name: value["value"] if isinstance(value, dict) else value for name, value in row.items()}, flush=True)
    result = {
        "name": arguments.out.stem,
        "command": "python -m benchmarks.controls --data_dir ptb-xl --models RUN ...",
        "seed": run["seed"],
        **origin(),
        "data": {"set": f"PTB-XL 1.0.3, 100 Hz, {arguments.split}", "records": len(records.record_ids)},
        "details": {"recipe": recipe_of(run, NOT_COMPARED)},
        "rows": rows,
    }
    arguments.out.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
