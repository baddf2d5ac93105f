"""The conventional multi-task network that others publish: xresnet1d101 with a plain linear head for each task.

The 101-layer residual network of the PTB-XL benchmark (Strodthoff et al. 2021, IEEE JBHI 25(5), table II: the best of
seven, and the network to beat on PTB-XL since), after the "bag of tricks" residual network of He et al. 2019: a stem
of three convolutions, an average before each shortcut that halves the rate, four stages of 3, 4, 23 and 3 bottlenecks.
All four stages are 64 channels wide inside and 256 outside, and the kernels are 5 long. Maximum and mean over time and
a hidden layer of 128 make the record's embedding, as there. It is here to be timed, with random weights.
"""

import copy

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from modeling_ecgmoe.tasks import Task

BLOCKS = (3, 4, 23, 3)
STEM_CHANNELS, INNER_CHANNELS, OUTER_CHANNELS, EMBEDDING_SIZE = (32, 32, 64), 64, 256, 128
KERNEL = 5


def conv_norm(inputs: int, outputs: int, kernel: int, stride: int = 1, rectify: bool = True) -> nn.Sequential:
    """Convolution, batch normalisation and, unless it ends a residual branch, a rectifier."""
    layers: list[nn.Module] = [
        nn.Conv1d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False),
        nn.BatchNorm1d(outputs),
    ]
    return nn.Sequential(*layers, *([nn.ReLU(inplace=True)] if rectify else []))


class Bottleneck(nn.Module):
    """Narrow, convolve, widen; the shortcut averages where the rate halves and projects where the width changes."""

    def __init__(self, inputs: int, stride: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            conv_norm(inputs, INNER_CHANNELS, 1),
            conv_norm(INNER_CHANNELS, INNER_CHANNELS, KERNEL, stride),
            conv_norm(INNER_CHANNELS, OUTER_CHANNELS, 1, rectify=False),
        )
        average = nn.Identity() if stride == 1 else nn.AvgPool1d(2, ceil_mode=True)
        project = nn.Identity() if inputs == OUTER_CHANNELS else conv_norm(inputs, OUTER_CHANNELS, 1, rectify=False)
        self.shortcut = nn.Sequential(average, project)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu_(self.branch(x) + self.shortcut(x))


class XResNet1d101(nn.Module):
    """12 leads at 100 Hz, (b, 12, t), to one tensor of logits (b, outputs) for each task."""

    def __init__(self, tasks: dict[str, Task], leads: int = 12) -> None:
        super().__init__()
        widths = (leads, *STEM_CHANNELS)
        self.stem = nn.Sequential(
            *(
                conv_norm(inputs, outputs, KERNEL, stride)
                for inputs, outputs, stride in zip(widths[:-1], widths[1:], (2, 1, 1), strict=True)
            ),
            nn.MaxPool1d(3, 2, padding=1),
        )
        blocks, inputs = [], STEM_CHANNELS[-1]
        for stage, count in enumerate(BLOCKS):
            for block in range(count):
                blocks.append(Bottleneck(inputs, stride=2 if stage and not block else 1))
                inputs = OUTER_CHANNELS
        self.blocks = nn.Sequential(*blocks)
        self.embed = nn.Sequential(
            nn.BatchNorm1d(2 * OUTER_CHANNELS),
            nn.Dropout(0.25),
            nn.Linear(2 * OUTER_CHANNELS, EMBEDDING_SIZE),
            nn.ReLU(inplace=True),
            nn.BatchNorm1d(EMBEDDING_SIZE),
            nn.Dropout(0.5),
        )
        self.heads = nn.ModuleDict(
            {f"head_{name}": nn.Linear(EMBEDDING_SIZE, task.num_outputs) for name, task in tasks.items()}
        )

    def forward(self, input_values: Tensor) -> dict[str, Tensor]:
        hidden = self.blocks(self.stem(input_values))
        embedding = self.embed(torch.cat([hidden.amax(dim=2), hidden.mean(dim=2)], dim=1))
        return {name: head(embedding) for name, head in self.heads.items()}

    def folded(self) -> "XResNet1d101":
        """A copy for inference, with the normalisations inside the convolutions before them."""
        copied = copy.deepcopy(self).eval()
        for part in copied.modules():
            if (
                isinstance(part, nn.Sequential)
                and isinstance(part[0], nn.Conv1d)
                and isinstance(part[1], nn.BatchNorm1d)
            ):
                part[0], part[1] = fuse_conv_bn_eval(part[0], part[1]), nn.Identity()
        return copied
