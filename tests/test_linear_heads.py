"""Heads in closed form: they start at the best linear answer from the embedding, and settle between several."""

import dataclasses

import numpy as np
import pytest
import torch
from test_few_labels import SIDE, synthetic_records
from tiny_model import tiny_model

from evaluation import predict_logits
from linear_heads import (
    LinearHead,
    _fisher,
    _fisher_directions,
    embed,
    fit_linear_head,
    head_targets,
    settle,
    settle_all,
    settled,
    start_at_base_rates,
    start_linearly,
    with_tasks_of_parts,
)
from modeling_ecgmoe.heads import Head, head_shapes
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


# Settling


def rare_findings(records: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Embeddings and three findings of them: a common one, a rare one, and one that never occurs."""
    z = embeddings(records, seed)
    standard = (z - np.arange(32)) / np.geomspace(0.01, 10.0, 32)
    noise = np.random.default_rng(seed + 100).normal(size=(records, 2))
    truth = np.zeros((records, 3), np.float32)
    truth[:, 0] = standard[:, :4].sum(axis=1) + noise[:, 0] > 0.0
    truth[:, 1] = standard[:, 4:8].sum(axis=1) + noise[:, 1] > 4.5
    return z, truth


def auroc(logits: np.ndarray, truth: np.ndarray) -> float:
    above = logits[truth > 0.5][:, None] > logits[truth < 0.5]
    return float(above.mean())


def test_a_head_that_never_met_a_rare_label_finds_it_after_settling() -> None:
    z, truth = rare_findings(1500, seed=0)
    more, wanted = rare_findings(4000, seed=1)
    assert 5 < truth[:, 1].sum() < 60
    direction = np.zeros((3, 32), np.float32)
    direction[0, :4] = 1.0 / np.geomspace(0.01, 10.0, 32)[:4]
    direction[1, :16] = np.random.default_rng(5).normal(size=16) / np.geomspace(0.01, 10.0, 32)[:16]
    trained = LinearHead(direction, np.array([-3.0, -4.0, -6.0], np.float32))
    head = settled(FINDINGS, trained, z, truth)
    before, after = trained.logits(more), head.logits(more)
    assert auroc(after[:, 1], wanted[:, 1]) > auroc(before[:, 1], wanted[:, 1]) + 0.1
    assert auroc(after[:, 0], wanted[:, 0]) > 0.93
    # Level and, but for what the methods disagree on, spread stay, so that what calibrates it has little to do.
    np.testing.assert_allclose(head.logits(z).mean(axis=0), trained.logits(z).mean(axis=0), atol=1e-2)
    assert 0.5 < after[:, 0].std() / before[:, 0].std() <= 1.05
    np.testing.assert_array_equal(after[:, 2], before[:, 2])
    assert head.weight.dtype == head.bias.dtype == np.float32


def test_a_row_that_nothing_has_trained_settles_at_the_other_methods_answer() -> None:
    z, truth = rare_findings(1500, seed=0)
    head = settled(FINDINGS, LinearHead(np.zeros((3, 32), np.float32), np.zeros(3, np.float32)), z, truth)
    assert auroc(head.logits(z)[:, 0], truth[:, 0]) > 0.93
    assert not head.weight[2].any()


def test_unknown_labels_do_not_change_what_a_head_settles_at() -> None:
    z, truth = rare_findings(1500, seed=0)
    trained = LinearHead(np.ones((3, 32), np.float32), np.zeros(3, np.float32))
    hidden = np.concatenate([truth, np.full((700, 3), np.nan, np.float32)])
    twice = np.concatenate([z, z[:700]])
    alone = settled(FINDINGS, trained, twice[:1500], hidden[:1500])
    with_unknown = settled(FINDINGS, trained, twice, hidden)
    np.testing.assert_allclose(with_unknown.logits(z)[:, 0], alone.logits(z)[:, 0], rtol=0.1, atol=2.0)
    nobody = settled(FINDINGS, trained, z, np.full_like(truth, np.nan))
    np.testing.assert_allclose(nobody.logits(z), trained.logits(z), rtol=1e-4)


def test_a_value_settles_between_the_trained_answer_and_a_ridge_regression() -> None:
    z = embeddings(800, seed=0)
    age = (60.0 + 5.0 * (z[:, 31] - 31.0) / 10.0)[:, None].astype(np.float32)
    nought = LinearHead(np.zeros((1, 32), np.float32), np.zeros(1, np.float32))
    found = TASKS["age"].answers(settled(TASKS["age"], nought, z, age).logits(z))[:, 0]
    assert np.polyfit(age[:, 0], found, 1) == pytest.approx([0.5, 30.0], abs=1.5)


def test_a_head_that_settles_with_fewer_leads_too_answers_for_these_better() -> None:
    def without_two(z: np.ndarray, seed: int) -> np.ndarray:
        """Embeddings whose first two numbers say nothing, and are large."""
        lost = z.copy()
        lost[:, :2] = np.random.default_rng(seed).normal(size=(len(z), 2)) * 4.0 * np.geomspace(0.01, 10.0, 32)[:2]
        return lost

    (z, truth), (more, wanted) = rare_findings(1500, seed=0), rare_findings(2000, seed=1)
    found = []
    for views in ([z], [z, without_two(z, seed=5)]):
        head = Head(32, FINDINGS)
        torch.nn.init.zeros_(head.weight)
        settle(head, FINDINGS, views, truth, more, wanted)
        found.append(auroc(LinearHead.of(head).logits(without_two(more, seed=6))[:, 0], wanted[:, 0]))
        assert auroc(LinearHead.of(head).logits(more)[:, 0], wanted[:, 0]) > 0.75
    assert found[1] > found[0] + 0.1


def test_a_head_keeps_its_answer_where_settling_does_not_better_it() -> None:
    records = synthetic_records(60)
    model = tiny_model().eval()
    truth = torch.from_numpy((np.arange(60) % 2).astype(np.float32))[:, None]
    records.labels["sex"] = truth
    layer: torch.nn.Linear = model.heads["head_sex"]  # type: ignore[assignment]
    embedding = embed(model, records, torch.arange(60))
    before = layer.weight.detach().clone()
    shuffled = np.random.default_rng(0).permutation(truth.numpy())
    records.labels["sex"] = torch.from_numpy(
        (predict_logits(model, records, torch.device("cpu"), ["sex"])["sex"] > 0).astype(np.float32)
    )
    # The trained head is perfect on these labels.
    settle(layer, TASKS["sex"], [embedding], shuffled, embedding, records.labels["sex"].numpy())
    torch.testing.assert_close(layer.weight.detach(), before)


# Parts


def test_parts_have_the_truth_of_the_task_that_they_are_labels_of() -> None:
    superclass = TASKS["superclass"]
    codes = TASKS["statements"].labels
    assert [t.name for t in with_tasks_of_parts([superclass, TASKS["age"]])] == ["superclass", "age", "statements"]
    assert with_tasks_of_parts([TASKS["statements"], superclass]) == [TASKS["statements"], superclass]
    labels = {"superclass": torch.zeros(2, 5), "statements": torch.zeros(2, 71)}
    labels["superclass"][1, superclass.labels.index("MI")] = 1.0
    labels["statements"][1, codes.index("ASMI")] = 1.0
    targets = head_targets(superclass, labels)
    assert targets.shape == (2, 49)
    assert [superclass.part_names[i - 5] for i in np.flatnonzero(targets[1]) if i >= 5] == ["ASMI"]
    unknown = head_targets(superclass, {"superclass": labels["superclass"]})
    assert np.isnan(unknown[:, 5:]).all()
    assert np.isfinite(unknown[:, :5]).all()


def test_a_model_gets_outputs_for_parts_that_start_as_its_own_answers() -> None:
    names = ("age", "statements", "superclass")
    model = tiny_model(tasks={name: TASKS[name].plain().to_dict() for name in names}).eval()
    statements, own = (model.heads[f"head_{name}"].weight.detach().clone() for name in ("statements", "superclass"))
    records = synthetic_records(40)
    records.labels = {"age": torch.full((40, 1), torch.nan)}  # nothing is known, so nothing settles
    settle_all(model, {}, records, records)
    task = model.tasks["superclass"]
    assert task == TASKS["superclass"]
    assert (model.config.tasks or {})["superclass"]["parts_task"] == "statements"
    grown = model.heads["head_superclass"].weight.detach()
    torch.testing.assert_close(grown[:5], own)
    torch.testing.assert_close(
        grown[5:], statements[[TASKS["statements"].labels.index(part) for part in task.part_names]]
    )
    assert predict_logits(model, records, torch.device("cpu"))["superclass"].shape == (40, 5)


def test_only_the_heads_that_are_named_settle() -> None:
    records = synthetic_records(60)
    model = tiny_model().eval()
    records.labels["age"] = torch.linspace(20.0, 80.0, 60)[:, None]
    records.labels["sex"] = torch.from_numpy((np.arange(60) % 2).astype(np.float32))[:, None]
    before = {name: model.heads[f"head_{name}"].weight.detach().clone() for name in ("age", "sex")}
    settle_all(model, dict(records.labels), records, records, ["age"])
    assert not torch.equal(model.heads["head_age"].weight, before["age"])
    assert torch.equal(model.heads["head_sex"].weight, before["sex"])
    with pytest.raises(ValueError, match="settle names height; this model has age, "):
        settle_all(model, {}, records, records, ["height"])


# Products


def clashing_findings(records: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Embeddings, and findings that two strong components tell together and neither alone; the last is unknown of
    every third record."""
    z = embeddings(records, seed)
    standard = (z - np.arange(32)) / np.geomspace(0.01, 10.0, 32)
    axes = np.linalg.qr(np.random.default_rng(7).normal(size=(32, 2)))[0]
    strong = standard @ axes
    z = (standard + 3.0 * strong @ axes.T).astype(np.float32)
    noise = 0.3 * np.random.default_rng(seed + 100).normal(size=records)
    truth = np.zeros((records, 3), np.float32)
    truth[:, 0] = strong[:, 0] * strong[:, 1] + noise > 0.0
    truth[:, 2] = strong[:, 0] ** 2 - strong[:, 1] ** 2 + noise > 0.0
    truth[::3, 2] = np.nan
    return z, truth


def without_answer(task: Task) -> LinearHead:
    """A head of 32 numbers that nothing has trained."""
    shapes = head_shapes(task, 32)
    return LinearHead(**{name: np.zeros(shape, np.float32) for name, shape in shapes.items()})


def test_products_find_what_no_line_tells() -> None:
    (z, truth), (more, wanted) = clashing_findings(1500, seed=0), clashing_findings(2000, seed=1)
    with_products = dataclasses.replace(FINDINGS, products=4)
    lines = settled(FINDINGS, without_answer(FINDINGS), z, truth).logits(more)
    head = settled(with_products, without_answer(with_products), z, truth)
    of_products = head._replace(weight=np.zeros_like(head.weight))
    known = np.isfinite(wanted[:, 2])
    for label, of in ((0, slice(None)), (2, known)):
        assert auroc(lines[of, label], wanted[of, label]) < 0.6
        # Half of the answers that are averaged are those of lines, which are noise here.
        assert auroc(head.logits(more)[of, label], wanted[of, label]) > 0.67
        assert auroc(of_products.logits(more)[of, label], wanted[of, label]) > 0.85
    assert head.products is not None
    assert not head.products[1].any()
    assert {value.dtype for value in head if value is not None} == {np.dtype(np.float32)}


def test_a_head_that_settles_again_keeps_its_directions_and_what_it_knows() -> None:
    z, truth = clashing_findings(1500, seed=0)
    task = dataclasses.replace(FINDINGS, products=4)
    once = settled(task, without_answer(task), z, truth)
    again = settled(task, once, z, truth)
    np.testing.assert_array_equal(again.directions, once.directions)
    for label in (0, 2):
        assert np.corrcoef(again.logits(z)[:, label], once.logits(z)[:, label])[0, 1] > 0.95
    np.testing.assert_allclose(again.logits(z).mean(axis=0), once.logits(z).mean(axis=0), atol=1e-2)


def test_more_products_than_the_embedding_has_components_are_nought() -> None:
    z, truth = clashing_findings(400, seed=0)
    task = dataclasses.replace(FINDINGS, products=40)
    head = settled(task, without_answer(task), z, truth)
    assert {name: value.shape for name, value in head._asdict().items() if value is not None} == head_shapes(task, 32)
    assert np.isfinite(head.logits(z)).all()


def test_discriminants_that_share_one_scatter_point_where_each_of_its_own_does() -> None:
    z, truth = rare_findings(1500, seed=0)
    truth[::4, 1] = np.nan
    inputs = (z - z.mean(axis=0)) / z.std(axis=0)
    found = _fisher_directions(inputs, truth)
    for label in (0, 1):
        known = np.isfinite(truth[:, label])
        own = _fisher(inputs[known], truth[known, label] > 0.5).coef_[0]
        assert np.corrcoef(inputs @ own, inputs @ found[label])[0, 1] > 0.9999
    assert not found[2].any()


def test_a_model_gets_products_that_start_at_nought_and_settle() -> None:
    task = dataclasses.replace(TASKS["sex"], products=3)
    records = synthetic_records(60)
    records.labels["sex"] = torch.from_numpy((np.arange(60) % 2).astype(np.float32))[:, None]
    model = tiny_model().eval()
    before = predict_logits(model, records, torch.device("cpu"), ["sex"])["sex"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(TASKS, "sex", task)
        settle_all(model, {}, records, records, ["sex"])
        assert model.tasks["sex"] == task
        same = predict_logits(model, records, torch.device("cpu"), ["sex"])["sex"]
        np.testing.assert_allclose(same, before, atol=1e-5)
        settle_all(model, dict(records.labels), records, records, ["sex"])
    head = model.heads["head_sex"]
    assert head.get_parameter("products").any()
    assert (model.config.tasks or {})["sex"]["products"] == 3
