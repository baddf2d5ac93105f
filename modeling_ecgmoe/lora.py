"""LoRA for one task, trained and saved with PEFT (Hu et al. 2022), on the fusion alone: the backbone stays shared.

Inference reads what PEFT saved without it, see `stacking.py`.
"""

import json
import shutil
from pathlib import Path

from peft import LoraConfig, PeftModel, get_peft_model

from .adapter_card import BASE_MODEL, AdapterCard
from .fusion import LORA_TARGETS
from .modeling_ecgmoe import EcgMoeForTasks
from .stacking import CONFIG_FILE
from .tasks import Task

LORA_SCOPES = {
    "fusion": rf"ecgmoe\.fusion\.({LORA_TARGETS})",
    "all": r"ecgmoe\.(fusion|encoder)\..*([qkv]|out|up|down|pooled|gate_up)_proj",
}


def lora_model(
    model: EcgMoeForTasks, task: Task, rank: int = 8, alpha: int = 16, dropout: float = 0.05, scope: str = "fusion"
) -> PeftModel:
    """Wrap a model so that only the LoRA of one task and its head train; a missing head is added.

    Raises:
        ValueError: the scope is unknown.
    """
    if scope not in LORA_SCOPES:
        raise ValueError(f"unknown LoRA scope {scope!r}; known are {', '.join(LORA_SCOPES)}")
    _match_head(model, task)
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        bias="none",
        target_modules=LORA_SCOPES[scope],
        modules_to_save=[f"head_{task.name}"],
    )
    return get_peft_model(model, config, adapter_name=task.name)


def _match_head(model: EcgMoeForTasks, task: Task) -> None:
    """Give the model a head for the task, a new one where its own of that name is of another question."""
    if task.name not in model.tasks or not model.tasks[task.name].reads_like(task):
        model.add_task(task)


def save_adapter(model: PeftModel, card: AdapterCard, folder: Path) -> None:
    """Write an adapter in PEFT's format, with its card, directly into `folder`."""
    name = card.task.name
    folder.mkdir(parents=True, exist_ok=True)
    # What was measured was another adapter's.
    (folder / "results.json").unlink(missing_ok=True)
    shutil.rmtree(folder / ".eval_results", ignore_errors=True)
    model.save_pretrained(folder, selected_adapters=[name])
    inner = folder / name
    if inner.is_dir():
        for path in inner.iterdir():
            path.replace(folder / path.name)
        inner.rmdir()
    # PEFT notes where class and base were found here; elsewhere remote code has another path, and so has the base.
    config_file = folder / CONFIG_FILE
    values = json.loads(config_file.read_text(encoding="utf-8"))
    values |= {"auto_mapping": None, "base_model_name_or_path": BASE_MODEL}
    config_file.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    card.save(folder)
    (folder / "README.md").write_text(card.to_markdown(BASE_MODEL), encoding="utf-8")
