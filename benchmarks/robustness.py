"""What the answers lose under worse conditions: fewer leads, other rates, shorter windows, noise; and in whom.

    python -m benchmarks.robustness --data_dir ptb-xl --cnn runs/plain_cnn/model

Fold 9 of PTB-XL at 100 Hz is changed before the feature extractor sees it, which then does what it does with any
recording: leads that are not given are missing, and rates are those that the recording came at. ECG-MoE's adapters and
the plain CNN answer the same input.

- Rates: the recording is resampled up by the Fourier transform. What lies above 50 Hz is absent, so this shows that
  the rate does not matter, and not what more bandwidth would give.
- Windows: the middle of the recording. The labels stay those of ten seconds, and what they name may lie outside.
- Noise (`NOISE_BANDS_HZ`) is added at 500 Hz, in each lead on its own, random phases in the band of its kind. The
  signal-to-noise ratio is the AC power (the variance) of the lead as recorded, over that of the noise as added, before
  any filter.
- Sex and age: the clean recordings of some patients. Ages above 89 are hidden in PTB-XL and count as 80 or more.

Intervals are 95 % bootstrap intervals over patients. A change is against the clean recordings, on the same resamples;
`mean_auroc` is the mean over arrhythmia, statements, superclass and sex (without sex within one sex). A change of a
group is against all patients, over the labels that have both classes in both.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from scipy.signal import resample
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers import HfArgumentParser

from benchmarks.plain_cnn import PlainCnn
from benchmarks.quality import SHOWN, origin
from data_builders.signal_view import SignalView
from modeling_ecgmoe.adapters import MultiTask
from modeling_ecgmoe.feature_extraction_ecgmoe import EcgMoeFeatureExtractor
from modeling_ecgmoe.leads import LEADS, NUM_LIMB_LEADS, find_lead
from modeling_ecgmoe.metrics import MetricResult, find_metric
from modeling_ecgmoe.tasks import TASKS
from records import SIGNAL_KEYS, DataArguments, load_split

COMMAND = "python -m benchmarks.robustness --data_dir ptb-xl --cnn runs/plain_cnn/model"
NOISE_BANDS_HZ = {"baseline wander": (0.05, 1.0), "muscle noise": (10.0, 100.0), "mains noise": (50.0, 50.0)}
NOISE_RATE_HZ = 500.0
CLASSIFIED = tuple(name for name in SHOWN if TASKS[name].kind != "regression")
LEVEL = 0.95
ECG_MOE, PLAIN_CNN = "ECG-MoE", "plain CNN"
PACKAGES = ("torch", "transformers", "datasets", "numpy", "scipy")


@dataclass
class RobustnessArguments:
    """What to measure."""

    model: str = field(default="hub/model", metadata={"help": "ECG-MoE, with its adapters beside it"})
    cnn: str = field(default="", metadata={"help": "folder of a plain CNN to compare with, see plain_cnn.py"})
    out: Path = field(default=Path("benchmarks/results/robustness.json"), metadata={"help": "result file"})
    resamples: int = field(default=1000, metadata={"help": "bootstrap resamples of patients"})
    seed: int = field(default=0, metadata={"help": "of noise and resamples"})


# ---------------------------------------------------------------------------------------------------------- conditions


@dataclass(frozen=True)
class Condition:
    """How a recording is changed before the feature extractor reads it.

    Args:
        name: in the table.
        leads: the leads that are given.
        sampling_rate: Hz that it is resampled to, *optional*, as recorded where not given.
        window_s: only the middle of it, *optional*.
        noise: what is added, a key of `NOISE_BANDS_HZ`, or "".
        snr_db: of the noise.
        in_table: whether it is a row of the table, and not only of the details.
    """

    name: str
    leads: tuple[str, ...] = LEADS
    sampling_rate: float | None = None
    window_s: float | None = None
    noise: str = ""
    snr_db: float = 0.0
    in_table: bool = True

    def apply(
        self, signal: np.ndarray, sampling_rate: float, lead_names: Sequence[str], rng: np.random.Generator
    ) -> tuple[np.ndarray, float, list[str]]:
        """The changed recording.

        Args:
            signal: (leads, samples) in mV, without gaps.
            sampling_rate: Hz.
            lead_names: of the rows.
            rng: of the noise.

        Returns:
            signal, Hz and lead names, as the feature extractor takes them.

        Raises:
            ValueError: the recording has none of the leads.
        """
        kept = [row for row, name in enumerate(lead_names) if find_lead(name) in self.leads]
        if not kept:
            raise ValueError(f"{self.name}: expected one of {', '.join(self.leads)}, found {', '.join(lead_names)}")
        signal = signal[kept]
        if self.sampling_rate is not None and self.sampling_rate != sampling_rate:
            signal, sampling_rate = resample_up(signal, sampling_rate, self.sampling_rate), self.sampling_rate
        if self.noise:
            signal = signal + noise_like(signal, sampling_rate, NOISE_BANDS_HZ[self.noise], self.snr_db, rng)
        if self.window_s is not None:
            samples = round(self.window_s * sampling_rate)
            start = max(0, (signal.shape[1] - samples) // 2)
            signal = signal[:, start : start + samples]
        return signal, sampling_rate, [lead_names[row] for row in kept]


CLEAN = Condition("12 leads, 100 Hz, 10 s")
CONDITIONS = (
    CLEAN,
    Condition("6 limb leads", leads=LEADS[:NUM_LIMB_LEADS]),
    Condition("leads I, II", leads=("I", "II")),
    Condition("lead II", leads=("II",)),
    Condition("lead I", leads=("I",)),
    Condition("leads V1–V6", leads=LEADS[NUM_LIMB_LEADS:]),
    *(Condition(f"given at {rate_hz:g} Hz", sampling_rate=rate_hz) for rate_hz in (250.0, 500.0, 1000.0)),
    *(Condition(f"{window_s:g} s", window_s=window_s) for window_s in (5.0, 3.0)),
    *(
        Condition(
            f"{noise}, {snr_db:g} dB",
            sampling_rate=NOISE_RATE_HZ,
            noise=noise,
            snr_db=snr_db,
            # The pass band of the feature extractor ends below 50 Hz: one row says it of mains.
            in_table=snr_db <= (0.0 if noise == "mains noise" else 6.0),
        )
        for noise in NOISE_BANDS_HZ
        for snr_db in (12.0, 6.0, 0.0)
    ),
)


def resample_up(signal: np.ndarray, rate_in_hz: float, rate_out_hz: float) -> np.ndarray:
    """The same signal (leads, samples) at a higher rate, mirrored at its ends so that they do not ring."""
    samples = round(signal.shape[1] * rate_out_hz / rate_in_hz)
    mirrored = np.concatenate([signal, signal[:, ::-1]], axis=1)
    return resample(mirrored, 2 * samples, axis=1)[:, :samples]


def noise_like(
    signal: np.ndarray, sampling_rate: float, band_hz: tuple[float, float], snr_db: float, rng: np.random.Generator
) -> np.ndarray:
    """Noise for a signal (leads, samples): all frequencies of the band alike, with random phases, in each lead anew.

    The variance of each lead's noise is exactly `snr_db` below that of the lead; a flat lead gets none.
    """
    frequency_hz = np.fft.rfftfreq(signal.shape[1], 1.0 / sampling_rate)
    half_step = 0.5 * frequency_hz[1]
    inside = (frequency_hz >= band_hz[0] - half_step) & (frequency_hz <= band_hz[1] + half_step) & (frequency_hz > 0)
    phases = rng.uniform(0.0, 2.0 * np.pi, (len(signal), len(frequency_hz)))
    noise = np.fft.irfft(inside * np.exp(1j * phases), n=signal.shape[1], axis=1)
    power = signal.var(axis=1, keepdims=True) / 10.0 ** (snr_db / 10.0)
    return noise * np.sqrt(power / noise.var(axis=1, keepdims=True))


# ------------------------------------------------------------------------------------------------------------- answers


class ChangedRecords(Dataset):
    """The recordings of a split under a condition, as the feature extractor gives them.

    An item is the index of a record and its features, or None where the extractor refuses it.

    Args:
        rows: rows of a builder whose signals are of one length.
        extractor: makes the model's input.
        condition: how to change them.
        seed: with the index of a record the seed of its noise, the same phases at every signal-to-noise ratio.
    """

    def __init__(
        self, rows: datasets.Dataset, extractor: EcgMoeFeatureExtractor, condition: Condition, seed: int
    ) -> None:
        plain = rows.with_format(None)
        self.signals = SignalView(rows)
        self.rates_hz, self.lead_names = plain["sampling_rate"][:], plain["lead_names"][:]
        self.extractor, self.condition, self.seed = extractor, condition, seed

    def __len__(self) -> int:
        return len(self.signals)

    def __getitem__(self, index: int) -> tuple[int, dict[str, Any] | None]:
        rng = np.random.default_rng((self.seed, index))
        try:
            changed = self.condition.apply(
                self.signals[index], float(self.rates_hz[index]), self.lead_names[index], rng
            )
            return index, self.extractor.extract(*changed)
        except ValueError:
            return index, None

    def batches(self, num_proc: int, size: int = 64) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
        """Records in batches with their indices, without the refused ones, prepared by `num_proc` processes."""
        for index, features in DataLoader(self, size, num_workers=num_proc, collate_fn=self._joined):
            if index:
                yield index, features

    def _joined(self, items: list[tuple[int, dict[str, Any] | None]]) -> tuple[list[int], dict[str, Tensor]]:
        kept = {index: features for index, features in items if features is not None}
        if not kept:
            return [], {}
        batch = self.extractor.pad(list(kept.values()), return_tensors="pt")
        return list(kept), {name: batch[name] for name in SIGNAL_KEYS}


@torch.inference_mode()
def answers_under(
    records: ChangedRecords, many: MultiTask, cnn: PlainCnn | None, num_proc: int
) -> dict[str, dict[str, np.ndarray]]:
    """model to task to answers (records, outputs) in the task's unit or as probabilities; NaN for refused records.

    Raises:
        ValueError: not one recording can be used.
    """
    answers: dict[str, dict[str, np.ndarray]] = {}
    for index, signal in records.batches(num_proc):
        logits = {ECG_MOE: many.task_logits(many.encoder(**signal))}
        if cnn is not None:
            logits[PLAIN_CNN] = cnn(**signal).logits
        for model, of_model in logits.items():
            for name in SHOWN:
                if name in of_model:
                    empty = np.full((len(records), TASKS[name].num_outputs), np.nan)
                    values = answers.setdefault(model, {}).setdefault(name, empty)
                    values[index] = TASKS[name].answers(of_model[name].numpy())
    if not answers:
        raise ValueError(
            f"{records.condition.name}: none of {len(records)} recordings can be used; have they its leads?"
        )
    return answers


# ------------------------------------------------------------------------------------------------------------- metrics


def draw_weights(patient_ids: Sequence[Any], resamples: int, seed: int) -> np.ndarray:
    """How often each record counts, (records, 1 + resamples): once, and then as its patient was drawn.

    The resamples are those of `metrics.bootstrap_interval`.
    """
    patient_of = np.unique(np.asarray(patient_ids), return_inverse=True)[1]
    count = int(patient_of.max()) + 1
    rng = np.random.default_rng(seed)
    drawn = [np.bincount(rng.integers(count, size=count), minlength=count)[patient_of] for _ in range(resamples)]
    return np.stack([np.ones(len(patient_of)), *drawn], axis=1)


def mean_over_labels(values: np.ndarray) -> np.ndarray:
    """From (labels, draws) to (draws,): the mean of the labels that are defined on all records; NaN without one."""
    kept = values[np.isfinite(values[:, 0])]
    counts = np.isfinite(kept).sum(axis=0)
    return np.divide(np.nansum(kept, axis=0), counts, out=np.full(values.shape[1], np.nan), where=counts > 0)


def with_interval(metric: str, values: np.ndarray, n: int) -> dict[str, Any] | None:
    """A metric of (labels, draws) in the form of `MetricResult.to_dict`; None where no label is defined."""
    means = mean_over_labels(values)
    if not np.isfinite(means[0]):
        return None
    low = high = float("nan")
    if np.isfinite(means[1:]).any():
        low, high = (float(bound) for bound in np.nanquantile(means[1:], [(1 - LEVEL) / 2, (1 + LEVEL) / 2]))
    per_label = [float(value) if np.isfinite(value) else None for value in values[:, 0]]
    return MetricResult(metric, float(means[0]), low, high, LEVEL, n, per_label.count(None), per_label).to_dict()


def changes(values: dict[str, np.ndarray], clean: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The change of each task, and that of `mean_auroc`, (1, draws), from task to (labels, draws)."""
    found = {name: mean_over_labels(values[name] - clean[name])[None] for name in values}
    classified = np.concatenate([found[name] for name in CLASSIFIED if name in found])
    return found | {"mean_auroc": mean_over_labels(classified)[None]}


class Measured:
    """The metrics of all tasks under every condition and in every group, on the same resamples.

    Args:
        targets: task to (records, outputs), NaN where unknown.
        weights: see `draw_weights`.
    """

    def __init__(self, targets: dict[str, np.ndarray], weights: np.ndarray) -> None:
        self.targets, self.weights = targets, weights
        self.values: dict[tuple[str, str], dict[str, np.ndarray]] = {}
        self.counts: dict[str, dict[str, int]] = {}

    def add(self, row: str, model: str, answers: dict[str, np.ndarray], records: np.ndarray) -> None:
        """Measure the answers, task to (records, outputs), of the records in a mask (records,)."""
        self.values[row, model] = {
            name: find_metric(TASKS[name].metric).compute(
                self.targets[name][records], values[records], self.weights[records]
            )
            for name, values in answers.items()
        }
        known = {name: np.isfinite(self.targets[name][records]).any(axis=1).sum() for name in answers}
        self.counts[row] = {name: int(count) for name, count in known.items()} | {"mean_auroc": int(records.sum())}

    def metrics(self, row: str, model: str) -> dict[str, Any]:
        """task to its metric, with the value of each label."""
        values, counts = self.values[row, model], self.counts[row]
        return {name: with_interval(TASKS[name].metric, v, counts[name]) for name, v in values.items()}

    def change(self, row: str, model: str, other: str = "") -> dict[str, Any]:
        """task to the change against the clean recordings; with `other`, how much it is above the other model's."""
        found = changes(self.values[row, model], self.values[CLEAN.name, model])
        if other:
            of_other = changes(self.values[row, other], self.values[CLEAN.name, other])
            found = {name: values - of_other[name] for name, values in found.items()}
        metric = {name: TASKS[name].metric for name in SHOWN} | {"mean_auroc": "macro_auroc"}
        results = {name: with_interval(metric[name], v, self.counts[row][name]) for name, v in found.items()}
        return {name: without_labels(result) for name, result in results.items()}


def without_labels(result: dict[str, Any] | None) -> dict[str, Any] | None:
    """A metric as a table shows it; the values of its labels are in the details."""
    return None if result is None else {name: value for name, value in result.items() if name != "per_label"}


def patient_groups(rows: datasets.Dataset) -> dict[str, np.ndarray]:
    """Name of a group to a mask of the records, (records,)."""
    plain = rows.with_format(None)
    sex = TASKS["sex"].targets(plain["sex"][:])[:, 0]
    age = TASKS["age"].targets(plain["age"][:])[:, 0]
    age[np.array(plain["age_over_89"][:], dtype=bool)] = 90.0
    return {
        "male": sex == 0,
        "female": sex == 1,
        "younger than 40": age < 40,
        "40 to 59 years": (age >= 40) & (age < 60),
        "60 to 79 years": (age >= 60) & (age < 80),
        "80 years or older": age >= 80,
    }


def table_row(measured: Measured, name: str, records: int, models: Sequence[str]) -> dict[str, Any]:
    """A line of the table: what ECG-MoE answers, and what it and the plain CNN lose."""
    metrics = {task: without_labels(result) for task, result in measured.metrics(name, ECG_MOE).items()}
    row: dict[str, Any] = {"condition": name, "records": records, "metrics": metrics}
    for model in models:
        row[f"change, {model}"] = None if name == CLEAN.name else measured.change(name, model)["mean_auroc"]
    if PLAIN_CNN in models:
        both = None if name == CLEAN.name else measured.change(name, ECG_MOE, PLAIN_CNN)["mean_auroc"]
        row["change, ECG-MoE less CNN"] = both
    return row


def detail(measured: Measured, name: str, models: Sequence[str]) -> dict[str, Any]:
    """All metrics and changes of a condition or group, by model."""
    details: dict[str, Any] = {
        model: {"metrics": measured.metrics(name, model), "change": measured.change(name, model)} for model in models
    }
    if PLAIN_CNN in models:
        details["change of ECG-MoE less that of the plain CNN"] = measured.change(name, ECG_MOE, PLAIN_CNN)
    return details


def main(argv: Sequence[str] | None = None) -> None:
    """Measure all rows and write the file."""
    parser = HfArgumentParser((DataArguments, RobustnessArguments))
    data, arguments = parser.parse_args_into_dataclasses(args=argv)
    many = MultiTask.from_pretrained(arguments.model)
    cnn = PlainCnn.from_pretrained(arguments.cnn) if arguments.cnn else None
    rows = load_split(data, "validation")
    answers = {}
    for condition in CONDITIONS:
        changed = ChangedRecords(rows, many.extractor, condition, arguments.seed)
        answers[condition.name] = answers_under(changed, many, cnn, data.num_proc)
        print(condition.name, "answered", flush=True)
    # A record that one condition loses (its only lead is flat) is left out of all: they compare the same patients.
    some = [next(iter(values.values())) for under in answers.values() for values in under.values()]
    usable = np.all([np.isfinite(values).all(axis=1) for values in some], axis=0)
    plain = rows.with_format(None)
    targets = {name: TASKS[name].targets(plain[TASKS[name].column][:]) for name in SHOWN}
    measured = Measured(targets, draw_weights(plain["patient_id"][:], arguments.resamples, arguments.seed))
    groups = {name: mask & usable for name, mask in patient_groups(rows).items()}
    masks = {condition.name: usable for condition in CONDITIONS} | groups
    models = list(answers[CLEAN.name])
    for name, mask in masks.items():
        for model, of_model in answers.get(name, answers[CLEAN.name]).items():
            measured.add(name, model, of_model, mask)
        print(name, "measured", flush=True)
    hidden = {condition.name for condition in CONDITIONS if not condition.in_table}
    result = {
        "name": arguments.out.stem,
        "command": COMMAND,
        "seed": arguments.seed,
        **origin(PACKAGES),
        "data": {"set": "PTB-XL 1.0.3, 100 Hz, fold 9", "records": int(usable.sum())},
        "rows": [table_row(measured, n, int(mask.sum()), models) for n, mask in masks.items() if n not in hidden],
        "details": {name: detail(measured, name, models) for name in masks},
        "left_out": [name for name, is_usable in zip(plain["record_id"][:], usable, strict=True) if not is_usable],
    }
    arguments.out.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")


if __name__ == "__main__":
    main()
