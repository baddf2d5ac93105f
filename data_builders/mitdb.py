"""MIT-BIH Arrhythmia Database: 48 half-hour recordings of two leads in which every beat and rhythm is annotated.

Splits are those of de Chazal et al. 2004 ("Automatic classification of heartbeats using ECG morphology and heartbeat
interval features"), DS1 for train and DS2 for test, with one correction: records 201 and 202 are one patient, and 202
is moved from DS2 to train. The four records with paced beats, which that division leaves out, are their own split.
"""

import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from data_builders.ecg_builder import EcgBuilder, Facts, RecordEntry, signal_columns
from modeling_ecgmoe.ecg_files import Ecg, EcgFileError, read_ecg
from modeling_ecgmoe.tasks import RHYTHM_STATEMENTS

# fmt: off
DS1 = ("101", "106", "108", "109", "112", "114", "115", "116", "118", "119", "122", "124", "201", "203", "205", "207",
       "208", "209", "215", "220", "223", "230")
DS2 = ("100", "103", "105", "111", "113", "117", "121", "123", "200", "202", "210", "212", "213", "214", "219", "221",
       "222", "228", "231", "232", "233", "234")
# fmt: on
PACED = ("102", "104", "107", "217")
SAME_PATIENT = {"202": "201"}
SAMPLING_RATE = 360
NUM_SAMPLES = 650_000
NUM_LEADS = 2
WINDOW_S = 10

# Beat annotations by ANSI/AAMI EC57; the last of each line are not in its table and go where they belong by name.
AAMI_CLASSES = {
    **dict.fromkeys("NLRejB", "N"),
    **dict.fromkeys("AaJSn", "S"),
    **dict.fromkeys("VEr", "V"),
    "F": "F",
    **dict.fromkeys("/fQ?", "Q"),
}
# Rhythm annotations that mean the same as one of PTB-XL's statements.
ARRHYTHMIA = {
    "(N": "SR", "(AFIB": "AFIB", "(AFL": "AFLT", "(B": "BIGU", "(AB": "BIGU", "(T": "TRIGU", "(SVTA": "SVTAC",
    "(SBR": "SBRAD", "(P": "PACE",
}  # fmt: skip

FACTS = Facts(
    title="MIT-BIH Arrhythmia Database",
    version="1.0.0",
    about=(
        "Half-hour ambulatory recordings of 1975 to 1979 with every beat and change of rhythm annotated by two "
        "cardiologists. Train is DS1 of de Chazal et al. 2004, test DS2; record 202 is of the same patient as 201 and "
        "therefore in train; the paced records 102, 104, 107 and 217 are the split `paced`."
    ),
    host="physionet",
    project="mitdb",
    doi="10.13026/C2F305",
    license="ODC-By 1.0",
    citation="""\
@article{moody2001impact,
  author = {Moody, George B. and Mark, Roger G.},
  title = {The impact of the {MIT-BIH} {A}rrhythmia {D}atabase},
  journal = {IEEE Engineering in Medicine and Biology Magazine}, volume = {20}, number = {3}, pages = {45--50},
  year = {2001}, doi = {10.1109/51.932724}
}""",
    records=48,
    patients=47,
    sampling_rates=(SAMPLING_RATE,),
    leads="2",
    length="30 min, in windows of 10 s",
    labels="every beat and rhythm, age, sex",
)

_STRING, _BOOL, _INT = (datasets.Value(dtype) for dtype in ("string", "bool", "int32"))
_COLUMNS = {
    "record": _STRING,  # the half hour that a window is from
    "start_sample": _INT,  # of the window in it
    "ds": _STRING,  # DS1, DS2 as published, or null
    "paced": _BOOL,
    "medication": _STRING,
    "beat_samples": datasets.List(_INT),  # position in this row's signal
    "beat_symbols": datasets.List(_STRING),  # as annotated
    "beat_classes": datasets.List(_STRING),  # AAMI's N, S, V, F, Q
    "rhythms": datasets.List({"start_sample": _INT, "rhythm": _STRING}),  # the first is in force at the beginning
    "arrhythmia": datasets.List(_STRING),  # SCP-ECG rhythm statements; null where none means the same
    "rr_interval_ms": datasets.Value("float32"),  # mean interval between the annotated beats
}


@dataclass
class MitdbConfig(datasets.BuilderConfig):
    """How long a row is.

    Args:
        window_s: in seconds; 0 for the whole half hour. What is left at the end of a recording, 5.6 s of a whole
            record for windows of 10 s, is left out.
    """

    window_s: int = WINDOW_S


@dataclass(frozen=True)
class Annotations:
    """What is annotated in a recording, in order of time."""

    beat_samples: np.ndarray
    beat_symbols: list[str]
    rhythm_samples: list[int]
    rhythms: list[str]


class Mitdb(EcgBuilder):
    """The recordings in windows of ten seconds or whole; see `EcgBuilder`."""

    FACTS = FACTS
    SPLITS = ("train", "test", "paced")
    VERSION = datasets.Version(FACTS.version)
    BUILDER_CONFIG_CLASS = MitdbConfig
    BUILDER_CONFIGS = [
        MitdbConfig(name="windows", version=VERSION, description="180 windows of 10 seconds from each recording"),
        MitdbConfig(name="records", version=VERSION, description="whole recordings of half an hour", window_s=0),
    ]
    DEFAULT_CONFIG_NAME = "windows"

    def signal_shape(self) -> tuple[int, int]:
        return NUM_LEADS, self.config.window_s * SAMPLING_RATE or NUM_SAMPLES

    def columns(self) -> dict[str, Any]:
        return _COLUMNS

    def is_wanted(self, path: str) -> bool:
        return path.rpartition(".")[0] in (*DS1, *DS2, *PACED) and path.endswith((".hea", ".dat", ".atr"))

    def list_records(self, folder: Path) -> list[RecordEntry]:
        entries = []
        for name in sorted((*DS1, *DS2, *PACED)):
            patient = SAME_PATIENT.get(name, name)
            split = "paced" if name in PACED else "train" if patient in DS1 else "test"
            files = tuple(f"{name}.{suffix}" for suffix in ("hea", "dat", "atr"))
            entries.append(RecordEntry(name, patient, split, files))
        return entries

    def read_record(self, entry: RecordEntry) -> Iterator[dict[str, Any]]:
        header = self.folder / entry.files[0]
        ecg = read_ecg(header, sampling_rate=SAMPLING_RATE, with_metadata=True)
        if ecg.signal.shape != (NUM_LEADS, NUM_SAMPLES):
            raise EcgFileError(f"expected shape {(NUM_LEADS, NUM_SAMPLES)}, found {ecg.signal.shape}")
        annotations = read_annotations(header, ecg.signal.shape[1])
        name = entry.record_id
        known = {
            "patient_id": entry.patient_id,
            "record": name,
            "ds": "DS1" if name in DS1 else "DS2" if name in DS2 else None,
            "paced": name in PACED,
            **describe(ecg.metadata["comments"]),
        }
        length = self.signal_shape()[1]
        for start in range(0, ecg.signal.shape[1] - length + 1, length):
            piece = Ecg(ecg.signal[:, start : start + length], ecg.sampling_rate, ecg.lead_names)
            yield {
                "record_id": f"{name}_{start // SAMPLING_RATE:04d}s" if self.config.window_s else name,
                **known,
                "start_sample": start,
                **signal_columns(piece),
                **cut(annotations, start, start + length),
            }


def read_annotations(header: Path, num_samples: int) -> Annotations:
    """Beats and rhythms of a record's reference annotations (.atr).

    Raises:
        EcgFileError: the file cannot be read, or annotates what is not in the recording.
    """
    import wfdb

    try:
        found = wfdb.rdann(str(header.with_suffix("")), "atr")
        samples, symbols, notes = list(map(int, found.sample)), found.symbol, found.aux_note
    except Exception as error:  # the library raises whatever its parsing of a damaged file runs into
        raise EcgFileError(f"its annotations cannot be read ({type(error).__name__}: {error})") from error
    if not samples or samples[-1] >= num_samples or samples[0] < 0 or sorted(samples) != samples:
        raise EcgFileError(f"its annotations do not fit {num_samples} samples; copy the .atr file again")
    beats = [i for i, symbol in enumerate(symbols) if symbol in AAMI_CLASSES]
    changes = [i for i, symbol in enumerate(symbols) if symbol == "+" and notes[i].startswith("(")]
    return Annotations(
        np.array([samples[i] for i in beats], dtype=np.int64),
        [symbols[i] for i in beats],
        [samples[i] for i in changes],
        [notes[i].rstrip("\0") for i in changes],
    )


def cut(annotations: Annotations, start: int, end: int) -> dict[str, Any]:
    """The columns of a window from sample `start` to before `end` that the annotations give."""
    first, last = np.searchsorted(annotations.beat_samples, (start, end))
    samples = annotations.beat_samples[first:last] - start
    symbols = annotations.beat_symbols[first:last]
    # The first rhythm is noted at the first beat and counts from the beginning.
    in_force = max(0, bisect_right(annotations.rhythm_samples, start) - 1)
    rhythms: list[dict[str, Any]] = [
        {"start_sample": sample - start, "rhythm": rhythm}
        for sample, rhythm in zip(annotations.rhythm_samples[in_force:], annotations.rhythms[in_force:], strict=True)
        if sample < end
    ]
    if rhythms:
        rhythms[0]["start_sample"] = 0
    statements = {ARRHYTHMIA.get(rhythm["rhythm"]) for rhythm in rhythms}
    return {
        "beat_samples": samples.tolist(),
        "beat_symbols": symbols,
        "beat_classes": [AAMI_CLASSES[symbol] for symbol in symbols],
        "rhythms": rhythms,
        "arrhythmia": [name for name in RHYTHM_STATEMENTS if name in statements] or None,
        "rr_interval_ms": float(np.diff(samples).mean()) * 1000 / SAMPLING_RATE if len(samples) > 1 else None,
    }


def describe(comments: Sequence[str]) -> dict[str, Any]:
    """Age, sex and medication from a header's comments: "69 M 1085 1629 x1", then the drugs."""
    match = re.match(r"(-?\d+|\?)\s+([MF])\b", comments[0]) if comments else None
    age = int(match[1]) if match and match[1] != "?" else -1
    return {
        "age": age if age > 0 else None,
        "age_over_89": False,
        "sex": None if match is None else "MF".index(match[2]),
        "medication": comments[1] if match and len(comments) > 1 and comments[1] != "None" else None,
    }
