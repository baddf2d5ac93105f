"""From the embedding of a recording to the logits of a task.

    outputs = W x + b + V p,  p = products of each two of  z = clamp(D x + d, -3, 3)

The products are for tasks with `Task.products`: how two findings go together tells many rare statements. `D` and `d`
are the embedding's principal components, in units of their spread.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

from .tasks import Task

PRODUCTS = ("directions", "offsets", "products")
FARTHEST = 3.0  # spreads; what is farther from the mean counts as this far, since products grow fast


class Head(nn.Linear):
    """The head of a task, a linear layer where the task has no products.

    Args:
        size: of the embedding.
        task: whose answer it gives.

    Attributes:
        directions (k, size), offsets (k,): `D` and `d`; products (head_size, k * k): `V`, half of it nought. All are
            nought until the head settles: gradients leave them there.
    """

    def __init__(self, size: int, task: Task) -> None:
        super().__init__(size, task.head_size)
        if task.products:
            self.directions = nn.Parameter(torch.zeros(task.products, size))
            self.offsets = nn.Parameter(torch.zeros(task.products))
            self.products = nn.Parameter(torch.zeros(task.head_size, task.products**2))

    def forward(self, embedding: Tensor) -> Tensor:
        """embedding (b, size) to outputs (b, head_size)."""
        return head_outputs(embedding, dict(self.named_parameters()))


def head_shapes(task: Task, size: int) -> dict[str, tuple[int, ...]]:
    """The names of a head's weights and their shapes."""
    shapes: dict[str, tuple[int, ...]] = {"weight": (task.head_size, size), "bias": (task.head_size,)}
    if task.products:
        count = task.products
        shapes |= {"directions": (count, size), "offsets": (count,), "products": (task.head_size, count**2)}
    return shapes


def head_outputs(embedding: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
    """embedding (b, size) to outputs (b, head_size), with the weights of `head_shapes`."""
    outputs = functional.linear(embedding, weights["weight"], weights["bias"])
    if "products" not in weights:
        return outputs
    components = functional.linear(embedding, weights["directions"], weights["offsets"]).clamp(-FARTHEST, FARTHEST)
    products = (components.unsqueeze(2) * components.unsqueeze(1)).flatten(1)
    return outputs + functional.linear(products, weights["products"])


# A regression with a measured prior learns only a correction; it moves in steps of this share of the task's spread.
CORRECTION_SHARE = 0.05


def read_head(outputs: Tensor, task: Task, period_s: Tensor) -> Tensor:
    """The logits (b, num_outputs) of a task from what its head gives, (b, head_size).

    A regression may start from what the feature extractor measured: the RR task from the mean RR of the found beats,
    which the head corrects. Where nothing was measured the head's own value counts, in full.

    A label made of parts has the mean of two logits: its own, and that of any of its parts, each by itself (noisy or,
    Pearl 1988, section 4.3.2): 1 - prod (1 - p).
    """
    if task.prior:
        measured = ((period_s[:, None].float() * 1000.0 - task.center) / task.spread).to(outputs.dtype)
        return torch.where(period_s[:, None] > 0, measured + CORRECTION_SHARE * outputs, outputs)
    if not task.parts:
        return outputs
    own, parts = outputs[:, : task.num_outputs], _softplus(outputs[:, task.num_outputs :].float())
    of_labels = parts.split([len(task.parts[label]) for label in task.labels], dim=1)
    absent = torch.stack([each.sum(dim=1) for each in of_labels], dim=1).clamp(min=1e-5)
    return 0.5 * (own + _logit_of_any(absent).to(own.dtype))


def _softplus(logits: Tensor) -> Tensor:
    """-log (1 - p), by its series where p is small: there log (1 + x) of exported graphs loses its digits."""
    x = torch.exp(logits.clamp(max=-4.0))
    return torch.where(logits < -4.0, x * (1.0 - x * (0.5 - x / 3.0)), functional.softplus(logits))


def _logit_of_any(absent: Tensor) -> Tensor:
    """log (e^x - 1), the logit of 1 - prod (1 - p) from x = -log prod (1 - p), by its series where x is small."""
    series = torch.log(absent) - absent * (0.5 - absent / 24.0)
    return absent + torch.where(absent < 0.1, series, torch.log(1.0 - torch.exp(-absent.clamp(min=0.1))))
