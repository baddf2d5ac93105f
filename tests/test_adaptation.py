"""Small matters of training: few records for many processes, products, the log."""

import dataclasses
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from accelerate import Accelerator
from safetensors.torch import load_file
from tiny_model import save_tiny_model

import train
from adaptation import spread_of
from checkpoints import write_log
from modeling_ecgmoe.adapters import MultiTask
from modeling_ecgmoe.tasks import TASKS, Task

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
def test_two_processes_adapt_to_fewer_records_than_both_batches(mini_ptb_xl: Path, tmp_path: Path) -> None:
    values = {"data_dir": mini_ptb_xl, "task": "age", "model": save_tiny_model(tmp_path), "batch_size": 20}
    values |= {"output_dir": tmp_path / "adapted", "min_steps": 3, "epochs": 1, "cache_dir": tmp_path / "cache"}
    words = [word for name, value in values.items() for word in (f"--{name}", str(value))]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT)}
    command = [*launch, "train.py", "adapt", *words]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "adapted/age/adapter_model.safetensors").is_file()


def test_a_task_of_ones_own_may_ask_for_products(mini_ptb_xl: Path, tmp_path: Path) -> None:
    task = dataclasses.replace(TASKS["statements"], name="findings", products=3)
    (tmp_path / "findings.json").write_text(json.dumps(task.to_dict()), encoding="utf-8")
    model = save_tiny_model(tmp_path, tasks=("age",))
    values = {"data_dir": mini_ptb_xl, "task": tmp_path / "findings.json", "model": model, "batch_size": 20}
    values |= {"output_dir": tmp_path / "adapted", "min_steps": 3, "epochs": 1, "cache_dir": tmp_path / "cache"}
    train.main(["adapt", *(word for name, value in values.items() for word in (f"--{name}", str(value)))])
    many = MultiTask.from_pretrained(model, [])
    assert many.cards[many.load(tmp_path / "adapted" / "findings")].task.products == 3
    head = load_file(tmp_path / "adapted/findings/adapter_model.safetensors")
    assert head["base_model.model.heads.head_findings.products"].shape == (71, 9)


@pytest.mark.parametrize(
    ("task", "values", "words"),
    [
        (Task("height", "regression", "height", "height", unit="cm"), [1.72, 181.0, 160.0], "1.72 to 181 cm, half"),
        (Task("old", "binary", "old", "old", labels=("no", "yes")), ["no", "yes", "no"], "no 2, yes 1"),
        (
            Task("axis", "multi_class", "axis", "axis", labels=("MID", "Mid", "LAD")),
            ["MID", "LAD", "LAD"],
            "MID 1, Mid 0",
        ),
        (Task("both", "multi_label", "both", "both", labels=("a", "b")), [["a", "b"], ["b"], []], "a 1, b 2"),
    ],
    ids=lambda value: value.kind if isinstance(value, Task) else "",
)
def test_the_labels_are_counted_before_training(task: Task, values: list[Any], words: str) -> None:
    assert words in spread_of(task, task.targets(values))


def test_what_is_not_finite_is_null_in_the_log(tmp_path: Path) -> None:
    write_log(Accelerator(cpu=True), tmp_path, {"loss": 1.0, "arrhythmia_macro_auroc": math.nan})
    assert json.loads((tmp_path / "log.jsonl").read_text(), parse_constant=pytest.fail) == {
        "loss": 1.0,
        "arrhythmia_macro_auroc": None,
    }
