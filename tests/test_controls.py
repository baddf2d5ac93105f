"""Whole trainings without a part, beside the model that has all."""

import json
import sys
from pathlib import Path

import pytest
from tiny_model import save_tiny_model, tiny_model

from benchmarks import controls
from benchmarks.tables import render_table


def run_of(folder: Path, config: dict[str, object] | None = None, **recipe: object) -> Path:
    """A run that has finished, of the full model or of one with other configuration fields."""
    model = save_tiny_model(folder)
    if config:
        tiny_model(**config).save_pretrained(model)
    values = {"epochs": 3, "seed": 0, "output_dir": str(folder), "model_config": bool(config), **recipe}
    (model / "training.json").write_text(json.dumps(values))
    return model


def measure(monkeypatch: pytest.MonkeyPatch, data: Path, out: Path, full: Path, *runs: Path) -> None:
    where = ["--data_dir", str(data), "--num_proc", "1", "--full", str(full), "--out", str(out)]
    models = ["--models", *map(str, runs)]
    monkeypatch.setattr(
        sys, "argv", ["controls", *where, *models, "--tasks", "age", "sex", "--split", "train", "--resamples", "20"]
    )
    controls.main()


def test_a_run_is_compared_with_the_full_model_on_the_same_records(
    mini_ptb_xl: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full, same = run_of(tmp_path / "full"), run_of(tmp_path / "same", seed=1)
    rhythm = run_of(tmp_path / "rhythm", {"paths": ["rhythm"]})
    out = tmp_path / "controls.json"
    measure(monkeypatch, mini_ptb_xl, out, full, rhythm, same)
    result = json.loads(out.read_text())
    first, second, third = result["rows"]
    assert [row["model"] for row in result["rows"]] == ["full", 'paths ["rhythm"]', "full"]
    assert second["parameters"] < first["parameters"] == third["parameters"]
    assert first["age minus full"] is None
    assert third["age minus full"]["value"] == third["sex minus full"]["value"] == 0.0
    difference = second["age"]["value"] - first["age"]["value"]
    assert second["age minus full"]["value"] == pytest.approx(difference)
    assert difference != 0.0
    assert result["details"]["recipe"] == {"epochs": 3}
    assert '| paths ["rhythm"] |' in render_table(result)


def test_runs_of_another_recipe_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full, longer = run_of(tmp_path / "full"), run_of(tmp_path / "longer", epochs=4, noise=0.1)
    with pytest.raises(ValueError, match=r"longer/model was not trained as .*: epochs, noise differ"):
        measure(monkeypatch, tmp_path, tmp_path / "out.json", full, longer)
    (longer / "training.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"training.json does not exist"):
        measure(monkeypatch, tmp_path, tmp_path / "out.json", full, longer)
