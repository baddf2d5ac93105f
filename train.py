"""Train ECG-MoE with Accelerate: `pretrain` the model on all tasks at once, `adapt` one task with LoRA, `evaluate`.

    accelerate launch -q train.py pretrain --data_dir ptb-xl --output_dir runs/base
    accelerate launch -q train.py adapt --task age --model runs/base/model --data_dir ptb-xl --output_dir runs/age
    accelerate launch -q train.py adapt --task low_ef --csv labels.csv --output_dir hub/adapters
    python train.py evaluate --data_dir ptb-xl --out benchmarks/results/quality_fold9.json

A JSON file may hold arguments; those after it count: `train.py pretrain benchmarks/configs/pretrain.json --seed 1`.
The resolved arguments are saved beside the weights. What cannot be run as asked is refused in one line on stderr, with
status 2, which `accelerate launch` turns into 1; its `-q` keeps it from adding a traceback of its own.
"""

import dataclasses
import logging
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, ProjectConfiguration, set_seed
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from adaptation import AdaptArguments, adapt
from arguments import (
    check_choices,
    check_ranges,
    make_folder,
    parse_arguments,
    parse_json_object,
    read_json_object,
    run_program,
)
from checkpoints import resume_checkpoint, save_arguments, save_checkpoint, write_log
from evaluation import EvaluateArguments, evaluate, evaluate_quickly, find_model
from linear_heads import settle_all, start_at_base_rates
from modeling_ecgmoe.configuration_ecgmoe import EcgMoeConfig
from modeling_ecgmoe.feature_extraction_ecgmoe import EcgMoeFeatureExtractor
from modeling_ecgmoe.modeling_ecgmoe import EcgMoeEncoderOutput, EcgMoeForTasks
from modeling_ecgmoe.tasks import TASKS, Task
from records import DataArguments, Records, as_is, crop, disturb, load_split, tell_unreadable
from report_words import TASK_NAME as REPORT_WORDS
from report_words import add_report_words
from soft_labels import soften


@dataclass
class TrainingArguments:
    """How to train. `benchmarks/configs/pretrain.json` holds what made the published model."""

    output_dir: str = field(default="runs/base", metadata={"help": "where weights, checkpoints and the log go"})
    epochs: int = field(default=14, metadata={"help": "passes over the training split"})
    batch_size: int = field(default=64, metadata={"help": "records a step and process"})
    learning_rate: float = field(default=2e-3, metadata={"help": "highest learning rate of the one-cycle schedule"})
    weight_decay: float = field(
        default=0.05, metadata={"help": "AdamW's decay of matrices, not of routers and experts"}
    )
    crop_s: float = field(default=5.12, metadata={"help": "seconds of each recording that a training step sees"})
    full_every: int = field(default=8, metadata={"help": "every so many steps see whole recordings, 0 for never"})
    ema_decay: float = field(default=0.998, metadata={"help": "moving average of the weights that is saved"})
    gradient_clip: float = field(default=2.0, metadata={"help": "largest norm of the gradient"})
    lead_dropout: float = field(default=0.25, metadata={"help": "share of records that lose leads in a step"})
    noise: float = field(default=0.3, metadata={"help": "share of records that get noise and baseline wander"})
    mixed_precision: str = field(default="no", metadata={"help": "no or bf16"})
    seed: int = field(default=0, metadata={"help": "seed of weights, order and augmentation"})
    max_steps: int | None = field(default=None, metadata={"help": "stop after so many steps (smoke runs)"})
    evaluate_every: int = field(default=4, metadata={"help": "epochs between two evaluations"})
    resume: bool = field(default=False, metadata={"help": "go on from the last checkpoint in output_dir"})
    model: str | None = field(default=None, metadata={"help": "start from this model instead of new weights"})
    model_config: str | None = field(default=None, metadata={"help": "JSON with configuration fields to change"})
    loss_weights: str = field(
        default="{}", metadata={"help": 'weights of tasks other than in the task table, in JSON, such as {"sex": 3}'}
    )
    report_weight: float = field(default=0.0, metadata={"help": "weight of the reports' words as a target, 0: none"})
    soft_labels: str = field(default="", metadata={"help": "other models' answers, from benchmarks.soft_labels"})
    soft_share: float = field(default=0.5, metadata={"help": "how far labels move to these answers, 0 to 1"})
    hard_labels: list[str] = field(
        default_factory=list, metadata={"help": "tasks whose labels stay as they are beside --soft_labels"}
    )
    settle: list[str] | None = field(
        default=None,
        metadata={"help": "tasks whose heads settle at the end, all where not given; see linear_heads.py"},
    )
    report_min_count: int = field(default=40, metadata={"help": "words in fewer reports are no targets"})

    def __post_init__(self) -> None:
        check_ranges(
            self,
            {
                "at least 1": ("epochs", "batch_size", "crop_s", "max_steps", "evaluate_every", "report_min_count"),
                "at least 0": ("weight_decay", "full_every", "report_weight"),
                "above 0": ("learning_rate", "gradient_clip"),
                "from 0 to 1": ("lead_dropout", "noise", "soft_share"),
                "at least 0 and below 1": ("ema_decay",),
            },
        )
        check_choices(self, {"mixed_precision": ("no", "bf16")})


# ------------------------------------------------------------------------------------------------------------ pretrain


def pretrain(data: DataArguments, arguments: TrainingArguments) -> dict[str, float]:
    """Train backbone, fusion and all heads together. Returns the last validation metrics.

    Raises:
        FileNotFoundError: the model or its configuration is not there.
        ValueError: these arguments do not go together, or not with these data.
    """
    if arguments.model and arguments.model_config:
        raise ValueError("a model has its own configuration; pass --model or --model_config")
    folder = find_model(arguments.model) if arguments.model else None
    config = read_config(Path(arguments.model_config)) if arguments.model_config else EcgMoeConfig()
    make_folder(Path(arguments.output_dir), "--output_dir")
    accelerator = accelerator_for(arguments)
    if folder:
        model = EcgMoeForTasks.from_pretrained(folder, dtype=torch.float32)
        extractor = EcgMoeFeatureExtractor.from_pretrained(folder)
    else:
        model = EcgMoeForTasks(config)
        extractor = EcgMoeFeatureExtractor(sampling_rate=model.config.sampling_rate)
    return fit_on_splits(model, extractor, data, arguments, accelerator)


def read_config(file: Path) -> EcgMoeConfig:
    """The configuration with the fields that a JSON file changes.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it names a field that there is not, or a value that a field cannot have.
    """
    changes = read_json_object(file)
    if unknown := sorted(set(changes) - set(EcgMoeConfig.__annotations__)):
        raise ValueError(
            f"{file} holds {', '.join(unknown)}; the fields of EcgMoeConfig are "
            f"{', '.join(EcgMoeConfig.__annotations__)}"
        )
    try:
        return EcgMoeConfig(**changes)
    except (StrictDataclassError, ValueError) as error:
        raise ValueError(f"{file}: {error}; mend the file") from error


def fit_on_splits(
    model: Any,
    extractor: EcgMoeFeatureExtractor,
    data: DataArguments,
    arguments: TrainingArguments,
    accelerator: Accelerator,
) -> dict[str, float]:
    """Train a model on the training split, with the words of its reports where asked for."""
    model.tasks |= reweighted(model.tasks, parse_json_object(arguments.loss_weights, "loss_weights"))
    tasks = list(model.tasks.values())
    with accelerator.main_process_first():
        rows = load_split(data, "train")
        validation = Records(load_split(data, "validation"), extractor, tasks, data.num_proc)
        tell_unreadable(data, "test")
        if arguments.report_weight:
            rows, words = add_report_words(rows, arguments.report_weight, arguments.report_min_count)
            model.add_task(words)
            tasks.append(words)
        train = Records(rows, extractor, tasks, data.num_proc)
        truth = dict(train.labels)
        if arguments.soft_labels:
            soften(train, tasks, arguments.soft_labels, arguments.soft_share, arguments.hard_labels)
    if arguments.model is None:
        start_at_base_rates(model, train.labels)

    def finish(trained: Any) -> None:
        settle_all(trained, truth, train, validation, arguments.settle)

    return fit(model, extractor, train, validation, data, arguments, accelerator, finish)


def reweighted(tasks: dict[str, Task], weights: dict[str, float]) -> dict[str, Task]:
    """The tasks with other loss weights than they came with.

    Raises:
        ValueError: a weight is for a task that there is not, or is no weight.
    """
    unknown = sorted(set(weights) - set(tasks))
    if unknown:
        raise ValueError(f"loss_weights names {', '.join(unknown)}; this model has {', '.join(tasks)}")
    for name, weight in weights.items():
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not weight >= 0:
            raise ValueError(f"loss_weights must be numbers of at least 0, found {weight!r} for {name}")
    return {name: dataclasses.replace(tasks[name], loss_weight=float(weight)) for name, weight in weights.items()}


def fit(
    model: Any,
    extractor: EcgMoeFeatureExtractor,
    train: Records,
    validation: Records,
    data: DataArguments,
    arguments: TrainingArguments,
    accelerator: Accelerator,
    finish: Callable[[Any], None] | None = None,
) -> dict[str, float]:
    """The training loop, for any model that takes the extractor's features and `labels` and gives `loss`, `logits`.

    Args:
        finish: what is done to the trained model before it is saved.

    Raises:
        ValueError: the training split does not fill one batch.
    """
    output_dir = Path(arguments.output_dir)
    rate = extractor.sampling_rate
    if len(train) < arguments.batch_size * accelerator.num_processes:
        raise ValueError(
            f"{len(train)} training records do not fill a batch of {arguments.batch_size} in each of "
            f"{accelerator.num_processes} processes; lower --batch_size"
        )
    for name in set(model.tasks) - set(train.labels):
        model.heads[f"head_{name}"].requires_grad_(False)  # nothing teaches it
    loader = DataLoader(train, arguments.batch_size, shuffle=True, drop_last=True, collate_fn=as_is)
    optimizer = torch.optim.AdamW(_parameter_groups(model, arguments.weight_decay), lr=arguments.learning_rate)
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(arguments.ema_decay), use_buffers=True)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    averaged.to(accelerator.device)
    total = arguments.max_steps or arguments.epochs * len(loader)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, arguments.learning_rate, total_steps=total + 1, pct_start=0.15, div_factor=20, final_div_factor=200
    )
    accelerator.register_for_checkpointing(schedule, averaged)
    set_seed(arguments.seed, device_specific=True)  # every process disturbs its records in its own way
    # What a step means: an interrupted run goes on under the same.
    pace = {name: getattr(arguments, name) for name in ("epochs", "batch_size", "max_steps")}
    pace["processes"] = accelerator.num_processes
    step = resume_checkpoint(accelerator, output_dir, pace) if arguments.resume else 0
    metrics: dict[str, float] = {}
    samples = round(arguments.crop_s * rate)
    bar = tqdm(total=total, initial=step, disable=not accelerator.is_main_process, mininterval=10.0)
    while step < total:
        epoch, done = divmod(step, len(loader))
        loader.set_epoch(epoch) if hasattr(loader, "set_epoch") else None
        model.train()
        began, running = time.time(), []
        for batch in accelerator.skip_first_batches(loader, done) if done else loader:
            whole = arguments.full_every and step % arguments.full_every == 0
            signal = batch["signal"] if whole else crop(batch["signal"], samples, rate)
            signal = disturb(signal, rate, arguments.noise, arguments.lead_dropout)
            labels = _labels_of_crop(batch["labels"], signal)
            with accelerator.autocast():
                output = model(**signal, labels=labels)
            accelerator.backward(output.loss)
            accelerator.clip_grad_norm_(model.parameters(), arguments.gradient_clip)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            averaged.update_parameters(accelerator.unwrap_model(model))
            running.append(output.loss.detach())
            step += 1
            bar.update()
            if step >= total:
                break
        line: dict[str, Any] = {"step": step, "epoch": epoch + 1, "loss": torch.stack(running).mean().item()}
        line |= expert_shares(output.encoder)
        if (epoch + 1) % arguments.evaluate_every == 0 or step >= total:
            metrics = evaluate_quickly(averaged.module, validation, accelerator) if accelerator.is_main_process else {}
            line |= metrics
        line["seconds"] = round(time.time() - began, 1)
        write_log(accelerator, output_dir, line)
        save_checkpoint(accelerator, output_dir, step, pace)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        trained: Any = averaged.module
        if REPORT_WORDS in trained.tasks:
            trained.remove_task(REPORT_WORDS)
        if finish:
            finish(trained.eval())
            metrics = evaluate_quickly(trained, validation, accelerator)
            write_log(accelerator, output_dir, {"finished": True} | metrics)
        save_model(trained, extractor, output_dir / "model")
        save_arguments(output_dir / "model", data, arguments, processes=accelerator.num_processes)
    return metrics


def expert_shares(encoder: EcgMoeEncoderOutput | None) -> dict[str, list[float]]:
    """How much the routers give each expert of a path's last layer, on average over the real elements of a batch."""
    shares = {}
    for path, (state, mask) in (encoder.memories() if encoder is not None else {}).items():
        probs = getattr(encoder, f"{path}_router_probs", None)
        if probs and state is not None:
            shares[f"{path}_experts"] = [round(share, 3) for share in probs[-1][mask].mean(dim=0).tolist()]
    return shares


def save_model(model: Any, extractor: EcgMoeFeatureExtractor, folder: Path) -> None:
    """Write weights, configuration and preprocessing side by side."""
    model.eval()
    model.save_pretrained(folder)
    extractor.save_pretrained(folder)


def _labels_of_crop(labels: dict[str, Tensor], signal: dict[str, Tensor]) -> dict[str, Tensor]:
    """A task that starts from a measurement is asked for the measurement of the crop, where its label is trusted."""
    measured = {"rr_interval_ms": signal["period_s"][:, None] * 1000.0}
    out = {}
    for name, target in labels.items():
        prior = TASKS[name].prior if name in TASKS else ""
        if prior:
            target = torch.where(torch.isfinite(target) & (measured[prior] > 0), measured[prior], torch.nan)
        out[name] = target
    return out


def _parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices decay; biases, norms, the state space's dynamics, routers and their experts do not.

    Decay reaches every expert at each step, tokens only some: those that win less often starve under a strong one.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    spared = re.compile(r"log_|frequency|\.router\.|\.experts\.")
    plain = [p for name, p in named if p.ndim < 2 or spared.search(name)]
    kept = {id(p) for p in plain}
    return [
        {"params": [p for _, p in named if id(p) not in kept], "weight_decay": weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]


def accelerator_for(arguments: TrainingArguments) -> Accelerator:
    set_seed(arguments.seed)
    project = ProjectConfiguration(project_dir=arguments.output_dir)
    loading = DataLoaderConfiguration(use_seedable_sampler=True)  # the order of an epoch survives an interruption
    return Accelerator(mixed_precision=arguments.mixed_precision, project_config=project, dataloader_config=loading)


# ---------------------------------------------------------------------------------------------------------------- main


def main(argv: list[str]) -> None:
    """Run a command.

    Raises:
        FileNotFoundError, ValueError: it cannot be run as asked; the message says why in a line.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    commands: dict[str, tuple[Callable[..., Any], tuple[type, ...]]] = {
        "pretrain": (pretrain, (DataArguments, TrainingArguments)),
        "adapt": (adapt, (DataArguments, AdaptArguments)),
        "evaluate": (evaluate, (DataArguments, EvaluateArguments)),
    }
    usage = f"usage: train.py {{{','.join(commands)}}} [--help | CONFIG.json] [arguments]"
    if argv[:1] in (["--help"], ["-h"]):
        print(f"{usage}\n\n{__doc__}")
        return
    if not argv or argv[0] not in commands:
        raise ValueError(f"{f'unknown command {argv[0]!r}' if argv else 'no command'}; {usage}")
    run, kinds = commands[argv[0]]
    run(*parse_arguments(kinds, argv[1:], f"train.py {argv[0]}"))


if __name__ == "__main__":
    sys.exit(run_program(main, sys.argv[1:], "train.py"))
