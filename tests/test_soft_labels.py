"""Soft labels: what models answer is written in the labels' unit, and moves labels as far as told."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_model import save_tiny_model

import train
from benchmarks import soft_labels as writer
from benchmarks.plain_cnn import PlainCnn
from modeling_ecgmoe.tasks import TASKS
from soft_labels import soften

TASKS_USED = [TASKS[name] for name in ("age", "sex", "rr_interval")]


def records(**labels: list[float]) -> Any:
    return SimpleNamespace(labels={name: torch.tensor(values)[:, None] for name, values in labels.items()})


def test_labels_move_by_the_share_and_unknown_ones_stay_unknown(tmp_path: Path) -> None:
    some = records(age=[40.0, np.nan, 60.0], sex=[0.0, 1.0, 1.0], rr_interval=[800.0, 900.0, 1000.0])
    answers = {"age": [50.0, 50.0, 50.0], "sex": [0.5, 0.5, 1.0], "rr_interval": [1.0, 1.0, 1.0]}
    save_file({name: torch.tensor(values)[:, None] for name, values in answers.items()}, tmp_path / "soft.safetensors")
    soften(some, TASKS_USED, tmp_path / "soft.safetensors", 0.2)
    torch.testing.assert_close(some.labels["age"][:, 0], torch.tensor([42.0, torch.nan, 58.0]), equal_nan=True)
    torch.testing.assert_close(some.labels["sex"][:, 0], torch.tensor([0.1, 0.9, 1.0]))
    # It starts from a measurement, which is nearer than any answer.
    assert some.labels["rr_interval"][:, 0].tolist() == [800.0, 900.0, 1000.0]


def test_tasks_may_keep_their_labels(tmp_path: Path) -> None:
    some = records(age=[40.0], sex=[0.0])
    save_file({"age": torch.full((1, 1), 50.0), "sex": torch.full((1, 1), 0.5)}, tmp_path / "soft.safetensors")
    soften(some, TASKS_USED, tmp_path / "soft.safetensors", 0.5, ["sex"])
    assert (float(some.labels["age"]), float(some.labels["sex"])) == (45.0, 0.0)
    with pytest.raises(ValueError, match="hard_labels names height; the tasks are age, sex, rr_interval"):
        soften(some, TASKS_USED, tmp_path / "soft.safetensors", 0.5, ["height"])


def test_answers_of_other_recordings_are_refused_with_both_shapes(tmp_path: Path) -> None:
    save_file({"age": torch.zeros(4, 1)}, tmp_path / "soft.safetensors")
    with pytest.raises(ValueError, match=r"task age as \(4, 1\), expected \(2, 1\)"):
        soften(records(age=[40.0, 50.0]), TASKS_USED, tmp_path / "soft.safetensors", 0.5)


def test_a_missing_file_and_an_impossible_share_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"benchmarks\.soft_labels writes it"):
        soften(records(age=[40.0]), TASKS_USED, tmp_path / "none.safetensors", 0.5)
    with pytest.raises(ValueError, match="soft_share must lie between 0 and 1, found 2"):
        soften(records(age=[40.0]), TASKS_USED, tmp_path / "none.safetensors", 2.0)


def test_answers_of_several_models_are_averaged_and_learned_from(mini_ptb_xl: Path, tmp_path: Path) -> None:
    own = save_tiny_model(tmp_path)
    torch.manual_seed(0)
    PlainCnn().save_pretrained(tmp_path / "plain")
    data = ["--data_dir", str(mini_ptb_xl)]
    for name, models in (("own", [own]), ("plain", [tmp_path / "plain"]), ("both", [own, tmp_path / "plain"])):
        writer.main([*data, "--models", *map(str, models), "--out", str(tmp_path / f"{name}.safetensors")])
    first, second, mean = (load_file(tmp_path / f"{name}.safetensors") for name in ("own", "plain", "both"))
    assert set(second) - set(first) == {"statements", "quality"}  # the tiny model has no such heads
    torch.testing.assert_close(mean["age"], (first["age"] + second["age"]) / 2)
    torch.testing.assert_close(mean["statements"], second["statements"])
    assert 0.0 <= float(mean["sex"].min()) <= float(mean["sex"].max()) <= 1.0

    how = [*data, "--max_steps", "1", "--batch_size", "8", "--output_dir", str(tmp_path / "taught")]
    train.main(["pretrain", *how, "--soft_labels", str(tmp_path / "both.safetensors"), "--soft_share", "0.5"])
    assert (tmp_path / "taught/model/model.safetensors").is_file()


def test_a_folder_without_a_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="holds no model"):
        writer.load_model(tmp_path)
