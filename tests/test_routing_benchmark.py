"""What the routing benchmark measures, on routings that are known, and the benchmark itself on small data."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import write_mini_ptb_xl
from mini_sets import write_mitdb
from PIL import Image
from sklearn.metrics import normalized_mutual_info_score
from tiny_model import TINY_TASKS, tiny_model
from torch import Tensor

from benchmarks import routing
from benchmarks.routing import ANOTHER, RANDOM, WINNER, associate, evenness, match, normalised_mi, rerouted, routers_of
from benchmarks.tables import KEYS, render_table
from data_builders.synthetic import synthetic_ecg
from modeling_ecgmoe.feature_extraction_ecgmoe import EcgMoeFeatureExtractor
from modeling_ecgmoe.leads import LEADS
from modeling_ecgmoe.modeling_ecgmoe import EcgMoeForTasks
from modeling_ecgmoe.tasks import TASKS

RNG = np.random.default_rng(0)
PATIENTS = np.repeat(np.arange(20), 100)
WAYS = ("within_patients", "patients_exchanged", "all_shuffled")


def associate_winners(kinds: np.ndarray, winners: np.ndarray) -> dict:
    return associate(kinds, np.eye(4)[winners], PATIENTS, resamples=50, permutations=50)


# Mutual information


def test_the_information_is_that_of_scikit_learn_on_any_labels() -> None:
    kinds, winners = RNG.integers(6, size=500), RNG.integers(4, size=500)
    winners = np.where(RNG.random(500) < 0.5, kinds % 4, winners)
    table = np.eye(6)[kinds].T @ np.eye(4)[winners]
    assert normalised_mi(table) == pytest.approx(normalized_mutual_info_score(kinds, winners))
    both = normalised_mi(np.stack([table, 2 * table]))
    assert both == pytest.approx(float(normalised_mi(table)))


def test_experts_that_each_take_one_kind_tell_all_and_no_shuffle_does() -> None:
    kinds = RNG.integers(4, size=2000)
    found = associate_winners(kinds, (kinds + 1) % 4)
    assert found["value"] == pytest.approx(1.0)
    assert found["low"] == pytest.approx(1.0)
    assert np.array(found["shares"]) == pytest.approx(np.eye(4)[[1, 2, 3, 0]])
    assert found["beats"] == np.bincount(kinds).tolist()
    assert all(found["chance"][way]["high"] < 0.05 and found["chance"][way]["p"] < 0.03 for way in WAYS)


def test_experts_that_take_any_kind_tell_no_more_than_chance() -> None:
    found = associate_winners(RNG.integers(4, size=2000), RNG.integers(4, size=2000))
    assert found["value"] < 0.01
    assert 0 < found["value"] < 3 * found["chance"]["all_shuffled"]["value"]


def test_experts_that_know_the_patient_alone_are_unmasked_by_shuffling_within_patients() -> None:
    kinds = np.where(RNG.random(2000) < 0.9, PATIENTS % 4, RNG.integers(4, size=2000))
    found = associate_winners(kinds, PATIENTS % 4)
    assert found["value"] > 0.5
    assert found["chance"]["within_patients"]["value"] == pytest.approx(found["value"], abs=1e-9)
    assert found["chance"]["patients_exchanged"]["value"] < 0.5 * found["value"]
    assert found["chance"]["all_shuffled"]["value"] < 0.01


def test_probabilities_that_hardly_differ_tell_little_though_their_winner_tells_all() -> None:
    kinds = RNG.integers(4, size=2000)
    found = associate(kinds, 0.24 + 0.04 * np.eye(4)[kinds], PATIENTS, resamples=20, permutations=20)
    assert 0 < found["value"] < 0.01


def test_load_is_even_with_equal_shares_and_not_at_all_with_one_expert() -> None:
    assert evenness(np.array([[5, 5, 5, 5], [20, 0, 0, 0]])) == pytest.approx([1.0, 0.0])
    load = routing.load_of(np.array([[3, 1], [1, 3]]), ["a", "b"], resamples=10)
    assert load["shares"] == [0.5, 0.5]
    assert load["evenness"]["value"] == pytest.approx(1.0)
    assert load["evenness"]["low"] == pytest.approx(evenness(np.array([3, 1])))


# Beats


def test_a_peak_is_the_beat_that_is_nearest_within_75_ms_and_each_beat_is_one_peak() -> None:
    marks_s = np.array([1.0, 2.0, 3.0])
    assert match(np.array([0.93, 1.03, 2.07, 3.08]), marks_s).tolist() == [-1, 0, 1, -1]
    assert match(np.array([]), marks_s).tolist() == []
    assert match(np.array([1.0]), np.array([])).tolist() == [-1]


# Deletion


@pytest.fixture(scope="module")
def batch() -> dict[str, Tensor]:
    signals = [
        synthetic_ecg(sampling_rate=100, noise_mv=0.01, seed=i, rate_bpm=60 + 20 * i).ecg.signal for i in (0, 1)
    ]
    features = EcgMoeFeatureExtractor()(signals, 100, LEADS, return_tensors="pt")
    return {name: features[name] for name in EcgMoeFeatureExtractor.model_input_names}


@pytest.fixture(scope="module")
def model() -> EcgMoeForTasks:
    """A tiny model whose routers are sure of what they choose."""
    made = tiny_model(path_layers=2).eval()
    with torch.no_grad():
        for router in routers_of(made).values():
            router.weight.mul_(50)
    return made


def test_every_layer_of_both_paths_has_its_router_by_name(model: EcgMoeForTasks) -> None:
    assert list(routers_of(model)) == ["morphology 1", "morphology 2", "rhythm 1", "rhythm 2"]
    assert list(routers_of(tiny_model())) == ["morphology", "rhythm"]


@pytest.mark.parametrize("how", [WINNER, ANOTHER, RANDOM])
@torch.no_grad()
def test_deletion_changes_the_answers_and_leaves_the_model_as_it_was(
    model: EcgMoeForTasks, batch: dict[str, Tensor], how: str
) -> None:
    before = model(**batch).logits["superclass"]
    with rerouted(list(routers_of(model).values()), how):
        changed = [model(**batch).logits["superclass"] for _ in range(2)]
    assert not torch.allclose(changed[0], before, atol=1e-5)
    assert torch.equal(model(**batch).logits["superclass"], before)
    with rerouted(list(routers_of(model).values()), how):
        again = model(**batch).logits["superclass"]
    assert torch.equal(again, changed[0])


def test_the_model_is_as_it_was_after_an_error_too(model: EcgMoeForTasks, batch: dict[str, Tensor]) -> None:
    with pytest.raises(KeyError), rerouted(list(routers_of(model).values()), WINNER):
        raise KeyError
    assert not any(router._forward_hooks for router in routers_of(model).values())


@torch.no_grad()
def test_the_winner_goes_the_next_in_line_moves_up_and_weights_add_up_to_one(model: EcgMoeForTasks) -> None:
    router, hidden = routers_of(model)["rhythm 1"], torch.randn(3, 7, model.config.hidden_size)
    plain, ranked = router(hidden), router(hidden).logits.argsort(dim=-1, descending=True)
    with rerouted([router], WINNER):
        without = router(hidden)
    assert torch.equal(without.logits, plain.logits)
    assert torch.equal(without.experts, ranked[..., 1 : 1 + router.top_k])
    torch.testing.assert_close(without.weights.sum(dim=-1), torch.ones(3, 7))
    with rerouted([router], ANOTHER):
        other = router(hidden)
    assert torch.equal(other.experts[..., 0], plain.experts[..., 0])
    is_changed = (other.experts != plain.experts).any(dim=-1)
    assert 0 < is_changed.sum() < is_changed.numel()  # only where one of the chosen was drawn
    with rerouted([router], RANDOM):
        drawn = router(hidden)
    assert torch.equal(drawn.weights, plain.weights)
    assert not torch.equal(drawn.experts, plain.experts)


def test_one_expert_cannot_be_deleted() -> None:
    alone = tiny_model(num_experts=1, num_experts_per_tok=1)
    with pytest.raises(ValueError, match="two experts"), rerouted(list(routers_of(alone).values()), WINNER):
        pass


# The whole benchmark


def measure(mitdb: Path, ptb_xl: Path, folder: Path, *options: str) -> dict:
    """Run the benchmark on a tiny model; gives what it wrote."""
    tasks = {name: TASKS[name].to_dict() for name in (*TINY_TASKS, "statements")}
    tiny_model(tasks=tasks).save_pretrained(folder / "model")
    EcgMoeFeatureExtractor().save_pretrained(folder / "model")
    routing.main(
        [
            *("--mitdb", str(mitdb), "--data_dir", str(ptb_xl), "--model", str(folder / "model"), "--num_proc", "1"),
            *("--out", str(folder / "routing.json"), "--figure", str(folder / "routing.png")),
            *("--cache_dir", str(folder / "cache"), "--resamples", "20", "--permutations", "10", *options),
        ]
    )
    return json.loads((folder / "routing.json").read_text())


def check_result(result: dict, folder: Path) -> None:
    assert set(KEYS) <= set(result)
    assert "-0.0000" not in str(result["rows"])
    layers = ["morphology", "rhythm"]
    assert all(list(row) == ["what", *layers, "both paths"] for row in result["rows"])
    assert len(render_table(result).splitlines()) == len(result["rows"]) + 4
    for question, kinds in result["details"]["kinds"].items():
        assert list(result["details"]["associations"][question]) == layers
        for found in result["details"]["associations"][question].values():
            winner = found["winner"]
            assert 0 <= winner["low"] <= winner["high"] <= 1
            assert len(winner["shares"]) <= len(kinds)
            is_seen = np.array(winner["beats"]) > 0
            assert np.array(winner["shares"]).sum(axis=1) == pytest.approx(is_seen.astype(float))
    for ways in result["details"]["deletion"].values():
        assert all(tasks["arrhythmia"]["change"]["value"] > 0 for tasks in ways.values())
    with Image.open(folder / "routing.png") as figure:
        assert figure.width == 1800


def test_the_benchmark_measures_small_sets_and_finds_their_beats(tmp_path: Path) -> None:
    mitdb = write_mitdb(tmp_path / "mitdb", ("102", "201"))
    ptb_xl = write_mini_ptb_xl(tmp_path / "ptb-xl", num_records=20)
    table = pd.read_csv(ptb_xl / "ptbxl_database.csv")
    table.loc[table["ecg_id"] <= 16, "strat_fold"] = 9  # where the benchmark looks, and several rhythms are needed
    table.to_csv(ptb_xl / "ptbxl_database.csv", index=False)
    result = measure(mitdb, ptb_xl, tmp_path, "--max_windows", "30")
    check_result(result, tmp_path)
    assert result["data"]["windows_of_MIT-BIH"] == 30
    assert result["data"]["records_of_PTB-XL"] == 18
    assert result["details"]["annotated_beats_found"] > 0.5
    beats = result["details"]["associations"]["beat type"]["morphology"]["winner"]["beats"]
    assert beats[0] > 4 * beats[4] > 0  # one beat in seven is called ventricular
    assert beats[1:4] == [0, 0, 0]


def test_the_benchmark_measures_real_recordings(test_data: Path, tmp_path: Path) -> None:
    mitdb = tmp_path / "mitdb"
    mitdb.mkdir()
    for name in ("119", "217"):  # normal and ventricular beats, and paced ones
        for suffix in ("hea", "dat", "atr"):
            (mitdb / f"{name}.{suffix}").symlink_to(
                test_data / "mit-bih-arrhythmia-database-1.0.0" / f"{name}.{suffix}"
            )
    result = measure(mitdb, test_data / "ptb-xl", tmp_path, "--max_windows", "40", "--max_records", "40")
    check_result(result, tmp_path)
    assert result["details"]["annotated_beats_found"] > 0.95
    beats = result["details"]["associations"]["beat type"]["rhythm"]["winner"]["beats"]
    assert min(beats[0], beats[4], beats[5]) > 10
