"""What an adapter says of itself beyond its weights: the task, its calibration, where it comes from."""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub import ModelCardData
from scipy.optimize import minimize, minimize_scalar

from .configuration_ecgmoe import PRETRAINING_TASKS
from .tasks import PRIORS, TASKS, Task

CARD_FILE = "task.json"
# What adapters call their base until they are published; the fingerprint in their card is what is checked.
BASE_MODEL = "ecg-moe/ecg-moe-base"
# Fields of a card that came later: where they are empty they are left out, and the file is as it always was.
LATER_FIELDS = ("group_bounds", "group_half_widths", "relative_widths", "shifts", "slopes", "bends")
# A label has a shift and a slope of its own where it has so many validation records with and without it, and a bend
# where it has so many.
MIN_SHIFT_RECORDS, MIN_BEND_RECORDS = 20, 200
# The intervals of a regression are by groups of its truth, so many where each has so many validation records.
MAX_GROUPS, MIN_GROUP_RECORDS = 6, 100
ABBREVIATIONS = ("auprc", "auroc", "ece", "mae", "rmse")


@dataclass
class AdapterCard:
    """What an adapter's `task.json` says: everything that an answer needs beyond the weights.

    Args:
        task: the question.
        base: fingerprint of the model the adapter was trained on, see `fingerprint`.
        evidence: "measured" where trained on real recordings, "simulated" otherwise.
        trained_on: the data, in words.
        temperature: logits of a classification are divided by it (Guo et al. 2017), after `shifts`, `slopes`, `bends`.
        thresholds: the probability from which each label is given, by the best F1 on validation data.
        half_widths: half of a regression's interval for recordings with at least so many leads, by split conformal
            prediction (Lei et al. 2018); keys are numbers of leads.
        level: the coverage of the intervals.
        metrics: results on validation data, name to value.
        group_bounds: rising bounds between groups of true values, in the task's unit.
        group_half_widths: number of leads, as in `half_widths`, to the half-width of each group; see `intervals`.
            Empty: one width for all.
        relative_widths: half-widths are multiples of the error to expect of the measurement that the task starts from,
            `mean_rr_error_ms` of each record (Lei et al. 2018, section 5.2).
        shifts: what is added to each output's logit, and slopes: what it is multiplied by then, beside the temperature
            (B and A of Platt 2000); empty: nothing, and one.
        bends: how much steeper it is near nought, as multiples of the shifted logit's tanh; empty: nothing.
    """

    task: Task
    base: str
    evidence: str = "measured"
    trained_on: str = ""
    temperature: float = 1.0
    thresholds: list[float] = field(default_factory=list)
    half_widths: dict[str, float] = field(default_factory=dict)
    level: float = 0.9
    metrics: dict[str, Any] = field(default_factory=dict)
    group_bounds: list[float] = field(default_factory=list)
    group_half_widths: dict[str, list[float]] = field(default_factory=dict)
    relative_widths: bool = False
    shifts: list[float] = field(default_factory=list)
    slopes: list[float] = field(default_factory=list)
    bends: list[float] = field(default_factory=list)

    def save(self, folder: Path) -> None:
        """Write `task.json`."""
        values = asdict(self) | {"task": self.task.to_dict()}
        values = {name: value for name, value in values.items() if value or name not in LATER_FIELDS}
        (folder / CARD_FILE).write_text(json.dumps(values, indent=2, allow_nan=False) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> "AdapterCard":
        """Read `task.json`.

        Raises:
            FileNotFoundError: the folder is not an adapter of this project.
            ValueError: the file is not what `save` writes.
        """
        path = folder / CARD_FILE
        if not path.is_file():
            raise FileNotFoundError(f"{folder} holds no {CARD_FILE}; an adapter of `train.py adapt` has one")
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is not JSON ({error}); copy it again") from error
        unknown = sorted(set(values) - set(cls.__dataclass_fields__))
        if unknown or "task" not in values or "base" not in values:
            raise ValueError(f"{path}: expected task and base, unknown {', '.join(unknown) or 'none'}; was it edited?")
        return cls(**(values | {"task": Task.from_dict(values["task"])}))

    def to_markdown(self, base_model: str) -> str:
        """The adapter's page on the Hub.

        Args:
            base_model: id of the model it adapts.
        """
        task = self.task
        header = ModelCardData(
            base_model=base_model,
            library_name="peft",
            license="apache-2.0",
            tags=["ecg", "medical", "lora", "ecg-moe", task.name],
            pipeline_tag="other",
        )
        outputs = f"one number in {task.unit or 'the unit of its labels'}" if task.kind == "regression" else "labels"
        lines = [
            f"---\n{header.to_yaml()}\n---\n",
            f"# ECG-MoE adapter: {task.name}\n",
            f"Answers from an ECG: {task.description}. Output ({task.kind.replace('_', ' ')}): {outputs}.\n",
            *self._label_table(),
            "LoRA on the fusion of ECG-MoE and one head, in PEFT's format; `task.json` holds labels, temperature,",
            f"thresholds and intervals. It fits the base with fingerprint `{self.base}` and no other.\n",
            f"Trained on {self.trained_on or 'data that nobody stated'}. Evidence: {self.evidence}.\n",
            "On validation data, on which the calibration was fitted too:\n",
            *self._figures(),
            "\n```python",
            "from modeling_ecgmoe.adapters import MultiTask\n",
            f'model = MultiTask.from_pretrained("{base_model}", tasks=["{base_model}-{task.name}"])',
            "```\n",
            *self._peft_lines(base_model),
            "Research software, not a medical device: its answers must not guide the care of a patient.",
        ]
        return "\n".join(lines) + "\n"

    def _peft_lines(self, base_model: str) -> list[str]:
        """How PEFT alone opens the adapter, whose base is the class with the heads."""
        name, known = self.task.name, TASKS.get(self.task.name)
        has_head = name in PRETRAINING_TASKS and known is not None and known.reads_like(self.task)
        imports, own_head = [], []
        if not has_head:
            imports = ["import json", "from huggingface_hub import hf_hub_download"]
            own_head = [
                f'card = json.load(open(hf_hub_download("{base_model}-{name}", "{CARD_FILE}")))',
                'base.add_task(Task.from_dict(card["task"]))',
            ]
        return [
            "With PEFT alone, on what the feature extractor gives; the base must be the class with the heads:\n",
            "```python",
            *imports,
            "from peft import PeftModel",
            "from transformers import AutoModelForTimeSeriesPrediction",
            *([] if has_head else ["from modeling_ecgmoe.tasks import Task"]),
            "",
            f'base = AutoModelForTimeSeriesPrediction.from_pretrained("{base_model}", trust_remote_code=True)',
            *own_head,
            f'model = PeftModel.from_pretrained(base, "{base_model}-{name}").eval()',
            f'logits = model(**features, tasks=["{name}"]).logits["{name}"]',
            "```\n",
        ]

    def _label_table(self) -> list[str]:
        task = self.task
        if not task.labels:
            return []
        thresholds: list[float | None] = [*[None] * (len(task.labels) - len(self.thresholds)), *self.thresholds]
        lines = ["| label | SCP-ECG | SNOMED CT | given from |", "|---|---|---|---:|"]
        for label, threshold in zip(task.labels, thresholds, strict=True):
            codes = task.codes.get(label, {})
            given = "" if threshold is None else f"{threshold:.2f}"
            lines.append(f"| {label} | {codes.get('scp_ecg', '')} | {codes.get('snomed_ct', '')} | {given} |")
        return [*lines, ""]

    def _figures(self) -> list[str]:
        """The measured results, a line each, with 95 % intervals; whatever else was noted follows as it is."""
        left, lines = dict(self.metrics), []
        for number, name in enumerate(self.task.metrics):
            ends = ("low", "high") if number == 0 else (f"{name}_low", f"{name}_high")
            value, *interval = (left.pop(key, None) for key in (f"validation_{name}", *ends))
            if value is not None:
                unit = f" {self.task.unit}".rstrip() if self.task.kind == "regression" else ""
                between = "" if None in interval else f" (95 % interval {interval[0]} to {interval[1]})"
                title = " ".join(word.upper() if word in ABBREVIATIONS else word for word in name.split("_"))
                lines.append(f"- {title}: {value}{unit}{between}")
        return lines + [f"- {name}: {value}" for name, value in left.items()]

    def answer(
        self, logits: np.ndarray, num_leads: int, prior_error: float | None = None, measured: bool = True
    ) -> dict[str, Any]:
        """The answer of one record, as the command line gives it.

        Args:
            logits: (outputs,) of the task's head.
            num_leads: how many leads the record has; fewer leads, wider intervals.
            prior_error: see `intervals`, *optional*.
            measured: whether there is the measurement that the task starts from, if it does. Where not, the value is
                None, and `reason` says why.
        """
        task = self.task
        out: dict[str, Any]
        if task.prior and not measured:
            out = {"value": None, "unit": task.unit, "reason": PRIORS[task.prior]}
        elif task.kind == "regression":
            value = float(task.answers(logits)[0])
            digits = task.decimals + 2
            out = {"value": round(value, digits), "unit": task.unit}
            if self.half_widths:
                error = None if prior_error is None else np.array([prior_error])
                ends = self.intervals(np.array([value]), num_leads, error)[0]
                out |= {"interval": [round(float(end), digits) for end in ends], "level": self.level}
        else:
            probabilities = self.probabilities(logits)
            if task.kind == "binary":
                probabilities = np.array([1.0 - probabilities[0], probabilities[0]])
            out = {"labels": self._labels(probabilities)}
            out["probabilities"] = {
                label: round(float(p), 4) for label, p in zip(task.labels, probabilities, strict=True)
            }
        return out if self.evidence == "measured" else out | {"evidence": self.evidence}

    def found_in_windows(self, logits: np.ndarray, starts_s: Sequence[float]) -> dict[str, dict[str, Any]]:
        """Where in a long recording each label of a multi-label task was given: a mean hides what soon passes.

        Args:
            logits: (windows, outputs) of the task's head; starts_s: where each window begins.

        Returns:
            label to `windows`, in how many it was given, `of` how many, and the `highest` of their probabilities with
            the `start_s` of that window; without the labels that none was given.
        """
        probabilities = self.probabilities(logits)
        given = probabilities >= np.array(self.thresholds or 0.5)
        found = {}
        for index in np.flatnonzero(given.any(axis=0)):
            best = int(probabilities[:, index].argmax())
            found[self.task.labels[index]] = {
                "windows": int(given[:, index].sum()),
                "of": len(starts_s),
                "highest": round(float(probabilities[best, index]), 4),
                "start_s": round(starts_s[best], 3),
            }
        return found

    def calibrated(self, logits: np.ndarray) -> np.ndarray:
        """The calibrated logits (..., outputs) of a classification."""
        shifted = logits + np.array(self.shifts or 0.0, logits.dtype)
        curved = shifted * np.array(self.slopes or 1.0, logits.dtype)
        if self.bends:
            curved = curved + np.tanh(shifted) * np.array(self.bends, logits.dtype)
        return curved / self.temperature

    def probabilities(self, logits: np.ndarray) -> np.ndarray:
        """The calibrated probabilities (..., outputs) of a classification's logits."""
        return self.task.answers(self.calibrated(logits))

    def intervals(self, values: np.ndarray, num_leads: int, prior_errors: np.ndarray | None = None) -> np.ndarray:
        """The intervals (records, 2) around a regression's values (records,), in its unit, not below its minimum.

        With `relative_widths` they are as wide as `prior_errors` (records,) says of each record, in the task's unit.

        Answers are drawn to the middle, so one half-width covers records with an extreme truth less often than
        promised and the others more often. With `group_half_widths` each group of true values has a width of its own,
        and the interval reaches as far as there are truths whose group allows for their distance: label-conditional
        conformal prediction (Vovk 2012), which covers every group as often as promised.

        Raises:
            ValueError: the widths are relative, and `prior_errors` is not given.
        """
        key = self._most_leads(num_leads)
        half_widths = np.full(len(values), self.half_widths[key])
        if self.relative_widths:
            if prior_errors is None:
                raise ValueError(
                    f"the intervals of task {self.task.name} are multiples of an expected error; pass prior_errors"
                )
            half_widths = half_widths * prior_errors
        halves = self.group_half_widths.get(key)
        if halves is None:
            return self._possible(values[:, None] + half_widths[:, None] * np.array([-1.0, 1.0]))
        bounds = np.array([-np.inf, *self.group_bounds, np.inf])
        lows = np.maximum(values[:, None] - np.array(halves), bounds[:-1])
        highs = np.minimum(values[:, None] + np.array(halves), bounds[1:])
        # The group of the value itself always has such truths; between two groups there is no gap.
        possible = lows <= highs
        low, high = np.where(possible, lows, np.inf).min(axis=1), np.where(possible, highs, -np.inf).max(axis=1)
        return self._possible(np.stack([low, high], axis=1))

    def _possible(self, intervals: np.ndarray) -> np.ndarray:
        """What is left of intervals above the task's minimum: no truth lies below, so that they cover as often."""
        return intervals if self.task.minimum is None else np.maximum(intervals, self.task.minimum)

    def _most_leads(self, num_leads: int) -> str:
        """The key of `half_widths` for so many leads: the most that there are, or the widest for fewer than any."""
        fitting = [int(leads) for leads in self.half_widths if int(leads) <= num_leads]
        return str(max(fitting)) if fitting else max(self.half_widths, key=lambda leads: self.half_widths[leads])

    def _labels(self, probabilities: np.ndarray) -> list[str]:
        labels = self.task.labels
        if self.task.kind == "multi_label":
            thresholds = self.thresholds or [0.5] * len(labels)
            return [label for label, p, t in zip(labels, probabilities, thresholds, strict=True) if p >= t]
        if self.task.kind == "binary" and self.thresholds:
            return [labels[int(probabilities[1] >= self.thresholds[0])]]
        return [labels[int(np.argmax(probabilities))]]


def renew_card(folder: Path) -> None:
    """Write an adapter's `task.json` and page anew, with the codes and the minimum that the task table has today.

    All else stays.
    """
    card = AdapterCard.load(folder)
    known = TASKS.get(card.task.name)
    if known is not None and known.reads_like(card.task):
        card.task = replace(card.task, codes=known.codes, minimum=known.minimum)
    card.save(folder)
    (folder / "README.md").write_text(card.to_markdown(BASE_MODEL), encoding="utf-8")


def calibrate(
    card: AdapterCard,
    logits: np.ndarray,
    targets: np.ndarray,
    num_leads: int = 12,
    prior_errors: np.ndarray | None = None,
) -> None:
    """Fit a classification's calibration and thresholds or a regression's interval on validation data; changes `card`.

    Args:
        logits, targets: (records, outputs), targets NaN where unknown.
        num_leads: how many leads the records have.
        prior_errors: (records,) of the measurement that the task starts from, *optional*, see `calibrate_intervals`.
    """
    task = card.task
    known = np.isfinite(targets)
    if not known.any():
        raise ValueError(f"task {task.name}: no validation record has a label, so nothing can be calibrated")
    if task.kind == "regression":
        errors = None if prior_errors is None else prior_errors[known[:, 0]]
        calibrate_intervals(card, task.answers(logits)[known], targets[known], num_leads, errors)
        return

    card.temperature, card.shifts, card.slopes, card.bends = best_temperature(task, logits, targets), [], [], []
    positive = np.where(known, targets, 0.0).sum(axis=0)
    rarer = np.minimum(positive, known.sum(axis=0) - positive)
    if task.kind != "multi_class" and (rarer >= MIN_SHIFT_RECORDS).any():
        curves = np.tile([0.0, 1.0, 0.0], (task.num_outputs, 1))
        for output in np.flatnonzero(rarer >= MIN_SHIFT_RECORDS):
            of, bent = known[:, output], rarer[output] >= MIN_BEND_RECORDS
            curves[output] = best_curve(logits[of, output], targets[of, output], card.temperature, bent)
        card.shifts, card.slopes, card.bends = (np.round(values, 4).tolist() for values in curves.T)
        card.bends = card.bends if any(card.bends) else []
    if task.kind != "multi_class":
        probabilities = card.probabilities(logits)
        card.thresholds = [
            best_threshold(probabilities[known[:, i], i], targets[known[:, i], i]) for i in range(task.num_outputs)
        ]


def best_temperature(task: Task, logits: np.ndarray, targets: np.ndarray) -> float:
    """What logits (records, outputs) must be divided by for the lowest log-loss of targets, NaN where unknown."""
    known = np.isfinite(targets)
    truth = np.where(known, targets, 0.0)

    def loss(log_temperature: float) -> float:
        p = np.clip(task.answers(logits / np.exp(log_temperature)), 1e-7, 1 - 1e-7)
        each = -truth * np.log(p) if task.kind == "multi_class" else -truth * np.log(p) - (1 - truth) * np.log(1 - p)
        return float((each * known).sum() / known.sum())

    return float(np.exp(minimize_scalar(loss, bounds=(-2.0, 2.0), method="bounded").x))


def best_curve(logits: np.ndarray, truth: np.ndarray, temperature: float, bent: bool) -> np.ndarray:
    """Shift, slope and bend of one label's logits (records,) for the lowest log-loss at a temperature.

    With a bend the curve is steeper near nought than at its ends. It rises everywhere, so that no order is lost. Truth
    is drawn in from 0 and 1 as by one record more of either kind (Platt 2000, section 2.2): where a few records lie
    apart, certainty would fit them best.

    Args:
        bent: whether it may have a bend.
    """
    positive = float(truth.sum())
    truth = np.where(truth > 0.5, (positive + 1) / (positive + 2), 1 / (len(truth) - positive + 2))

    def loss(curve: np.ndarray) -> float:
        shifted = logits.astype(np.float64) + curve[0]
        told = (curve[1] * shifted + curve[2] * np.tanh(shifted)) / temperature
        return float((np.logaddexp(0.0, told) - truth * told).mean())

    bounds = [(-4.0, 4.0), (0.1, 10.0), (0.0, 10.0 if bent else 0.0)]
    return np.asarray(minimize(loss, [0.0, 1.0, 0.0], bounds=bounds, method="L-BFGS-B").x)


def calibrate_intervals(
    card: AdapterCard, values: np.ndarray, truth: np.ndarray, num_leads: int, prior_errors: np.ndarray | None = None
) -> None:
    """Fit a regression's intervals for so many leads on validation values and truth (records,); changes `card`.

    Args:
        prior_errors: (records,) how far the measurement that the task starts from may be off, *optional*: then the
            half-width is a multiple of it. An irregular heart's mean RR interval is less certain than a regular one's.
    """
    if card.task.prior:  # not drawn to the middle, so that groups only make its intervals wider
        card.relative_widths = prior_errors is not None
        scale = np.ones(len(values)) if prior_errors is None else prior_errors
        card.half_widths[str(num_leads)] = conformal_half_width(values / scale, truth / scale, card.level)
        return
    card.half_widths[str(num_leads)] = conformal_half_width(values, truth, card.level)
    fit_groups(card, values, truth, num_leads)


def fit_groups(card: AdapterCard, values: np.ndarray, truth: np.ndarray, num_leads: int) -> None:
    """Give each group of true values its half-width where there are records enough; changes `card`.

    The groups are those of the first call, so that all numbers of leads share them.
    """
    count = min(MAX_GROUPS, len(truth) // MIN_GROUP_RECORDS)
    if not card.group_half_widths:
        bounds = np.quantile(truth, np.arange(1, count) / max(1, count))
        card.group_bounds = [float(bound) for bound in np.unique(bounds)]
    group = np.searchsorted(card.group_bounds, truth, side="right")
    sizes = np.bincount(group, minlength=len(card.group_bounds) + 1)
    if len(sizes) > 1 and sizes.min() >= MIN_GROUP_RECORDS // 2:
        card.group_half_widths[str(num_leads)] = [
            conformal_half_width(values[group == i], truth[group == i], card.level) for i in range(len(sizes))
        ]
    elif not card.group_half_widths:
        card.group_bounds = []


def conformal_half_width(values: np.ndarray, truth: np.ndarray, level: float) -> float:
    """The half-width that covers a new record with probability `level` (Lei et al. 2018, algorithm 2).

    Of fewer than level / (1 - level) records, nine for 90 %, no error is large enough, and the largest covers less.
    """
    errors = np.sort(np.abs(values - truth))
    rank = min(len(errors) - 1, int(np.ceil((len(errors) + 1) * level)) - 1)
    return float(errors[rank])


def best_threshold(probabilities: np.ndarray, truth: np.ndarray) -> float:
    """The threshold of the best F1, 0.5 where a label has fewer than 5 positive or negative records."""
    if min(truth.sum(), (1 - truth).sum()) < 5:
        return 0.5
    order = np.argsort(-probabilities)
    hits = np.cumsum(truth[order])
    f1 = 2 * hits / (np.arange(1, len(truth) + 1) + truth.sum())
    tied = np.diff(probabilities[order], append=-1.0) == 0.0  # with the next one: no threshold comes between them
    best = int(np.argmax(np.where(tied, -1.0, f1)))
    following = probabilities[order][best + 1] if best + 1 < len(order) else 0.0
    return float(0.5 * (probabilities[order][best] + following))


if __name__ == "__main__":  # python -m modeling_ecgmoe.adapter_card hub/adapters/*
    for name in sys.argv[1:]:
        renew_card(Path(name))
