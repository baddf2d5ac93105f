"""Ablations: configurations of the variants, and a run of two of them on a miniature PTB-XL."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_model import TINY_TASKS, tiny_model

from adaptation import AdaptArguments
from benchmarks import ablations
from benchmarks.ablations import Ablations, adapted, config_of, read_settings
from benchmarks.tables import KEYS, render_table
from modeling_ecgmoe.configuration_ecgmoe import EcgMoeConfig
from modeling_ecgmoe.modeling_ecgmoe import EcgMoeForTasks
from modeling_ecgmoe.tasks import TASKS

ROOT = Path(__file__).resolve().parents[1]
SHIPPED = ROOT / "benchmarks" / "configs" / "ablations.json"


def tiny_config() -> dict[str, Any]:
    config = tiny_model().config.to_diff_dict()
    sizes = {name: config[name] for name in EcgMoeConfig.__annotations__ if name in config}
    return sizes | {"tasks": list(TINY_TASKS)}


@pytest.fixture
def settings(mini_ptb_xl: Path, tmp_path: Path) -> dict[str, Any]:
    return {
        "data": {"data_dir": str(mini_ptb_xl), "cache_dir": str(tmp_path / "cache"), "num_proc": 1},
        "training": {"batch_size": 8, "max_steps": 3},
        "seeds": [0],
        "tasks": ["superclass", "age"],
        "config": tiny_config(),
        "variants": [
            {"name": "full", "seeds": [0, 1]},
            {"name": "of no such field", "config": {"depth": 3}},
            {"name": "dense, age alone", "dense": True, "config": {"tasks": ["age"]}},
        ],
        "adapting": {"max_steps": 2, "batch_size": 8},
        "adapter_tasks": ["age"],
        "adapters": [{"name": "head alone", "rank": 0}, {"name": "all weights", "rank": 0, "scope": "everything"}],
        "resamples": 20,
        "output_dir": str(tmp_path / "runs"),
        "out": str(tmp_path / "ablations.json"),
    }


def test_a_run_measures_what_it_can_names_what_failed_and_resumes(
    settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = tmp_path / "settings.json", tmp_path / "ablations.json"
    path.write_text(json.dumps(settings))
    with pytest.raises(SystemExit, match="failed: of no such field"):
        ablations.main([str(path)])
    first = json.loads(out.read_text())
    assert set(first) >= set(KEYS)
    full, dense, head, everything = first["rows"]
    assert [row["variant"] for row in first["rows"]] == ["full", "dense, age alone", "head alone", "all weights"]
    assert full["age minus full"] is None
    assert dense["superclass"] is None
    assert [full["seeds"], dense["seeds"], head["seeds"]] == [2, 1, 1]
    gap = dense["age"]["value"] - full["age"]["value"]  # full's is the mean of its seeds
    assert dense["age minus full"]["value"] == pytest.approx(gap)
    assert dense["age minus full"]["low"] <= gap <= dense["age minus full"]["high"]
    assert head["parameters"] == tiny_model().heads["head_age"].weight.numel() + 1
    assert everything["parameters"] > head["parameters"]
    assert "age, MAE (years)" in render_table(first)

    capsys.readouterr()
    del settings["variants"][1]
    settings["variants"].append({"name": "one path", "config": {"paths": ["rhythm"]}})
    path.write_text(json.dumps(settings))
    ablations.main([str(path), "--only", "one path", "head alone"])
    said = capsys.readouterr().out
    assert "full: measured before" in said
    assert "head alone: measured before" in said
    second = json.loads(out.read_text())
    assert "one path" in [row["variant"] for row in second["rows"]]
    assert [row for row in second["rows"] if row["variant"] != "one path"] == first["rows"]


def test_what_was_compared_to_another_full_model_is_forgotten(settings: dict[str, Any], tmp_path: Path) -> None:
    settings |= {"variants": settings["variants"][:1], "adapters": settings["adapters"][:1]}
    path, out = tmp_path / "settings.json", tmp_path / "ablations.json"
    path.write_text(json.dumps(settings))
    ablations.main([str(path)])
    assert [row["variant"] for row in json.loads(out.read_text())["rows"]] == ["full", "head alone"]
    settings["training"]["max_steps"] = 2
    path.write_text(json.dumps(settings))
    ablations.main([str(path), "--only", "full"])
    assert [row["variant"] for row in json.loads(out.read_text())["rows"]] == ["full"]


def test_two_runs_side_by_side_share_the_result_file(settings: dict[str, Any], tmp_path: Path) -> None:
    settings |= {"variants": [settings["variants"][0], settings["variants"][2]], "adapters": settings["adapters"][:1]}
    path, out = tmp_path / "settings.json", tmp_path / "ablations.json"
    path.write_text(json.dumps(settings))
    ablations.main([str(path), "--only", "full"])
    one, other = Ablations(settings), Ablations(settings)
    one.run_variant(settings["variants"][1])
    other.run_adapter(settings["adapters"][0])
    rows = json.loads(out.read_text())["rows"]
    assert [row["variant"] for row in rows] == ["full", "dense, age alone", "head alone"]


def test_every_variant_of_the_shipped_file_can_be_built() -> None:
    settings = read_settings(SHIPPED)
    full = config_of({"name": "full"}, settings["config"])
    for variant in settings["variants"]:
        config = config_of(variant, settings["config"])
        assert isinstance(EcgMoeForTasks(config), EcgMoeForTasks)
        if set(variant) - {"name", "seeds"}:
            assert config.to_dict() != full.to_dict(), variant["name"]
    assert set(settings["tasks"]) <= set(full.tasks or {})


def test_the_dense_variant_is_as_wide_as_what_an_element_sees_of_the_full_model() -> None:
    shared = tiny_config()
    dense, full = config_of({"name": "dense", "dense": True}, shared), config_of({"name": "full"}, shared)
    assert dense.num_experts == 1
    assert 2 * dense.expert_size == (full.num_experts_per_tok + 1) * full.expert_size


@pytest.mark.parametrize(
    ("variant", "message"),
    [
        ({"name": "x", "config": {"depth": 3}}, "EcgMoeConfig has no depth"),
        ({"name": "x", "without": {"families": ["wavelet"]}}, "families of the full model lacks wavelet"),
        ({"name": "x", "confg": {}}, "unknown confg"),
    ],
)
def test_a_variant_that_changes_nothing_known_is_refused(variant: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config_of(variant, {})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 3}, "missing or unknown: epochs"),
        ({"variants": [{"name": "other"}]}, "the first variant must be"),
        ({"adapters": [{"name": "full", "rank": 1}]}, "found twice: full"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / "settings.json"
    path.write_text(json.dumps(json.loads(SHIPPED.read_text()) | changes))
    with pytest.raises(ValueError, match=message):
        read_settings(path)


@pytest.mark.parametrize(
    ("rank", "scope", "expected"),
    [(0, "fusion", {"head"}), (2, "fusion", {"head", "fusion"}), (2, "all", {"head", "fusion", "encoder"})],
)
def test_what_trains_is_what_the_adapter_says(rank: int, scope: str, expected: set[str]) -> None:
    model = adapted(tiny_model(), TASKS["age"], rank, scope, AdaptArguments())
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert {part for name in trained for part in ("head", "fusion", "encoder") if part in name} == expected
    assert all("lora_" in name or "head_age" in name for name in trained)


def test_full_fine_tuning_starts_where_the_full_model_is() -> None:
    torch.manual_seed(0)
    signal = torch.randn(2, 12, 400)
    with torch.inference_mode():
        before = tiny_model().eval()(signal, tasks=["age"]).logits["age"]
        model = adapted(tiny_model(), TASKS["age"], 0, "everything", AdaptArguments()).eval()
        after = model(input_values=signal, tasks=["age"]).logits["age"]
    np.testing.assert_allclose(after, before, atol=1e-6)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == sum(p.numel() for p in tiny_model().parameters())
