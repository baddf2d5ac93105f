"""How far few labels go: LoRA on the frozen model, a linear probe on its embedding, a plain CNN from scratch.

    python -m benchmarks.few_labels --data_dir ptb-xl --mitdb mitdb --cinc2017 training2017

Two files are written. `few_labels.json` has questions whose labels the model never saw; the column "related labels
seen" says what it saw that comes near. Two columns of PTB-XL that look held out are not, and are left out: `pacemaker`
repeats the statement PACE, and the infarction stage repeats ABQRS and QWAVE, which the model was trained on.
`few_labels_seen.json` has tasks of the pretraining with a share of their labels. There the model has seen all labels
of these very records before, so it shows how many labels an adapter needs and is no fair comparison with the CNN.

All three learners get the same records. A fifth of them is set aside to choose the best of the epochs; the probe's
penalty is chosen within the others. Adapter and CNN train for the same number of steps. Fold 9 is looked at once, at
the end.
"""

import copy
import json
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import datasets
import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from sklearn.model_selection import GroupKFold
from torch import nn
from torch.utils.data import DataLoader
from transformers import HfArgumentParser

from adaptation import AdaptArguments, fit_adapter
from benchmarks.plain_cnn import PlainCnn
from benchmarks.quality import origin
from evaluation import point_metric, predict_logits
from linear_heads import embed, fit_linear_head, head_targets, settle, start_at_base_rates, start_linearly
from modeling_ecgmoe.feature_extraction_ecgmoe import EcgMoeFeatureExtractor
from modeling_ecgmoe.lora import lora_model
from modeling_ecgmoe.metrics import bootstrap_difference, bootstrap_interval, find_metric
from modeling_ecgmoe.modeling_ecgmoe import EcgMoeForTasks
from modeling_ecgmoe.tasks import TASKS, Task
from records import DataArguments, EncodedRecords, Records, as_is, crop, disturb, load_split

logger = logging.getLogger(__name__)

CPU = torch.device("cpu")
SEEN = ("age", "sex", "superclass", "arrhythmia")  # drawn by the first: as they come, where an age is known
ADAPTER, PROBE, CNN, CONSTANT = "LoRA adapter", "linear probe", "plain CNN", "median"
AXES = {"MID": "normal", "LAD": "left", "ALAD": "left", "RAD": "right", "ARAD": "right"}
INNER_SHARE = 0.2  # of the few records, to choose on


class HeldOut(NamedTuple):
    """A question that the model was not trained on; `read` makes its label of what the column holds, or None."""

    task: Task
    read: Callable[[Any], Any]
    related: str


HEART_AXIS = HeldOut(
    Task("heart_axis", "multi_class", "the heart's electrical axis", "heart_axis", ("normal", "left", "right")),
    AXES.get,
    "LAFB, LPFB",
)
# A few entries of PTB-XL are slips: 6 cm, 5 kg.
BODY_WEIGHT = HeldOut(
    Task("body_weight", "regression", "body weight", "weight_kg", unit="kg", center=71.0, spread=16.0),
    lambda kg: kg if kg is not None and kg >= 30.0 else None,
    "age, sex",
)
BODY_HEIGHT = HeldOut(
    Task("body_height", "regression", "body height", "height_cm", unit="cm", center=167.0, spread=10.0),
    lambda cm: cm if cm is not None and cm >= 120.0 else None,
    "age, sex",
)
VENTRICULAR_BEAT = HeldOut(
    Task("ventricular_beat", "binary", "a ventricular beat within 10 s", "beat_classes", ("none", "ventricular")),
    lambda classes: "ventricular" if "V" in classes else "none",
    "PVC, of PTB-XL",
)
FIBRILLATION = HeldOut(
    Task("atrial_fibrillation", "binary", "normal or fibrillation", "label_name", ("normal", "atrial fibrillation")),
    lambda name: name if name in ("normal", "atrial fibrillation") else None,
    "AFIB, of PTB-XL",
)


@dataclass
class FewLabelsArguments:
    """What to compare, on how many labels."""

    model: str = field(default="hub/model", metadata={"help": "the model to adapt, a folder or an id on the Hub"})
    mitdb: str = field(default="", metadata={"help": "folder of MIT-BIH, left out where not given"})
    cinc2017: str = field(default="", metadata={"help": "folder of CinC 2017, left out where not given"})
    counts: list[int] = field(default_factory=lambda: [30, 100, 300], metadata={"help": "labels of a held-out task"})
    shares: list[float] = field(
        default_factory=lambda: [0.01, 0.03, 0.1], metadata={"help": "shares of the training split, of seen tasks"}
    )
    draws: int = field(default=3, metadata={"help": "random subsets of each size on PTB-XL"})
    folds: int = field(default=5, metadata={"help": "of the cross-validation by patient on the other sets"})
    windows: int = field(default=100, metadata={"help": "labelled windows of MIT-BIH in each fold"})
    batch_size: int = field(default=32, metadata={"help": "records a step, of adapter and CNN"})
    epochs: int = field(default=20, metadata={"help": "passes over the few records, within the two bounds below"})
    min_steps: int = field(default=80, metadata={"help": "fewest steps"})
    max_steps: int = field(default=300, metadata={"help": "most steps"})
    resamples: int = field(default=1000, metadata={"help": "bootstrap resamples"})
    seed: int = field(default=0, metadata={"help": "of the first draw"})
    out: Path = field(default=Path("benchmarks/results/few_labels.json"), metadata={"help": "result file"})

    def steps(self, count: int) -> int:
        """How long adapter and CNN train on `count` records."""
        return int(np.clip(math.ceil(self.epochs * count / self.batch_size), self.min_steps, self.max_steps))


# ---------------------------------------------------------------------------------------------------------------- data

AnyRecords = TypeVar("AnyRecords", Records, EncodedRecords)


def part_of(records: AnyRecords, index: np.ndarray) -> AnyRecords:
    """Some of the records, as a data set of its own; what is held of their signals is copied.

    Args:
        index: (n,) of the records, each once; the part has them in rising order.
    """
    chosen = torch.from_numpy(np.sort(np.asarray(index, dtype=np.int64)))
    windows = torch.isin(records.record_of, chosen)
    part = copy.copy(records)
    part.record_of = torch.searchsorted(chosen, records.record_of[windows])
    part.labels = {name: values[chosen] for name, values in records.labels.items()}
    for name in ("signal", "encoded"):
        if hasattr(records, name):
            setattr(part, name, {key: value[windows] for key, value in getattr(records, name).items()})
    for name in ("record_ids", "patient_ids"):
        if hasattr(records, name):
            setattr(part, name, [getattr(records, name)[i] for i in chosen])
    return part


def add_labels(records: Records, rows: datasets.Dataset, held_out: HeldOut) -> None:
    """Give records the labels of a task that no builder offers as they are."""
    plain = rows.with_format(None)
    known = dict(zip(plain["record_id"][:], plain[held_out.task.column][:], strict=True))
    values = [held_out.read(known[name]) for name in records.record_ids]
    records.labels[held_out.task.name] = torch.from_numpy(held_out.task.targets(values))


class Material(NamedTuple):
    """Records, and what the frozen model makes of them; `embedding` is (records, record_size)."""

    records: Records
    encoded: EncodedRecords
    embedding: np.ndarray

    def part(self, index: np.ndarray) -> "Material":
        """Some of the records."""
        return Material(
            part_of(self.records, index), part_of(self.encoded, index), self.embedding[np.sort(np.asarray(index))]
        )


def encode(model: EcgMoeForTasks, records: Records) -> Material:
    """Run the backbone once."""
    encoded = EncodedRecords(model, records, CPU)
    return Material(records, encoded, embed(model, encoded))


def draw(
    records: Records, task: Task, count: int | None, rng: np.random.Generator, within: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """A random subset: the records to fit, and a fifth of them to choose on.

    Of exclusive classes each gives as many records as the others; of several labels or a value, records are drawn as
    they come. No patient is drawn twice unless `within` says where to draw.

    Args:
        count: how many, all where not given.
        within: (n,) the records to draw from, *optional*.
    """
    targets = records.labels[task.name].numpy()
    order = rng.permutation(np.arange(len(targets)) if within is None else within)
    order = order[np.isfinite(targets[order]).any(axis=1)]
    if within is None:
        first = np.unique(np.array(records.patient_ids)[order], return_index=True)[1]
        order = order[np.sort(first)]
    groups = [order]
    if task.kind in ("binary", "multi_class"):
        classes = np.concatenate([1 - targets, targets], axis=1) if task.kind == "binary" else targets
        groups = [order[column[order] == 1] for column in classes.T]
    if count is not None:
        groups = [group[: max(2, count // len(groups))] for group in groups]
    cuts = [math.ceil(INNER_SHARE * len(group)) for group in groups]
    fit, inner = (
        np.concatenate([group[part(cut)] for group, cut in zip(groups, cuts, strict=True)])
        for part in (lambda cut: slice(cut, None), lambda cut: slice(0, cut))
    )
    if not len(fit):
        raise ValueError(f"task {task.name}: {len(inner)} labelled records are too few; 2 of each class are needed")
    return fit, inner


# ------------------------------------------------------------------------------------------------------------ learners


class Few(NamedTuple):
    """What a learner gets: records to fit, records to choose on, records to answer, and the seed."""

    fit: Material
    inner: Material
    test: Material
    seed: int


def adapter_answers(model: EcgMoeForTasks, task: Task, few: Few, arguments: FewLabelsArguments) -> np.ndarray:
    """A LoRA adapter with a head of its own, which starts anew even where the model has one; answers of the test
    records."""
    set_seed(few.seed)
    fresh = copy.deepcopy(model)
    fresh.add_task(task)
    start_linearly(fresh, task, few.fit.encoded, few.seed)
    how = AdaptArguments(
        batch_size=arguments.batch_size, learning_rate=3e-4, max_steps=arguments.steps(len(few.fit.records.record_ids))
    )
    wrapped = lora_model(fresh, task, how.lora_rank, how.lora_alpha, how.lora_dropout)
    fit_adapter(wrapped, task, few.fit.encoded, few.inner.encoded, how, Accelerator())
    return task.answers(predict_logits(wrapped, few.test.encoded, CPU, [task.name])[task.name])


def probe_answers(task: Task, few: Few) -> np.ndarray:
    """The best linear model on the embedding, where adapters start; answers of the test records."""
    head = fit_linear_head(task, few.fit.embedding, few.fit.records.labels[task.name].numpy(), few.seed)
    return task.answers(head.logits(few.test.embedding))


def plain_cnn(tasks: Sequence[Task]) -> PlainCnn:
    """The plain CNN with new weights and heads for these tasks."""
    cnn = PlainCnn()
    width = next(head.in_features for head in cnn.heads.values() if isinstance(head, nn.Linear))
    cnn.tasks = {task.name: task for task in tasks}
    cnn.heads = nn.ModuleDict({f"head_{task.name}": nn.Linear(width, task.head_size) for task in tasks})
    return cnn


def cnn_answers(
    tasks: Sequence[Task], few: Few, arguments: FewLabelsArguments, sampling_rate: int
) -> dict[str, np.ndarray]:
    """The plain CNN from scratch, on all tasks at once; task to answers of the test records.

    The inner records are asked ten times on the way, and each task is answered by the weights that were best for it.
    """
    set_seed(few.seed)
    length = round(5.12 * sampling_rate)
    cnn, total = plain_cnn(tasks), arguments.steps(len(few.fit.records.record_ids))
    start_at_base_rates(cnn, {task.name: few.fit.records.labels[task.name] for task in tasks})
    size = min(arguments.batch_size, len(few.fit.records))
    loader = DataLoader(few.fit.records, size, shuffle=True, drop_last=True, collate_fn=as_is)
    optimizer = torch.optim.AdamW(cnn.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=total + 1, pct_start=0.15)
    best: dict[str, tuple[float, int]] = {}
    weights: dict[int, dict[str, torch.Tensor]] = {}
    step = 0
    while step < total:
        for batch in loader:
            cnn.train()
            # The training of the published CNN: stretches of 5.12 s, every eighth step whole recordings.
            signal = batch["signal"] if step % 8 == 0 else crop(batch["signal"], length, sampling_rate)
            output = cnn(**disturb(signal, sampling_rate, noise=0.1, lead_dropout=0.25), labels=batch["labels"])
            output.loss.backward()
            nn.utils.clip_grad_norm_(cnn.parameters(), 2.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            step += 1
            if step % max(1, total // 10) == 0 or step == total:
                inner = predict_logits(cnn, few.inner.records, CPU)
                for task in tasks:
                    sign = 1.0 if find_metric(task.metric).higher_is_better else -1.0
                    labels = few.inner.records.labels[task.name].numpy()
                    value = sign * point_metric(task, labels, inner[task.name])
                    if task.name not in best or not best[task.name][0] > value:  # of two equals the later
                        best[task.name] = (value, step)
                weights[step] = {name: value.clone() for name, value in cnn.state_dict().items()}
            if step == total:
                break
    answers: dict[str, np.ndarray] = {}
    for chosen in sorted({at for _, at in best.values()}):
        cnn.load_state_dict(weights[chosen])
        answered = [task for task in tasks if best[task.name][1] == chosen]
        views, held_out = [embed(cnn, few.fit.records)], embed(cnn, few.inner.records)
        for task in answered:  # as the adapters do
            targets, labels = (head_targets(task, part.records.labels) for part in (few.fit, few.inner))
            settle(cnn.heads[f"head_{task.name}"], task, views, targets, held_out, labels)
        logits = predict_logits(cnn, few.test.records, CPU)
        answers |= {task.name: task.answers(logits[task.name]) for task in answered}
    return answers


# ---------------------------------------------------------------------------------------------------------- comparison

Answers = dict[str, list[np.ndarray]]  # learner to the answers of each draw, (records, outputs)


def add_answers(
    into: dict[str, Answers], tasks: Sequence[Task], few: Few, model: EcgMoeForTasks, arguments: FewLabelsArguments
) -> None:
    """Let all learners learn from these few records, and append what they answer."""
    of_cnn = cnn_answers(tasks, few, arguments, model.config.sampling_rate)
    for task in tasks:
        answers = into.setdefault(task.name, {})
        answers.setdefault(ADAPTER, []).append(adapter_answers(model, task, few, arguments))
        answers.setdefault(PROBE, []).append(probe_answers(task, few))
        answers.setdefault(CNN, []).append(of_cnn[task.name])
        if task.kind == "regression":
            median = np.nanmedian(few.fit.records.labels[task.name].numpy())
            answers.setdefault(CONSTANT, []).append(np.full_like(of_cnn[task.name], median))


def row_of(facts: dict[str, Any], task: Task, answers: Answers, test: Records, resamples: int) -> dict[str, Any]:
    """A row: the metrics of each learner, and how much the adapter is above the CNN, with intervals over patients.

    The draws stand side by side as if they were labels, so that each value is their mean and each interval that of the
    mean; the values of the draws stay beside them.
    """
    draws = len(answers[ADAPTER])
    targets = np.tile(test.labels[task.name].numpy(), (1, draws))
    joined = {name: np.hstack(parts) for name, parts in answers.items()}
    how: dict[str, Any] = {"resamples": resamples, "groups": test.patient_ids}
    row: dict[str, Any] = {"task": task.name.replace("_", " "), **facts}
    for name, values in joined.items():
        result = bootstrap_interval(task.metric, targets, values, **how)
        each = [value for value in result.per_label if value is not None]
        row[name] = short(result.to_dict(), task)
        row[name]["draws"] = np.array(each).reshape(draws, -1).mean(axis=1).tolist()
    difference = bootstrap_difference(task.metric, targets, joined[CNN], joined[ADAPTER], **how)
    row["adapter minus CNN"] = short(difference.to_dict(), task)
    print({name: round(v["value"], 4) if isinstance(v, dict) else v for name, v in row.items()}, flush=True)
    return row


def short(values: dict[str, Any], task: Task) -> dict[str, Any]:
    """A metric without its labels, with the task's unit."""
    kept = {name: value for name, value in values.items() if name not in ("per_label", "labels_left_out")}
    return kept | ({"unit": task.unit} if task.unit else {})


class Trial(NamedTuple):
    """Tasks that are learned from the same draws of `size` records, and what the row says of them."""

    tasks: Sequence[Task]
    size: int
    facts: dict[str, Any]


def rows_of_draws(
    model: EcgMoeForTasks, pool: Records, asked: Material, trials: Sequence[Trial], arguments: FewLabelsArguments
) -> list[dict[str, Any]]:
    """Several draws from the training split for each trial, measured on `asked` where an answer is known."""
    drawn = []
    for trial in trials:
        rngs = [np.random.default_rng([arguments.seed + n, trial.size]) for n in range(arguments.draws)]
        drawn.append([draw(pool, trial.tasks[0], trial.size, rng) for rng in rngs])
    used = np.unique(np.concatenate([index for pairs in drawn for pair in pairs for index in pair]))
    material, rows = encode(model, part_of(pool, used)), []
    for trial, pairs in zip(trials, drawn, strict=True):
        labels = np.hstack([asked.records.labels[task.name].numpy() for task in trial.tasks])
        test = asked.part(np.flatnonzero(np.isfinite(labels).any(axis=1)))
        answers: dict[str, Answers] = {}
        for number, pair in enumerate(pairs):
            fit, inner = (material.part(np.searchsorted(used, index)) for index in pair)
            add_answers(answers, trial.tasks, Few(fit, inner, test, arguments.seed + number), model, arguments)
        for task in trial.tasks:
            facts = trial.facts | {"labelled records": trial.size}
            rows.append(row_of(facts, task, answers[task.name], test.records, arguments.resamples))
    return rows


def cross_validated_row(
    model: EcgMoeForTasks, records: Records, question: HeldOut, count: int | None, arguments: FewLabelsArguments
) -> dict[str, Any]:
    """Another set: each patient is answered by what was learned from others; the answers of all folds are pooled."""
    task = question.task
    known = np.flatnonzero(np.isfinite(records.labels[task.name].numpy()).all(axis=1))
    everything = encode(model, part_of(records, known))
    labelled = everything.records
    answers: Answers = {}
    sizes = []
    folds = GroupKFold(arguments.folds, shuffle=True, random_state=arguments.seed)
    for number, (rest, asked) in enumerate(folds.split(known, groups=labelled.patient_ids)):
        rng = np.random.default_rng([arguments.seed, number])
        fit, inner = draw(labelled, task, count, rng, within=rest)
        sizes.append(len(fit) + len(inner))
        few = Few(everything.part(fit), everything.part(inner), everything.part(asked), arguments.seed + number)
        of_fold: dict[str, Answers] = {}
        add_answers(of_fold, [task], few, model, arguments)
        for name, parts in of_fold[task.name].items():
            whole = answers.setdefault(name, [np.full((len(known), task.num_outputs), np.nan)])[0]
            whole[asked] = parts[0]
    facts = {"related labels seen": question.related, "labelled records": max(sizes)}
    return row_of(facts, task, answers, labelled, arguments.resamples)


# ---------------------------------------------------------------------------------------------------------------- main


def main() -> None:
    """Compare on all sets that are there, and write both files."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    data, arguments = HfArgumentParser((DataArguments, FewLabelsArguments)).parse_args_into_dataclasses()
    model = EcgMoeForTasks.from_pretrained(arguments.model, dtype=torch.float32).eval()
    extractor = EcgMoeFeatureExtractor.from_pretrained(arguments.model)
    questions = (HEART_AXIS, BODY_WEIGHT, BODY_HEIGHT)
    splits = {}
    for split in ("train", "validation"):
        rows = load_split(data, split)
        splits[split] = Records(rows, extractor, [TASKS[name].plain() for name in SEEN], data.num_proc)
        for question in questions:
            add_labels(splits[split], rows, question)
    pool, test = splits["train"], encode(model, splits["validation"])
    sets = ["PTB-XL 1.0.3, 100 Hz, labels of folds 1-8, measured on fold 9"]
    trials = [Trial([q.task], n, {"related labels seen": q.related}) for q in questions for n in arguments.counts]
    result = rows_of_draws(model, pool, test, trials, arguments)
    others = (
        ("mitdb", ("train", "test"), VENTRICULAR_BEAT, arguments.windows, "MIT-BIH 1.0.0"),
        ("cinc2017", ("train",), FIBRILLATION, None, "CinC 2017"),
    )
    for dataset, names, question, count, title in others:
        folder = getattr(arguments, dataset)
        if not folder:
            logger.warning("%s is left out; name its folder with --%s", title, dataset)
            continue
        own = DataArguments(data_dir=folder, dataset=dataset, cache_dir=data.cache_dir, num_proc=data.num_proc)
        rows = datasets.concatenate_datasets([load_split(own, name) for name in names])
        if dataset == "mitdb":
            rows = rows.select(range(0, len(rows), 6))  # a window a minute
        records = Records(rows, extractor, [], data.num_proc)
        add_labels(records, rows, question)
        result.append(cross_validated_row(model, records, question, count, arguments))
        sets.append(f"{title}, {len(set(records.patient_ids))} patients, cross-validated by patient")
    count = len(test.records.record_ids)
    write(arguments.out, arguments, result, sets, count)
    tasks, size = [TASKS[name].plain() for name in SEEN], len(pool.record_ids)
    trials = [Trial(tasks, round(s * size), {"share of the labels": f"{100 * s:g} %"}) for s in arguments.shares]
    seen = sorted(rows_of_draws(model, pool, test, trials, arguments), key=lambda row: SEEN.index(row["task"]))
    write(arguments.out.with_name(f"{arguments.out.stem}_seen.json"), arguments, seen, sets[:1], count)


def write(path: Path, arguments: FewLabelsArguments, rows: list[dict[str, Any]], sets: list[str], count: int) -> None:
    """A result file."""
    settings = ("draws", "folds", "batch_size", "epochs", "min_steps", "max_steps")
    result = {
        "name": path.stem,
        "command": "python -m benchmarks.few_labels --data_dir ptb-xl --mitdb mitdb --cinc2017 training2017",
        "seed": arguments.seed,
        **origin(),
        "data": {"set": "; ".join(sets), "records": count},
        "details": {name: getattr(arguments, name) for name in settings},
        "rows": rows,
    }
    path.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")


if __name__ == "__main__":
    main()
