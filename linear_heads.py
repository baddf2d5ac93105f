"""Heads in closed form: where a new one starts, and where a trained one settles.

A new head starts at the base rates of its labels, or at the best linear answer from the frozen embedding. Fine-tuning
from the latter keeps what the embedding knows, which a head of random numbers lets go while it learns (Kumar et al.
2022, "Fine-Tuning can Distort Pretrained Features and Underperform Out-of-Distribution"). With few labels most of an
adapter's answer is this start.

A trained head settles between its own answer and what other methods find in the same embedding. Stochastic gradients
leave rare labels to a handful of steps, where discriminants and balanced regressions weigh every record. Where
a task has products, both have their say with these as well.
"""

import logging
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate.utils import send_to_device
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.model_selection import KFold
from torch import Tensor, nn

from evaluation import point_metric
from modeling_ecgmoe.heads import FARTHEST, head_outputs, read_head
from modeling_ecgmoe.modeling_ecgmoe import EcgMoeForTasks, task_loss
from modeling_ecgmoe.tasks import TASKS, Task
from records import EncodedRecords, Records, mean_of_windows, with_fewer_leads

logger = logging.getLogger("train")

PENALTIES = tuple(10.0**power for power in range(6))  # of the squared weights of a standardised embedding
SHARES = tuple(0.5**power for power in range(1, 8))  # of a discriminant's evidence
FOLDS = 5
MAX_RECORDS = 2000  # more change the start little, and take long
BALANCED_PENALTY = 5.0  # of the squared weights of a balanced regression, over the records of the rarer class
PRODUCT_SCALE = 0.3  # of products beside the embedding, so that a discriminant's shrinkage trusts them less


class LinearHead(NamedTuple):
    """The weights of a head, see `heads.head_shapes`; the last three where it has products."""

    weight: np.ndarray
    bias: np.ndarray
    directions: np.ndarray | None = None
    offsets: np.ndarray | None = None
    products: np.ndarray | None = None

    def logits(self, embedding: np.ndarray) -> np.ndarray:
        """(records, record_size) to (records, head_size), before a task's prior or parts."""
        weights = {name: torch.from_numpy(value) for name, value in self._asdict().items() if value is not None}
        return head_outputs(torch.from_numpy(embedding.astype(self.weight.dtype)), weights).numpy()

    @classmethod
    def of(cls, layer: Any) -> "LinearHead":
        """What a head of a model holds now."""
        named = dict(layer.named_parameters()).items()
        return cls(**{name: value.detach().float().cpu().numpy().copy() for name, value in named})


@torch.no_grad()
def start_at_base_rates(model: Any, labels: dict[str, Tensor]) -> None:
    """Set the biases of classification heads to the log-odds of their labels, which no step must then learn.

    Args:
        labels: task to (records, outputs), NaN where unknown; of classes it is their log-frequency.
    """
    for name, values in labels.items():
        task = model.tasks.get(name)
        if task is not None and task.kind != "regression":
            share = values.nanmean(dim=0).clamp(1e-4, 1 - 1e-4)
            bias = model.heads[f"head_{name}"].bias[: len(share)]
            start = share.log() if task.kind == "multi_class" else torch.logit(share)
            bias.copy_(torch.where(start.isfinite(), start.to(bias), bias))  # nothing is known of a label without any


def start_linearly(model: EcgMoeForTasks, task: Task, train: Records | EncodedRecords, seed: int = 0) -> None:
    """Set a head of the model to the linear answer that fits the training records, or `MAX_RECORDS` of them.

    A task that starts from a measurement starts there: its head, which answers the difference, is nought.

    Args:
        seed: of the records that are chosen, and of the folds.
    """
    layer: Any = model.heads[f"head_{task.name}"]
    targets = head_targets(task, train.labels)
    known = np.flatnonzero(np.isfinite(targets).any(axis=1))
    if task.prior or not len(known):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
        return
    chosen = np.sort(np.random.default_rng(seed).permutation(known)[:MAX_RECORDS])
    _set_head(layer, fit_linear_head(task, embed(model, train, torch.from_numpy(chosen)), targets[chosen], seed))


def head_targets(task: Task, labels: dict[str, Tensor]) -> np.ndarray:
    """The truth of all that a head gives, (records, head_size), NaN where unknown: the task's, then its parts'.

    Args:
        labels: task to the truth of the records, (records, outputs); that of the parts is their own task's, if it is
            there.
    """
    targets = labels[task.name].numpy()
    if not task.parts:
        return targets
    if task.parts_task not in labels:
        return np.pad(targets, ((0, 0), (0, len(task.part_names))), constant_values=np.nan)
    return np.concatenate([targets, labels[task.parts_task].numpy()[:, _places_of_parts(task)]], axis=1)


def _places_of_parts(task: Task) -> list[int]:
    """Which outputs of the task that its parts are labels of."""
    return [TASKS[task.parts_task].labels.index(part) for part in task.part_names]


def with_tasks_of_parts(tasks: list[Task]) -> list[Task]:
    """The tasks, and those that their parts are labels of."""
    wanted = {task.name: task for task in tasks}
    of_parts = {task.parts_task: TASKS[task.parts_task] for task in tasks if task.parts}
    return list((wanted | {name: task for name, task in of_parts.items() if name not in wanted}).values())


def _set_head(layer: Any, head: LinearHead) -> None:
    with torch.no_grad():
        for name, value in head._asdict().items():
            if value is not None:
                getattr(layer, name).copy_(torch.from_numpy(value))


@torch.inference_mode()
def embed(
    model: nn.Module, records: Records | EncodedRecords, chosen: Tensor | None = None, batch_size: int = 64
) -> np.ndarray:
    """The model's embedding of records as they are, (records, record_size), the mean of each one's windows.

    Args:
        chosen: (n,) of the records, rising, *optional*, defaults to all.
    """
    model.eval()
    chosen = torch.unique(records.record_of) if chosen is None else chosen
    device = next(model.parameters()).device
    parts = []
    windows = torch.isin(records.record_of, chosen).nonzero()[:, 0]
    for index in windows.split(batch_size):
        encoded = isinstance(records, EncodedRecords)
        inputs = {"encoder_output": records.at(index)} if encoded else records.__getitems__(index.tolist())["signal"]
        output = model(**send_to_device(inputs, device), tasks=[])
        parts.append(output.pooler_output.float().cpu())
    return mean_of_windows(torch.cat(parts), torch.searchsorted(chosen, records.record_of[windows])).numpy()


def fit_linear_head(task: Task, embedding: np.ndarray, targets: np.ndarray, seed: int = 0) -> LinearHead:
    """Ridge regression, or Fisher's discriminant of each label or class against the rest.

    Cross-validation chooses how much they may say, by the lowest loss: the penalty of the one, the share that counts
    of the other's evidence, which is overconfident where there are fewer records than dimensions.

    Args:
        embedding: (records, record_size).
        targets: (records, outputs) as `Task.targets` gives them, NaN where unknown.
        seed: of the folds.
    """
    known = np.isfinite(targets).any(axis=1)
    embedding, targets = embedding[known].astype(np.float64), targets[known].astype(np.float64)
    center, scale = embedding.mean(axis=0), embedding.std(axis=0) + 1e-6
    inputs = (embedding - center) / scale
    candidates = _ridges if task.kind == "regression" else _discriminants
    heads = candidates(task, inputs, targets)
    best = len(heads) // 2
    if len(targets) >= 2 * FOLDS:
        folds = KFold(FOLDS, shuffle=True, random_state=seed).split(inputs)
        losses = [
            [_loss(task, head, inputs[held], targets[held]) for head in candidates(task, inputs[fit], targets[fit])]
            for fit, held in folds
        ]
        best = int(np.mean(losses, axis=0).argmin())
    weight = heads[best].weight / scale
    return LinearHead(weight.astype(np.float32), (heads[best].bias - weight @ center).astype(np.float32))


def _loss(task: Task, head: LinearHead, inputs: np.ndarray, targets: np.ndarray) -> float:
    return float(task_loss(task, torch.from_numpy(head.logits(inputs)), torch.from_numpy(targets)))


def _ridges(task: Task, inputs: np.ndarray, targets: np.ndarray) -> list[LinearHead]:
    """A regression for each of the penalties."""
    known = np.isfinite(targets[:, 0])
    standard = (targets[known, 0] - task.center) / task.spread
    ridges = [Ridge(alpha=penalty).fit(inputs[known], standard) for penalty in PENALTIES]
    return [LinearHead(ridge.coef_[None], np.array([ridge.intercept_])) for ridge in ridges]


def _discriminants(task: Task, inputs: np.ndarray, targets: np.ndarray) -> list[LinearHead]:
    """The discriminants with each share of their evidence; outputs without an example stay at their base rate."""
    known = np.isfinite(targets)
    rates = (np.where(known, targets, 0.0).sum(axis=0) + 0.5) / (known.sum(axis=0) + 1.0)
    odds = np.log(rates / (1.0 - rates))
    weight, evidence = np.zeros((targets.shape[1], inputs.shape[1])), np.zeros(targets.shape[1])
    for output, column in enumerate(targets.T):
        seen, positive = inputs[known[:, output]], column[known[:, output]] > 0.5
        if len(seen) > 2 and 0 < positive.sum() < len(seen):  # one example says more than none
            fisher = _fisher(seen, positive)
            weight[output], evidence[output] = fisher.coef_[0], fisher.intercept_[0] - odds[output]
    base = np.log(rates) if task.kind == "multi_class" else odds
    return [LinearHead(share * weight, share * evidence + base) for share in SHARES]


def _fisher(inputs: np.ndarray, positive: np.ndarray) -> LinearDiscriminantAnalysis:
    """Fisher's discriminant, shrunk the more the fewer records there are (Friedman 1989)."""
    records, size = inputs.shape
    fisher = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=size / (size + records))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Only one sample available")  # a single example has a mean all the same
        return fisher.fit(inputs, positive)


# ------------------------------------------------------------------------------------------------------------ settling


def settle(
    layer: Any,
    task: Task,
    views: Sequence[np.ndarray],
    targets: np.ndarray,
    held_out: np.ndarray,
    labels: np.ndarray,
) -> None:
    """Let a trained head settle, where that makes its main metric on validation better.

    The choice looks at recordings as they are. Where the fit sees nothing else, answers for fewer leads lose by it.

    Args:
        layer: the head, see `heads.Head`.
        views: embeddings of the training records, each (records, record_size), as they are and with fewer leads.
        targets: of the training records, (records, head_size), see `head_targets`.
        held_out, labels: of the validation records, (records, record_size) and (records, outputs).
    """
    if task.prior or task.kind == "multi_class":  # it corrects a measurement; its logits compete with each other
        return

    def measure(head: LinearHead) -> float:
        outputs = torch.from_numpy(head.logits(held_out))
        return point_metric(task, labels, read_head(outputs, task, torch.zeros(len(outputs))).numpy())

    trained = LinearHead.of(layer)
    other = settled(task, trained, np.concatenate(views), np.tile(targets, (len(views), 1)))
    before, after = measure(trained), measure(other)
    logger.info("%s: settling, %s on validation %.4f to %.4f", task.name, task.metric, before, after)
    if after < before if task.kind == "regression" else after > before:
        _set_head(layer, other)


def settled(task: Task, trained: LinearHead, embedding: np.ndarray, targets: np.ndarray) -> LinearHead:
    """The mean of a trained head and of other answers in closed form to the same questions.

    Of a label these are Fisher's discriminant and a logistic regression that weighs both classes alike, and both once
    more with the products where the task has some. All are brought to the mean and spread of the trained head's logits
    over the training records before they are averaged. Of a regression it is a ridge regression.

    Args:
        embedding: (records, record_size).
        targets: (records, head_size), NaN where unknown. A label without an example keeps its trained answer.
    """
    center, scale = embedding.mean(axis=0, dtype=np.float64), embedding.std(axis=0, dtype=np.float64) + 1e-6
    inputs = (embedding - center) / scale
    size = inputs.shape[1]
    weight, bias = trained.weight * scale, trained.bias + trained.weight.astype(np.float64) @ center
    features, of_products = [inputs], []
    if task.products:
        directions, offsets = _directions_of(task, trained, center, scale, inputs)
        pairs, weight_of_pairs = _pairs(task, trained, embedding.astype(np.float64) @ directions.T + offsets)
        features, weight = [inputs, np.hstack([inputs, pairs])], np.hstack([weight, weight_of_pairs])
        of_products = [directions, offsets]
    if task.kind == "regression":
        known = np.isfinite(targets[:, 0])
        if known.sum() > 1:
            standard = (targets[known, 0] - task.center) / task.spread
            ridge = Ridge(alpha=float(size)).fit(inputs[known], standard)
            weight, bias = (weight + ridge.coef_) / 2, (bias + ridge.intercept_) / 2
    else:
        discriminants = [_fisher_directions(seen, targets) for seen in features]
        for output, column in enumerate(targets.T):
            known = np.isfinite(column)
            positive = column[known] > 0.5
            if len(positive) > 2 and 0 < positive.sum() < len(positive):
                seen = [values[known] for values in features]
                fishers = [directions_of[output] for directions_of in discriminants]
                weight[output], bias[output] = _mean_answer(seen, positive, weight[output], bias[output], fishers)
    linear = weight[:, :size] / scale
    parts = [linear, bias - linear @ center, *of_products]
    if task.products:
        parts.append(_squares(weight[:, size:] * PRODUCT_SCALE, task.products))
    return LinearHead(*(part.astype(np.float32) for part in parts))


def _mean_answer(
    features: list[np.ndarray], positive: np.ndarray, trained: np.ndarray, bias: float, fishers: list[np.ndarray]
) -> tuple[np.ndarray, float]:
    """Weights and bias of a label's mean answer, for the last of the features.

    Args:
        features: each (records, numbers) and holding those before it.
        positive: (records,) bool.
        trained, bias: of the trained head, for the last of the features.
        fishers: the discriminant for each of the features.
    """
    rarer, seen = min(positive.sum(), (~positive).sum()), features[-1]
    balanced = LogisticRegression(C=rarer / (BALANCED_PENALTY * len(positive)), class_weight="balanced", max_iter=200)
    answers = np.zeros((1 + 2 * len(features), seen.shape[1]))
    answers[0] = trained
    for place, (values, fisher) in enumerate(zip(features, fishers, strict=True)):
        balanced.fit(values, positive)
        answers[1 + 2 * place, : len(fisher)] = fisher
        answers[2 + 2 * place, : len(fisher)] = balanced.coef_[0]
    spreads = (seen @ answers.T).std(axis=0)
    level, spread = float((seen @ trained).mean() + bias), spreads[0]
    if not spread:  # a row that nothing has trained yet says nothing
        level, spread = float((seen @ answers[-1]).mean() + balanced.intercept_[0]), spreads[-1]
        answers, spreads = answers[1:], spreads[1:]
    weight = spread * (answers / (spreads[:, None] + 1e-12)).mean(axis=0)
    return weight, level - float((seen @ weight).mean())


def _fisher_directions(inputs: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Directions of the discriminants of all labels, (labels, size), shrunk as `_fisher`'s; nought without examples.

    The scatter of all records takes the place of that within classes: they differ by a multiple of the difference d of
    the means with itself, so that by Sherman and Morrison 1950 only the length of the direction changes. One scatter
    then serves all labels that are known of the same records.

    Args:
        inputs: (records, size).
        targets: (records, labels), NaN where unknown.
    """
    out = np.zeros((targets.shape[1], inputs.shape[1]))
    masks, group_of = np.unique(np.isfinite(targets), axis=1, return_inverse=True)
    for group, known in enumerate(masks.T):
        labels, seen = np.flatnonzero(group_of == group), inputs[known]
        positive = targets[known][:, labels] > 0.5
        count = positive.sum(axis=0)
        told = (count > 0) & (count < len(seen))
        if not told.any():
            continue
        records, size = seen.shape
        shrinkage = size / (size + records)
        center = seen.mean(axis=0)
        scatter = np.cov(seen, rowvar=False, bias=True)
        scatter = (1.0 - shrinkage) * scatter + shrinkage * np.trace(scatter) / size * np.eye(size)
        # Both class means lie on a line through the mean of all.
        of_positives = positive[:, told].T.astype(np.float64) @ seen / count[told, None] - center
        out[labels[told]] = np.linalg.solve(scatter, of_positives.T).T
    return out


def _directions_of(
    task: Task, trained: LinearHead, center: np.ndarray, scale: np.ndarray, inputs: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Directions (products, record_size) and offsets (products,) of a head's products: the trained head's where it has
    any yet, otherwise the principal components of the standardised embedding, in units of their spread, and nought
    where there are fewer of these."""
    assert trained.directions is not None
    assert trained.offsets is not None
    if trained.directions.any():
        return trained.directions.astype(np.float64), trained.offsets.astype(np.float64)
    variances, axes = np.linalg.eigh(inputs.T @ inputs / len(inputs))
    strongest = slice(None, -task.products - 1, -1)
    components = (axes[:, strongest] / np.sqrt(variances[strongest] + 1e-6)).T / scale
    directions = np.zeros((task.products, len(center)))
    directions[: len(components)] = components
    return directions, -directions @ center


def _pairs(task: Task, trained: LinearHead, components: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The products of each two components (records, pairs), scaled, and the trained head's weights of these
    (head_size, pairs)."""
    assert trained.products is not None
    count = task.products
    first, second = np.triu_indices(count)
    components = np.clip(components, -FARTHEST, FARTHEST)
    square = trained.products.astype(np.float64).reshape(-1, count, count)
    weight = square[:, first, second] + np.where(first == second, 0.0, square[:, second, first])
    return PRODUCT_SCALE * components[:, first] * components[:, second], weight / PRODUCT_SCALE


def _squares(of_pairs: np.ndarray, count: int) -> np.ndarray:
    """Weights of pairs (head_size, pairs) as those of all products (head_size, count * count)."""
    out = np.zeros((len(of_pairs), count, count))
    out[:, *np.triu_indices(count)] = of_pairs
    return out.reshape(len(of_pairs), -1)


def settle_all(
    model: Any,
    labels: dict[str, Tensor],
    train: Records,
    validation: Records,
    names: Sequence[str] | None = None,
) -> None:
    """Let the heads of a model settle. Labels that have parts get outputs for these first, which start as the model's
    own answers for them; so do products, which start at nought.

    Args:
        labels: task to the training records' truth, whatever labels the model learned from.
        names: of the tasks, *optional*, defaults to all.

    Raises:
        ValueError: the model has no such task.
    """
    chosen = list(model.tasks) if names is None else names
    if unknown := sorted(set(chosen) - set(model.tasks)):
        raise ValueError(f"settle names {', '.join(unknown)}; this model has {', '.join(model.tasks)}")
    for name in chosen:
        task = model.tasks[name]
        whole = TASKS.get(name, task)
        if whole.plain().reads_like(task) and not whole.reads_like(task) and (whole.parts_task or name) in model.tasks:
            own: Any = model.heads[f"head_{name}"]
            weight, bias = own.weight, own.bias
            if whole.parts:
                of_parts: Any = model.heads[f"head_{whole.parts_task}"]
                places = _places_of_parts(whole)
                weight, bias = torch.cat([weight, of_parts.weight[places]]), torch.cat([bias, of_parts.bias[places]])
            model.add_task(whole)
            _set_head(
                model.heads[f"head_{name}"], LinearHead(weight.detach().cpu().numpy(), bias.detach().cpu().numpy())
            )
    views, held_out = [embed(model, train), embed(model, with_fewer_leads(train))], embed(model, validation)
    for name in chosen:
        task = model.tasks[name]
        if name in labels and name in validation.labels:
            layer, truth = model.heads[f"head_{name}"], validation.labels[name].numpy()
            settle(layer, task, views, head_targets(task, labels), held_out, truth)
