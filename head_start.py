"""Where a new head starts: at the base rates of its labels, or at the best linear answer from the frozen embedding.

Fine-tuning from the latter keeps what the embedding knows, which a head of random numbers lets go while it learns
(Kumar et al. 2022, "Fine-Tuning can Distort Pretrained Features and Underperform Out-of-Distribution"). With few
labels most of an adapter's answer is this start.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate.utils import send_to_device
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.model_selection import KFold
from torch import Tensor, nn

from modeling_ecgmoe.modeling_ecgmoe import EcgMoeForTasks, task_loss
from modeling_ecgmoe.tasks import Task
from records import EncodedRecords, Records, mean_of_windows

PENALTIES = tuple(10.0**power for power in range(6))  # of the squared weights of a standardised embedding
FOLDS = 5
MAX_RECORDS = 2000  # more change the start little, and take long


class LinearHead(NamedTuple):
    """weight (outputs, record_size) and bias (outputs,) of a head."""

    weight: np.ndarray
    bias: np.ndarray

    def logits(self, embedding: np.ndarray) -> np.ndarray:
        """(records, record_size) to (records, outputs)."""
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
            bias = model.heads[f"head_{name}"].bias
            start = share.log() if task.kind == "multi_class" else torch.logit(share)
            bias.copy_(torch.where(start.isfinite(), start.to(bias), bias))  # nothing is known of a label without any


def start_linearly(model: EcgMoeForTasks, task: Task, train: Records | EncodedRecords, seed: int = 0) -> None:
    """Set a head of the model to the linear answer that fits the training records, or `MAX_RECORDS` of them.

    A task that starts from a measurement starts there: its head, which answers the difference, is nought.

    Args:
        seed: of the records that are chosen, and of the folds.
    """
    layer: Any = model.heads[f"head_{task.name}"]
    targets = train.labels[task.name].numpy()
    known = np.flatnonzero(np.isfinite(targets).any(axis=1))
    if task.prior or not len(known):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
        return
    chosen = np.sort(np.random.default_rng(seed).permutation(known)[:MAX_RECORDS])
    head = fit_linear_head(task, embed(model, train, torch.from_numpy(chosen)), targets[chosen], seed)
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(head.weight))
        layer.bias.copy_(torch.from_numpy(head.bias))


@torch.inference_mode()
def embed(
    model: EcgMoeForTasks, records: Records | EncodedRecords, chosen: Tensor, batch_size: int = 64
) -> np.ndarray:
    """The model's embedding of some records, (records, record_size), the mean of each one's windows.

    Args:
        chosen: (n,) of the records, rising.
    """
    model.eval()
    parts = []
    windows = torch.isin(records.record_of, chosen).nonzero()[:, 0]
    for index in windows.split(batch_size):
        batch = records.__getitems__(index.tolist())
        inputs = {"encoder_output": batch["encoded"]} if "encoded" in batch else batch["signal"]
        parts.append(model.ecgmoe(**send_to_device(inputs, model.device)).pooler_output.float().cpu())
    return mean_of_windows(torch.cat(parts), torch.searchsorted(chosen, records.record_of[windows])).numpy()


def fit_linear_head(task: Task, embedding: np.ndarray, targets: np.ndarray, seed: int = 0) -> LinearHead:
    """Ridge or logistic regression, with the penalty of the lowest cross-validated loss.

    Args:
        embedding: (records, record_size).
        targets: (records, outputs) as `Task.targets` gives them, NaN where unknown.
        seed: of the folds.
    """
    known = np.isfinite(targets).any(axis=1)
    embedding, targets = embedding[known].astype(np.float64), targets[known].astype(np.float64)
    center, scale = embedding.mean(axis=0), embedding.std(axis=0) + 1e-6
    inputs = (embedding - center) / scale
    penalty = PENALTIES[len(PENALTIES) // 2]
    if len(targets) >= 2 * FOLDS:
        folds = list(KFold(FOLDS, shuffle=True, random_state=seed).split(inputs))
        losses = [
            np.mean([_loss(task, _fit(task, each, inputs[a], targets[a]), inputs[b], targets[b]) for a, b in folds])
            for each in PENALTIES
        ]
        penalty = PENALTIES[int(np.argmin(losses))]
    head = _fit(task, penalty, inputs, targets)
    weight = head.weight / scale
    return LinearHead(weight.astype(np.float32), (head.bias - weight @ center).astype(np.float32))


def _loss(task: Task, head: LinearHead, inputs: np.ndarray, targets: np.ndarray) -> float:
    return float(task_loss(task, torch.from_numpy(head.logits(inputs)), torch.from_numpy(targets)))


def _fit(task: Task, penalty: float, inputs: np.ndarray, targets: np.ndarray) -> LinearHead:
    """One fit; outputs without an example stay at their base rate."""
    weight, known = np.zeros((targets.shape[1], inputs.shape[1])), np.isfinite(targets)
    if task.kind == "regression":
        standard = (targets[known[:, 0], 0] - task.center) / task.spread
        ridge = Ridge(alpha=penalty).fit(inputs[known[:, 0]], standard)
        return LinearHead(ridge.coef_[None], np.array([ridge.intercept_]))
    counts = np.where(known, targets, 0.0).sum(axis=0)
    rates = (counts + 0.5) / (known.sum(axis=0) + 1.0)
    regression = LogisticRegression(C=1.0 / penalty, max_iter=500)
    if task.kind == "multi_class":
        bias = np.log(rates)
        present = np.flatnonzero(counts)
        if len(present) > 1:
            regression.fit(inputs, targets.argmax(axis=1))
            both = len(present) == 2  # then the one row says how far the second is above the first
            weight[present] = np.vstack([-regression.coef_, regression.coef_]) / 2 if both else regression.coef_
            ends = [-regression.intercept_, regression.intercept_]
            bias[present] = np.concatenate(ends) / 2 if both else regression.intercept_
        return LinearHead(weight, bias)
    bias = np.log(rates / (1.0 - rates))
    for output, column in enumerate(targets.T):
        seen = known[:, output]
        if 0 < column[seen].sum() < seen.sum():  # one example says more than none
            regression.fit(inputs[seen], column[seen] > 0.5)
            weight[output], bias[output] = regression.coef_[0], regression.intercept_[0]
    return LinearHead(weight, bias)
