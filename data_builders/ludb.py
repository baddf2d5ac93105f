"""Lobachevsky University Database: 200 12-lead ECGs with the bounds of every P wave, QRS complex and T wave, per lead.

Amplitude. The gains in the headers are no calibration: each is its lead's peak-to-peak distance in counts, so that
every lead swings by exactly 1. The counts themselves obey Einthoven's relation II = I + III to the last count, so one
scale holds for all leads, and in microvolts they swing like PTB-XL's (medians over 20 records: 1.6 mV in II, 2.4 mV in
V2; PTB-XL's first 400: 1.2 and 2.2 mV). They are therefore read as microvolts. The publisher does not say so, hence
`amplitude_calibrated` is false.
"""

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from data_builders.ecg_builder import EcgBuilder, Facts, RecordEntry
from data_builders.splits import split_of_patient
from modeling_ecgmoe.ecg_files import EcgFileError
from modeling_ecgmoe.tasks import RHYTHM_STATEMENTS
from modeling_ecgmoe.wfdb_files import WfdbRecord, read_wfdb

SAMPLING_RATE = 500
SHAPE = (12, 5000)
RECORDS_CSV = "ludb.csv"
FRACTIONS = {"train": 0.8, "validation": 0.1, "test": 0.1}
WAVES = {"p": "P", "N": "QRS", "t": "T"}
LEAD_FILES = ("i", "ii", "iii", "avr", "avl", "avf", "v1", "v2", "v3", "v4", "v5", "v6")
# The table's columns of statements, to the names of ours.
STATEMENT_COLUMNS = {
    "Rhythms": "rhythms",
    "Electric axis of the heart": "heart_axis",
    "Conduction abnormalities": "conduction",
    "Extrasystoles": "extrasystoles",
    "Hypertrophies": "hypertrophies",
    "Cardiac pacing": "pacing",
    "Ischemia": "ischemia",
    "Non-specific repolarization abnormalities": "repolarization",
    "Other states": "other_states",
}
# What the rhythms are in PTB-XL's statements.
ARRHYTHMIA = {
    "sinus rhythm": "SR", "sinus bradycardia": "SBRAD", "sinus tachycardia": "STACH", "sinus arrhythmia": "SARRH",
    "irregular sinus rhythm": "SARRH", "atrial fibrillation": "AFIB", "atrial flutter, typical": "AFLT",
    "atrial flutter, atypical": "AFLT", "atrial flutter": "AFLT",
}  # fmt: skip

FACTS = Facts(
    title="LUDB",
    version="1.0.1",
    about=(
        "12-lead ECGs of 10 seconds from healthy volunteers and patients in Nizhny Novgorod, 2017 to 2018, in which "
        "cardiologists marked onset, peak and end of every P wave, QRS complex and T wave in each lead. Split by "
        "patient. Amplitudes are not calibrated by the publisher: counts are read as microvolts."
    ),
    host="physionet",
    project="ludb",
    doi="10.13026/eegm-h675",
    license="ODC-By 1.0",
    citation="""\
@article{kalyakulina2020ludb,
  author = {Kalyakulina, Alena I. and Yusipov, Igor I. and Moskalenko, Viktor A. and Nikolskiy, Alexander V.
            and Kosonogov, Konstantin A. and Osipov, Grigory V. and Zolotykh, Nikolai Yu. and Ivanchenko, Mikhail V.},
  title = {{LUDB}: A new open-access validation tool for electrocardiogram delineation algorithms},
  journal = {IEEE Access}, volume = {8}, pages = {186181--186190}, year = {2020}, doi = {10.1109/ACCESS.2020.3029211}
}""",
    records=200,
    patients=200,
    sampling_rates=(SAMPLING_RATE,),
    leads="12",
    length="10 s",
    labels="bounds of P, QRS and T per lead, rhythm, axis, diagnoses, age, sex",
)

_STRING, _INT = datasets.Value("string"), datasets.Value("int32")
_STRINGS = datasets.List(_STRING)


class Ludb(EcgBuilder):
    """The recordings with all their wave annotations; see `EcgBuilder`."""

    FACTS = FACTS
    VERSION = datasets.Version(FACTS.version)
    BUILDER_CONFIGS = [datasets.BuilderConfig(name="default", version=VERSION, description="all records")]

    def signal_shape(self) -> tuple[int, int]:
        return SHAPE

    def columns(self) -> dict[str, Any]:
        return {
            "amplitude_calibrated": datasets.Value("bool"),  # whether the publisher's gain gives millivolts
            # Positions in the signal; null where a bound is not marked.
            "waves": datasets.List({"lead": _STRING, "wave": _STRING, "onset": _INT, "peak": _INT, "offset": _INT}),
            **dict.fromkeys(STATEMENT_COLUMNS.values(), _STRINGS),
            "arrhythmia": _STRINGS,  # SCP-ECG rhythm statements; null where none means the same
            "rr_interval_ms": datasets.Value("float32"),  # mean interval between the QRS peaks marked in lead II
        }

    def is_wanted(self, path: str) -> bool:
        return path == RECORDS_CSV or (path.startswith("data/") and not path.endswith("/"))

    def list_records(self, folder: Path) -> list[RecordEntry]:
        entries = []
        for row in read_records(folder):
            stem = f"data/{row['ID']}"
            files = tuple(f"{stem}.{suffix}" for suffix in ("hea", "dat", *LEAD_FILES))
            entries.append(RecordEntry(row["ID"], row["ID"], split_of_patient(row["ID"], FRACTIONS), files, row))
        return entries

    def read_record(self, entry: RecordEntry) -> Iterator[dict[str, Any]]:
        header = self.folder / entry.files[0]
        record = read_wfdb(header)
        if record.signal.shape != SHAPE or record.sampling_rate != SAMPLING_RATE:
            raise EcgFileError(
                f"expected {SHAPE} at {SAMPLING_RATE} Hz, found {record.signal.shape} at {record.sampling_rate}"
            )
        signal, is_calibrated = to_millivolts(record)
        waves = [wave for lead in LEAD_FILES for wave in read_waves(header, lead)]
        beats = [wave["peak"] for wave in waves if (wave["lead"], wave["wave"]) == ("ii", "QRS")]
        yield {
            "record_id": entry.record_id,
            "patient_id": entry.patient_id,
            "signal": signal,
            "sampling_rate": SAMPLING_RATE,
            "lead_names": record.names,
            "amplitude_calibrated": is_calibrated,
            "waves": waves,
            "rr_interval_ms": float(np.diff(beats).mean()) * 1000 / SAMPLING_RATE if len(beats) > 1 else None,
            **describe(entry.facts),
        }


def read_records(folder: Path) -> list[dict[str, str]]:
    """The rows of the record table, as text.

    Raises:
        FileNotFoundError: it is not there.
        ValueError: it lacks columns or rows.
    """
    path = folder / RECORDS_CSV
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no {RECORDS_CSV}; expected it and data/: {FACTS.how_to_get}")
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        # The release spells the column "Extrasystolies".
        rows = [{name.replace("Extrasystolies", "Extrasystoles"): row[name] or "" for name in row} for row in reader]
    lacking = [name for name in ("ID", "Sex", "Age", *STATEMENT_COLUMNS) if not rows or name not in rows[0]]
    wrong = [row["ID"] for row in rows if not row.get("ID", "").isdecimal()] if not lacking else []
    if lacking or wrong:
        raise ValueError(f"{path} has no {', '.join(lacking)} or a wrong ID {wrong[:1]}; {FACTS.how_to_get}")
    return rows


def to_millivolts(record: WfdbRecord) -> tuple[np.ndarray, bool]:
    """The signal, and whether its amplitude is the publisher's; see the head of this file.

    Returns:
        float32 (leads, samples): as read where the gains are a calibration, else counts as microvolts.
    """
    gains = np.array([[line.gain] for line in record.header.signals])
    baselines = np.array([[line.baseline] for line in record.header.signals])
    counts = np.round(record.signal * gains + baselines)
    swings = np.fmax.reduce(counts, axis=1, keepdims=True) - np.fmin.reduce(counts, axis=1, keepdims=True)
    if not np.array_equal(swings, gains):
        return record.signal, True
    return (counts / 1000.0).astype(np.float32), False


def read_waves(header: Path, lead: str) -> list[dict[str, Any]]:
    """The waves of one lead: "(" is the onset of the peak after it, ")" the end of the peak before it.

    Raises:
        EcgFileError: the annotations cannot be read.
    """
    import wfdb

    try:
        found = wfdb.rdann(str(header.with_suffix("")), lead)
        marks = list(zip(found.symbol, map(int, found.sample), strict=True))
    except Exception as error:  # the library raises whatever its parsing of a damaged file runs into
        reason = f"{type(error).__name__}: {error}"
        raise EcgFileError(f"its annotations of lead {lead} cannot be read ({reason})") from error
    waves = []
    for i, (symbol, peak) in enumerate(marks):
        if symbol in WAVES:
            before = marks[i - 1] if i else ("", 0)
            after = marks[i + 1] if i + 1 < len(marks) else ("", 0)
            onset = before[1] if before[0] == "(" else None
            offset = after[1] if after[0] == ")" else None
            waves.append({"lead": lead, "wave": WAVES[symbol], "onset": onset, "peak": peak, "offset": offset})
    return waves


def describe(row: dict[str, str]) -> dict[str, Any]:
    """The columns of a record beside its signal, from its row in the table; several statements stand in lines."""
    statements = {
        ours: [line.strip() for line in row[name].splitlines() if line.strip()]
        for name, ours in STATEMENT_COLUMNS.items()
    }
    found = {ARRHYTHMIA.get(rhythm.lower()) for rhythm in statements["rhythms"]}
    if any("pacing" in line.lower() for line in statements["pacing"]):
        found.add("PACE")
    age = row["Age"].strip()
    return {
        "age": float(age) if age.isdecimal() else None,
        "age_over_89": age.startswith(">"),
        "sex": {"M": 0, "F": 1}.get(row["Sex"].strip()),
        **statements,
        "arrhythmia": [name for name in RHYTHM_STATEMENTS if name in found] or None,
    }
