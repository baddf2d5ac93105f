"""MIMIC-IV-ECG, 800,035 diagnostic ECGs of 161,352 patients, with labels from MIMIC-IV for those who have it.

    MimicIvEcg(config_name="potassium", data_dir="mimic-iv-ecg", clinical_dir="mimiciv/3.1")

The recordings are open. `clinical_dir`, MIMIC-IV or its folder `hosp`, is not: users bring their own copy, nothing
is downloaded, and rows made with it must not be passed on. Without it, age, sex, admission and potassium are null.
"""

import hashlib
import logging
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import polars as pl

from data_builders.ecg_builder import EcgBuilder, Facts, RecordEntry, signal_columns
from data_builders.mimic_labels import WAVES, PotassiumRule, clinical_tables, find_table, label_ecgs
from data_builders.mimic_reports import first_line_class, rhythm_statements, stated_classes
from data_builders.splits import split_of_patient
from modeling_ecgmoe.ecg_files import EcgFileError, read_ecg

logger = logging.getLogger(__name__)

SAMPLING_RATE = 500
DURATION_S = 10
NUM_LEADS = 12
TABLES = ("record_list", "machine_measurements")
SPLIT_SHARES = {"train": 0.8, "validation": 0.1, "test": 0.1}  # of the patients
LABELS_FILE = "labels.arrow"  # beside the built rows

FACTS = Facts(
    title="MIMIC-IV-ECG",
    version="1.0",
    about=(
        "Diagnostic 12-lead ECGs of 10 seconds of patients of the Beth Israel Deaconess Medical Center, Boston, with "
        "what the electrocardiograph measured and reported. There are no official splits: patients go to train (80 %),"
        " validation (10 %) and test (10 %) by the hash of their number."
    ),
    host="physionet",
    project="mimic-iv-ecg",
    doi="10.13026/4nqg-sb35",
    license="ODbL 1.0",
    citation="""\
@misc{gow2023mimicivecg,
  author = {Gow, Brian and Pollard, Tom and Nathanson, Larry A and Johnson, Alistair and Moody, Benjamin and Fernandes,
            Chrystinne and Greenbaum, Nathaniel and Waks, Jonathan W and Eslami, Parastou and Carbonati, Tanner and
            Chaudhari, Ashish and Herbst, Elizabeth and Moukheiber, Dana and Berkowitz, Seth and Mark, Roger and
            Horng, Steven},
  title = {{MIMIC-IV-ECG}: Diagnostic Electrocardiogram Matched Subset (version 1.0)},
  publisher = {PhysioNet}, year = {2023}, doi = {10.13026/4nqg-sb35}
}""",
    records=800_035,
    patients=161_352,
    sampling_rates=(SAMPLING_RATE,),
    leads="12",
    length="10 s",
    labels="machine reports and intervals; potassium, age and sex with MIMIC-IV",
    access="open, labels of MIMIC-IV credentialed",
)

_STRING, _BOOL, _FLOAT = (datasets.Value(dtype) for dtype in ("string", "bool", "float32"))
_COLUMNS = {
    "report_class": _STRING,  # see mimic_reports; null where there is no report
    "report_classes": datasets.List(_STRING),
    "arrhythmia": datasets.List(_STRING),  # PTB-XL's rhythm statements; null where the report names none
    "rr_interval_ms": _FLOAT,  # by the electrocardiograph
    **dict.fromkeys(WAVES.values(), _FLOAT),
    "cart_id": _STRING,
    "bandwidth": _STRING,
    "filtering": _STRING,
    "hadm_id": datasets.Value("int64"),
    "potassium": datasets.List(_STRING),  # hypokalaemia, hyperkalaemia or none; null without a value in reach
    "potassium_mmol_l": _FLOAT,
    "potassium_distance_min": _FLOAT,  # positive: drawn after the ECG
    "potassium_specimen": _STRING,
    "potassium_hemolysed": _BOOL,
}
_TAKEN_OVER = [name for name in _COLUMNS if name not in ("report_class", "report_classes", "arrhythmia")]


@dataclass
class MimicIvEcgConfig(datasets.BuilderConfig):
    """Which records are read, and the rule of their potassium labels.

    Args:
        labelled_only: leave out records without a potassium value.
        clinical_dir: MIMIC-IV or its folder `hosp`.
        folders: read only these of the thousand folders in `files/`, such as ("p1000",); all where empty.
        specimens, max_distance_min, low_mmol_l, high_mmol_l, skip_hemolysed: see `PotassiumRule`.
    """

    labelled_only: bool = False
    clinical_dir: str | None = None
    folders: tuple[str, ...] = ()
    specimens: tuple[str, ...] = ("serum",)
    max_distance_min: float = 60.0
    low_mmol_l: float = 3.5
    high_mmol_l: float = 5.5
    skip_hemolysed: bool = True

    @property
    def rule(self) -> PotassiumRule:
        """The rule of the potassium labels."""
        return PotassiumRule(
            tuple(self.specimens), self.max_distance_min, self.low_mmol_l, self.high_mmol_l, self.skip_hemolysed
        )


class MimicIvEcg(EcgBuilder):
    """MIMIC-IV-ECG at 500 Hz; see `EcgBuilder` and, for the further arguments, `MimicIvEcgConfig`.

    Raises:
        ValueError: neither `data_dir` nor `folders`, since the whole set has 90 GB in 1.6 million files; labelled
            records are wanted without `clinical_dir`; or the potassium rule makes no sense.
    """

    FACTS = FACTS
    VERSION = datasets.Version("1.0.0")
    BUILDER_CONFIG_CLASS = MimicIvEcgConfig
    BUILDER_CONFIGS = [
        MimicIvEcgConfig(name="all", version=VERSION, description="every record"),
        MimicIvEcgConfig(
            name="potassium",
            version=VERSION,
            labelled_only=True,
            description="the records with a potassium value drawn close to them",
        ),
    ]
    DEFAULT_CONFIG_NAME = "all"

    def __init__(
        self,
        *args: Any,
        data_dir: str | Path | None = None,
        clinical_dir: str | Path | None = None,
        **kwargs: Any,
    ) -> None:
        if data_dir is None and not kwargs.get("folders"):
            raise ValueError(
                "data_dir is missing, and all of MIMIC-IV-ECG has 90 GB in 1.6 million files; pass some of its "
                f"folders, such as folders=('p1000',), to download those alone, or {FACTS.how_to_get}"
            )
        digest = hashlib.sha256(self._fingerprint(None if data_dir is None else Path(data_dir)).encode())
        for folder in () if data_dir is None else _dated_folders(Path(data_dir) / "files"):
            digest.update(folder.encode())
        if clinical_dir is not None:
            for path in clinical_tables(Path(clinical_dir)).values():
                status = path.stat() if path else None
                digest.update(f"{path and path.name} {status and (status.st_size, status.st_mtime_ns)}".encode())
            kwargs["clinical_dir"] = str(clinical_dir)
        kwargs.setdefault("hash", digest.hexdigest()[:16])
        super().__init__(*args, data_dir=data_dir, **kwargs)
        if self.config.labelled_only and self.config.clinical_dir is None:
            raise ValueError(
                f"configuration {self.config.name} needs clinical_dir: the laboratory values are in MIMIC-IV "
                "(https://doi.org/10.13026/kpb9-mt58, for credentialed users); configuration all does without"
            )
        self.rule = self.config.rule

    def signal_shape(self) -> tuple[int, int]:
        return NUM_LEADS, DURATION_S * SAMPLING_RATE

    def columns(self) -> dict[str, Any]:
        return _COLUMNS

    def is_wanted(self, path: str) -> bool:
        return path in {f"{name}.csv" for name in TABLES} or path.startswith(self._prefixes())

    def _prefixes(self) -> tuple[str, ...]:
        return tuple(f"files/{name}/" for name in self.config.folders)

    @classmethod
    def watched(cls, folder: Path) -> Iterable[Path]:
        return [path for name in TABLES if (path := find_table(folder, name))]

    def list_records(self, folder: Path) -> list[RecordEntry]:
        lacking = [name for name in TABLES if find_table(folder, name) is None]
        if lacking:
            raise FileNotFoundError(
                f"{folder} holds no {' and no '.join(f'{name}.csv' for name in lacking)}: {FACTS.how_to_get}"
            )
        clinical_dir = self.config.clinical_dir
        labels, counts = label_ecgs(folder, None if clinical_dir is None else Path(clinical_dir), self.rule)
        if clinical_dir is None:
            note = "Without clinical_dir, age, sex, admission and potassium are null."
            logger.warning("%s: %s", FACTS.title, note)
        else:
            found = ", ".join(f"{number:,} {what}" for what, number in counts.ecgs.items() if number) or "none"
            passed = ", ".join(f"{number:,} {why}" for why, number in counts.skipped_values.items()) or "none"
            note = f"Labels of all {labels.height:,} ECGs: {found}; potassium values passed over: {passed}."
            logger.info("%s: %s", FACTS.title, note)
        if self.config.labelled_only:
            labels = labels.filter(pl.col("potassium").is_not_null())
        if self.config.folders:
            labels = labels.filter(
                pl.any_horizontal(pl.col("path").str.starts_with(prefix) for prefix in self._prefixes())
            )
        self._note = note
        if self._building:
            # Every process gets a copy of the builder: the labels of 800,035 ECGs stay in a file that they map.
            path = Path(self._output_dir) / LABELS_FILE
            labels.write_ipc_stream(path, compat_level=pl.CompatLevel.oldest())
            self._labels = datasets.Dataset.from_file(str(path))
        else:
            self._labels = datasets.Dataset.from_polars(labels)
        return [
            RecordEntry(
                record_id=str(study_id),
                patient_id=str(subject_id),
                split=split_of_patient(str(subject_id), SPLIT_SHARES),
                files=(f"{path}.hea", f"{path}.dat"),
                facts={"row": row},
            )
            for row, (study_id, subject_id, path) in enumerate(
                labels.select("study_id", "subject_id", "path").iter_rows()
            )
        ]

    def _download_and_prepare(self, *args: Any, **kwargs: Any) -> None:
        super()._download_and_prepare(*args, **kwargs)
        self.info.description = f"{self.info.description} {self._note}"

    def read_record(self, entry: RecordEntry) -> Iterator[dict[str, Any]]:
        ecg = read_ecg(self.folder / entry.files[0])
        if ecg.sampling_rate != SAMPLING_RATE or ecg.signal.shape != self.signal_shape():
            raise EcgFileError(
                f"expected shape {self.signal_shape()} at {SAMPLING_RATE} Hz, found {ecg.signal.shape} at "
                f"{ecg.sampling_rate:g} Hz"
            )
        known = self._labels[entry.facts["row"]]
        lines = (known["report"] or "").split("\n")
        yield {
            "record_id": entry.record_id,
            "patient_id": entry.patient_id,
            **signal_columns(ecg),
            "age": known["age"],
            "age_over_89": known["age_over_89"],
            "sex": known["sex"],
            "recording_date": known["ecg_time"],
            "report": known["report"],
            "report_class": first_line_class(lines),
            "report_classes": stated_classes(lines),
            "arrhythmia": rhythm_statements(lines),
            **{name: known[name] for name in _TAKEN_OVER},
        }


def _dated_folders(files: Path) -> Iterator[str]:
    """The folders of patients and studies with the time of their last change: files that came or went show there, and
    a look at each of 1.6 million files is spared."""
    for group in sorted(files.glob("p*/")):
        for patient in sorted(os.scandir(group), key=lambda entry: entry.name):
            if patient.is_dir():
                yield f"{patient.name} {patient.stat().st_mtime_ns}"
                with os.scandir(patient) as studies:
                    times = [study.stat().st_mtime_ns for study in studies]
                yield f"{len(times)} {sum(times)}"
