"""The conventional multi-task baseline: one residual 1-D CNN trunk, pooled, with a plain linear head for each task.

    python -m benchmarks.plain_cnn benchmarks/configs/plain_cnn.json

Same recordings and training loop as ECG-MoE, ten epochs fewer, no soft labels; it sees the signal, no beats.
"""

import logging
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from arguments import parse_arguments, run_program
from modeling_ecgmoe.configuration_ecgmoe import PRETRAINING_TASKS, EcgMoeConfig
from modeling_ecgmoe.feature_extraction_ecgmoe import EcgMoeFeatureExtractor
from modeling_ecgmoe.heads import Head, read_head
from modeling_ecgmoe.modeling_ecgmoe import EcgMoeTaskOutput, task_loss
from modeling_ecgmoe.tasks import TASKS, Task
from modeling_ecgmoe.temporal import Stem
from records import DataArguments
from train import TrainingArguments, accelerator_for, fit_on_splits


class PlainCnn(nn.Module):
    """A residual network like ECG-MoE's stem, one block deeper; global mean and maximum pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.tasks = {name: TASKS[name].plain() for name in PRETRAINING_TASKS}
        config = EcgMoeConfig(conv_kernels=(9, 5, 3, 3), conv_blocks=(1, 1, 2))
        self.stem = Stem(config)
        self.dropout = nn.Dropout(0.3)
        self.width = 2 * config.conv_channels[-1]
        self.heads = nn.ModuleDict({f"head_{name}": Head(self.width, t) for name, t in self.tasks.items()})

    def forward(
        self,
        input_values: Tensor,
        labels: dict[str, Tensor] | None = None,
        tasks: list[str] | None = None,
        **other: Any,
    ) -> EcgMoeTaskOutput:
        """Takes what the feature extractor gives and leaves the beats in `other` alone."""
        hidden = self.stem(input_values)
        embedding = torch.cat([hidden.mean(dim=2), hidden.amax(dim=2)], dim=1)
        pooled, unknown = self.dropout(embedding), embedding.new_zeros(len(embedding))
        logits = {
            name: read_head(self.heads[f"head_{name}"](pooled), self.tasks[name], unknown)
            for name in (self.tasks if tasks is None else tasks)
        }
        if labels is None:
            return EcgMoeTaskOutput(logits=logits, pooler_output=embedding)
        losses = {
            name: task_loss(task, logits[name], labels[name]) for name, task in self.tasks.items() if name in labels
        }
        loss = torch.stack([self.tasks[name].loss_weight * value for name, value in losses.items()]).sum()
        return EcgMoeTaskOutput(loss=loss, logits=logits, losses=losses, pooler_output=embedding)

    def add_task(self, task: Task) -> None:
        """Add a head, or replace the one of that name."""
        self.tasks[task.name] = task
        self.heads[f"head_{task.name}"] = Head(self.width, task)

    def remove_task(self, name: str) -> None:
        """Take away a head."""
        del self.tasks[name], self.heads[f"head_{name}"]

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the weights."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        save_file(self.state_dict(), Path(folder) / "model.safetensors")

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "PlainCnn":
        """Read the weights, of heads with or without parts and products."""
        model, weights = cls(), load_file(Path(folder) / "model.safetensors")
        for name, task in model.tasks.items():
            has_products = f"heads.head_{name}.products" in weights
            if len(weights[f"heads.head_{name}.bias"]) != task.head_size or has_products:
                model.add_task(TASKS[name])
        model.load_state_dict(weights)
        return model.eval()


def main(argv: list[str]) -> None:
    """Train it; the arguments are those of `train.py pretrain`."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    data, arguments = parse_arguments((DataArguments, TrainingArguments), argv)
    accelerator = accelerator_for(arguments)
    model, extractor = PlainCnn(), EcgMoeFeatureExtractor()
    fit_on_splits(model, extractor, data, arguments, accelerator)


if __name__ == "__main__":
    sys.exit(run_program(main, sys.argv[1:], "plain_cnn"))
