"""Recordings in memory for training: prepared once, cropped and disturbed anew in every step, or encoded."""

import copy
import hashlib
import inspect
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.data import Dataset

from arguments import check_choices, check_ranges, parse_json_object
from data_builders import BUILDERS, find_builder
from data_builders.csv_table import EcgCsv, shorten
from data_builders.label_column import find_labels
from data_builders.rr_consensus import add_rr_interval
from modeling_ecgmoe.feature_extraction_ecgmoe import EcgMoeFeatureExtractor
from modeling_ecgmoe.leads import NUM_LEADS, find_lead
from modeling_ecgmoe.modeling_ecgmoe import EcgMoeEncoderOutput, EcgMoeForTasks
from modeling_ecgmoe.tasks import Task

logger = logging.getLogger(__name__)

# Part of the cache's key: features prepared by other code are not used again.
PREPARED_BY = ("leads.py", "beats.py", "feature_extraction_ecgmoe.py")
VERSION = hashlib.sha256(b"".join(Path(inspect.getfile(find_lead)).with_name(n).read_bytes() for n in PREPARED_BY))
CSV_OPTIONS = (
    "csv",
    "path_column",
    "patient_column",
    "split_column",
    "sampling_rate",
    "lead_names",
    "file_unit",
)
MAX_WINDOWS = 30  # of one recording, spread over it: a night of ECG does not outweigh all others
SIGNAL_KEYS = ("input_values", "lead_mask", "sample_mask", "r_peaks", "rr_intervals_s", "period_s")


@dataclass
class DataArguments:
    """Where the recordings come from."""

    data_dir: str = field(
        default="",
        metadata={"help": "folder as its publisher ships it; empty: download an open set"},
    )
    dataset: str = field(default="ptb_xl", metadata={"help": f"builder: {', '.join(BUILDERS)}"})
    config_name: str | None = field(
        default=None, metadata={"help": "configuration of the builder, its first choice where not given"}
    )
    clinical_dir: str | None = field(default=None, metadata={"help": "MIMIC-IV's tables, for mimic_iv_ecg alone"})
    builder_options: str = field(
        default="{}", metadata={"help": 'further arguments of the builder in JSON, such as {"max_distance_min": 30}'}
    )
    cache_dir: str | None = field(default=None, metadata={"help": "where built data sets are kept"})
    num_proc: int = field(default=2, metadata={"help": "processes that read and prepare recordings"})
    max_records: int | None = field(default=None, metadata={"help": "use only the first records of each split"})
    csv: str = field(default="", metadata={"help": "a table of files and labels of your own, instead of a data set"})
    path_column: str = field(default="path", metadata={"help": "files, relative to data_dir or to the table's folder"})
    patient_column: str | None = field(default=None, metadata={"help": "patients, who never cross splits"})
    split_column: str | None = field(default=None, metadata={"help": "train, validation, test; by patient otherwise"})
    sampling_rate: float | None = field(default=None, metadata={"help": "Hz, of files of yours that do not give it"})
    lead_names: list[str] | None = field(default=None, metadata={"help": "of files of yours that do not name them"})
    file_unit: str | None = field(default=None, metadata={"help": "V, mV, uV or nV, of files that do not give it"})

    def __post_init__(self) -> None:
        check_ranges(self, {"at least 1": ("num_proc", "max_records"), "above 0": ("sampling_rate",)})
        check_choices(self, {"file_unit": ("V", "mV", "uV", "nV")})
        of_sets = {"dataset": "ptb_xl", "config_name": None, "clinical_dir": None, "builder_options": "{}"}
        if self.csv and (given := [f"--{name}" for name, value in of_sets.items() if getattr(self, name) != value]):
            raise ValueError(
                f"--csv is a table of your own, and {', '.join(given)} for a public data set; leave one of them out"
            )


class Records(Dataset):
    """Prepared recordings of one split in memory, with the targets of all tasks.

    An item is a window of a recording, as prediction cuts it: most recordings are one window. Recordings that the
    extractor refuses are left out, and named in the log.

    Args:
        rows: rows of a builder.
        extractor: makes the model's input.
        tasks: whose targets are wanted; tasks whose column the rows lack are left out.
        num_proc: processes that prepare.
        leads: see only these leads of each recording, all where not given.

    Attributes:
        signal: name to (windows, ...), the model's input; record_of: (windows,), whose they are.
        labels: task to (records, outputs); record_ids, patient_ids: of each record.

    Raises:
        ValueError: not one recording can be used, or a label is not of its task.
    """

    def __init__(
        self,
        rows: datasets.Dataset,
        extractor: EcgMoeFeatureExtractor,
        tasks: list[Task],
        num_proc: int = 1,
        leads: Sequence[str] | None = None,
    ) -> None:
        wanted = ["signal", "sampling_rate", "lead_names"]
        prepared = (
            rows.select_columns(wanted)
            .with_format("numpy")
            .map(
                _prepare,
                batched=True,
                batch_size=1,
                with_indices=True,
                fn_kwargs={"settings": extractor.to_dict(), "leads": leads, "version": VERSION.hexdigest()},
                remove_columns=wanted,
                features=_prepared_features(extractor),
                num_proc=num_proc if len(rows) > 1000 else None,
                desc="features",
            )
        )
        row_of, refused = np.array(prepared["row"][:]), prepared["refused"][:]
        # Files of a user's table may be called alike, in a folder for each patient.
        names = rows.with_format(None)["path" if "table" in rows.column_names else "record_id"][:]
        reasons = [f"{names[row]}: {reason}" for row, reason in zip(row_of, refused, strict=True) if reason]
        usable = [i for i, reason in enumerate(refused) if not reason]
        if not usable:
            raise ValueError(f"none of {len(names)} recordings can be used, the first: {reasons[0]}")
        if reasons:
            logger.warning(
                "%s: %d of %d recordings are left out:\n  %s",
                rows.split or "rows", len(reasons), len(names), shorten(reasons),
            )  # fmt: skip
            prepared, rows = prepared.select(usable), rows.select(np.unique(row_of[usable]))
        self.signal = {name: _stack(prepared, name) for name in SIGNAL_KEYS}
        self.record_of = torch.from_numpy(np.unique(row_of[usable], return_inverse=True)[1])
        truth = {task.name: (task, find_labels(rows, task)) for task in tasks}
        self.labels = {
            name: torch.from_numpy(task.targets(values))
            for name, (task, values) in truth.items()
            if values is not None
        }
        plain = rows.with_format(None)
        self.record_ids = plain["record_id"][:]
        self.patient_ids = plain["patient_id"][:]

    @property
    def has_rr(self) -> Tensor:
        """(windows,) bool, whether an RR interval was measured."""
        return (self.signal["rr_intervals_s"] > 0).any(dim=1)

    def __len__(self) -> int:
        return len(self.record_of)

    def __getitems__(self, index: list[int]) -> dict[str, Any]:
        at = torch.tensor(index)
        signal = {name: values[at] for name, values in self.signal.items()}
        signal["input_values"] = signal["input_values"].float() * signal["lead_mask"][:, :, None]
        beats = max(1, int((signal["r_peaks"] >= 0).sum(dim=1).max()))
        for name in ("r_peaks", "rr_intervals_s"):
            signal[name] = signal[name][:, :beats]
        records = self.record_of[at]
        return {"signal": signal, "labels": {name: values[records] for name, values in self.labels.items()}}


def mean_of_windows(values: Tensor, record_of: Tensor, counted: Tensor | None = None) -> Tensor:
    """What windows (w, outputs) say of their records, (records, outputs): the mean, as prediction takes it.

    Args:
        counted: (w,) bool, which windows count where any of a record does, all where not given.
    """
    num_records = int(record_of.max()) + 1
    weights = torch.ones(len(values)) if counted is None else counted.float()
    weights = weights.to(values)
    some = weights.new_zeros(num_records).index_add_(0, record_of, weights) > 0
    weights = torch.where(some[record_of], weights, 1.0)
    sums = values.new_zeros(num_records, values.shape[1]).index_add_(0, record_of, values * weights[:, None])
    return sums / weights.new_zeros(num_records).index_add_(0, record_of, weights)[:, None]


def answers_of_records(
    of_windows: dict[str, Tensor], tasks: Mapping[str, Task], records: "Records | EncodedRecords"
) -> dict[str, np.ndarray]:
    """task to logits (records, outputs), from those of the windows. A task that starts from the RR intervals is
    answered by windows that have some."""
    return {
        name: mean_of_windows(values, records.record_of, records.has_rr if tasks[name].prior else None).numpy()
        for name, values in of_windows.items()
    }


def _prepare(
    rows: dict[str, Any], index: list[int], settings: dict[str, Any], leads: Sequence[str] | None, version: str
) -> dict[str, list[Any]]:
    """The windows of the one recording in `rows`, or an empty one that says why there is none."""
    extractor = EcgMoeFeatureExtractor(**settings)
    signal, names = np.asarray(rows["signal"][0]), [str(name) for name in rows["lead_names"][0]]
    if leads is not None:
        kept = [i for i, name in enumerate(names) if find_lead(name) in leads]
        signal, names = signal[kept], [names[i] for i in kept]
    try:
        windows = extractor.prepare(signal, float(rows["sampling_rate"][0]), names).windows
    except ValueError as error:
        return {name: [value] for name, value in _padded(None, extractor, index[0], str(error)).items()}
    if len(windows) > MAX_WINDOWS:
        windows = [windows[i] for i in np.linspace(0, len(windows) - 1, MAX_WINDOWS).round().astype(int)]
    padded = [_padded(window, extractor, index[0], "") for window in windows]
    return {name: [window[name] for window in padded] for name in padded[0]}


def _padded(
    window: dict[str, Any] | None, extractor: EcgMoeFeatureExtractor, row: int, refused: str
) -> dict[str, Any]:
    """A window at the longest length, with the most beats."""
    beats, intervals = np.full(extractor.max_beats, -1.0, np.float32), np.zeros(extractor.max_beats, np.float32)
    values = np.zeros((NUM_LEADS, extractor.window_samples), np.float16)
    mask, lead_mask, period_s = np.zeros(extractor.window_samples, bool), np.zeros(NUM_LEADS, bool), 0.0
    if window is not None:
        beats[: len(window["r_peaks"])] = window["r_peaks"]
        intervals[: len(window["r_peaks"])] = window["rr_intervals_s"]
        values[:, : window["input_values"].shape[1]] = window["input_values"]
        mask[: len(window["sample_mask"])] = window["sample_mask"]
        lead_mask, period_s = window["lead_mask"], window["period_s"]
    rest = {"lead_mask": lead_mask, "period_s": period_s, "row": row, "refused": refused}
    return rest | {"input_values": values, "sample_mask": mask, "r_peaks": beats, "rr_intervals_s": intervals}


def _prepared_features(extractor: EcgMoeFeatureExtractor) -> datasets.Features:
    def row(kind: str, length: int) -> datasets.List:
        return datasets.List(datasets.Value(kind), length=length)

    return datasets.Features(
        {
            "input_values": datasets.Array2D((NUM_LEADS, extractor.window_samples), "float16"),
            "lead_mask": row("bool", NUM_LEADS),
            "sample_mask": row("bool", extractor.window_samples),
            "r_peaks": row("float32", extractor.max_beats),
            "rr_intervals_s": row("float32", extractor.max_beats),
            "period_s": datasets.Value("float32"),
            "row": datasets.Value("int64"),
            "refused": datasets.Value("string"),
        }
    )


def _stack(prepared: datasets.Dataset, name: str, chunk: int = 2000) -> Tensor:
    column = prepared.select_columns([name]).with_format("numpy")
    parts = [np.asarray(column[i : i + chunk][name]) for i in range(0, len(column), chunk)]
    return torch.from_numpy(np.concatenate(parts))


def load_split(arguments: DataArguments, split: str) -> datasets.Dataset:
    """The rows of a split, with the RR labels: its own, or the consensus of detectors; of a CSV, with its cells.

    Raises:
        FileNotFoundError: the data are not there.
        ValueError: they cannot be read as asked, or have no such split.
    """
    builder = _prepared_builder(arguments)
    if not arguments.csv and split not in builder.info.splits:
        raise ValueError(
            f"{arguments.dataset} has no split {split!r} here; there are {', '.join(builder.info.splits) or 'none'}"
        )
    rows = builder.as_dataset(split)
    if arguments.max_records is not None:
        rows = rows.select(range(min(arguments.max_records, len(rows))))
    if arguments.csv or "rr_interval_ms" in rows.column_names:  # labels of its own
        return rows
    return add_rr_interval(rows, num_proc=arguments.num_proc if len(rows) > 1000 else None)


def tell_unreadable(arguments: DataArguments, split: str) -> None:
    """Name the files of a table that cannot be read, of a split that nothing opens: before it is needed."""
    if arguments.csv:
        _prepared_builder(arguments).tell_problems(split)


def _prepared_builder(arguments: DataArguments) -> Any:
    options: dict[str, Any] = {"data_dir": arguments.data_dir or None, "cache_dir": arguments.cache_dir}
    builder: Any
    if arguments.csv:
        builder = EcgCsv(**options, **{name: getattr(arguments, name) for name in CSV_OPTIONS})
    else:
        own = parse_json_object(arguments.builder_options, "builder_options")
        if arguments.clinical_dir:
            own["clinical_dir"] = arguments.clinical_dir
        builder = find_builder(arguments.dataset)(config_name=arguments.config_name, **options, **own)
    builder.download_and_prepare(num_proc=arguments.num_proc)
    return builder


# -------------------------------------------------------------------------------------------------------- augmentation


def crop(signal: dict[str, Tensor], samples: int, sampling_rate: int) -> dict[str, Tensor]:
    """A random stretch of each recording, with its own beats, intervals and period."""
    values = signal["input_values"]
    batch, leads, total = values.shape
    if total <= samples:
        return signal
    # Within what is real: a short recording is padded at its end.
    moments = torch.arange(1, total + 1, device=values.device)
    real = (signal["sample_mask"] * moments).amax(dim=1)
    start = torch.randint(0, total - samples + 1, (batch,), device=values.device)
    start = start % ((real - samples).clamp(min=0) + 1)
    index = start[:, None] + torch.arange(samples, device=values.device)
    peaks = signal["r_peaks"] - start[:, None]
    peaks = torch.where((signal["r_peaks"] >= 0) & (peaks >= 0) & (peaks < samples), peaks, torch.inf)
    return (
        signal
        | {
            "input_values": values.gather(2, index[:, None, :].expand(-1, leads, -1)),
            "sample_mask": signal["sample_mask"].gather(1, index),
        }
        | beats_of(peaks, sampling_rate)
    )


def beats_of(peaks: Tensor, sampling_rate: int) -> dict[str, Tensor]:
    """Peaks, intervals and period as the feature extractor gives them, from peaks (b, n) with infinity for none."""
    peaks = peaks.sort(dim=1).values
    peaks = peaks[:, : max(1, int(peaks.isfinite().sum(dim=1).max()))]
    intervals = torch.diff(peaks, dim=1, prepend=torch.full_like(peaks[:, :1], -torch.inf)) / sampling_rate
    intervals = torch.where((intervals >= 0.2) & (intervals <= 3.0), intervals, 0.0)
    period = intervals.sum(dim=1) / (intervals > 0).sum(dim=1).clamp(min=1)
    return {"r_peaks": torch.where(peaks.isfinite(), peaks, -1.0), "rr_intervals_s": intervals, "period_s": period}


def disturb(
    signal: dict[str, Tensor], sampling_rate: int, noise: float = 0.3, lead_dropout: float = 0.25
) -> dict[str, Tensor]:
    """Other gains, missing leads, noise, baseline wander, and beats that the detector misses or misplaces.

    `noise` and `lead_dropout` are the shares of the records that get noise and wander, and that lose leads. Records
    that keep one lead get noise `HAND_HELD_NOISE` times as often."""
    values = signal["input_values"]
    batch, leads, samples = values.shape
    device = values.device
    values = values * torch.exp(0.12 * torch.randn(batch, 1, 1, device=device))
    kept = _kept_leads(batch, lead_dropout, device)
    lead_mask = _only(kept, signal["lead_mask"])
    hand_held = kept.sum(dim=1)[:, None, None] == 1  # one lead, of dry electrodes
    noisy = (torch.rand(batch, 1, 1, device=device) < noise * torch.where(hand_held, HAND_HELD_NOISE, 1.0)).float()
    level = noisy * 0.3 * torch.rand(batch, leads, 1, device=device) ** 2
    seconds = torch.arange(samples, device=device) / sampling_rate
    rate_hz, turn = (
        0.1 + 0.6 * torch.rand(batch, 1, 1, device=device),
        6.3 * torch.rand(batch, leads, 1, device=device),
    )
    wander = noisy * 0.8 * torch.rand(batch, leads, 1, device=device) ** 2
    values = values + level * torch.randn_like(values) + wander * torch.sin(2 * math.pi * rate_hz * seconds + turn)
    values = values * lead_mask[:, :, None] * signal["sample_mask"][:, None, :]
    peaks = signal["r_peaks"]
    found = (peaks >= 0) & (torch.rand(peaks.shape, device=device) > 0.02)
    moved = torch.where(found, (peaks + 0.4 * torch.randn_like(peaks)).clamp(min=0.0), torch.inf)
    return signal | {"input_values": values, "lead_mask": lead_mask} | beats_of(moved, sampling_rate)


# How much more often noise meets records of one lead, and how often each lead is that one.
HAND_HELD_NOISE = 5.0
ALONE = torch.tensor([10.0, 8.0] + [1.0] * 10)


def _kept_leads(batch: int, share: float, device: torch.device) -> Tensor:
    """Which leads a record keeps, (b, 12): all, or, for `share` of the records, a set that recorders really give.

    Four of ten such sets are one lead, mostly I and II, which wrist and chest devices record; three are the six limb
    leads; three are chest leads, each kept with a chance that differs between records, beside all limb leads or none.
    """
    draw = torch.rand(batch, 4, device=device)
    alone = functional.one_hot(torch.multinomial(ALONE.to(device), batch, replacement=True), NUM_LEADS).bool()
    limbs = torch.arange(NUM_LEADS, device=device) < 6
    chest = torch.rand(batch, NUM_LEADS, device=device) < 0.2 + 0.8 * draw[:, :1]
    chest = torch.where(limbs, draw[:, 1:2] < 0.7, chest)
    chest = torch.where(chest.any(dim=1, keepdim=True), chest, limbs)
    kind = draw[:, 2:3]
    kept = torch.where(kind < 0.4, alone, torch.where(kind < 0.7, limbs, chest))
    return kept | (draw[:, 3:4] >= share)


def _only(kept: Tensor, lead_mask: Tensor) -> Tensor:
    """The leads (b, 12) that there are and that are kept; a record that would have none keeps all."""
    return lead_mask & torch.where((lead_mask & kept).any(dim=1, keepdim=True), kept, True)


def with_fewer_leads(records: Records) -> Records:
    """The same recordings, each with a set of leads that recorders with fewer of them give, drawn at random."""
    fewer, lead_mask = copy.copy(records), records.signal["lead_mask"]
    kept = _kept_leads(len(records), 1.0, lead_mask.device)
    fewer.signal = records.signal | {"lead_mask": _only(kept, lead_mask)}
    return fewer


def as_is(batch: Any) -> Any:
    """For data loaders: `__getitems__` makes whole batches already."""
    return batch


def batches(records: "Records | EncodedRecords", size: int = 64) -> Iterator[dict[str, Any]]:
    """All records in order, in batches."""
    for start in range(0, len(records), size):
        yield records.__getitems__(list(range(start, min(start + size, len(records)))))


# ------------------------------------------------------------------------------------------------------------- encoded

ENCODED_KEYS = (
    "last_hidden_state",
    "token_mask",
    "pooled_waves",
    "beat_hidden_state",
    "beat_mask",
    "rhythm_hidden_state",
    "rhythm_mask",
    "period_s",
)


class EncodedRecords(Dataset):
    """What the backbone makes of recordings, in half precision in memory: adapters in the fusion need no more.

    Args:
        model: its backbone is used as it is.
        records: the recordings.
        device: where to compute.
        views: how often each window is encoded; the first time as it is, then disturbed. An item is one view, drawn at
            random.
    """

    def __init__(
        self,
        model: EcgMoeForTasks,
        records: Records,
        device: torch.device,
        views: int = 1,
    ) -> None:
        self.labels, self.record_of, self.views = records.labels, records.record_of, views
        self.has_rr = records.has_rr
        encoder = model.ecgmoe.encoder.to(device).eval()
        parts: dict[str, list[Tensor]] = {}
        for view in range(views):
            for batch in batches(records):
                signal = {name: value.to(device) for name, value in batch["signal"].items()}
                if view:
                    signal = disturb(signal, model.config.sampling_rate)
                with torch.inference_mode():
                    encoded = encoder(**signal)
                for name in ENCODED_KEYS:
                    value = getattr(encoded, name)
                    if value is not None:  # a model of one path has no states of the other
                        parts.setdefault(name, []).append(value.half().cpu() if value.ndim == 3 else value.cpu())
        self.encoded = {name: torch.cat(_same_length(values)) for name, values in parts.items()}

    def __len__(self) -> int:
        return len(self.record_of)

    def __getitems__(self, index: list[int]) -> dict[str, Any]:
        at = torch.tensor(index)
        drawn, records = at + len(self) * torch.randint(0, self.views, at.shape), self.record_of[at]
        return {"encoded": self.at(drawn), "labels": {name: value[records] for name, value in self.labels.items()}}

    def at(self, index: Tensor) -> EcgMoeEncoderOutput:
        """The backbone's output for some rows, without the padding that none of them needs."""
        values = {name: value[index] for name, value in self.encoded.items()}
        for state, mask in (("beat_hidden_state", "beat_mask"), ("rhythm_hidden_state", "rhythm_mask")):
            if mask not in values:
                continue
            used = int(values[mask].any(dim=0).nonzero().max()) + 1
            values[state], values[mask] = values[state][:, :used], values[mask][:, :used]
        whole: dict[str, Any] = {k: v.float() if v.dtype == torch.float16 else v for k, v in values.items()}
        return EcgMoeEncoderOutput(**whole)


def _same_length(values: list[Tensor]) -> list[Tensor]:
    """Batches (b, n, ...) padded with zeros to the most beats or tokens that any of them has."""
    if values[0].ndim == 1:
        return values
    longest = max(value.shape[1] for value in values)
    return [functional.pad(v, (0, 0) * (v.ndim - 2) + (0, longest - v.shape[1])) for v in values]
