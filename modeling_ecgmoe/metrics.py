"""How good an answer is: the metrics of the task table, each with a bootstrap interval.

Axis letters: n records, l labels (or outputs of a regression), r bootstrap resamples.

A metric is a function of targets (n, l), predictions (n, l) and weights (n, r). A weight says how often a record
occurs in a resample, so one sort of the predictions serves all resamples, and the point estimate is the resample in
which every record occurs once. Labels and resamples that a metric is not defined on are NaN.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

DECISION_THRESHOLD = 0.5
NUM_CALIBRATION_BINS = 15
# Bounds the memory of a block of resamples: so many weights are in use at a time.
_WEIGHTS_AT_ONCE = 4_000_000


def _any_known(targets: np.ndarray) -> np.ndarray:
    return np.isfinite(targets).any(axis=1)


@dataclass(frozen=True)
class Metric:
    """One way to compare predictions with the truth.

    Args:
        name: the key in `METRICS`.
        title: its name in cards and tables.
        compute: targets (n, l), predictions (n, l), weights (n, r) -> values (l, r).
        higher_is_better: the direction.
        is_probability: targets are 0 or 1 and predictions are probabilities of 1.
        is_single: one output only, several are refused.
        evaluated: targets (n, l) -> bool (n,), the records that count.
    """

    name: str
    title: str
    compute: Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]
    higher_is_better: bool = True
    is_probability: bool = True
    is_single: bool = False
    evaluated: Callable[[np.ndarray], np.ndarray] = _any_known


@dataclass(frozen=True)
class MetricResult:
    """A metric with its interval.

    Args:
        metric: its name.
        value: the mean over labels.
        low, high: the bootstrap interval of the value, percentiles of the resamples; NaN without resamples.
        level: the coverage of the interval.
        n: the records that count.
        labels_left_out: how many labels are not in the mean, since their known targets hold one class only, or none
            is known.
        per_label: the value of each label, None where it was left out.
    """

    metric: str
    value: float
    low: float
    high: float
    level: float
    n: int
    labels_left_out: int
    per_label: list[float | None]

    def to_dict(self) -> dict[str, Any]:
        """The result as plain JSON types; without resamples there is no `low` and no `high`."""
        return {name: value for name, value in asdict(self).items() if value == value}


def bootstrap_interval(
    metric: str,
    targets: Any,
    predictions: Any,
    *,
    level: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
    groups: Sequence[Any] | np.ndarray | None = None,
) -> MetricResult:
    """Compare predictions with the truth and say how sure the number is.

    Whole groups are drawn with replacement (Efron and Tibshirani 1993, chapters 8 and 13). Labels that are left out of
    the point estimate are left out of every resample; a rare label that has lost one of its classes in a resample is
    left out of the mean of that resample.

    Args:
        metric: a key of `METRICS`.
        targets: (n,) or (n, l), NaN where unknown, which is left out label by label; 0 or 1 for every metric but `mae`
            and `rmse`.
        predictions: as `targets`; in the unit of the targets for `mae` and `rmse`, probabilities for all others. `f1`,
            `macro_f1` and `accuracy` decide at 0.5; for other thresholds pass the decisions themselves,
            `probabilities >= thresholds`.
        level: the coverage of the interval.
        resamples: how many; with 0 there is no interval.
        seed: of the resampling.
        groups: (n,) which records belong together, such as patient ids; each record by itself where not given.

    Raises:
        ValueError: the metric is unknown, shapes do not fit, values are out of range, or no label can be evaluated.
    """
    definition = find_metric(metric)
    if not 0 < level < 1 or resamples < 0:
        raise ValueError(f"`level` must lie in (0, 1) and `resamples` must be 0 or more, found {level}, {resamples}")
    targets, predictions = _check(definition, targets, predictions)
    group_of_record = _check_groups(groups, len(targets))

    per_label = definition.compute(targets, predictions, np.ones((len(targets), 1)))[:, 0]
    kept = np.isfinite(per_label)
    if not kept.any():
        raise ValueError(
            f"{metric} is not defined on these {len(targets)} targets: it needs known ones, both classes of a label "
            "to rank or calibrate it, and records with exactly one label for an accuracy"
        )

    tail = (1 - level) / 2
    low = high = float("nan")
    if resamples:
        means = _resampled_means(definition, targets, predictions, kept, group_of_record, resamples, seed)
        low, high = (float(bound) for bound in np.nanquantile(means, [tail, 1 - tail]))
    return MetricResult(
        metric=metric,
        value=float(per_label[kept].mean()),
        low=low,
        high=high,
        level=level,
        n=int(definition.evaluated(targets).sum()),
        labels_left_out=int((~kept).sum()),
        per_label=[float(value) if np.isfinite(value) else None for value in per_label],
    )


def bootstrap_difference(
    metric: str,
    targets: Any,
    first: Any,
    second: Any,
    *,
    level: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
    groups: Sequence[Any] | np.ndarray | None = None,
) -> MetricResult:
    """How much the metric of `second` is above that of `first`, both answers to the same records.

    Both are computed on the same resamples, so that the interval is that of the difference. See `bootstrap_interval`.
    """
    definition = find_metric(metric)
    results = [
        bootstrap_interval(metric, targets, predictions, level=level, resamples=0) for predictions in (first, second)
    ]
    checked = [_check(definition, targets, predictions) for predictions in (first, second)]
    group_of_record = _check_groups(groups, len(checked[0][0]))
    kept = np.array([value is not None for value in results[0].per_label])
    before, after = (
        _resampled_means(definition, known, predictions, kept, group_of_record, resamples, seed)
        for known, predictions in checked
    )
    low, high = (float(bound) for bound in np.nanquantile(after - before, [(1 - level) / 2, (1 + level) / 2]))
    return replace(
        results[1],
        value=results[1].value - results[0].value,
        low=low,
        high=high,
        per_label=[
            None if a is None or b is None else b - a
            for a, b in zip(results[0].per_label, results[1].per_label, strict=True)
        ],
    )


def find_metric(name: str) -> Metric:
    """The metric of that name.

    Raises:
        ValueError: there is none; the message lists the known ones.
    """
    if name not in METRICS:
        raise ValueError(f"unknown metric {name!r}; known metrics are {', '.join(METRICS)}")
    return METRICS[name]


def load_metric(name: str) -> Any:
    """The metric as an `evaluate.Metric`, for `add_batch`, `compute` and `evaluate.combine`.

    Predictions and references are numbers, or rows of one number for each label. `compute` takes the keyword arguments
    of `bootstrap_interval`, and gives the value under the metric's name and the other fields of `MetricResult` beside
    it.

    Raises:
        ValueError: the metric is unknown.
        ImportError: the package `evaluate` is not installed (`pip install "ecg-moe[train]"`).
    """
    definition = find_metric(name)
    # Not at the top: a prediction needs no metric, and these bring pandas and pyarrow with them.
    import datasets
    import evaluate

    number = datasets.Value("float64")
    row = datasets.Sequence(number)

    class EcgMoeMetric(evaluate.Metric):
        def _info(self) -> Any:
            return evaluate.MetricInfo(
                description=definition.title,
                citation="",
                inputs_description="Numbers, or rows of one number for each label; NaN references are unknown.",
                features=[datasets.Features({"predictions": kind, "references": kind}) for kind in (row, number)],
            )

        def _compute(self, predictions: Any, references: Any, **options: Any) -> dict[str, Any]:
            result = bootstrap_interval(name, references, predictions, **options).to_dict()
            del result["metric"]
            return {name: result.pop("value"), **result}

    return EcgMoeMetric(config_name=name, keep_in_memory=True)


def _check(definition: Metric, targets: Any, predictions: Any) -> tuple[np.ndarray, np.ndarray]:
    """Both as float64 (n, l), or a ValueError."""
    name = definition.name
    targets, predictions = (np.asarray(values, dtype=np.float64) for values in (targets, predictions))
    if targets.shape != predictions.shape or targets.ndim not in (1, 2) or targets.size == 0:
        raise ValueError(
            f"{name}: targets and predictions must have the same shape, (records,) or (records, labels), with one "
            f"record or more; found {targets.shape} and {predictions.shape}"
        )
    targets, predictions = targets.reshape(len(targets), -1), predictions.reshape(len(targets), -1)
    if definition.is_single and targets.shape[1] != 1:
        raise ValueError(f"{name} compares one output, found {targets.shape[1]}; use macro_{name} for their mean")
    known = np.isfinite(targets)
    bad = np.flatnonzero((known & ~np.isfinite(predictions)).any(axis=1))
    if bad.size:
        raise ValueError(f"{name}: {bad.size} predictions are not finite, the first is record {bad[0]}")
    if definition.is_probability:
        if not np.isin(targets[known], (0.0, 1.0)).all():
            raise ValueError(
                f"{name}: targets must be 0, 1 or NaN, found {targets[known].min()} to {targets[known].max()}"
            )
        answers = predictions[known]
        if answers.size and not (answers.min() >= 0 and answers.max() <= 1):
            raise ValueError(
                f"{name}: predictions must be probabilities, found {answers.min():.3g} to {answers.max():.3g}; "
                "pass logits through a sigmoid or softmax first"
            )
    return targets, predictions


def _check_groups(groups: Sequence[Any] | np.ndarray | None, num_records: int) -> np.ndarray:
    """The group of each record, as int (n,) counted from 0."""
    if groups is None:
        return np.arange(num_records)
    if len(groups) != num_records:
        raise ValueError(f"`groups` must name the group of each of the {num_records} records, found {len(groups)}")
    return np.unique(np.asarray(groups), return_inverse=True)[1]


def _resampled_means(
    definition: Metric,
    targets: np.ndarray,
    predictions: np.ndarray,
    kept: np.ndarray,
    group_of_record: np.ndarray,
    resamples: int,
    seed: int,
) -> np.ndarray:
    """The mean over the kept labels in each resample, (resamples,)."""
    rng = np.random.default_rng(seed)
    num_groups = int(group_of_record.max()) + 1
    at_once = max(1, _WEIGHTS_AT_ONCE // len(targets))
    means = []
    for start in range(0, resamples, at_once):
        weights = np.empty((len(targets), min(at_once, resamples - start)))
        for resample in range(weights.shape[1]):
            drawn = np.bincount(rng.integers(num_groups, size=num_groups), minlength=num_groups)
            weights[:, resample] = drawn[group_of_record]
        values = definition.compute(targets, predictions, weights)[kept]
        defined = np.isfinite(values)
        means.append(_divide(np.where(defined, values, 0.0).sum(axis=0), defined.sum(axis=0)))
    return np.concatenate(means)


def _divide(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """The quotient, NaN where the denominator is 0."""
    quotient = np.full(np.broadcast_shapes(numerator.shape, denominator.shape), np.nan)
    return np.divide(numerator, denominator, out=quotient, where=denominator != 0)


def _weighted_mean_error(error: np.ndarray, known: np.ndarray, weights: np.ndarray) -> np.ndarray:
    return _divide(np.where(known, error, 0.0).T @ weights, known.T.astype(np.float64) @ weights)


def _mean_absolute_error(targets: np.ndarray, predictions: np.ndarray, weights: np.ndarray) -> np.ndarray:
    return _weighted_mean_error(np.abs(targets - predictions), np.isfinite(targets), weights)


def _root_mean_squared_error(targets: np.ndarray, predictions: np.ndarray, weights: np.ndarray) -> np.ndarray:
    return np.sqrt(_weighted_mean_error((targets - predictions) ** 2, np.isfinite(targets), weights))


def _f1(targets: np.ndarray, predictions: np.ndarray, weights: np.ndarray) -> np.ndarray:
    known = np.isfinite(targets)
    positive, negative, chosen = targets == 1, targets == 0, known & (predictions >= DECISION_THRESHOLD)
    num_positive, num_negative, true_positive, num_chosen = (
        mask.T.astype(np.float64) @ weights for mask in (positive, negative, positive & chosen, chosen)
    )
    both_classes = (num_positive > 0) & (num_negative > 0)
    return np.where(both_classes, _divide(2 * true_positive, num_positive + num_chosen), np.nan)


def _macro_f1(targets: np.ndarray, predictions: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """F1 of each label; the two classes of a single output are its labels."""
    if targets.shape[1] == 1:
        chosen = (predictions >= DECISION_THRESHOLD).astype(np.float64)
        targets, predictions = np.hstack([1 - targets, targets]), np.hstack([1 - chosen, chosen])
    return _f1(targets, predictions, weights)


def _has_one_label(targets: np.ndarray) -> np.ndarray:
    """Whether the right answer of a record is one label, bool (n,). NaN is in no label."""
    if targets.shape[1] == 1:
        return np.isfinite(targets[:, 0])
    return targets.sum(axis=1) == 1


def _accuracy(targets: np.ndarray, predictions: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The share of right answers, (1, r). Of several labels the most probable is the answer."""
    counted = _has_one_label(targets)
    if targets.shape[1] == 1:
        right = targets[:, 0] == (predictions[:, 0] >= DECISION_THRESHOLD)
    else:
        right = np.argmax(np.nan_to_num(targets), axis=1) == np.argmax(predictions, axis=1)
    return _weighted_mean_error(right[:, None].astype(np.float64), counted[:, None], weights)


def _coverage(targets: np.ndarray, predictions: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The share of records whose truth lies in what was predicted: targets are 1, predictions 1 where it does, or the
    share of several predictions that hold it."""
    return _weighted_mean_error(predictions, targets == 1, weights)


def _each_label(
    of_label: Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray],
) -> Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]:
    """Lift a metric of one label, of targets (n,), predictions (n,) and weights (n, r), to many with unknown targets.

    Resamples that lack one of the two classes become NaN.
    """

    def compute(targets: np.ndarray, predictions: np.ndarray, weights: np.ndarray) -> np.ndarray:
        values = np.full((targets.shape[1], weights.shape[1]), np.nan)
        for label, (target, prediction) in enumerate(zip(targets.T, predictions.T, strict=True)):
            known = np.isfinite(target)
            target, prediction = target[known], prediction[known]
            weight = weights if known.all() else weights[known]
            both_classes = (target @ weight > 0) & ((1 - target) @ weight > 0)
            if both_classes.any():
                values[label] = np.where(both_classes, of_label(target, prediction, weight), np.nan)
        return values

    return compute


def _ranked_weights(target: np.ndarray, prediction: np.ndarray, weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Weights of positives and of negatives by falling prediction, both (distinct predictions, r)."""
    order = np.argsort(-prediction, kind="stable")
    ranked = prediction[order]
    firsts = np.flatnonzero(np.concatenate([[True], ranked[1:] != ranked[:-1]]))
    weight = weight[order]
    positive = weight * target[order, None]
    negative = weight - positive
    if len(firsts) < len(ranked):
        positive, negative = (np.add.reduceat(values, firsts, axis=0) for values in (positive, negative))
    return positive, negative


def _auroc(target: np.ndarray, prediction: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """The share of (positive, negative) pairs in the right order, ties count half (Mann and Whitney 1947)."""
    positive, negative = _ranked_weights(target, prediction, weight)
    num_positive, num_negative = positive.sum(axis=0), negative.sum(axis=0)
    negatives_above = np.cumsum(negative, axis=0)
    negatives_above -= negative / 2
    wrong = np.einsum("nr,nr->r", positive, negatives_above)
    return 1 - _divide(wrong, num_positive * num_negative)


def _average_precision(target: np.ndarray, prediction: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """The mean precision at the positives, as a step function: no interpolation of the precision-recall curve."""
    positive, negative = _ranked_weights(target, prediction, weight)
    found = np.cumsum(positive, axis=0)
    chosen = found + np.cumsum(negative, axis=0)
    precision = np.divide(found, chosen, out=np.zeros_like(found), where=chosen > 0)
    return _divide(np.einsum("nr,nr->r", positive, precision), found[-1])


def _expected_calibration_error(target: np.ndarray, prediction: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Mean distance of probability and frequency over bins of equal width (Guo et al. 2017, equation 3)."""
    bins = np.minimum((prediction * NUM_CALIBRATION_BINS).astype(np.int64), NUM_CALIBRATION_BINS - 1)
    return _distance_in_bins(target, prediction, weight, bins)


def _equal_mass_calibration_error(target: np.ndarray, prediction: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """The same over bins that hold as many records each (Nixon et al. 2019); records of one prediction stay together.

    The bins are those of the data, in every resample: a rare label is looked at where its probabilities are.
    """
    inner = np.quantile(prediction, np.arange(1, NUM_CALIBRATION_BINS) / NUM_CALIBRATION_BINS)
    return _distance_in_bins(target, prediction, weight, np.searchsorted(inner, prediction, side="right"))


def _distance_in_bins(target: np.ndarray, prediction: np.ndarray, weight: np.ndarray, bins: np.ndarray) -> np.ndarray:
    surplus = np.zeros((NUM_CALIBRATION_BINS, len(target)))
    surplus[bins, np.arange(len(target))] = prediction - target
    return _divide(np.abs(surplus @ weight).sum(axis=0), weight.sum(axis=0))


METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric("mae", "MAE", _mean_absolute_error, higher_is_better=False, is_probability=False),
        Metric("rmse", "RMSE", _root_mean_squared_error, higher_is_better=False, is_probability=False),
        Metric("auroc", "AUROC", _each_label(_auroc), is_single=True),
        Metric("macro_auroc", "macro AUROC", _each_label(_auroc)),
        Metric("auprc", "macro AUPRC", _each_label(_average_precision)),
        Metric("f1", "F1", _f1, is_single=True),
        Metric("macro_f1", "macro F1", _macro_f1),
        Metric("accuracy", "accuracy", _accuracy, evaluated=_has_one_label),
        Metric("ece", "calibration error", _each_label(_expected_calibration_error), higher_is_better=False),
        Metric(
            "ece_equal_mass",
            "calibration error",
            _each_label(_equal_mass_calibration_error),
            higher_is_better=False,
        ),
        Metric("coverage", "coverage", _coverage),
    )
}
