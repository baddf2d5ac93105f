"""Where a new head starts: the best linear answer from the embedding, and no more than the labels allow."""

import dataclasses

import numpy as np
import pytest
import torch
from test_few_labels import SIDE, synthetic_records
from tiny_model import tiny_model

from evaluation import predict_logits
from head_start import LinearHead, embed, fit_linear_head, start_at_base_rates, start_linearly
from modeling_ecgmoe.tasks import TASKS, Task
from records import EncodedRecords

FINDINGS = Task("findings", "multi_label", "three findings", "findings", ("often", "once", "never"))


def embeddings(records: int, seed: int, size: int = 32) -> np.ndarray:
    """Of another spread and mean in each direction, as real ones are."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=(records, size)) * np.geomspace(0.01, 10.0, size) + np.arange(size)


def test_a_value_that_is_linear_in_the_embedding_is_found_in_its_own_unit() -> None:
    few, more = embeddings(60, seed=0), embeddings(500, seed=1)
    direction = np.random.default_rng(2).normal(size=32) / np.geomspace(0.01, 10.0, 32)
    age, asked = (60.0 + (z - np.arange(32)) @ direction for z in (few, more))
    head = fit_linear_head(TASKS["age"], few, age[:, None].astype(np.float32))
    found = TASKS["age"].answers(head.logits(more))[:, 0]
    assert np.abs(found - asked).mean() < 0.2 * np.abs(asked - asked.mean()).mean()
    assert head.weight.dtype == head.bias.dtype == np.float32


def test_what_the_embedding_does_not_know_is_answered_by_the_base_rate() -> None:
    truth = (np.arange(200) % 4 == 0).astype(np.float32)[:, None]
    head = fit_linear_head(TASKS["sex"], embeddings(200, seed=0), truth)
    probabilities = TASKS["sex"].answers(head.logits(embeddings(500, seed=1)))
    assert probabilities.std() < 0.05
    assert probabilities.mean() == pytest.approx(0.25, abs=0.05)


def test_unknown_labels_do_not_count_and_no_example_teaches_nothing() -> None:
    z = embeddings(80, seed=0)
    truth = np.zeros((80, 3), np.float32)
    truth[:, 0] = z[:, 5] > 5.0
    truth[7, 1] = 1.0
    truth[:20, 0] = np.nan
    truth[0] = np.nan
    head = fit_linear_head(FINDINGS, z, truth)
    given = head.logits(z)[20:, 0] > 0
    assert (given == (truth[20:, 0] == 1.0)).mean() > 0.9
    assert head.logits(z)[:, 1].argmax() == 7
    assert not head.weight[2].any()
    assert head.bias[2] == pytest.approx(np.log(0.5 / 79.5), abs=1e-3)


@pytest.mark.parametrize("present", [(0, 1, 2), (0, 2), (1,)])
def test_classes_that_do_not_occur_stay_below_those_that_do(present: tuple[int, ...]) -> None:
    z = embeddings(90, seed=0)
    kinds = np.array(present)[np.arange(90) % len(present)]
    z[:, 3] += 0.2 * kinds
    truth = np.eye(3, dtype=np.float32)[kinds]
    logits = fit_linear_head(SIDE, z, truth).logits(z)
    assert (logits.argmax(axis=1) == kinds).mean() > 0.9
    odds = np.exp(logits - logits.max(axis=1, keepdims=True))
    rates = (odds / odds.sum(axis=1, keepdims=True)).mean(axis=0)
    assert rates == pytest.approx(truth.mean(axis=0), abs=0.1)


def test_a_handful_of_records_is_fitted_without_choosing() -> None:
    z = embeddings(6, seed=0)
    head = fit_linear_head(TASKS["age"], z, np.linspace(20.0, 80.0, 6, dtype=np.float32)[:, None])
    assert np.isfinite(head.weight).all()
    assert np.corrcoef(head.logits(z)[:, 0], np.arange(6))[0, 1] > 0.5


def test_the_model_answers_as_its_linear_start() -> None:
    records = synthetic_records(60, windows=2)
    model = tiny_model().eval()
    model.add_task(SIDE)
    encoded = EncodedRecords(model, records, torch.device("cpu"))
    start_linearly(model, SIDE, encoded)
    logits = predict_logits(model, encoded, torch.device("cpu"), ["side"])["side"]
    head: torch.nn.Linear = model.heads["head_side"]  # type: ignore[assignment]
    expected = LinearHead(head.weight.detach().numpy(), head.bias.detach().numpy()).logits(
        embed(model, encoded, torch.arange(60))
    )
    np.testing.assert_allclose(logits, expected, atol=1e-4)
    some = embed(model, records, torch.tensor([3, 17, 40]))  # from the signals themselves
    np.testing.assert_allclose(some, embed(model, encoded, torch.arange(60))[[3, 17, 40]], atol=0.02)
    truth = records.labels["side"].numpy().argmax(axis=1)
    assert (logits.argmax(axis=1) == truth).mean() > 0.8


def test_an_answer_that_starts_from_a_measurement_starts_at_it() -> None:
    records = synthetic_records(12)
    records.labels["rr_interval"] = torch.full((12, 1), 900.0)
    model = tiny_model().eval()
    model.add_task(dataclasses.replace(TASKS["rr_interval"], description="mean interval of this table"))
    start_linearly(model, model.tasks["rr_interval"], records)
    logits = predict_logits(model, records, torch.device("cpu"), ["rr_interval"])["rr_interval"]
    np.testing.assert_allclose(TASKS["rr_interval"].answers(logits), 800.0, atol=1e-3)


def test_a_label_of_which_nothing_is_known_leaves_its_bias_alone() -> None:
    model = tiny_model()
    before = model.heads["head_superclass"].bias.detach().clone()
    labels = torch.zeros(20, 5)
    labels[:5, 0] = 1.0
    labels[:, 3] = torch.nan
    start_at_base_rates(model, {"superclass": labels, "sex": torch.full((20, 1), torch.nan)})
    bias = model.heads["head_superclass"].bias.detach()
    assert bias.isfinite().all()
    assert model.heads["head_sex"].bias.isfinite().all()
    assert bias[3] == before[3]
    assert bias[0] == pytest.approx(-1.0986, abs=1e-3)
