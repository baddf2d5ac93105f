"""Teach a frozen model new questions: LoRA on the fusion and a head for each task, calibrated, with a card.

`train.py adapt` runs it, on a public data set or on a table of the user's own.
"""

import dataclasses
import logging
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from peft import PeftModel
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from arguments import check_choices, check_ranges, make_folder, read_json_object
from checkpoints import save_arguments, write_log
from data_builders.csv_table import place_of, read_table
from data_builders.label_column import find_kind, infer_task
from evaluation import find_model, point_metric, predict_logits
from linear_heads import embed, head_targets, settle, start_linearly, with_tasks_of_parts
from modeling_ecgmoe.adapter_card import AdapterCard, calibrate, calibrate_intervals
from modeling_ecgmoe.adapters import fingerprint
from modeling_ecgmoe.beats import mean_rr_error_ms
from modeling_ecgmoe.feature_extraction_ecgmoe import EcgMoeFeatureExtractor
from modeling_ecgmoe.leads import NUM_LIMB_LEADS, find_lead
from modeling_ecgmoe.lora import LORA_SCOPES, lora_model, save_adapter
from modeling_ecgmoe.metrics import MetricResult, bootstrap_interval, find_metric
from modeling_ecgmoe.modeling_ecgmoe import EcgMoeForTasks, task_loss
from modeling_ecgmoe.tasks import TASKS, Task, find_task
from records import (
    DataArguments,
    EncodedRecords,
    Records,
    as_is,
    disturb,
    load_split,
    mean_of_windows,
    tell_unreadable,
    with_fewer_leads,
)

logger = logging.getLogger("train")


@dataclass
class AdaptArguments:
    """How to adapt the model to tasks. `benchmarks/configs/adapt.json` holds what made the published adapters."""

    task: list[str] = field(
        default_factory=list,
        metadata={"help": f"tasks: {', '.join(TASKS)}, JSON files of new ones, or with --csv new names"},
    )
    label_column: str | None = field(
        default=None, metadata={"help": "the column of --csv with the labels, the task's name where not given"}
    )
    kind: str | None = field(
        default=None,
        metadata={"help": "regression, binary, multi_class, multi_label (labels joined by ;), if not plain"},
    )
    unit: str = field(default="", metadata={"help": "unit of a new regression"})
    description: str = field(default="", metadata={"help": "one line about a new task, for cards and menus"})
    model: str | None = field(
        default=None,
        metadata={"help": "what to adapt, a folder or an id on the Hub; hub/model of the sources otherwise"},
    )
    output_dir: str = field(
        default="runs/adapters", metadata={"help": "each adapter goes to a folder of its name in here"}
    )
    epochs: int = field(default=3, metadata={"help": "passes over the training split"})
    min_steps: int = field(default=200, metadata={"help": "small training splits are passed until so many steps"})
    batch_size: int = field(default=128, metadata={"help": "records a step and process"})
    learning_rate: float = field(default=3e-4, metadata={"help": "highest learning rate of the cosine schedule"})
    weight_decay: float = field(default=0.01, metadata={"help": "AdamW's decay"})
    lora_rank: int = field(default=8, metadata={"help": "rank of LoRA"})
    lora_alpha: int = field(default=16, metadata={"help": "scale of LoRA"})
    lora_dropout: float = field(default=0.1, metadata={"help": "dropout on LoRA's input"})
    lora_scope: str = field(
        default="fusion", metadata={"help": "fusion, or all: the backbone too, at one pass a task"}
    )
    settle: bool = field(default=True, metadata={"help": "whether the head settles at the end, see linear_heads.py"})
    views: int = field(default=2, metadata={"help": "encodings of each record: as it is, and disturbed"})
    level: float = field(default=0.9, metadata={"help": "coverage of the intervals of regressions"})
    trained_on: str = field(default="", metadata={"help": "the data, for the card; found out where not given"})
    evidence: str = field(default="measured", metadata={"help": "measured, or simulated where the ECGs are"})
    mixed_precision: str = field(default="no", metadata={"help": "no or bf16"})
    seed: int = field(default=0, metadata={"help": "seed"})
    max_steps: int | None = field(default=None, metadata={"help": "stop after so many steps (smoke runs)"})

    def __post_init__(self) -> None:
        check_ranges(
            self,
            {
                "at least 1": ("epochs", "batch_size", "lora_rank", "views", "max_steps"),
                "at least 0": ("min_steps", "weight_decay"),
                "above 0": ("learning_rate", "lora_alpha"),
                "between 0 and 1": ("level",),
                "at least 0 and below 1": ("lora_dropout",),
            },
        )
        scopes, evidence = tuple(LORA_SCOPES), ("measured", "simulated")
        check_choices(self, {"lora_scope": scopes, "evidence": evidence, "mixed_precision": ("no", "bf16")})
        self.kind = self.kind and find_kind(self.kind)


def adapt(data: DataArguments, arguments: AdaptArguments) -> dict[str, MetricResult]:
    """Train one adapter for each task; what the backbone makes of the recordings is computed once for all of them.

    Raises:
        FileNotFoundError: there is no such model, table or task file.
        ValueError: a task is unknown, or cannot be learned or evaluated with these data.
    """
    if not arguments.task:
        raise ValueError(f"name the tasks to adapt to: --task {' '.join(TASKS)}, or a task's JSON file")
    known = {name: find_known_task(name, data, arguments) for name in arguments.task}
    source = find_model(arguments.model)
    make_folder(Path(arguments.output_dir), "--output_dir")
    set_seed(arguments.seed)
    accelerator = Accelerator(mixed_precision=arguments.mixed_precision)
    model = EcgMoeForTasks.from_pretrained(source, dtype=torch.float32)
    extractor = EcgMoeFeatureExtractor.from_pretrained(source)
    with accelerator.main_process_first():
        rows = {split: load_split(data, split) for split in ("train", "validation")}
        tell_unreadable(data, "test")
        tasks = [task or task_of_column(name, data, arguments, rows["train"]) for name, task in known.items()]
        records = {s: Records(rows[s], extractor, with_tasks_of_parts(tasks), data.num_proc) for s in rows}
        seen = {typical_leads(records["validation"]): records["validation"]}
        for count, leads in FEWER_LEADS.items() if any(t.kind == "regression" for t in tasks) else ():
            having = with_leads(rows["validation"], leads) if count < min(seen) else None
            if having:
                seen[count] = Records(having, extractor, tasks, data.num_proc, leads)
    for task in tasks:
        check_labels(task, data, records)
    fewer = with_fewer_leads(records["train"])
    train: Records | EncodedRecords = records["train"]
    fewer_leads: Records | EncodedRecords = fewer
    validation: dict[int, Records | EncodedRecords] = dict(seen)
    if arguments.lora_scope == "fusion":
        train = EncodedRecords(model, records["train"], accelerator.device, arguments.views)
        if arguments.settle:
            fewer_leads = EncodedRecords(model, fewer, accelerator.device)
        validation = {n: EncodedRecords(model, r, accelerator.device) for n, r in seen.items()}
    errors = {count: prior_errors_of(seen_with) for count, seen_with in seen.items()}
    results = {}
    for task in tasks:
        fresh = EcgMoeForTasks.from_pretrained(source, dtype=torch.float32)
        is_new = task.name not in fresh.tasks or not fresh.tasks[task.name].reads_like(task)
        own = fresh.tasks.get(task.name)
        if is_new and (task.parts or (own is not None and own.reads_like(task.plain()))):
            task = task.plain()  # outputs of parts have nothing to start from; a head that is there is worth more
            is_new = task.name not in fresh.tasks or not fresh.tasks[task.name].reads_like(task)
        if is_new:
            fresh.add_task(task)
        if is_new or task.prior:
            start_linearly(fresh.to(accelerator.device), task, train, arguments.seed)
        wrapped = lora_model(
            fresh, task, arguments.lora_rank, arguments.lora_alpha, arguments.lora_dropout, arguments.lora_scope
        )
        fit_adapter(wrapped, task, train, validation[max(validation)], arguments, accelerator, fewer_leads)
        if accelerator.is_main_process:
            wrapped.eval()
            trained_on = arguments.trained_on or describe_data(task, data, records)
            card = AdapterCard(task, fingerprint(model), arguments.evidence, trained_on, level=arguments.level)
            patients = records["validation"].patient_ids
            results[task.name] = calibrate_on(wrapped, card, validation, errors, patients, accelerator.device)
            folder = Path(arguments.output_dir) / task.name
            save_adapter(wrapped, card, folder)
            # A task of the user's own is a file on this machine; its name is enough, the card holds the rest.
            save_arguments(folder, data, dataclasses.replace(arguments, task=[t.name for t in tasks]))
            write_log(accelerator, Path(arguments.output_dir), {"task": task.name} | card.metrics)
    accelerator.wait_for_everyone()
    return results


# ---------------------------------------------------------------------------------------------------------------- data


def find_known_task(name: str, data: DataArguments, arguments: AdaptArguments) -> Task | None:
    """A task of a JSON file or of the task table; None where a column of the user's table says what it is about.

    Raises:
        FileNotFoundError: there is no such task file or table.
        ValueError: there is no such task or column, or the arguments do not go together.
    """
    if arguments.label_column and (not data.csv or len(arguments.task) > 1):
        raise ValueError("--label_column names the labels of one --task in a --csv; leave it out")
    task = None
    if name.endswith(".json"):
        task = Task.from_dict(read_json_object(Path(name)))
    elif name in TASKS or not data.csv:
        task = find_task(name)
    if task and arguments.kind not in (None, task.kind):
        raise ValueError(f"task {task.name} is a {task.kind}, and --kind says {arguments.kind}; leave --kind out")
    column = arguments.label_column or (task.column if task else name)
    if data.csv:
        read_table(Path(data.csv), {"label_column": column})
    if task is None:
        Task(name, "regression", name, column)  # whatever its kind, a name that does not do is refused
        return None
    return dataclasses.replace(task, column=column)


def task_of_column(name: str, data: DataArguments, arguments: AdaptArguments, train: datasets.Dataset) -> Task:
    """The task that a column of the user's table is about."""
    column = arguments.label_column or name
    texts = [cells[column] for cells in train["table"][:]]
    table = read_table(Path(data.csv), {"path_column": data.path_column})
    places = [place_of(row[data.path_column], number) for number, row in enumerate(table)]
    every = [row[column] for row in table]
    return infer_task(name, column, texts, every, places, arguments.kind, arguments.unit, arguments.description)


FAR = 3.8  # spreads from the centre of a known task: half of the labels there, and they are of another unit


def check_labels(task: Task, data: DataArguments, records: dict[str, Records]) -> None:
    """Refuse a task before it is trained rather than after.

    Raises:
        ValueError: the data have no such column, or a split no label, or not two different ones, or a known task's
            numbers are of another unit.
    """
    for split, split_records in records.items():
        if task.name not in split_records.labels:
            source = Path(data.csv).name if data.csv else data.dataset
            raise ValueError(f"task {task.name} reads the column {task.column!r}, which {source} does not have")
        targets = split_records.labels[task.name].numpy()
        known = np.isfinite(targets).all(axis=1)
        both = any(len(np.unique(column[np.isfinite(column)])) > 1 for column in targets.T)
        if not known.any() or (task.labels and not both):
            found = "no label" if not known.any() else "no label that some recordings have and others lack"
            raise ValueError(
                f"task {task.name}: the {split} split has {found} in its {len(targets)} recordings, so nothing can be "
                "learned or evaluated there; add recordings, or name other splits (--split_column)"
            )
        middle = float(np.median(targets[known, 0]))
        if task.name in TASKS and task.kind == "regression" and abs(middle - task.center) > FAR * task.spread:
            raise ValueError(
                f"task {task.name} is in {task.unit}, around {task.center:g}; half of the {split} split's labels are "
                f"below {middle:g}. Convert them to {task.unit}, or give a task of your own another name"
            )
        logger.info("task %s, %s: %s", task.name, split, spread_of(task, targets[known]))
        if not known.all():
            logger.info(
                "task %s, %s: %d of %d recordings have no label and do not count",
                task.name, split, int((~known).sum()), len(known),
            )  # fmt: skip


def spread_of(task: Task, targets: np.ndarray) -> str:
    """What there is to learn from, in words: of labels how many recordings have each, so that slips are seen early.

    Args:
        targets: (records, outputs), none unknown.
    """
    if task.kind == "regression":
        low, middle, high = np.percentile(targets[:, 0], [0, 50, 100])
        return f"{low:g} to {high:g} {task.unit}".rstrip() + f", half of them below {middle:g}"
    counts = targets.sum(axis=0)
    if task.kind == "binary":
        counts = np.array([len(targets) - counts[0], counts[0]])
    return ", ".join(f"{label} {round(float(count))}" for label, count in zip(task.labels, counts, strict=True))


def describe_data(task: Task, data: DataArguments, records: dict[str, Records]) -> str:
    """What an adapter was trained on, for its card."""
    if not data.csv:
        configuration = data.config_name or "its first configuration"
        known = {"ptb_xl": "PTB-XL 1.0.3, folds 1-8, " + (data.config_name or "100hz").replace("hz", " Hz")}
        return known.get(data.dataset, f"{data.dataset}, {configuration}, training split")
    parts = []
    for split, split_records in records.items():
        labelled = int(torch.isfinite(split_records.labels[task.name]).all(dim=1).sum())
        patients = f" of {len(set(split_records.patient_ids))} patients" if data.patient_column else ""
        parts.append(f"{split} {labelled} labelled recordings{patients}")
    how = "split by a column of the table" if data.split_column else "split by patient"
    if not data.patient_column:
        how = how if data.split_column else "split by recording"
        how += "; the table names no patients, so one may be in two splits and the results may be too good"
    return f"{Path(data.csv).name} ({', '.join(parts)}; {how})"


# The leads behind an interval for so many known leads: a single one, and two that give all six limb leads.
FEWER_LEADS: dict[int, tuple[str, ...]] = {NUM_LIMB_LEADS: ("I", "II"), 1: ("I",)}


def typical_leads(records: Records) -> int:
    """How many leads most recordings have, those that can be derived included."""
    return int(records.signal["lead_mask"].sum(dim=1).median())


def with_leads(rows: datasets.Dataset, leads: tuple[str, ...]) -> datasets.Dataset | None:
    """The rows that have all of some leads; None where there is none."""
    names = rows.with_format(None)["lead_names"][:]
    having = [i for i, found in enumerate(names) if set(leads) <= {find_lead(name) for name in found}]
    return rows.select(having) if having else None


# ------------------------------------------------------------------------------------------------------------ training


def fit_adapter(
    model: PeftModel,
    task: Task,
    train: Records | EncodedRecords,
    validation: Records | EncodedRecords,
    arguments: AdaptArguments,
    accelerator: Accelerator,
    fewer_leads: Records | EncodedRecords | None = None,
) -> None:
    """Train LoRA and head of one task in place, and keep the epoch of the best metric on validation, of equals that of
    the lowest loss; none may be the best. Then the head settles. The backbone stays as it is, with its batch
    statistics.

    Args:
        fewer_leads: the training records with fewer leads, on which the head settles too, *optional*.
    """
    # A last batch is left out only where whole ones remain for every process.
    drop_last = len(train) >= arguments.batch_size * accelerator.num_processes
    loader = DataLoader(train, arguments.batch_size, shuffle=True, drop_last=drop_last, collate_fn=as_is)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=arguments.learning_rate, weight_decay=arguments.weight_decay)
    prepared, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    total = arguments.max_steps or max(arguments.epochs * len(loader), arguments.min_steps)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total)
    bar = tqdm(total=total, desc=task.name, disable=not accelerator.is_main_process, mininterval=10.0)
    targets = validation.labels[task.name].numpy()

    def measure() -> tuple[tuple[float, float], dict[str, Tensor]]:
        logits = predict_logits(model, validation, accelerator.device, [task.name])[task.name]
        loss = task_loss(task, torch.from_numpy(logits), torch.from_numpy(targets))
        value = sign * point_metric(task, targets, logits), -float(loss)
        return value, {name: p.detach().clone() for name, p in trained.items()}

    rate = accelerator.unwrap_model(prepared).base_model.model.config.sampling_rate
    step, sign = 0, 1.0 if find_metric(task.metric).higher_is_better else -1.0
    best = measure()
    course = [sign * best[0][0]]
    while step < total:
        for batch in loader:
            prepared.train()
            accelerator.unwrap_model(prepared).base_model.model.ecgmoe.encoder.eval()
            inputs = {"encoder_output": batch["encoded"]} if "encoded" in batch else disturb(batch["signal"], rate)
            with accelerator.autocast():
                output = prepared(**inputs, labels={task.name: batch["labels"][task.name]}, tasks=[task.name])
            accelerator.backward(output.loss)
            accelerator.clip_grad_norm_(trained.values(), 2.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            step += 1
            bar.update()
            if step >= total:
                break
        now = measure()
        course.append(sign * now[0][0])
        if not best[0] > now[0]:
            best = now
    with torch.no_grad():
        for name, p in trained.items():
            p.copy_(best[1][name])
    logger.info("%s: %s on validation by epoch %s", task.name, task.metric, [round(value, 4) for value in course])
    accelerator.free_memory()
    if arguments.settle:
        adapted: EcgMoeForTasks = model.base_model.model
        head = adapted.get_submodule(f"heads.head_{task.name}.modules_to_save.{task.name}")
        views = [embed(adapted, records) for records in (train, fewer_leads) if records is not None]
        settle(head, task, views, head_targets(task, train.labels), embed(adapted, validation), targets)


def prior_errors_of(records: Records) -> np.ndarray:
    """(records,) the error in ms to expect of each one's mean RR interval, the mean of its windows with intervals."""
    errors_ms = [[mean_rr_error_ms(intervals)] for intervals in records.signal["rr_intervals_s"].numpy()]
    return mean_of_windows(torch.tensor(errors_ms), records.record_of, records.has_rr)[:, 0].numpy()


def calibrate_on(
    model: PeftModel,
    card: AdapterCard,
    validation: dict[int, Records | EncodedRecords],
    prior_errors: dict[int, np.ndarray],
    patients: list[str],
    device: torch.device,
) -> MetricResult:
    """Fit the card's temperature, thresholds or intervals on validation records, and note the main metric there.

    Args:
        validation: number of leads to the records as seen with so many; the most are all that they have.
        prior_errors: number of leads to what `prior_errors_of` says of these records.
        patients: of each record, for the interval of the metric.
    """
    task, most = card.task, max(validation)
    for count, records in validation.items():
        logits = predict_logits(model, records, device, [task.name])[task.name]
        targets = records.labels[task.name].numpy()
        if count == most:
            calibrate(card, logits, targets, count, prior_errors[count])
            answers = card.probabilities(logits) if task.labels else task.answers(logits)
            results = {name: bootstrap_interval(name, targets, answers, groups=patients) for name in task.metrics}
        elif task.kind == "regression":
            known = np.isfinite(targets)
            if not known.any():
                continue
            errors = prior_errors[count][known[:, 0]]
            calibrate_intervals(card, task.answers(logits)[known], targets[known], count, errors)
    for name, result in results.items():
        prefix = "" if name == task.metric else f"{name}_"
        card.metrics |= {
            f"validation_{name}": round(result.value, 4),
            f"{prefix}low": round(result.low, 4),
            f"{prefix}high": round(result.high, 4),
        }
    return results[task.metric]
