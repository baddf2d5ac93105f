"""PhysioNet/CinC Challenge 2017: single-lead ECGs of a hand-held recorder, 9 to 61 s, labelled by their rhythm."""

import csv
from collections import Counter
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import datasets

from data_builders.ecg_builder import EcgBuilder, Facts, RecordEntry, find_headers, signal_columns
from modeling_ecgmoe.ecg_files import read_ecg

LABELS = {"N": "normal", "A": "atrial fibrillation", "O": "other rhythm", "~": "too noisy"}
# What the classes say in PTB-XL's rhythm statements; "other" is known to be something else and not known to be what.
ARRHYTHMIA = {"N": ["SR"], "A": ["AFIB"]}
# The labels were revised twice after the first release; the newest that is there is read.
REFERENCES = ("REFERENCE-v3.csv", "REFERENCE-v2.csv", "REFERENCE-v1.csv", "REFERENCE.csv", "REFERENCE-v0.csv")

FACTS = Facts(
    title="PhysioNet/CinC Challenge 2017",
    version="1.0.0",
    about=(
        "Single-lead ECGs of AliveCor's hand-held recorder in four classes: normal, atrial fibrillation, other "
        "rhythm, too noisy. The challenge's validation folder repeats 300 training records: these are the validation "
        "split and are left out of train. Nothing is known of the patients; each record counts as one."
    ),
    host="physionet",
    project="challenge-2017",
    doi="10.13026/d3hm-sf11",
    license="ODC-By 1.0",
    citation="""\
@inproceedings{clifford2017af,
  author = {Clifford, Gari D. and Liu, Chengyu and Moody, Benjamin and Lehman, Li-wei H. and Silva, Ikaro and Li, Qiao
            and Johnson, A. E. and Mark, Roger G.},
  title = {{AF} classification from a short single lead {ECG} recording:
           The {PhysioNet}/Computing in Cardiology {C}hallenge 2017},
  booktitle = {Computing in Cardiology}, volume = {44}, year = {2017}, doi = {10.22489/CinC.2017.065-469}
}""",
    records=8_528,
    patients=None,
    sampling_rates=(300,),
    leads="1",
    length="9–61 s",
    labels="normal, atrial fibrillation, other, noise",
)


class Cinc2017(EcgBuilder):
    """The challenge's training data; see `EcgBuilder`. `data_dir` may be training2017/ itself or hold it."""

    FACTS = FACTS
    VERSION = datasets.Version(FACTS.version)
    BUILDER_CONFIGS = [datasets.BuilderConfig(name="default", version=VERSION, description="all records")]

    def signal_shape(self) -> None:
        return None

    def columns(self) -> dict[str, Any]:
        return {
            "label": datasets.ClassLabel(names=list(LABELS)),
            "label_name": datasets.Value("string"),
            "arrhythmia": datasets.List(datasets.Value("string")),  # null for other rhythms and noise
        }

    def is_wanted(self, path: str) -> bool:
        name = PurePosixPath(path)
        is_signal = name.suffix in (".hea", ".mat") and name.stem[:1] == "A" and name.stem[1:].isdecimal()
        return name.name in REFERENCES or (is_signal and name.parts[0] in ("training", "validation"))

    def list_records(self, folder: Path) -> list[RecordEntry]:
        labels = read_labels(folder)
        stems: dict[str, str] = {}
        validation = set()
        for stem in find_headers(folder):
            path = PurePosixPath(stem)
            if "validation" in path.parts:
                validation.add(path.name)
                stems.setdefault(path.name, stem)
            else:
                stems[path.name] = stem
        entries = []
        for name, label in labels.items():
            stem = stems.get(name, name)
            split = "validation" if name in validation else "train"
            entries.append(RecordEntry(name, name, split, (f"{stem}.hea", f"{stem}.mat"), {"label": label}))
        return entries

    def read_record(self, entry: RecordEntry) -> Iterator[dict[str, Any]]:
        label = entry.facts["label"]
        yield {
            "record_id": entry.record_id,
            "patient_id": entry.patient_id,
            **signal_columns(read_ecg(self.folder / entry.files[0])),
            "lead_names": ["I"],  # the recorder's; the files say "ECG"
            "label": label,
            "label_name": LABELS[label],
            "arrhythmia": ARRHYTHMIA.get(label),
        }


def read_labels(folder: Path) -> dict[str, str]:
    """Record name to its class, from the newest revision of the labels that lies in the folder or below it.

    The validation folder has a table of its own, which is read only where there is no other.

    Raises:
        FileNotFoundError: there is none.
        ValueError: a line is not "name,class".
    """
    tables = sorted(
        (path for path in folder.rglob("REFERENCE*.csv") if path.name in REFERENCES),
        key=lambda path: ("validation" in path.parts, REFERENCES.index(path.name), str(path)),
    )
    if not tables:
        raise FileNotFoundError(f"{folder} holds no {' or '.join(REFERENCES)}: {FACTS.how_to_get}")
    with tables[0].open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.reader(file) if row]
    wrong = [row for row in rows if len(row) != 2 or row[1] not in LABELS]
    repeated = [name for name, count in Counter(row[0] for row in rows).items() if count > 1]
    if wrong or repeated or not rows:
        raise ValueError(
            f"{tables[0]} must give each record once as name,class with {', '.join(LABELS)}; found "
            f"{wrong[:1] or repeated[:1] or 'nothing'}; {FACTS.how_to_get}"
        )
    return dict(rows)
