"""From a recording to the JSON object of its answers: what the command line, the Space and the pipeline share.

The object is a line of `ecgmoe predict`: record, path, status, sampling_rate, leads, duration_s, quality and tasks, or
record, path, status "error" and error.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .adapters import MultiTask
from .feature_extraction_ecgmoe import Prepared

BATCH_SIZE = 32
# Percentile of `typicality`: almost all white noise lies below, and one in twenty of the ECGs of other hospitals.
UNTYPICAL = 2.0
# Of swapped arms 97 % lie above in PTB-XL's fold 9, 90 % in LUDB and 86 % in CinC 2021, of others .5, 0 and 0 %; of
# lead I alone turned round 98, 95 and 83 %, of others .6, 0 and 9 %.
SWAPPED = 0.9
# Of white noise on one lead all lies below, of CinC 2017's 193 readable records and of PTB-XL's fold 9 one in 400.
UNLIKE_BEATS = 0.5
NOTED_SHARE = 0.01


@dataclass
class LoadedRecord:
    """A record on its way: its line as far as known, and what the model needs, None where it was refused."""

    line: dict[str, Any]
    prepared: Prepared | None = None

    @property
    def num_windows(self) -> int:
        """How many windows the model has to see."""
        return 0 if self.prepared is None else len(self.prepared.windows)


def prepare_record(
    many: MultiTask,
    line: dict[str, Any],
    signal: np.ndarray,
    sampling_rate: float,
    lead_names: Sequence[str],
    remark: str = "",
) -> LoadedRecord:
    """Make a recording ready, and note what it is.

    Args:
        line: what is known of the record: record and path.
        signal, sampling_rate, lead_names: see `EcgMoeFeatureExtractor`.
        remark: what its reader has to say of the signal, *optional*.

    Raises:
        ValueError: the recording is refused.
    """
    prepared = many.prepare(signal, sampling_rate, lead_names)
    prepared.quality["warnings"] = [remark] if remark else []
    facts = {
        "status": "ok",
        "sampling_rate": int(sampling_rate) if float(sampling_rate).is_integer() else sampling_rate,
        "leads": prepared.leads,
        "duration_s": round(signal.shape[1] / sampling_rate, 3),
        "quality": prepared.quality,
    }
    return LoadedRecord(line | facts, prepared)


def refuse_record(line: dict[str, Any], reason: str) -> LoadedRecord:
    """A record that cannot be answered, and why."""
    name = f"{line['record']}: " if line["record"] is not None else ""
    facts = {"record": line["record"], "path": line["path"], "status": "error"}
    return LoadedRecord(facts | {"error": " ".join(f"{name}{reason}".split())})


def answer_records(many: MultiTask, records: Sequence[LoadedRecord], batch_size: int) -> list[dict[str, Any]]:
    """The finished lines of records, in their order, from batches of at most `batch_size` windows.

    Only windows of one length share a batch: padding would let the longest of them move the answers of the others.
    """
    by_length: dict[int, list[tuple[int, Prepared]]] = {}
    for index, record in enumerate(records):
        if record.prepared is not None:
            length = record.prepared.windows[0]["input_values"].shape[1]
            by_length.setdefault(length, []).append((index, record.prepared))
    lines = [record.line for record in records]
    for alike in by_length.values():
        answers = many.answer([prepared for _, prepared in alike], batch_size)
        for (index, _), tasks in zip(alike, answers, strict=True):
            lines[index] = _finished(lines[index], tasks)
    return lines


def _finished(line: dict[str, Any], tasks: dict[str, Any]) -> dict[str, Any]:
    try:
        json.dumps(tasks, allow_nan=False)
    except ValueError:
        return refuse_record(line, "the model gives no finite answer; leave it out, and report it").line
    line["quality"]["warnings"] += find_warnings(line["quality"])
    return line | {"tasks": tasks}


def find_warnings(quality: dict[str, Any]) -> list[str]:
    """What a reader of the answers should know of the recording, in words, from its quality report."""
    found = []
    typicality = quality.get("typicality")
    if typicality is not None and typicality < UNTYPICAL:
        share = f"{100 - typicality:.1f} % of" if typicality else "all"
        found.append(
            f"less typical than {share} the recordings that the model was checked on: a rare rhythm, noise or no ECG; "
            "do not rely on the answers"
        )
    elif (likeness := quality.get("beat_likeness")) is not None and likeness < UNLIKE_BEATS:
        found.append("its beats are not like each other: noise or no ECG; do not rely on the answers")
    elif (quality.get("arm_electrodes_swapped") or 0.0) > SWAPPED:
        held = " or the recorder to be held the other way round" if quality["leads"] == ["I"] else ""
        found.append(f"the electrodes of the arms seem to be swapped{held}")
    if quality["beats"] < 2:
        found.append("fewer than two beats were found")
    if quality["clipped"] > NOTED_SHARE:
        found.append(f"{quality['clipped']:.0%} of the samples are beyond what the model sees and were cut")
    if quality["missing"] > NOTED_SHARE:
        found.append(f"{quality['missing']:.0%} of the samples are missing")
    if quality["flat_leads"]:
        found.append(f"flat and left out: {', '.join(quality['flat_leads'])}")
    if quality.get("windows_refused"):
        found.append(f"{quality['windows_refused']} stretches of 10 s could not be used")
    return found
