"""What each part is for: the pretraining without it, and adapters of other sizes, on fold 9 beside the full model.

    python -m benchmarks.ablations benchmarks/configs/ablations.json [--only NAME ...]

Every variant changes fields of `EcgMoeConfig` and nothing else; all share one short schedule, so the figures are below
those of the published model. Each difference to the full model has an interval over patients, the same patients drawn
for both. Adapters start from the full model of this run and are chosen on a part of the training split.

The JSON holds `data` and `training` (arguments of `train.py pretrain`), `seeds`, `tasks` to report, `config` that all
variants share, `variants`, `adapting` (arguments of `train.py adapt`), `adapter_tasks`, `adapters`, `resamples`,
`output_dir` and `out`. A variant has a `name` and may have `config` (fields to change; `tasks` as names), `without`
(items to leave out of a list field), `dense` (true: one feed-forward layer as large as the experts that are active in
the full model) and `seeds` of its own; means over seeds are compared. An adapter has a `name` and `rank`, and may have
`scope`: fusion, all, or everything, which trains every weight, and `adapting` of its own. Rank 0: the head alone.

Whatever is in `out` already under the same settings is not trained again, so once `full` is there two runs with other
names in `--only` may share the work. A variant that fails is named, and the others go on.
"""

import argparse
import json
import logging
import math
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from peft import PeftModel
from safetensors.numpy import load_file, save_file
from sklearn.model_selection import GroupShuffleSplit

from adaptation import AdaptArguments, fit_adapter
from benchmarks.few_labels import part_of, short
from benchmarks.quality import origin
from evaluation import predict_logits
from linear_heads import start_at_base_rates
from modeling_ecgmoe.configuration_ecgmoe import EcgMoeConfig
from modeling_ecgmoe.feature_extraction_ecgmoe import EcgMoeFeatureExtractor
from modeling_ecgmoe.lora import lora_model
from modeling_ecgmoe.metrics import bootstrap_difference, bootstrap_interval
from modeling_ecgmoe.modeling_ecgmoe import EcgMoeForTasks
from modeling_ecgmoe.tasks import TASKS, Task, find_task
from records import DataArguments, EncodedRecords, Records, load_split
from train import TrainingArguments, accelerator_for, fit

logger = logging.getLogger(__name__)

CPU = torch.device("cpu")
FULL = "full"
SETTINGS = (
    "data", "training", "seeds", "tasks", "config", "variants", "adapting", "adapter_tasks", "adapters", "resamples",
    "output_dir", "out",
)  # fmt: skip
CHOSEN_ON = 0.05  # of the training patients, to choose an adapter's epoch on

Answers = dict[str, np.ndarray]  # task to answers of fold 9, (records, outputs), the seeds' side by side


def read_settings(path: Path) -> dict[str, Any]:
    """The JSON.

    Raises:
        ValueError: a key is missing or unknown, a name occurs twice, or the first variant is not the full model.
    """
    settings: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    odd = sorted(set(settings) ^ set(SETTINGS))
    if odd:
        raise ValueError(f"{path} must hold {', '.join(SETTINGS)}; missing or unknown: {', '.join(odd)}")
    names = [variant["name"] for variant in settings["variants"] + settings["adapters"]]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ValueError(f"{path}: each name may occur once, found twice: {', '.join(repeated)}")
    first = settings["variants"][0] if settings["variants"] else {}
    if {name: value for name, value in first.items() if name != "seeds"} != {"name": FULL}:
        raise ValueError(f'{path}: the first variant must be {{"name": "{FULL}"}}, to which all others are compared')
    return settings


def config_of(variant: dict[str, Any], shared: dict[str, Any]) -> EcgMoeConfig:
    """The configuration of a variant.

    Raises:
        ValueError: a key or field is unknown, or `without` names what the full model does not have.
    """
    unknown = sorted(set(variant) - {"name", "config", "without", "dense", "seeds"})
    if unknown:
        known = "known are config, without, dense, seeds"
        raise ValueError(f"variant {variant['name']}: unknown {', '.join(unknown)}; {known}")
    full = build_config(variant["name"], shared)
    changes = dict(variant.get("config", {}))
    for name, items in variant.get("without", {}).items():
        absent = sorted(set(items) - set(getattr(full, name)))
        if absent:
            raise ValueError(f"variant {variant['name']}: {name} of the full model lacks {', '.join(absent)}")
        changes[name] = [item for item in getattr(full, name) if item not in items]
    if variant.get("dense"):
        # The one expert and the shared one, which is as wide, together have the width of all that see an element.
        active = full.expert_size * (full.num_experts_per_tok + 1)
        changes |= {"num_experts": 1, "num_experts_per_tok": 1, "expert_size": active // 2}
    return build_config(variant["name"], shared | changes)


def build_config(variant: str, fields: dict[str, Any]) -> EcgMoeConfig:
    """The configuration with these fields, `tasks` given by their names."""
    odd = sorted(set(fields) - set(EcgMoeConfig.__annotations__))
    if odd:
        raise ValueError(f"variant {variant}: EcgMoeConfig has no {', '.join(odd)}")
    if "tasks" in fields:
        fields = fields | {"tasks": {name: find_task(name).to_dict() for name in fields["tasks"]}}
    return EcgMoeConfig(**fields)


class Ablations:
    """The run: recordings in memory, and where what is measured is written.

    Args:
        settings: see the module.
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        self.settings = settings
        self.data = DataArguments(**settings["data"])
        self.folder, self.out = Path(settings["output_dir"]), Path(settings["out"])
        full = config_of(settings["variants"][0], settings["config"])
        self.extractor = EcgMoeFeatureExtractor(sampling_rate=full.sampling_rate)
        tasks = [Task.from_dict(values) for values in (full.tasks or {}).values()]
        self.train, self.validation = (
            Records(load_split(self.data, split), self.extractor, tasks, self.data.num_proc)
            for split in ("train", "validation")
        )
        self._encoded: tuple[EncodedRecords, EncodedRecords, EncodedRecords] | None = None

    def measured(self) -> dict[str, dict[str, Any]]:
        """What the result file holds, by this run or another; nothing if it was compared to another full model."""
        if not self.out.is_file():
            return {}
        before: dict[str, dict[str, Any]] = json.loads(self.out.read_text(encoding="utf-8"))["details"]["measured"]
        return before if before.get(FULL, {}).get("how") == self.how_variant(self.settings["variants"][0]) else {}

    def folder_of(self, name: str) -> Path:
        """Where a variant's weights and answers lie."""
        return self.folder / "".join(c if c.isalnum() else "_" for c in name)

    def is_done(self, name: str, how: dict[str, Any]) -> bool:
        """Whether it was measured under these settings, and its answers are still there."""
        answers = self.folder_of(name) / "answers.safetensors"
        return self.measured().get(name, {}).get("how") == how and answers.is_file()

    # ------------------------------------------------------------------------------------------------------ variants

    def how_variant(self, variant: dict[str, Any]) -> dict[str, Any]:
        """All that decides about a variant's figures, as JSON has it."""
        config = config_of(variant, self.settings["config"])
        fields = {name: getattr(config, name) for name in sorted(EcgMoeConfig.__annotations__)}
        how = {"config": fields, **{name: self.settings[name] for name in ("data", "training")}}
        how["seeds"] = self.seeds_of(variant)
        return json.loads(json.dumps(how, default=list))

    def seeds_of(self, variant: dict[str, Any]) -> list[int]:
        """The seeds it is trained from."""
        return list(variant.get("seeds", self.settings["seeds"]))

    def run_variant(self, variant: dict[str, Any]) -> None:
        """Train a variant from each seed and measure it."""
        name, answers, parameters = variant["name"], [], 0
        for seed in self.seeds_of(variant):
            folder = self.folder_of(name) / f"seed{seed}"
            shutil.rmtree(folder, ignore_errors=True)
            how = {"evaluate_every": 1000} | self.settings["training"]  # by the last step alone
            arguments = TrainingArguments(**how, seed=seed, output_dir=str(folder))
            accelerator = accelerator_for(arguments)
            model = EcgMoeForTasks(config_of(variant, self.settings["config"]))
            parameters = sum(p.numel() for p in model.parameters())
            start_at_base_rates(model, self.train.labels)
            fit(model, self.extractor, self.train, self.validation, self.data, arguments, accelerator)
            accelerator.free_memory()
            shutil.rmtree(folder / "checkpoint", ignore_errors=True)
            averaged = EcgMoeForTasks.from_pretrained(folder / "model", dtype=torch.float32)
            answers.append(answers_of(averaged, self.validation))
        self.measure(name, self.how_variant(variant), parameters, side_by_side(answers))

    # ------------------------------------------------------------------------------------------------------ adapters

    def how_adapter(self, adapter: dict[str, Any]) -> dict[str, Any]:
        """All that decides about an adapter's figures."""
        own = {name: self.settings[name] for name in ("adapting", "adapter_tasks")}
        plain = {name: value for name, value in adapter.items() if name != "name"}
        return {"adapter": plain, "full": self.how_variant(self.settings["variants"][0]), **own}

    def run_adapter(self, adapter: dict[str, Any]) -> None:
        """Train an adapter for each task on the full model of the first seed and measure them."""
        seed, scope = self.seeds_of(self.settings["variants"][0])[0], adapter.get("scope", "fusion")
        folder = self.folder_of(FULL) / f"seed{seed}" / "model"
        unknown = sorted(set(adapter) - {"name", "rank", "scope", "adapting"})
        if unknown:
            raise ValueError(
                f"adapter {adapter['name']}: unknown {', '.join(unknown)}; known are rank, scope, adapting"
            )
        # What is compared is what LoRA learns; the full model has plain heads, which have not settled.
        how = {"settle": False} | self.settings["adapting"] | adapter.get("adapting", {})
        arguments, tasks = AdaptArguments(**how, seed=seed), self.settings["adapter_tasks"]
        raw = self.adapter_records()
        fitted, chosen_on, measured = raw if scope != "fusion" else self.encoded(folder, raw)
        answers, trained = {}, 0
        for name, task in ((name, TASKS[name].plain()) for name in tasks):
            set_seed(seed)
            model = EcgMoeForTasks.from_pretrained(folder, dtype=torch.float32)
            wrapped = adapted(model, task, adapter["rank"], scope, arguments)
            trained = max(trained, sum(p.numel() for p in wrapped.parameters() if p.requires_grad))
            fit_adapter(wrapped, task, fitted, chosen_on, arguments, Accelerator())
            answers[name] = task.answers(predict_logits(wrapped, measured, CPU, [name])[name])
        self.measure(adapter["name"], self.how_adapter(adapter), trained, answers)

    def adapter_records(self) -> tuple[Records, Records, Records]:
        """What an adapter learns from, what its epoch is chosen on, and fold 9."""
        splitter = GroupShuffleSplit(1, test_size=CHOSEN_ON, random_state=0)
        patients = self.train.patient_ids
        rest, chosen_on = next(splitter.split(np.zeros(len(patients)), groups=patients))
        return part_of(self.train, rest), part_of(self.train, chosen_on), self.validation

    def encoded(self, folder: Path, raw: Sequence[Records]) -> tuple[EncodedRecords, EncodedRecords, EncodedRecords]:
        """What the full model's backbone makes of them, once for all adapters in the fusion."""
        if self._encoded is None:
            model = EcgMoeForTasks.from_pretrained(folder, dtype=torch.float32)
            first, second, third = (EncodedRecords(model, records, CPU) for records in raw)
            self._encoded = first, second, third
        return self._encoded

    # ------------------------------------------------------------------------------------------------------- results

    def measure(self, name: str, how: dict[str, Any], parameters: int, answers: Answers) -> None:
        """Note a variant's metrics and their difference to the full model, and write the file."""
        folder = self.folder_of(name)
        folder.mkdir(parents=True, exist_ok=True)
        save_file(answers, folder / "answers.safetensors")
        metrics = {}
        for task_name in self.settings["tasks"]:
            if task_name not in answers or task_name not in self.validation.labels:
                continue
            task, found = TASKS[task_name], answers[task_name]
            targets = self.validation.labels[task_name].numpy()
            options: dict[str, Any] = {"resamples": self.settings["resamples"], "groups": self.validation.patient_ids}
            value = bootstrap_interval(task.metric, repeated(targets, found.shape[1]), found, **options)
            metrics[task_name] = short(value.to_dict(), task)
            if name != FULL:
                full = self.reference(name)[task_name]
                columns = math.lcm(full.shape[1], found.shape[1])
                pair = (repeated(full, columns), repeated(found, columns))
                difference = bootstrap_difference(task.metric, repeated(targets, columns), *pair, **options)
                metrics[f"{task_name} minus full"] = short(difference.to_dict(), task)
        self.write(self.measured() | {name: {"how": how, "parameters": parameters, "metrics": metrics}})
        print(name, {key: round(metric["value"], 4) for key, metric in metrics.items()}, flush=True)

    def reference(self, name: str) -> Answers:
        """The full model's answers: from all seeds for a variant, from the first for adapters, which start at it."""
        answers = load_file(self.folder_of(FULL) / "answers.safetensors")
        if name in {variant["name"] for variant in self.settings["variants"]}:
            return answers
        seeds = len(self.seeds_of(self.settings["variants"][0]))
        return {task: values[:, : values.shape[1] // seeds] for task, values in answers.items()}

    def write(self, measured: dict[str, dict[str, Any]]) -> None:
        """The result file, in the order of the settings."""
        names = [variant["name"] for variant in self.settings["variants"] + self.settings["adapters"]]
        columns = [c for name in self.settings["tasks"] for c in (name, f"{name} minus full")]
        rows = []
        for name in (n for n in names if n in measured):
            metrics = measured[name]["metrics"]
            ordered = {column: metrics.get(column) for column in columns}
            seeds = len(measured[name]["how"].get("seeds", "1"))  # an adapter has one
            rows.append({"variant": name, "seeds": seeds, "parameters": measured[name]["parameters"], **ordered})
        result = {
            "name": self.out.stem,
            "command": "python -m benchmarks.ablations benchmarks/configs/ablations.json",
            "seed": self.seeds_of(self.settings["variants"][0])[0],
            **origin(),
            "data": {"set": "PTB-XL 1.0.3, 100 Hz, fold 9", "records": len(self.validation.record_ids)},
            "details": {"measured": measured},
            "rows": rows,
        }
        self.out.parent.mkdir(parents=True, exist_ok=True)
        part = self.out.with_suffix(f".{os.getpid()}")  # another run never reads half of it
        part.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        part.replace(self.out)


def answers_of(model: EcgMoeForTasks, records: Records) -> Answers:
    """Task to answers (records, outputs)."""
    return {name: model.tasks[name].answers(logits) for name, logits in predict_logits(model, records, CPU).items()}


def side_by_side(answers: Sequence[Answers]) -> Answers:
    """The answers of several seeds as columns, so that a metric over them is the mean of the seeds."""
    return {name: np.hstack([one[name] for one in answers]) for name in answers[0]}


def repeated(values: np.ndarray, columns: int) -> np.ndarray:
    """The same columns again and again, which leaves a mean over them what it is."""
    return np.tile(values, (1, columns // values.shape[1]))


def adapted(model: EcgMoeForTasks, task: Task, rank: int, scope: str, arguments: AdaptArguments) -> PeftModel:
    """The model ready for `fit_adapter`. LoRA that does not train stays at zero, where it changes nothing."""
    place = "all" if scope == "all" else "fusion"
    wrapped = lora_model(model, task, max(1, rank), 2 * max(1, rank), arguments.lora_dropout, place)
    for name, parameter in wrapped.named_parameters():
        if scope == "everything":
            parameter.requires_grad = "lora_" not in name and "original_module" not in name
        elif rank == 0 and "lora_" in name:
            parameter.requires_grad = False
    return wrapped


def main(argv: Sequence[str] | None = None) -> None:
    """Run what is not done yet; exits with 1 where something failed."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    parser = argparse.ArgumentParser(description="What each part of the model is for.")
    parser.add_argument("settings", type=Path, help="JSON, see benchmarks/configs/ablations.json")
    parser.add_argument("--only", nargs="*", help="names of variants and adapters; all otherwise")
    options = parser.parse_args(argv)
    settings = read_settings(options.settings)
    names = [variant["name"] for variant in settings["variants"] + settings["adapters"]]
    unknown = sorted(set(options.only or ()) - set(names))
    if unknown:
        raise ValueError(f"no variant {', '.join(unknown)} in {options.settings}; there are {', '.join(names)}")
    run, failed = Ablations(settings), []
    jobs: list[tuple[dict[str, Any], Callable[..., dict[str, Any]], Callable[..., None]]]
    jobs = [(v, run.how_variant, run.run_variant) for v in settings["variants"]]
    jobs += [(a, run.how_adapter, run.run_adapter) for a in settings["adapters"]]
    for job, how_of, start in jobs:
        name = job["name"]
        # All others are compared to the full model.
        if options.only and name not in options.only and name != FULL:
            continue
        try:
            if run.is_done(name, how_of(job)):
                print(f"{name}: measured before", flush=True)
                continue
            start(job)
        except Exception:  # whatever went wrong with one, hours of the others must not be lost; it is named below
            logger.exception("%s failed; the others go on", name)
            failed.append(name)
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
