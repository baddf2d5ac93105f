"""The spread over seeds: runs that differ in their seed alone, measured on the same records."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_model import save_tiny_model

from benchmarks import seeds
from benchmarks.plain_cnn import PlainCnn
from benchmarks.tables import render_table
from modeling_ecgmoe.feature_extraction_ecgmoe import EcgMoeFeatureExtractor


def run_of(folder: Path, **recipe: object) -> Path:
    model = save_tiny_model(folder)
    (model / "training.json").write_text(json.dumps({"epochs": 3, "output_dir": str(folder), **recipe}))
    return model


def plain_run_of(folder: Path, **recipe: object) -> Path:
    torch.manual_seed(0)
    PlainCnn().save_pretrained(folder)
    EcgMoeFeatureExtractor().save_pretrained(folder)
    (folder / "training.json").write_text(json.dumps({"epochs": 3, "output_dir": str(folder), **recipe}))
    return folder


@pytest.mark.parametrize("run", [run_of, plain_run_of])
def test_runs_of_one_recipe_are_compared(
    run: Callable[..., Path], mini_ptb_xl: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = [str(run(tmp_path / str(seed), seed=seed, evaluate_every=5 * (1 + seed))) for seed in (0, 1)]
    out = tmp_path / "seeds.json"
    data = ["--data_dir", str(mini_ptb_xl), "--num_proc", "1"]
    monkeypatch.setattr(sys, "argv", ["seeds", *data, "--models", *runs, "--out", str(out)])
    seeds.main()
    result = json.loads(out.read_text())
    age = next(row for row in result["rows"] if row["answer"].startswith("age"))
    assert age["seed 0"] == age["seed 1"] > 0  # the same weights twice
    assert age["standard deviation"] == 0.0
    assert result["details"]["recipe"] == {"epochs": 3}
    assert "| age, mae |" in render_table(result)


@pytest.mark.parametrize(
    ("second", "message"),
    [({"seed": 1, "epochs": 5}, "differs from .* in epochs"), ({"seed": 0}, r"a seed of its own, found \[0, 0\]")],
)
def test_runs_that_cannot_be_compared_are_refused(second: dict[str, int], message: str, tmp_path: Path) -> None:
    runs = [run_of(tmp_path / "first", seed=0), run_of(tmp_path / "second", **second)]
    with pytest.raises(ValueError, match=message):
        seeds.read_recipes(runs)
    with pytest.raises(ValueError, match="two or more runs, found 1"):
        seeds.read_recipes(runs[:1])
