"""A model small enough to be built in a test, saved with adapters in the layout of `hub/`: what the programs load."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from modeling_ecgmoe.adapter_card import AdapterCard, calibrate
from modeling_ecgmoe.adapters import fingerprint
from modeling_ecgmoe.configuration_ecgmoe import FAMILIES, EcgMoeConfig
from modeling_ecgmoe.feature_extraction_ecgmoe import EcgMoeFeatureExtractor
from modeling_ecgmoe.lora import lora_model, save_adapter
from modeling_ecgmoe.modeling_ecgmoe import EcgMoeForTasks
from modeling_ecgmoe.tasks import TASKS

TINY_TASKS = ("age", "arrhythmia", "rr_interval", "sex", "superclass")


def tiny_model(**changes: Any) -> EcgMoeForTasks:
    """All parts of the architecture, a few numbers each, random weights that are the same every time.

    Args:
        changes: fields of the configuration that shall be others.
    """
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "families": FAMILIES,
        "hidden_size": 16,
        "conv_channels": (4, 8, 8, 8),
        "conv_blocks": (1, 1, 1),
        "ssm_channels": 8,
        "ssm_states": 4,
        "ssm_layers": 1,
        "patch_channels": 16,
        "beat_size": 16,
        "num_attention_heads": 2,
        "expert_size": 16,
        "num_queries": 2,
        "fusion_size": 32,
        "record_size": 32,
        "tasks": {name: TASKS[name].to_dict() for name in TINY_TASKS},
    }
    return EcgMoeForTasks(EcgMoeConfig(**(sizes | changes)))


def save_tiny_model(folder: Path, tasks: tuple[str, ...] = TINY_TASKS, simulated: tuple[str, ...] = ()) -> Path:
    """Write `model/` and `adapters/<task>/` into a folder.

    Args:
        folder: made where it does not exist.
        tasks: the adapters to write.
        simulated: tasks whose adapters say that they were trained on simulated data.

    Returns:
        the folder of the model.
    """
    model = tiny_model()
    model.save_pretrained(folder / "model")
    EcgMoeFeatureExtractor().save_pretrained(folder / "model")
    base = fingerprint(model)
    rng = np.random.default_rng(0)
    for name in tasks:
        task = TASKS[name]
        torch.manual_seed(len(name))
        adapted = lora_model(tiny_model(), task, rank=2)
        for parameter_name, parameter in adapted.named_parameters():
            if "lora_B" in parameter_name:  # zero at first, so that an untrained adapter changes nothing
                torch.nn.init.normal_(parameter, std=0.1)
        card = AdapterCard(task, base, evidence="simulated" if name in simulated else "measured")
        truth = (
            rng.uniform(40, 80, (20, 1)) if task.kind == "regression" else rng.integers(0, 2, (20, task.num_outputs))
        )
        calibrate(card, rng.normal(size=(20, task.num_outputs)), truth.astype(np.float32))
        save_adapter(adapted, card, folder / "adapters" / name)
    return folder / "model"
