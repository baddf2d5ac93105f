"""Heads in closed form: where a new one starts, and where a trained one settles.

A new head starts at the base rates of its labels, or at the best linear answer from the frozen embedding. Fine-tuning
from the latter keeps what the embedding knows, which a head of random numbers lets go while it learns (Kumar et al.
2022, "Fine-Tuning can Distort Pretrained Features and Underperform Out-of-Distribution"). With few labels most of an
adapter's answer is this start.

A trained head settles between its own answer and what other linear methods find in the same embedding. Stochastic
gradients leave rare labels to a handful of steps, where discriminants and balanced regressions weigh every record.
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
from modeling_ecgmoe.encoder import read_head
from modeling_ecgmoe.modeling_ecgmoe import EcgMoeForTasks, task_loss
from modeling_ecgmoe.tasks import TASKS, Task
from records import EncodedRecords, Records, mean_of_windows

logger = logging.getLogger("train")

PENALTIES = tuple(10.0**power for power in range(6))  # of the squared weights of a standardised embedding
SHARES = tuple(0.5**power for power in range(1, 8))  # of a discriminant's evidence
FOLDS = 5
MAX_RECORDS = 2000  # more change the start little, and take long
BALANCED_PENALTY = 5.0  # of the squared weights of a balanced regression, over the records of the rarer class


class LinearHead(NamedTuple):
    """weight (head_size, record_size) and bias (head_size,) of a head."""

    weight: np.ndarray
    bias: np.ndarray

    def logits(self, embedding: np.ndarray) -> np.ndarray:
        """(records, record_size) to (records, head_size), before a task's prior or parts."""
        return embedding @ self.weight.T + self.bias


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
        layer.weight.copy_(torch.from_numpy(head.weight))
        layer.bias.copy_(torch.from_numpy(head.bias))


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
    layer: Any, task: Task, embedding: np.ndarray, targets: np.ndarray, held_out: np.ndarray, labels: np.ndarray
) -> None:
    """Let a trained head settle, where that makes its main metric on validation better.

    Both the fit and the choice look at recordings as they are: what is asked of single leads may lose by it.

    Args:
        layer: the linear layer of the head.
        embedding, targets: of the training records, (records, record_size) and (records, head_size), see
            `head_targets`.
        held_out, labels: of the validation records, (records, record_size) and (records, outputs).
    """
    if task.prior or task.kind == "multi_class":  # it corrects a measurement; its logits compete with each other
        return

    def measure(head: LinearHead) -> float:
        outputs = torch.from_numpy(head.logits(held_out))
        return point_metric(task, labels, read_head(outputs, task, torch.zeros(len(outputs))).numpy())

    trained = LinearHead(*(p.detach().cpu().numpy().copy() for p in (layer.weight, layer.bias)))
    other = settled(task, trained, embedding, targets)
    before, after = measure(trained), measure(other)
    logger.info("%s: settling, %s on validation %.4f to %.4f", task.name, task.metric, before, after)
    if after < before if task.kind == "regression" else after > before:
        _set_head(layer, other)


def settled(task: Task, trained: LinearHead, embedding: np.ndarray, targets: np.ndarray) -> LinearHead:
    """The mean of a trained head and of other linear answers to the same questions.

    Of a label these are Fisher's discriminant and a logistic regression that weighs both classes alike. All are
    brought to the mean and spread of the trained head's logits over the training records before they are averaged. Of
    a regression it is a ridge regression.

    Args:
        embedding: (records, record_size).
        targets: (records, head_size), NaN where unknown. A label without an example keeps its trained answer.
    """
    weight, bias = trained.weight.astype(np.float64), trained.bias.astype(np.float64)
    center, scale = embedding.mean(axis=0, dtype=np.float64), embedding.std(axis=0, dtype=np.float64) + 1e-6
    inputs = (embedding - center) / scale
    weight, bias = weight * scale, bias + weight @ center  # of standardised inputs from here
    for output, column in enumerate(targets.T):
        known = np.isfinite(column)
        seen, truth = inputs[known], column[known]
        records, size = seen.shape if known.any() else (0, 1)
        if task.kind == "regression":
            if records > 1:
                ridge = Ridge(alpha=float(size)).fit(seen, (truth - task.center) / task.spread)
                weight[output] = (weight[output] + ridge.coef_) / 2
                bias[output] = (bias[output] + ridge.intercept_) / 2
            continue
        positive = truth > 0.5
        rarer = min(positive.sum(), (~positive).sum())
        if records < 3 or not rarer:
            continue
        fisher = _fisher(seen, positive)
        balanced = LogisticRegression(C=rarer / (BALANCED_PENALTY * records), class_weight="balanced", max_iter=200)
        balanced.fit(seen, positive)
        directions = np.stack([weight[output], fisher.coef_[0], balanced.coef_[0]])
        spreads = (seen @ directions.T).std(axis=0)
        level, spread = float((seen @ weight[output]).mean() + bias[output]), spreads[0]
        if not spread:  # a row that nothing has trained yet says nothing
            directions, spreads = directions[1:], spreads[1:]
            level, spread = float((seen @ balanced.coef_[0]).mean() + balanced.intercept_[0]), spreads[-1]
        weight[output] = spread * (directions / (spreads[:, None] + 1e-12)).mean(axis=0)
        bias[output] = level - (seen @ weight[output]).mean()
    weight = weight / scale
    return LinearHead(weight.astype(np.float32), (bias - weight @ center).astype(np.float32))


def settle_all(
    model: Any,
    labels: dict[str, Tensor],
    train: Records,
    validation: Records,
    names: Sequence[str] | None = None,
) -> None:
    """Let the heads of a model settle. Labels that have parts get outputs for these first, which start as the model's
    own answers for them.

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
        if whole.parts and whole.without_parts().reads_like(task) and whole.parts_task in model.tasks:
            own: Any = model.heads[f"head_{name}"]
            of_parts: Any = model.heads[f"head_{whole.parts_task}"]
            places = _places_of_parts(whole)
            weight = torch.cat([own.weight, of_parts.weight[places]])
            bias = torch.cat([own.bias, of_parts.bias[places]])
            model.add_task(whole)
            _set_head(
                model.heads[f"head_{name}"], LinearHead(weight.detach().cpu().numpy(), bias.detach().cpu().numpy())
            )
    embedding, held_out = embed(model, train), embed(model, validation)
    for name in chosen:
        task = model.tasks[name]
        if name in labels and name in validation.labels:
            layer, truth = model.heads[f"head_{name}"], validation.labels[name].numpy()
            settle(layer, task, embedding, head_targets(task, labels), held_out, truth)
