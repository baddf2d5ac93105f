"""PhysioNet/CinC Challenge 2021: eight sources of 12-lead ECGs with SNOMED-CT diagnoses in their headers.

Patients. Except for Chapman-Shaoxing and Ningbo, where every record is another patient, the sources hold several
records of some patients, and the challenge does not tell which. `ptb_xl`, `ptb` and `st_petersburg`, in which this is
common, are therefore train as a whole; the records of the others are split as if each were a patient's only one.
`ptb_xl` here and the builder `ptb_xl` are the same recordings: do not train on one and test on the other.

Rhythm. `snomed_ct.csv` gives the SCP-ECG rhythm statement that means the same as a code. The challenge's own counts
for PTB-XL confirm it: 1,514 AF are PTB-XL's AFIB, 73 AFL its AFLT, 296 paced its PACE. Not so in Ningbo, which has
7,615 atrial flutters and not one atrial fibrillation: there, flutter leaves `arrhythmia` null.
"""

import csv
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import datasets

from data_builders.ecg_builder import EcgBuilder, Facts, RecordEntry, find_headers, signal_columns
from data_builders.splits import split_of_patient
from modeling_ecgmoe.ecg_files import read_ecg
from modeling_ecgmoe.tasks import RHYTHM_STATEMENTS

FRACTIONS = {"train": 0.8, "validation": 0.1, "test": 0.1}
MAX_AGE = 110
AGE_OVER_89 = 300  # in the copy of PTB-XL
LAST_OF_CHAPMAN = 10_646  # JS00001 to JS10646 are Chapman-Shaoxing's, later ones Ningbo's
ATRIAL_FLUTTER = "164890007"


@dataclass(frozen=True)
class Source:
    """One of the challenge's sources: the first letters of its record names, and how many records it has."""

    prefix: str
    title: str
    records: int
    several_a_patient: bool = False


SOURCES = {
    "cpsc2018": Source("A", "CPSC 2018", 6_877),
    "cpsc_extra": Source("Q", "CPSC-Extra", 3_453),
    "st_petersburg": Source("I", "St Petersburg INCART, 257 Hz, 30 minutes", 74, several_a_patient=True),
    "ptb": Source("S", "PTB, 1000 Hz", 516, several_a_patient=True),
    "ptb_xl": Source("HR", "PTB-XL", 21_837, several_a_patient=True),
    "georgia": Source("E", "Georgia", 10_344),
    "chapman_shaoxing": Source("JS", "Chapman-Shaoxing", 10_247),
    "ningbo": Source("JS", "Ningbo", 34_905),
}

FACTS = Facts(
    title="PhysioNet/CinC Challenge 2021",
    version="1.0.3",
    about=(
        "12-lead ECGs of eight sources in four countries with SNOMED-CT diagnoses, age and sex in the headers. Split "
        "by record, except for PTB-XL, PTB and St Petersburg, which are train as a whole: they hold several records "
        "of a patient and the challenge does not tell which."
    ),
    host="physionet",
    project="challenge-2021",
    doi="10.13026/34va-7q14",
    license="CC BY 4.0",
    citation="""\
@inproceedings{reyna2021will,
  author = {Reyna, Matthew A. and Sadr, Nadi and Perez Alday, Erick A. and Gu, Annie and Shah, Amit J.
            and Robichaux, Chad and Rad, Ali Bahrami and Elola, Andoni and Seyedi, Salman and Ansari, Sardar
            and others},
  title = {Will Two Do? {V}arying Dimensions in Electrocardiography:
           The {PhysioNet}/Computing in Cardiology {C}hallenge 2021},
  booktitle = {Computing in Cardiology}, volume = {48}, year = {2021}, doi = {10.23919/CinC53138.2021.9662687}
}""",
    records=sum(source.records for source in SOURCES.values()),
    patients=None,
    sampling_rates=(500, 1000, 257),
    leads="12",
    length="5 s to 30 min",
    labels="133 SNOMED-CT diagnoses, age, sex",
)

_STRING = datasets.Value("string")
_STRINGS = datasets.List(_STRING)
_COLUMNS = {
    "source": _STRING,  # a key of `SOURCES`
    "snomed_codes": _STRINGS,  # as in the header
    "abbreviations": _STRINGS,  # the challenge's, one for each code; null where it lists none
    "diagnoses": _STRINGS,  # the names, one for each code
    "arrhythmia": _STRINGS,  # SCP-ECG rhythm statements; null where no code is about rhythm
    "medication": _STRING,  # Rx, Hx and Sx of the header; null where unknown
    "history": _STRING,
    "symptoms": _STRING,
}


def _read_diagnoses() -> dict[str, dict[str, str]]:
    with Path(__file__).with_name("snomed_ct.csv").open(encoding="utf-8", newline="") as file:
        return {row["code"]: row for row in csv.DictReader(file)}


DIAGNOSES = _read_diagnoses()


def _config(name: str, description: str) -> datasets.BuilderConfig:
    return datasets.BuilderConfig(name=name, version=datasets.Version(FACTS.version), description=description)


class Cinc2021(EcgBuilder):
    """The challenge's training data, one source or all; see `EcgBuilder`.

    Records are found wherever they lie below `data_dir`, and belong to the source that their names begin like.
    """

    FACTS = FACTS
    VERSION = datasets.Version(FACTS.version)
    BUILDER_CONFIGS = [
        *(_config(name, f"{source.title}, {source.records:,} records") for name, source in SOURCES.items()),
        _config("all", "all sources"),
    ]
    DEFAULT_CONFIG_NAME = "all"

    def signal_shape(self) -> None:
        return None

    def columns(self) -> dict[str, Any]:
        return _COLUMNS

    def is_wanted(self, path: str) -> bool:
        name = PurePosixPath(path)
        return name.suffix in (".hea", ".mat") and self._reads(find_source(name.stem))

    def _reads(self, source: str | None) -> bool:
        return source is not None and self.config.name in (source, "all")

    def list_records(self, folder: Path) -> list[RecordEntry]:
        entries: dict[str, RecordEntry] = {}
        for stem in find_headers(folder):
            name = PurePosixPath(stem).name
            source = find_source(name)
            if source is None or not self._reads(source):
                continue
            split = "train" if SOURCES[source].several_a_patient else split_of_patient(name, FRACTIONS)
            # A record that lies there twice, as after unpacking twice, is one record.
            entries.setdefault(
                name, RecordEntry(name, name, split, (f"{stem}.hea", f"{stem}.mat"), {"source": source})
            )
        return list(entries.values())

    def read_record(self, entry: RecordEntry) -> Iterator[dict[str, Any]]:
        ecg = read_ecg(self.folder / entry.files[0], with_metadata=True)
        yield {
            "record_id": entry.record_id,
            "patient_id": entry.patient_id,
            "source": entry.facts["source"],
            **signal_columns(ecg),
            **describe(ecg.metadata["comments"], entry.facts["source"]),
        }


def find_source(name: str) -> str | None:
    """The source of a record, a key of `SOURCES`, or None where the name is none of the challenge's."""
    match = re.fullmatch(r"([A-Z]+)(\d+)", name)
    if match is None:
        return None
    if match[1] == "JS":
        return "chapman_shaoxing" if int(match[2]) <= LAST_OF_CHAPMAN else "ningbo"
    return next((key for key, source in SOURCES.items() if source.prefix == match[1]), None)


def describe(comments: Sequence[str], source: str) -> dict[str, Any]:
    """The columns that a header's comments give: `Age: 74`, `Sex: Male`, `Dx: 59118001,164889003`, `Rx: Unknown`."""
    said: dict[str, str] = {}
    for comment in comments:
        name, _, value = comment.partition(":")
        said.setdefault(name.strip().lower(), value.strip())
    codes = [code.strip() for code in said.get("dx", "").split(",") if code.strip() not in ("", "Unknown")]
    known = [DIAGNOSES.get(code, {}) for code in codes]
    age = _age(said.get("age", ""))
    return {
        "age": None if age == AGE_OVER_89 else age,
        "age_over_89": age == AGE_OVER_89,
        "sex": {"m": 0, "f": 1}.get(said.get("sex", "")[:1].lower()),
        "snomed_codes": codes,
        "abbreviations": [row.get("abbreviation") for row in known],
        "diagnoses": [row.get("name") for row in known],
        "arrhythmia": _rhythms(codes, source),
        "medication": _text(said.get("rx", "")),
        "history": _text(said.get("hx", "")),
        "symptoms": _text(said.get("sx", "")),
    }


def _rhythms(codes: Sequence[str], source: str) -> list[str] | None:
    if source == "ningbo" and ATRIAL_FLUTTER in codes:
        return None
    found = {name for code in codes for name in DIAGNOSES.get(code, {}).get("rhythm_statement", "").split()}
    return [name for name in RHYTHM_STATEMENTS if name in found] or None


def _age(text: str) -> float | None:
    try:
        age = float(text)
    except ValueError:
        return None
    return age if age == AGE_OVER_89 or (math.isfinite(age) and 0 <= age <= MAX_AGE) else None


def _text(text: str) -> str | None:
    return None if text in ("", "Unknown") else text
