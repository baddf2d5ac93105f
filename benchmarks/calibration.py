"""What the adapters' probabilities and intervals are worth on recordings that they were not calibrated on.

    python -m benchmarks.calibration --data_dir ptb-xl

Fold 9 is split into two halves by patient; a calibration is fitted on one half and looked at on the other, and then
the other way round, so that every record counts once. Which half the records of a small group fall into moves its
coverage by points, so coverage is the mean over ten such splits.

Calibration errors are over 15 bins of equal mass; `details` has those over bins of equal width too. The calibration
error of a finite sample is not zero even where every probability is right: `by_chance` is its mean over labels drawn
from the probabilities themselves. Beside what the adapters do, one temperature without shifts and one half-width for
all records are measured.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from transformers import HfArgumentParser

from adaptation import prior_errors_of
from benchmarks.quality import origin
from evaluation import predict_adapters
from modeling_ecgmoe.adapter_card import AdapterCard, calibrate
from modeling_ecgmoe.adapters import MultiTask
from modeling_ecgmoe.metrics import bootstrap_interval
from modeling_ecgmoe.tasks import TASKS
from records import DataArguments, Records, load_split

COMMAND = "python -m benchmarks.calibration --data_dir ptb-xl"
CLASSES, REGRESSIONS = ("sex", "arrhythmia"), ("age", "rr_interval")
MIN_POSITIVES = 20  # rarer labels are left out
CHANCE_DRAWS = 200
ALL_LEADS = 12


@dataclass
class CalibrationArguments:
    """What to measure."""

    model: str = field(default="hub/model", metadata={"help": "ECG-MoE, with its adapters beside it"})
    split: str = field(default="validation", metadata={"help": "validation or test"})
    out: Path = field(default=Path("benchmarks/results/calibration.json"), metadata={"help": "result file"})
    resamples: int = field(default=1000, metadata={"help": "bootstrap resamples of patients"})
    seed: int = field(default=0, metadata={"help": "of the split into halves, the first of several"})
    splits: int = field(default=10, metadata={"help": "splits into halves that the coverage is the mean of"})


def first_half(patients: Sequence[str], seed: int) -> np.ndarray:
    """Whether each record is of the first half of the patients, bool (records,)."""
    whose = np.unique(np.asarray(patients), return_inverse=True)[1]
    drawn = np.random.default_rng(seed).permutation(whose.max() + 1) < (whose.max() + 1) // 2
    return drawn[whose]


def calibrations(
    card: AdapterCard,
    logits: np.ndarray,
    targets: np.ndarray,
    half: np.ndarray,
    prior_errors: np.ndarray | None = None,
) -> list[AdapterCard]:
    """The calibration of the first half and that of the other, each with nothing of what `card` was fitted on."""
    fitted = []
    for part in (half, ~half):
        fresh = AdapterCard(card.task, card.base, level=card.level)
        calibrate(fresh, logits[part], targets[part], ALL_LEADS, None if prior_errors is None else prior_errors[part])
        fitted.append(fresh)
    return fitted


def crossed(pair: Sequence[np.ndarray], half: np.ndarray) -> np.ndarray:
    """What each record is told by the half that it is not in, from what the first half and the other tell, (records,
    ...) each."""
    of_first, of_other = pair
    return np.where(half.reshape(-1, *[1] * (of_first.ndim - 1)), of_other, of_first)


# ------------------------------------------------------------------------------------------------------- probabilities


def measure_probabilities(
    card: AdapterCard,
    logits: np.ndarray,
    targets: np.ndarray,
    patients: Sequence[str],
    arguments: CalibrationArguments,
) -> list[dict[str, Any]]:
    """Calibration errors of each label with enough positive records: without a calibration, with its temperature
    alone, and with the shifts of its labels."""
    half = first_half(patients, arguments.seed)
    fitted = calibrations(card, logits, targets, half)
    told = {
        "uncalibrated": card.task.answers(logits),
        "temperature": crossed([card.task.answers(logits / each.temperature) for each in fitted], half),
        "temperature and shifts": crossed([each.probabilities(logits) for each in fitted], half),
    }
    rng = np.random.default_rng(arguments.seed)
    rows = []
    for column in range(targets.shape[1]):
        truth = targets[:, column]
        positives = int(np.nansum(truth))
        if min(positives, np.isfinite(truth).sum() - positives) < MIN_POSITIVES:
            continue
        found: dict[str, dict[str, Any]] = {}
        for metric in ("ece_equal_mass", "ece"):
            found[metric] = {
                name: bootstrap_interval(
                    metric, truth, p[:, column], resamples=arguments.resamples, groups=patients
                ).to_dict()
                for name, p in told.items()
            }
            found[metric]["by chance"] = by_chance(metric, told["temperature and shifts"][:, column], rng)
        rows.append(
            {"answer": card.task.labels[-1] if card.task.kind == "binary" else card.task.labels[column]}
            | {"positives": positives, "equal_mass": found["ece_equal_mass"], "equal_width": found["ece"]}
            | {"log_loss": {name: log_loss(p[:, column], truth) for name, p in told.items()}}
        )
    return rows


def by_chance(metric: str, probabilities: np.ndarray, rng: np.random.Generator) -> float:
    """The calibration error to expect where every probability is right."""
    draws = [
        bootstrap_interval(metric, labels, probabilities, resamples=0).value
        for labels in (rng.random((CHANCE_DRAWS, len(probabilities))) < probabilities).astype(float)
        if 0 < labels.sum() < len(labels)
    ]
    return float(np.mean(draws))


def log_loss(probabilities: np.ndarray, truth: np.ndarray) -> float:
    """The mean of -log of what was given to the truth, in nats."""
    known = np.isfinite(truth)
    given = np.where(truth[known] == 1, probabilities[known], 1.0 - probabilities[known])
    return float(-np.log(np.clip(given, 1e-7, 1.0)).mean())


# ----------------------------------------------------------------------------------------------------------- intervals


def measure_intervals(
    card: AdapterCard,
    logits: np.ndarray,
    targets: np.ndarray,
    prior_errors: np.ndarray,
    groups: dict[str, np.ndarray],
    patients: Sequence[str],
    arguments: CalibrationArguments,
) -> list[dict[str, Any]]:
    """How often the intervals hold the truth, overall and in groups of records, with one width for all and as the
    adapters do, with one for each group of true values or a multiple of what each record's error may be; and how wide
    they are."""
    values, truth = card.task.answers(logits)[:, 0], targets[:, 0]
    inside, width = ({name: np.zeros(len(truth)) for name in ("one width", "adapter")} for _ in range(2))
    for seed in range(arguments.seed, arguments.seed + arguments.splits):
        half = first_half(patients, seed)
        fitted = calibrations(card, logits, targets, half, prior_errors)
        alone = [replace(each, group_half_widths={}) for each in calibrations(card, logits, targets, half)]
        for name, cards in (("one width", alone), ("adapter", fitted)):
            low, high = crossed([each.intervals(values, ALL_LEADS, prior_errors) for each in cards], half).T
            inside[name] += ((low <= truth) & (truth <= high)) / arguments.splits
            width[name] += (high - low) / arguments.splits
    rows = []
    for group, members in groups.items():
        here = members & np.isfinite(truth)
        if here.sum() < MIN_POSITIVES:
            continue
        row: dict[str, Any] = {"answer": card.task.name, "group": group, "records": int(here.sum())}
        for name, share in inside.items():
            # Sums of tenths may end a hair above 1.
            row[name] = bootstrap_interval(
                "coverage",
                np.ones(int(here.sum())),
                np.minimum(share[here], 1.0),
                resamples=arguments.resamples,
                groups=np.asarray(patients)[here],
            ).to_dict()
            row[f"{name}, mean width"] = float(width[name][here].mean())
        rows.append(row)
    return rows


def groups_of(age: np.ndarray, sex: np.ndarray) -> dict[str, np.ndarray]:
    """The records that are looked at by themselves, bool (records,); in no age group where the age is unknown."""
    return {
        "all": np.ones(len(age), bool),
        "male": sex == 0,
        "female": sex == 1,
        "under 40": age < 40,
        "40 to 60": (age >= 40) & (age < 60),
        "60 to 80": (age >= 60) & (age <= 80),
        "over 80": age > 80,
    }


# --------------------------------------------------------------------------------------------------------------- table


def table(labels: list[dict[str, Any]], intervals: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of the README: each label, and of each interval all records and the worst group."""
    rows = [
        {
            "answer": row["answer"],
            "uncalibrated": row["equal_mass"]["uncalibrated"],
            "one temperature or width": row["equal_mass"]["temperature"],
            "as the adapters do": row["equal_mass"]["temperature and shifts"],
            "by chance, if right": f"{row['equal_mass']['by chance']:.3f}",
        }
        for row in labels
    ]
    for name in dict.fromkeys(row["answer"] for row in intervals):
        overall, *groups = (row for row in intervals if row["answer"] == name)
        worst = [min(groups, key=lambda row: row[how]["value"])["group"] for how in ("one width", "adapter")]
        shown = [overall, *(row for row in groups if row["group"] in worst)]
        rows += [
            {
                "answer": f"90 % interval of {name}, {row['group']}",
                "uncalibrated": None,
                "one temperature or width": row["one width"],
                "as the adapters do": row["adapter"],
                "by chance, if right": None,
            }
            for row in shown
        ]
    return rows


def main() -> None:
    """Measure and write the file."""
    data, arguments = HfArgumentParser((DataArguments, CalibrationArguments)).parse_args_into_dataclasses()
    many = MultiTask.from_pretrained(arguments.model, [*CLASSES, *REGRESSIONS])
    rows = load_split(data, arguments.split)
    records = Records(rows, many.extractor, [TASKS[name] for name in (*CLASSES, *REGRESSIONS)], data.num_proc)
    logits = predict_adapters(many, records)
    targets = {name: values.numpy() for name, values in records.labels.items()}
    errors = prior_errors_of(records)
    groups = groups_of(targets["age"][:, 0], targets["sex"][:, 0])
    labels = [
        row
        for name in CLASSES
        for row in measure_probabilities(many.cards[name], logits[name], targets[name], records.patient_ids, arguments)
    ]
    intervals = [
        row
        for name in REGRESSIONS
        for row in measure_intervals(
            many.cards[name], logits[name], targets[name], errors, groups, records.patient_ids, arguments
        )
    ]
    fold = {"validation": "fold 9", "test": "fold 10"}[arguments.split]
    result = {
        "name": arguments.out.stem,
        "command": f"{COMMAND} --split {arguments.split}",
        "seed": arguments.seed,
        **origin(),
        "data": {"set": f"PTB-XL 1.0.3, 100 Hz, {fold}, halves by patient", "records": len(records)},
        "rows": table(labels, intervals),
        "details": {"labels": labels, "intervals": intervals},
    }
    arguments.out.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")
    for row in result["rows"]:
        print(row["answer"], {k: round(v["value"], 4) for k, v in row.items() if isinstance(v, dict)})


if __name__ == "__main__":
    main()
