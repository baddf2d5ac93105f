"""What the model should refuse: recordings of bad quality, and what is no ECG or wrongly connected.

    python -m benchmarks.refusal --data_dir ptb-xl --fit    fit hub/model/typicality.safetensors, then measure
    python -m benchmarks.refusal --data_dir ptb-xl          measure with the file that is there

The fit takes folds 1-8, and fold 9 for the percentiles. Measured is on fold 9: how well the `quality` head, the
feature extractor's report and the distance from the training data find the recordings that PTB-XL marks as noisy, and
how well distance and probe tell recordings that were spoiled on purpose from the same recordings as they are. Lead I
alone has a probe of its own and is compared with itself.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from scipy.special import expit
from transformers import HfArgumentParser

from benchmarks.quality import origin
from modeling_ecgmoe.adapters import SIGNAL_KEYS, MultiTask
from modeling_ecgmoe.feature_extraction_ecgmoe import Prepared
from modeling_ecgmoe.leads import LEADS, LIMB_FROM_I_II, find_lead
from modeling_ecgmoe.metrics import MetricResult, bootstrap_interval
from modeling_ecgmoe.record_answers import SWAPPED
from modeling_ecgmoe.tasks import TASKS
from modeling_ecgmoe.temporal import mean_and_max
from modeling_ecgmoe.typicality import TYPICALITY_FILE, Typicality, fit_typicality
from records import DataArguments, Records, batches, load_split

COMMAND = "python -m benchmarks.refusal --data_dir ptb-xl"
SUSPICIOUS = 0.05  # the share of the recordings that is refused
REMARKS = TASKS["quality"].labels
ELECTRODES = "arm electrode probe"
ALL, LEAD_I = slice(None), slice(LEADS.index("I"), LEADS.index("I") + 1)
ARMS, UPSIDE_DOWN, TURNED = "arm electrodes swapped", "all leads upside down", "lead I alone, upside down"
WHITE_NOISE_MV, FLAT_NOISE_MV, EEG_MV = 0.2, 0.005, 0.05
# What the arms' electrodes measure when they change places: I turns around, II and III, aVR and aVL change places.
SWAPPED_ARMS = {"I": (-1.0, "I"), "II": (1.0, "III"), "III": (1.0, "II"), "aVR": (1.0, "aVL"), "aVL": (1.0, "aVR")}


@dataclass
class RefusalArguments:
    """What to fit and to measure."""

    model: str = field(default="hub/model", metadata={"help": "ECG-MoE, with its adapters beside it"})
    fit: bool = field(default=False, metadata={"help": "fit typicality.safetensors anew and write it to the model"})
    split: str = field(default="validation", metadata={"help": "validation or test"})
    out: Path = field(default=Path("benchmarks/results/refusal.json"), metadata={"help": "result file"})
    resamples: int = field(default=1000, metadata={"help": "bootstrap resamples of patients"})
    seed: int = field(default=0, metadata={"help": "of the noise"})


# ------------------------------------------------------------------------------------------------- spoiled on purpose


def swap_arms(values: np.ndarray) -> np.ndarray:
    """Recordings (..., 12, samples) as they are with the electrodes of the right and the left arm swapped."""
    swapped = values.copy()
    for lead, (sign, source) in SWAPPED_ARMS.items():
        swapped[..., LEADS.index(lead), :] = sign * values[..., LEADS.index(source), :]
    return swapped


def white_noise(shape: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """Standard deviation 1."""
    return rng.normal(size=shape)


def pink_noise(shape: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """Noise whose power falls as 1 / f, as that of an EEG does; standard deviation 1."""
    spectrum = np.fft.rfft(rng.normal(size=shape), axis=1)
    spectrum[:, 1:] /= np.sqrt(np.arange(1, spectrum.shape[1]))
    spectrum[:, 0] = 0.0
    noise = np.fft.irfft(spectrum, shape[1], axis=1)
    return noise / noise.std(axis=1, keepdims=True)


def of_electrodes(
    noise: Callable[[tuple[int, int], np.random.Generator], np.ndarray], scale_mv: float
) -> Callable[[np.ndarray, np.random.Generator], np.ndarray]:
    """Twelve leads of noise whose limb leads follow from two, as a recorder computes them."""

    def spoil(signal: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        eight = scale_mv * noise((8, signal.shape[1]), rng)
        return np.concatenate([LIMB_FROM_I_II @ eight[:2], eight[2:]])

    return spoil


# Each takes a recording (12, samples) in mV, in the order of LEADS.
SPOILED: dict[str, Callable[[np.ndarray, np.random.Generator], np.ndarray]] = {
    f"white noise, {WHITE_NOISE_MV:g} mV": of_electrodes(white_noise, WHITE_NOISE_MV),
    f"flat lines with noise of {1000 * FLAT_NOISE_MV:g} µV": of_electrodes(white_noise, FLAT_NOISE_MV),
    f"1/f noise as of an EEG, {1000 * EEG_MV:g} µV": of_electrodes(pink_noise, EEG_MV),
    ARMS: lambda signal, rng: swap_arms(signal),
    UPSIDE_DOWN: lambda signal, rng: -signal,
    "amplitude x 2": lambda signal, rng: 2.0 * signal,
    "amplitude x 10": lambda signal, rng: 10.0 * signal,
}


# ------------------------------------------------------------------------------------------------- what the model sees


@dataclass
class Seen:
    """What the model makes of recordings.

    Args:
        features: (records, 2 hidden_size), what `typicality` looks at.
        remarks: (records, 4), probabilities of the `quality` head.
        report: (records,), how much the feature extractor finds amiss, see `amiss`.
        likeness: (records,), how alike the beats are, 0 where there are too few of them.
        logits: task to logits (records, outputs) of the adapters.
        rows: (records,), which rows of the split they are; the extractor refuses some.
    """

    features: np.ndarray
    remarks: np.ndarray
    report: np.ndarray
    likeness: np.ndarray
    logits: dict[str, np.ndarray]
    rows: np.ndarray


def amiss(quality: dict[str, Any]) -> float:
    """One number of the feature extractor's report: flat leads, missing and cut samples, no beats found."""
    flat = len(quality["flat_leads"]) / len(LEADS)
    return flat + quality["missing"] + quality["clipped"] + (quality["period_from"] != "r_peaks")


def see(
    many: MultiTask,
    rows: datasets.Dataset,
    spoil: Callable[[np.ndarray, np.random.Generator], np.ndarray] | None = None,
    seed: int = 0,
    leads: Sequence[str] | None = None,
) -> Seen:
    """The model's view of the first window of each row, spoiled or as it is, of all its leads or of some."""
    rng = np.random.default_rng(seed)
    prepared: list[tuple[int, Prepared]] = []
    parts: list[dict[str, np.ndarray]] = []
    waiting: list[dict[str, Any]] = []

    def look() -> None:
        if waiting:
            features = many.extractor.pad(waiting, return_tensors="pt")
            parts.append(_outputs(many, {name: features[name] for name in SIGNAL_KEYS}))
            waiting.clear()

    for index, (signal, rate, names) in enumerate(_recordings(rows)):
        if spoil is not None:
            if tuple(find_lead(name) for name in names) != LEADS:
                raise ValueError(
                    f"row {index} has the leads {names}; only recordings in the order of {LEADS} are spoiled"
                )
            signal = spoil(signal, rng).astype(np.float32)
        if leads is not None:
            signal, names = signal[[names.index(lead) for lead in leads]], list(leads)
        try:
            record = many.prepare(signal, rate, names)
        except ValueError:
            continue  # refused already
        prepared.append((index, record))
        waiting.append(record.windows[0])
        if len(waiting) == 64:
            look()
    look()
    joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    return Seen(
        features=joined.pop("features"),
        remarks=joined.pop("remarks"),
        report=np.array([amiss(record.quality) for _, record in prepared]),
        likeness=np.array([record.quality["beat_likeness"] or 0.0 for _, record in prepared]),
        logits=joined,
        rows=np.array([index for index, _ in prepared]),
    )


def _recordings(rows: datasets.Dataset) -> Iterator[tuple[np.ndarray, float, list[str]]]:
    for row in rows.select_columns(["signal", "sampling_rate", "lead_names"]).with_format("numpy"):
        yield np.asarray(row["signal"]), float(row["sampling_rate"]), [str(name) for name in row["lead_names"]]


@torch.inference_mode()
def _outputs(many: MultiTask, signal: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """Features, remarks and the logits of all adapters, from one pass of the backbone."""
    encoded = many.encoder(**signal)
    remarks = torch.sigmoid(many.model.heads["head_quality"](many.fusion(encoded)[0]))
    outputs = many.task_logits(encoded) | {"features": mean_and_max(*encoded.memories()["tokens"]), "remarks": remarks}
    return {name: value.float().numpy() for name, value in outputs.items()}


# ----------------------------------------------------------------------------------------------------------------- fit


@torch.inference_mode()
def fit(many: MultiTask, train: Records, reference: Records) -> Typicality:
    """What is typical for a model: see `modeling_ecgmoe.typicality`."""

    def look_at(records: Records, change: Callable[[np.ndarray], np.ndarray], leads: slice = ALL) -> np.ndarray:
        parts = []
        for batch in batches(records):
            signal = dict(batch["signal"])
            kept = torch.zeros_like(signal["lead_mask"])
            kept[:, leads] = signal["lead_mask"][:, leads]
            # The encoder silences what is not kept.
            signal |= {"input_values": torch.from_numpy(change(signal["input_values"].numpy())), "lead_mask": kept}
            parts.append(mean_and_max(*many.encoder(**signal).memories()["tokens"]).numpy())
        return np.concatenate(parts)

    return fit_typicality(
        many.base,
        look_at(train, np.array),
        look_at(train, swap_arms),
        look_at(reference, np.array),
        lead_i=look_at(train, np.array, LEAD_I),
        lead_i_swapped=look_at(train, np.negative, LEAD_I),
    )


# ------------------------------------------------------------------------------------------------------------- measure


def suspicion(seen: Seen, typicality: Typicality, lead_i: bool = False) -> dict[str, np.ndarray]:
    """Scores (records,) from 0 to 1, high where something is wrong, by their names in the table.

    Args:
        lead_i: it was lead I alone, of which no distance is known.
    """
    distances = typicality.distances(seen.features)
    scores = {
        "quality head": 1.0 - np.prod(1.0 - seen.remarks, axis=1),
        "signal report": seen.report / (1.0 + seen.report),
        "beat likeness": (1.0 - seen.likeness) / 2.0,
        "typicality": distances / (1.0 + distances),
        ELECTRODES: expit(typicality.swap_logits(seen.features, lead_i)),
    }
    return {name: score for name, score in scores.items() if not (lead_i and name == "typicality")}


def find_bad(
    scores: dict[str, np.ndarray], truth: np.ndarray, patients: Sequence[str], resamples: int
) -> dict[str, MetricResult]:
    """AUROC of each score; truth (records,) is 1 where a recording is bad."""
    return {
        name: bootstrap_interval("auroc", truth, score, resamples=resamples, groups=patients)
        for name, score in scores.items()
    }


def most_suspicious(score: np.ndarray) -> np.ndarray:
    """Which recordings have the highest scores, bool (records,), a share of `SUSPICIOUS` of them."""
    refused = np.zeros(len(score), bool)
    refused[np.argsort(-score, kind="stable")[: max(1, round(SUSPICIOUS * len(score)))]] = True
    return refused


def errors_of(
    many: MultiTask,
    seen: Seen,
    labels: dict[str, np.ndarray],
    chosen: np.ndarray,
    patients: np.ndarray,
    resamples: int,
) -> dict[str, Any]:
    """How wrong the answers of some recordings are: age in years, and the share with every rhythm statement right."""
    result: dict[str, Any] = {"records": int(chosen.sum())}
    age, rhythm = many.cards.get("age"), many.cards.get("arrhythmia")
    if age is not None:
        answers = age.task.answers(seen.logits["age"])
        result["age"] = bootstrap_interval(
            "mae", labels["age"][chosen], answers[chosen], resamples=resamples, groups=patients[chosen]
        ).to_dict() | {"unit": "years"}
    if rhythm is not None:
        given = rhythm.probabilities(seen.logits["arrhythmia"]) >= np.array(rhythm.thresholds)
        right = (given == (labels["arrhythmia"] == 1)).all(axis=1).astype(float)
        result["every_rhythm_statement_right"] = bootstrap_interval(
            "coverage", np.ones(int(chosen.sum())), right[chosen], resamples=resamples, groups=patients[chosen]
        ).to_dict()
    return result


def measure(many: MultiTask, rows: datasets.Dataset, arguments: RefusalArguments) -> tuple[list[dict[str, Any]], Any]:
    """The rows of the table, and what else was found."""
    typicality = many.typicality
    assert typicality is not None  # main has looked
    clean = see(many, rows)
    scores = suspicion(clean, typicality)
    plain = rows.with_format(None)
    patients = np.array(plain["patient_id"][:])[clean.rows]
    labels = {
        name: TASKS[name].targets(plain[TASKS[name].column][:])[clean.rows]
        for name in ("quality", "age", "arrhythmia")
    }
    table: list[dict[str, Any]] = []
    marked = labels["quality"].max(axis=1)
    among = {
        name: bootstrap_interval(
            "coverage",
            np.ones(int(refused.sum())),
            marked[refused],
            resamples=arguments.resamples,
            groups=patients[refused],
        )
        for name, score in scores.items()
        for refused in [most_suspicious(score)]
    }
    for name, truth in {"any remark": marked, **dict(zip(REMARKS, labels["quality"].T, strict=True))}.items():
        if 0 < truth.sum() < len(truth):
            found = find_bad(scores, truth, list(patients), arguments.resamples)
            row = {"recordings": f"marked by PTB-XL: {name.replace('_', ' ')}", "n": int(truth.sum())}
            table.append(row | {key: value.to_dict() for key, value in found.items()})
    warned: dict[str, dict[str, float]] = {}
    lead_i = see(many, rows, leads=["I"])
    comparisons = [(name, clean, see(many, rows, spoil, arguments.seed)) for name, spoil in SPOILED.items()]
    comparisons.append((TURNED, lead_i, see(many, rows, SPOILED[UPSIDE_DOWN], leads=["I"])))
    for name, right, wrong in comparisons:
        good, bad = (suspicion(seen, typicality, lead_i=right is lead_i) for seen in (right, wrong))
        both = {key: np.concatenate([good[key], bad[key]]) for key in good}
        truth = np.repeat([0.0, 1.0], [len(right.rows), len(wrong.rows)])
        whose = np.array(plain["patient_id"][:])[np.concatenate([right.rows, wrong.rows])]
        found = find_bad(both, truth, list(whose), arguments.resamples)
        table.append({"recordings": name, "n": len(wrong.rows)} | {k: v.to_dict() for k, v in found.items()})
        if name in (ARMS, TURNED):
            shares = {"found": bad[ELECTRODES], "false": good[ELECTRODES]}
            warned[name] = {key: float((probabilities > SWAPPED).mean()) for key, probabilities in shares.items()}
    details = {
        "share_marked": float(marked.mean()),
        "share_warned_of_swapped_arms": warned,
        "marked_among_the_5_percent_most_suspicious": {name: value.to_dict() for name, value in among.items()},
        "answers": {
            f"{'refused' if which else 'kept'} by {name}": errors_of(
                many, clean, labels, most_suspicious(score) == which, patients, arguments.resamples
            )
            for name, score in scores.items()
            if name in ("quality head", "typicality")
            for which in (True, False)
        },
        "percentile_of_the_clean_records": {
            str(q): float(np.quantile(typicality.percentiles(typicality.distances(clean.features)), q / 100))
            for q in (1, 5, 25, 50, 75)
        },
    }
    return table, details


def main() -> None:
    """Fit if asked, measure, and write the file."""
    data, arguments = HfArgumentParser((DataArguments, RefusalArguments)).parse_args_into_dataclasses()
    if arguments.fit:  # an older file goes first: it may be of another model, which would refuse it
        (Path(arguments.model) / TYPICALITY_FILE).unlink(missing_ok=True)
    many = MultiTask.from_pretrained(arguments.model)
    if arguments.fit:
        train, reference = (
            Records(load_split(data, split), many.extractor, [], data.num_proc) for split in ("train", "validation")
        )
        many.typicality = fit(many, train, reference)
        print("wrote", many.typicality.save(Path(arguments.model)))
    if many.typicality is None:
        raise ValueError(f"{arguments.model} holds no {TYPICALITY_FILE}; run the command with --fit first")
    rows = load_split(data, arguments.split)
    table, details = measure(many, rows, arguments)
    fold = {"validation": "fold 9", "test": "fold 10"}[arguments.split]
    result = {
        "name": arguments.out.stem,
        "command": f"{COMMAND} --split {arguments.split}",
        "seed": arguments.seed,
        **origin(),
        "data": {"set": f"PTB-XL 1.0.3, 100 Hz, {fold}", "records": len(rows)},
        "rows": table,
        "details": details,
    }
    arguments.out.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")
    for row in table:
        print(row["recordings"], row["n"], {k: round(v["value"], 3) for k, v in row.items() if isinstance(v, dict)})
    print(json.dumps(details, indent=1))


if __name__ == "__main__":
    main()
