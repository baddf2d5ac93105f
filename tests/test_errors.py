"""The errors that are shown are those that were made, with the recordings behind them."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from tiny_model import save_tiny_model

from benchmarks import errors
from benchmarks.plain_cnn import PlainCnn
from benchmarks.tables import render_table
from modeling_ecgmoe.tasks import TASKS

LABELS = TASKS["statements"].labels
ABQRS, IMI, NORM = (LABELS.index(code) for code in ("ABQRS", "IMI", "NORM"))


def test_misses_and_false_alarms_are_named_with_what_they_carry() -> None:
    targets = np.zeros((40, len(LABELS)))
    answers = np.full(targets.shape, 0.1)
    targets[:, NORM] = 1.0
    targets[:4, ABQRS] = 1.0
    answers[:4, ABQRS] = [0.9, 0.8, 0.05, 0.7]
    targets[10:20, IMI] = 1.0
    targets[10:20, NORM] = 0.0
    answers[10:20, ABQRS] = np.linspace(0.5, 0.6, 10)
    found = {one["statement"]: one for one in errors.look_at(targets, answers, [f"r{i}" for i in range(40)])}
    assert set(found) == {"ABQRS", "IMI", "NORM"}  # the others cannot be ranked
    about = found["ABQRS"]
    assert about["column"] == ABQRS
    assert about["missed"][0] == {"record": "r2", "records_above": 0.975, "statements": ["NORM", "ABQRS"]}
    assert [one["record"] for one in about["missed"]] == ["r2", "r3", "r1", "r0"]
    assert about["false"][0] == {"record": "r19", "records_above": 0.075, "statements": ["IMI"]}
    assert about["instead"] == "IMI 100%"
    assert found["IMI"]["instead"] == "NORM 100%"


def test_the_file_holds_all_statements_and_the_table_the_worst(
    mini_ptb_xl: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, out = save_tiny_model(tmp_path, ("statements",)), tmp_path / "errors.json"
    PlainCnn().save_pretrained(tmp_path / "cnn")
    options = [
        "--data_dir",
        str(mini_ptb_xl),
        "--model",
        str(model),
        "--cnn",
        str(tmp_path / "cnn"),
        "--out",
        str(out),
    ]
    monkeypatch.setattr(sys, "argv", ["errors", *options, "--shown", "2", "--resamples", "20"])
    errors.main()
    result = json.loads(out.read_text())
    values = [row["metrics"]["ECG-MoE"]["value"] for row in result["statements"]]
    assert values == sorted(values)
    assert len(values) > 2
    assert [row["statement"] for row in result["rows"]] == [row["statement"] for row in result["statements"][:2]]
    assert "| statement | in training | in validation | ECG-MoE, macro AUROC" in render_table(result)
