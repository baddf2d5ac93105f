"""How good the answers are: ECG-MoE beside the plain CNN and the trivial baselines, on one split of PTB-XL.

    python -m benchmarks.quality --data_dir ptb-xl --cnn runs/plain_cnn/model

Every figure has a 95 % bootstrap interval over patients. Demographics alone is a logistic regression on age and sex,
fitted on the training split (the median by sex for age); constant gives the median or the prevalence.
"""

import json
import platform
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from transformers import HfArgumentParser

from benchmarks.plain_cnn import PlainCnn
from evaluation import predict_adapters, predict_logits
from modeling_ecgmoe.adapters import MultiTask
from modeling_ecgmoe.metrics import bootstrap_interval
from modeling_ecgmoe.tasks import DIAGNOSTIC_STATEMENTS, FORM_STATEMENTS, TASKS, Task
from records import DataArguments, Records, load_split

ROOT = Path(__file__).resolve().parents[1]
SHOWN = ("arrhythmia", "statements", "superclass", "age", "sex", "rr_interval")
GROUPS = {"diagnostic": DIAGNOSTIC_STATEMENTS, "form": FORM_STATEMENTS}
COMMAND = "python -m benchmarks.quality --data_dir ptb-xl"
PACKAGES = ("torch", "transformers", "peft", "accelerate", "datasets", "scikit-learn", "sleepecg", "neurokit2")


@dataclass
class QualityArguments:
    """What to compare."""

    model: str = field(default="hub/model", metadata={"help": "ECG-MoE, with its adapters beside it"})
    cnn: list[str] = field(default_factory=list, metadata={"help": "folders of plain CNNs, see plain_cnn.py"})
    split: str = field(default="validation", metadata={"help": "validation or test"})
    out: Path = field(default=Path("benchmarks/results/quality_fold9.json"), metadata={"help": "result file"})
    resamples: int = field(default=1000, metadata={"help": "bootstrap resamples"})


def measure(answers: dict[str, np.ndarray], records: Records, resamples: int) -> dict[str, Any]:
    """The metrics of one row, from task to answers (records, outputs) in the task's unit or as probabilities."""
    wanted: dict[str, tuple[Task, Sequence[int]]] = {
        name: (TASKS[name], range(TASKS[name].num_outputs)) for name in SHOWN if name in answers
    }
    if "statements" in answers:
        statements = TASKS["statements"]
        for group, codes in GROUPS.items():
            wanted[group] = (statements, [statements.labels.index(code) for code in codes])
    return {
        name: bootstrap_interval(
            task.metric,
            records.labels[task.name].numpy()[:, columns],
            answers[task.name][:, columns],
            resamples=resamples,
            groups=records.patient_ids,
        ).to_dict()
        for name, (task, columns) in wanted.items()
    }


def constant_answers(train: Records, count: int) -> dict[str, np.ndarray]:
    """The median or the prevalence for everybody."""
    answers = {}
    for name in SHOWN:
        targets = train.labels[name].numpy()
        value = np.nanmedian(targets, axis=0) if TASKS[name].kind == "regression" else np.nanmean(targets, axis=0)
        answers[name] = np.tile(value, (count, 1))
    return answers


def demographic_answers(train: Records, records: Records) -> dict[str, np.ndarray]:
    """What age and sex alone tell; sex from age, and age from sex."""

    def facts(of: Records, without: str) -> np.ndarray:
        age, sex = of.labels["age"].numpy()[:, 0], of.labels["sex"].numpy()[:, 0]
        known = np.nan_to_num(age, nan=float(np.nanmedian(age))) / 50.0 - 1.0
        columns = {"age": [known, known**2, np.isnan(age)], "sex": [np.nan_to_num(sex, nan=0.5)]}
        return np.stack([c for name, group in columns.items() if name != without for c in group], axis=1)

    answers = {}
    for name in ("arrhythmia", "statements", "superclass", "sex"):
        targets = train.labels[name].numpy()
        inputs, asked = facts(train, name), facts(records, name)
        columns = []
        for target in targets.T:
            known = np.isfinite(target)
            fitted = LogisticRegression(C=1.0, max_iter=500).fit(inputs[known], target[known])
            columns.append(fitted.predict_proba(asked)[:, 1])
        answers[name] = np.stack(columns, axis=1)
    age, sex = train.labels["age"].numpy()[:, 0], train.labels["sex"].numpy()[:, 0]
    medians = np.array([np.nanmedian(age[sex == value]) for value in (0, 1)])
    answers["age"] = medians[records.labels["sex"].numpy()[:, :1].astype(int)]
    return answers


def training_of(folder: Path) -> dict[str, Any]:
    """The arguments a model was trained with; its `epochs` are those without adapters."""
    training: dict[str, Any] = json.loads((folder / "training.json").read_text(encoding="utf-8"))
    return training


def name_of_cnn(training: dict[str, Any]) -> str:
    """What sets a plain CNN apart from the others."""
    soft, seed = training.get("soft_labels"), training["seed"]
    return "plain CNN" + (", soft labels too" if soft else "") + (f", seed {seed}" if seed else "")


def main() -> None:
    """Measure all rows and write the file."""
    data, arguments = HfArgumentParser((DataArguments, QualityArguments)).parse_args_into_dataclasses()
    many = MultiTask.from_pretrained(arguments.model)
    tasks = [TASKS[name] for name in SHOWN]
    train, records = (
        Records(load_split(data, s), many.extractor, tasks, data.num_proc) for s in ("train", arguments.split)
    )
    cpu = torch.device("cpu")

    def of_logits(logits: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {name: TASKS[name].answers(values) for name, values in logits.items() if name in SHOWN}

    size = sum(p.numel() for p in many.model.parameters())
    adapted = size + sum(many.adapter_size(name) for name in many.cards)
    epochs = training_of(Path(arguments.model))["epochs"]
    rows: list[tuple[str, int | None, int | None, dict[str, np.ndarray]]] = [
        ("ECG-MoE, adapters", adapted, epochs, of_logits(predict_adapters(many, records))),
        ("ECG-MoE, joint heads", size, epochs, of_logits(predict_logits(many.model, records, cpu))),
    ]
    for folder in arguments.cnn:
        cnn = PlainCnn.from_pretrained(folder)
        count, training = sum(p.numel() for p in cnn.parameters()), training_of(Path(folder))
        answers = of_logits(predict_logits(cnn, records, cpu))
        rows.append((name_of_cnn(training), count, training["epochs"], answers))
    detector = {"rr_interval": records.signal["period_s"].numpy()[:, None] * 1000.0}
    rows.append(("R-peak detector alone", None, None, detector))
    rows.append(("age and sex alone", None, None, demographic_answers(train, records)))
    rows.append(("constant", None, None, constant_answers(train, len(records))))
    values: list[dict[str, Any]] = [
        {
            "model": name,
            "parameters": count,
            "epochs": seen,
            "metrics": measure(answers, records, arguments.resamples),
        }
        for name, count, seen, answers in rows
    ]
    fold = {"validation": "fold 9", "test": "fold 10"}[arguments.split]
    cnns = f" --cnn {' '.join(arguments.cnn)}" if arguments.cnn else ""
    result = {
        "name": arguments.out.stem,
        "command": f"{COMMAND}{cnns} --split {arguments.split}",
        "seed": 0,
        **origin(),
        "data": {"set": f"PTB-XL 1.0.3, 100 Hz, {fold}", "records": len(records)},
        "rows": values,
    }
    arguments.out.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")
    for row in values:
        print(row["model"], {name: round(m["value"], 4) for name, m in row["metrics"].items()})


def origin(packages: Sequence[str] = PACKAGES) -> dict[str, Any]:
    """Commit, versions and hardware of a result."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True)
    cpuinfo = Path("/proc/cpuinfo")
    names = (
        [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        if cpuinfo.exists()
        else []
    )
    processor = names[0].split(":")[1].strip() if names else platform.processor() or platform.machine()
    return {
        "commit": commit.stdout.strip(),
        "versions": {name: version(name) for name in packages},
        "hardware": {"processor": processor, "threads": torch.get_num_threads()},
    }


if __name__ == "__main__":
    main()
