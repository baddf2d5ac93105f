"""Metrics against scikit-learn, and intervals against what a bootstrap must do."""

import json
import subprocess
import sys
import time

import numpy as np
import pytest
import sklearn.metrics
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling_ecgmoe.metrics import METRICS, bootstrap_difference, bootstrap_interval, find_metric, load_metric
from modeling_ecgmoe.tasks import TASKS


def made_up_answers(
    num_records: int, num_labels: int, *, seed: int = 0, decimals: int = 2
) -> tuple[np.ndarray, np.ndarray]:
    """Labels and rounded probabilities (so that ties occur) that know something about them, both (records, labels)."""
    rng = np.random.default_rng(seed)
    targets = (rng.random((num_records, num_labels)) < 0.3).astype(float)
    logits = 1.5 * targets - 1 + rng.normal(size=targets.shape)
    return targets, np.round(1 / (1 + np.exp(-logits)), decimals)


def oracle(metric: str, targets: np.ndarray, predictions: np.ndarray, weights: np.ndarray) -> float:
    """scikit-learn's value of one label, arrays (n,)."""
    decisions = predictions >= 0.5
    return {
        "mae": lambda: sklearn.metrics.mean_absolute_error(targets, predictions, sample_weight=weights),
        "rmse": lambda: sklearn.metrics.root_mean_squared_error(targets, predictions, sample_weight=weights),
        "auroc": lambda: sklearn.metrics.roc_auc_score(targets, predictions, sample_weight=weights),
        "auprc": lambda: sklearn.metrics.average_precision_score(targets, predictions, sample_weight=weights),
        "f1": lambda: sklearn.metrics.f1_score(targets, decisions, sample_weight=weights),
        "macro_f1": lambda: sklearn.metrics.f1_score(targets, decisions, sample_weight=weights, average="macro"),
        "accuracy": lambda: sklearn.metrics.accuracy_score(targets, decisions, sample_weight=weights),
    }[metric]()


@pytest.mark.parametrize("metric", ["mae", "rmse", "auroc", "auprc", "f1", "macro_f1", "accuracy"])
def test_a_single_output_gives_the_value_of_scikit_learn(metric: str) -> None:
    targets, predictions = made_up_answers(300, 1)
    result = bootstrap_interval(metric, targets, predictions, resamples=0)
    assert result.value == pytest.approx(oracle(metric, targets[:, 0], predictions[:, 0], np.ones(300)), abs=1e-12)
    assert result.n == 300


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), decimals=st.integers(0, 3), num_records=st.integers(4, 60))
def test_a_resample_as_weights_is_the_resample_drawn(seed: int, decimals: int, num_records: int) -> None:
    targets, predictions = made_up_answers(num_records, 1, seed=seed, decimals=decimals)
    targets[:2, 0] = 0.0, 1.0
    drawn = np.concatenate([[0, 1], np.random.default_rng(seed).integers(num_records, size=num_records - 2)])
    weights = np.bincount(drawn, minlength=num_records).astype(float)[:, None]
    for metric in ("auroc", "auprc", "f1", "macro_f1", "accuracy", "mae", "rmse"):
        value = METRICS[metric].compute(targets, predictions, weights)
        value = value.mean()  # the two classes of macro F1
        expected = oracle(metric, targets[drawn, 0], predictions[drawn, 0], np.ones(num_records))
        assert value == pytest.approx(expected, abs=1e-9), metric


@pytest.mark.parametrize(
    ("metric", "average"),
    [
        ("macro_auroc", lambda t, p: sklearn.metrics.roc_auc_score(t, p, average="macro")),
        ("auprc", lambda t, p: sklearn.metrics.average_precision_score(t, p, average="macro")),
        ("macro_f1", lambda t, p: sklearn.metrics.f1_score(t, p >= 0.5, average="macro")),
    ],
)
def test_many_labels_give_the_macro_average_of_scikit_learn(metric: str, average) -> None:
    targets, predictions = made_up_answers(200, 7)
    result = bootstrap_interval(metric, targets, predictions, resamples=0)
    assert result.value == pytest.approx(average(targets, predictions), abs=1e-12)
    assert result.value == pytest.approx(np.mean(result.per_label), abs=1e-12)


def test_accuracy_of_many_labels_counts_the_records_with_exactly_one() -> None:
    targets = [[1, 0, 0], [0, 1, 0], [1, 1, 0], [0, 0, 0], [0, 0, 1]]
    predictions = [[0.9, 0.1, 0.0], [0.6, 0.4, 0.0], [0.1, 0.1, 0.9], [0.1, 0.1, 0.9], [0.2, 0.3, 0.4]]
    result = bootstrap_interval("accuracy", targets, predictions, resamples=0)
    assert result.n == 3
    assert result.value == pytest.approx(2 / 3)


def test_calibration_error_is_the_gap_between_probability_and_frequency() -> None:
    # 100 records at .85 of which 70 are positive, 300 at .05 of which none is.
    predictions = np.array([0.85] * 100 + [0.05] * 300)
    targets = np.array([1.0] * 70 + [0.0] * 330)
    result = bootstrap_interval("ece", targets, predictions, resamples=0)
    assert result.value == pytest.approx((100 * 0.15 + 300 * 0.05) / 400)


def test_calibration_error_takes_probabilities_of_exactly_zero_and_one() -> None:
    assert bootstrap_interval("ece", [0, 1, 1, 0], [0, 1, 1, 0], resamples=0).value == 0.0


def test_a_constant_answer_ranks_at_one_half() -> None:
    targets, _ = made_up_answers(50, 3)
    result = bootstrap_interval("macro_auroc", targets, np.full((50, 3), 0.3))
    assert (result.value, result.low, result.high) == (0.5, 0.5, 0.5)


def test_unknown_targets_are_left_out_label_by_label() -> None:
    targets, predictions = made_up_answers(120, 2)
    hidden = targets.copy()
    hidden[:40, 0] = np.nan
    result = bootstrap_interval("macro_auroc", hidden, predictions, resamples=0)
    expected = [
        sklearn.metrics.roc_auc_score(targets[40:, 0], predictions[40:, 0]),
        sklearn.metrics.roc_auc_score(targets[:, 1], predictions[:, 1]),
    ]
    assert result.per_label == pytest.approx(expected)
    assert result.n == 120


@pytest.mark.parametrize("metric", list(METRICS))
def test_what_stands_beside_an_unknown_target_makes_no_difference(metric: str) -> None:
    targets, predictions = made_up_answers(80, 1)
    targets[60:] = np.nan
    nonsense = predictions.copy()
    nonsense[60:] = np.nan
    whole, short = (
        bootstrap_interval(metric, targets, nonsense, resamples=0),
        bootstrap_interval(metric, targets[:60], predictions[:60], resamples=0),
    )
    assert whole.value == pytest.approx(short.value, abs=1e-12)
    assert whole.n == short.n == 60


@pytest.mark.parametrize("metric", ["macro_auroc", "auprc", "macro_f1", "ece"])
def test_a_label_with_one_class_is_left_out_of_the_mean_and_counted(metric: str) -> None:
    targets, predictions = made_up_answers(100, 4)
    targets[:, 1] = 0.0
    targets[:, 3] = np.nan
    result = bootstrap_interval(metric, targets, predictions, resamples=20)
    rest = bootstrap_interval(metric, targets[:, [0, 2]], predictions[:, [0, 2]], resamples=20)
    assert result.labels_left_out == 2
    assert [value is None for value in result.per_label] == [False, True, False, True]
    assert (result.value, result.low, result.high) == (rest.value, rest.low, rest.high)


def test_the_interval_of_a_mean_error_is_the_normal_one() -> None:
    # The mean of 400 absolute errors has standard error s / sqrt(400), and 95 % of a normal lies within 1.96 of them.
    errors = np.abs(np.random.default_rng(1).normal(size=400))
    result = bootstrap_interval("mae", np.zeros(400), errors, resamples=4000)
    half_width = 1.96 * errors.std() / np.sqrt(400)
    assert result.low == pytest.approx(result.value - half_width, abs=0.1 * half_width)
    assert result.high == pytest.approx(result.value + half_width, abs=0.1 * half_width)


def test_a_lower_level_gives_a_narrower_interval() -> None:
    targets, predictions = made_up_answers(200, 1)
    wide, narrow = (bootstrap_interval("auroc", targets, predictions, level=level) for level in (0.95, 0.5))
    assert wide.low < narrow.low < narrow.value < narrow.high < wide.high


def test_twins_in_one_group_count_once_for_the_interval() -> None:
    targets, predictions = made_up_answers(100, 1)
    once = bootstrap_interval("auroc", targets, predictions, seed=3)
    groups = [f"patient {record}" for record in range(100)] * 4
    together = bootstrap_interval("auroc", np.tile(targets, (4, 1)), np.tile(predictions, (4, 1)), groups=groups)
    apart = bootstrap_interval("auroc", np.tile(targets, (4, 1)), np.tile(predictions, (4, 1)))
    assert together.value == pytest.approx(once.value)
    assert together.high - together.low == pytest.approx(once.high - once.low, rel=0.1)
    assert apart.high - apart.low == pytest.approx((once.high - once.low) / 2, rel=0.15)  # sqrt(4) times too sure


def test_the_same_seed_gives_the_same_interval_however_the_resamples_are_blocked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    targets, predictions = made_up_answers(90, 3)
    at_once = bootstrap_interval("macro_auroc", targets, predictions, resamples=50, seed=7)
    monkeypatch.setattr("modeling_ecgmoe.metrics._WEIGHTS_AT_ONCE", 90 * 7)
    assert bootstrap_interval("macro_auroc", targets, predictions, resamples=50, seed=7) == at_once
    assert bootstrap_interval("macro_auroc", targets, predictions, resamples=50, seed=8).low != at_once.low


def test_the_interval_of_71_statements_on_a_fold_takes_under_a_minute() -> None:
    targets, predictions = made_up_answers(2183, 71, decimals=6)
    start = time.process_time()
    bootstrap_interval("macro_auroc", targets, predictions, resamples=100)
    assert time.process_time() - start < 6


@pytest.mark.parametrize(
    ("metric", "targets", "predictions", "options", "message"),
    [
        ("auc", [0, 1], [0.1, 0.9], {}, "known metrics are mae, rmse, auroc"),
        ("mae", [1.0, 2.0], [1.0], {}, r"same shape.*found \(2,\) and \(1,\)"),
        ("mae", [], [], {}, "one record or more"),
        ("mae", [1.0, 2.0], [1.0, np.nan], {}, "1 predictions are not finite, the first is record 1"),
        ("mae", [np.nan], [1.0], {}, "not defined on these 1 targets"),
        ("auroc", [0, 1], [-2.0, 3.0], {}, "must be probabilities, found -2 to 3"),
        ("auroc", [0, 2], [0.1, 0.9], {}, "must be 0, 1 or NaN, found 0.0 to 2.0"),
        ("auroc", [0, 0], [0.1, 0.9], {}, "not defined on these 2 targets"),
        ("auroc", [[0, 1], [1, 0]], [[0.1, 0.9]] * 2, {}, "found 2; use macro_auroc"),
        ("accuracy", [[1, 1]], [[0.1, 0.9]], {}, "exactly one label"),
        ("mae", [1.0], [1.0], {"level": 95}, r"`level` must lie in \(0, 1\)"),
        ("mae", [1.0], [1.0], {"groups": ["a", "b"]}, "each of the 1 records, found 2"),
    ],
)
def test_what_cannot_be_compared_is_refused_with_the_way_out(metric, targets, predictions, options, message) -> None:
    with pytest.raises(ValueError, match=message):
        bootstrap_interval(metric, targets, predictions, **options)


def test_every_task_names_a_metric_that_exists() -> None:
    assert {find_metric(task.metric).name for task in TASKS.values()} <= set(METRICS)


def test_a_result_survives_strict_json() -> None:
    targets, predictions = made_up_answers(40, 2)
    targets[:, 1] = 1.0
    for resamples in (0, 30):
        result = bootstrap_interval("macro_auroc", targets, predictions, resamples=resamples).to_dict()
        assert json.loads(json.dumps(result, allow_nan=False)) == result
        assert ("low" in result) == (resamples > 0)


def test_evaluate_collects_batches_and_gives_the_same_numbers() -> None:
    targets, predictions = made_up_answers(64, 3)
    targets[5:20, 1] = np.nan
    metric = load_metric("macro_auroc")
    for start in range(0, 64, 16):
        metric.add_batch(predictions=predictions[start : start + 16], references=targets[start : start + 16])
    groups = list(range(32)) * 2
    computed = metric.compute(resamples=50, groups=groups)
    expected = bootstrap_interval("macro_auroc", targets, predictions, resamples=50, groups=groups)
    assert computed["macro_auroc"] == pytest.approx(expected.value, abs=1e-12)
    assert (computed["low"], computed["high"], computed["n"]) == (expected.low, expected.high, 64)


def test_evaluate_takes_plain_numbers_for_a_single_output() -> None:
    computed = load_metric("mae").compute(predictions=[50.0, 63.0], references=[52.0, 60.0], resamples=10)
    assert computed["mae"] == 2.5


def test_the_metrics_can_be_combined_by_evaluate() -> None:
    import evaluate

    both = evaluate.combine([load_metric("mae"), load_metric("rmse")])
    computed = both.compute(predictions=[1.0, 5.0], references=[1.0, 1.0])
    assert computed["mae"] == 2.0
    assert computed["rmse"] == pytest.approx(8**0.5)


def test_metrics_do_not_load_evaluate_before_it_is_asked_for() -> None:
    code = "import sys, runpy; runpy.run_path(sys.argv[1]); print(*sys.modules)"
    source = sys.modules["modeling_ecgmoe.metrics"].__file__
    done = subprocess.run([sys.executable, "-c", code, source], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert "numpy" in loaded
    assert not loaded & {"evaluate", "datasets", "pandas", "sklearn", "torch"}


# Differences


def test_a_shift_of_every_prediction_is_the_difference_with_no_doubt_about_it() -> None:
    rng = np.random.default_rng(0)
    truth = rng.uniform(20, 90, 60)
    found = truth + rng.uniform(1, 5, 60)  # always too high
    result = bootstrap_difference("mae", truth, found, found + 0.5)
    assert result.value == pytest.approx(0.5)
    assert result.low == pytest.approx(0.5)
    assert result.high == pytest.approx(0.5)


def test_the_difference_of_two_answers_is_surer_than_the_two_answers() -> None:
    rng = np.random.default_rng(1)
    truth = rng.integers(0, 2, 300).astype(float)
    first = np.clip(0.3 * truth + 0.7 * rng.uniform(size=300), 0, 1)
    second = np.clip(first + rng.normal(scale=0.02, size=300), 0, 1)
    alone = bootstrap_interval("macro_auroc", truth, second)
    difference = bootstrap_difference("macro_auroc", truth, first, second)
    assert difference.low <= difference.value <= difference.high
    assert difference.high - difference.low < 0.5 * (alone.high - alone.low)
    assert difference.value == pytest.approx(alone.value - bootstrap_interval("macro_auroc", truth, first).value)
