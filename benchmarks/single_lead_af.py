"""Atrial fibrillation from one hand-held lead, without having seen one: ECG-MoE on CinC 2017, beside simpler answers.

    python -m benchmarks.single_lead_af --data_dir training2017 --cnn runs/plain_cnn/model

The recordings (9 to 61 s, 300 Hz) go in as lead I, the other eleven are missing. Asked is the probability of AFIB that
the task `arrhythmia` gives, learned on the 12-lead ECGs of PTB-XL; no label of CinC 2017 is fitted to, so all its
recordings are the test. Class A (atrial fibrillation) is told from N (normal), and from N and O (other rhythm); the
recordings too noisy for their readers are left out.

Windows of ten seconds are averaged as prediction averages them, the logits and then the sigmoid; `details` has the
mean and the maximum of the windows' probabilities too. The RR baselines need no network: how irregular the intervals
between the R peaks are that `find_r_peaks` finds in the whole recording. Intervals are 95 % bootstrap intervals over
recordings, since the set says nothing of its patients.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from scipy.stats import rankdata
from torch import Tensor
from transformers import HfArgumentParser

from benchmarks.plain_cnn import PlainCnn
from benchmarks.quality import origin
from data_builders import find_builder
from modeling_ecgmoe.adapters import MultiTask
from modeling_ecgmoe.beats import find_r_peaks, rr_intervals
from modeling_ecgmoe.metrics import bootstrap_interval
from modeling_ecgmoe.tasks import TASKS
from records import Records, batches, mean_of_windows

COMMAND = "python -m benchmarks.single_lead_af --data_dir training2017 --cnn runs/plain_cnn/model"
PACKAGES = ("torch", "transformers", "datasets", "numpy", "scipy")
RHYTHMS = TASKS["arrhythmia"].labels
AFIB, AFLT = RHYTHMS.index("AFIB"), RHYTHMS.index("AFLT")
COMPARED = {"A against N": "N", "A against N and O": "NO"}
MIN_INTERVALS = 3  # fewer do not tell regular from irregular


@dataclass
class SingleLeadArguments:
    """What to measure."""

    data_dir: str = field(default="training2017", metadata={"help": "CinC 2017 as PhysioNet ships it"})
    model: str = field(default="hub/model", metadata={"help": "ECG-MoE, with its adapters beside it"})
    cnn: str = field(default="", metadata={"help": "folder of a plain CNN to compare with, see plain_cnn.py"})
    out: Path = field(default=Path("benchmarks/results/single_lead_af.json"), metadata={"help": "result file"})
    resamples: int = field(default=1000, metadata={"help": "bootstrap resamples of recordings"})
    cache_dir: str | None = field(default=None, metadata={"help": "where the built data set is kept"})
    num_proc: int = field(default=2, metadata={"help": "processes that read and prepare recordings"})


def read_rows(arguments: SingleLeadArguments) -> datasets.Dataset:
    """The recordings of the classes N, A and O, of all splits: nothing is fitted to any of them.

    Raises:
        ValueError: there is no recording of N or none of A.
    """
    builder = find_builder("cinc2017")(data_dir=arguments.data_dir or None, cache_dir=arguments.cache_dir)
    builder.download_and_prepare(num_proc=arguments.num_proc)
    rows = datasets.concatenate_datasets(list(builder.as_dataset().values()))
    classes = classes_of(rows)
    missing = [name for name in "NA" if name not in classes]
    if missing:
        raise ValueError(
            f"{arguments.data_dir}: expected recordings of N and A, found {len(classes)} without "
            f"{', '.join(missing)}; use more of the data set"
        )
    return rows.select(np.flatnonzero(np.isin(classes, list("NAO"))))


def classes_of(rows: datasets.Dataset) -> np.ndarray:
    """The class of each recording, N, A, O or ~."""
    return np.array(rows.features["label"].int2str(rows.with_format(None)["label"][:]))


@torch.inference_mode()
def window_logits(records: Records, many: MultiTask, cnn: PlainCnn | None) -> dict[str, Tensor]:
    """model to logits of the arrhythmia task (windows, outputs), ECG-MoE's as its adapter calibrates them."""
    parts: dict[str, list[Tensor]] = {}
    for batch in batches(records):
        logits = many.task_logits(many.encoder(**batch["signal"]))["arrhythmia"]
        parts.setdefault("ECG-MoE", []).append(torch.from_numpy(many.cards["arrhythmia"].calibrated(logits.numpy())))
        if cnn is not None:
            parts.setdefault("plain CNN", []).append(cnn(**batch["signal"]).logits["arrhythmia"])
    return {model: torch.cat(values) for model, values in parts.items()}


def pooled(logits: Tensor, record_of: Tensor) -> dict[str, np.ndarray]:
    """Ways to make one probability (records, outputs) of those of a recording's windows; the first is prediction's."""
    probabilities = logits.double().sigmoid()
    highest = np.zeros((int(record_of.max()) + 1, logits.shape[1]))
    np.maximum.at(highest, record_of.numpy(), probabilities.numpy())
    return {
        "mean logit": mean_of_windows(logits.double(), record_of).sigmoid().numpy(),
        "mean probability": mean_of_windows(probabilities, record_of).numpy(),
        "maximum": highest,
    }


def afib_scores(probabilities: np.ndarray) -> dict[str, np.ndarray]:
    """Scores (records,) of atrial fibrillation, from probabilities (records, outputs) of the rhythm statements."""
    return {"AFIB": probabilities[:, AFIB], "AFIB + AFLT": probabilities[:, AFIB] + probabilities[:, AFLT]}


def rr_irregularity(signal: np.ndarray, sampling_rate: float) -> tuple[float, float]:
    """How irregular the RR intervals of a recording are.

    Args:
        signal: (leads, samples) in mV.
        sampling_rate: Hz.

    Returns:
        Their standard deviation and the root mean square of their successive differences (RMSSD), both over their
        mean; 0 with fewer than `MIN_INTERVALS`, which no one would call irregular.
    """
    rr_s = rr_intervals(find_r_peaks(signal, sampling_rate))
    steps_s = np.diff(rr_s)
    if np.isfinite(rr_s).sum() < MIN_INTERVALS or not np.isfinite(steps_s).any():
        return 0.0, 0.0
    mean_s = np.nanmean(rr_s)
    return float(np.nanstd(rr_s) / mean_s), float(np.sqrt(np.nanmean(steps_s**2)) / mean_s)


def compare(scores: np.ndarray, classes: np.ndarray, resamples: int) -> dict[str, Any]:
    """The AUROC of scores (records,) of any scale, for each pair of `COMPARED` whose classes are there."""
    metrics = {}
    for name, others in COMPARED.items():
        kept = np.isin(classes, ["A", *others])
        ranks = rankdata(scores[kept]) / kept.sum()  # in [0, 1] as the metric wants it, and AUROC sees the order alone
        truth = (classes[kept] == "A").astype(float)
        metrics[name] = bootstrap_interval("auroc", truth, ranks, resamples=resamples).to_dict()
    return metrics


def main(argv: Sequence[str] | None = None) -> None:
    """Measure all rows and write the file."""
    (arguments,) = HfArgumentParser(SingleLeadArguments).parse_args_into_dataclasses(args=argv)
    many = MultiTask.from_pretrained(arguments.model, ["arrhythmia"])
    cnn = PlainCnn.from_pretrained(arguments.cnn) if arguments.cnn else None
    rows = read_rows(arguments)
    records = Records(rows, many.extractor, [], arguments.num_proc)
    place = {name: index for index, name in enumerate(rows.with_format(None)["record_id"][:])}
    rows = rows.select([place[name] for name in records.record_ids])  # without those that the extractor refuses
    classes = classes_of(rows)

    table: list[dict[str, Any]] = []
    details: dict[str, Any] = {}
    for model, logits in window_logits(records, many, cnn).items():
        of_model = {way: afib_scores(values) for way, values in pooled(logits, records.record_of).items()}
        details[model] = {
            way: {score: compare(values, classes, arguments.resamples) for score, values in scores.items()}
            for way, scores in of_model.items()
        }
        default = next(iter(details[model].values()))
        table += [{"answer": model, "score": score, "metrics": metrics} for score, metrics in default.items()]
    irregular = [rr_irregularity(row["signal"], float(row["sampling_rate"])) for row in rows.with_format("numpy")]
    for score, values in zip(("SD / mean", "RMSSD / mean"), np.array(irregular).T, strict=True):
        metrics = compare(values, classes, arguments.resamples)
        table.append({"answer": "RR intervals alone", "score": score, "metrics": metrics})
    details["too few RR intervals"] = sum(values == (0.0, 0.0) for values in irregular)
    details["refused"] = len(place) - len(rows)
    counts = {f"of class {name}": int((classes == name).sum()) for name in "NAO"}
    result = {
        "name": arguments.out.stem,
        "command": COMMAND,
        "seed": 0,
        **origin(PACKAGES),
        "data": {"set": "PhysioNet/CinC Challenge 2017 1.0.0", "records": len(rows)} | counts,
        "rows": table,
        "details": details,
    }
    arguments.out.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")
    for row in table:
        print(row["answer"], row["score"], {name: round(m["value"], 4) for name, m in row["metrics"].items()})


if __name__ == "__main__":
    main()
