"""CODE-15 %: 345,779 12-lead ECGs of the Telehealth Network of Minas Gerais with six diagnoses, in HDF5 files.

Length. Recordings of 7 or 10 seconds lie in the middle of 4096 samples at 400 Hz, zeros before and after. These zeros
are no signal and become NaN.

Amplitude. The publisher's descriptions contradict themselves ("at the scale 1e-4V: so it should be multiplied by 1000
... in V"). The PhysioNet Challenge 2025 takes the numbers for millivolts, the authors advise to scale other signals to
millivolts, and users who compared them with other sets find them about twice as large. They are read as millivolts,
and `amplitude_calibrated` is false.
"""

import csv
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from data_builders.downloads import extract_member
from data_builders.ecg_builder import EcgBuilder, Facts, RecordEntry
from data_builders.splits import split_of_patient
from modeling_ecgmoe.ecg_files import EcgFileError
from modeling_ecgmoe.leads import LEADS
from modeling_ecgmoe.tasks import RHYTHM_STATEMENTS

EXAMS_CSV = "exams.csv"
SAMPLING_RATE = 400
NUM_SAMPLES = 4096
FRACTIONS = {"train": 0.8, "validation": 0.1, "test": 0.1}
LABELS = ("1dAVb", "RBBB", "LBBB", "SB", "ST", "AF")
# What the labels about rhythm are in PTB-XL's statements. A normal ECG is one in sinus rhythm.
ARRHYTHMIA = {"SB": "SBRAD", "ST": "STACH", "AF": "AFIB", "normal_ecg": "SR"}
MAX_PART_BYTES = 2**33  # a part has some 20,000 recordings, 4 GB
_MOST_COMPRESSED = 1000  # times: what claims to hold more for its size is no data set
_CACHED_BYTES = 2**26  # of decompressed chunks, so that rows read in order unpack each chunk once
_PART = re.compile(r"exams_part\d{1,3}\.hdf5")

FACTS = Facts(
    title="CODE-15%",
    version="1.0.0",
    about=(
        "12-lead ECGs of primary care in Brazil, 2010 to 2016, a sample of 15 % of the patients of the CODE study, "
        "with six diagnoses, age, sex and survival. Split by patient. The amplitude's unit is not certain."
    ),
    host="zenodo",
    project="4916206",
    doi="10.5281/zenodo.4916206",
    license="CC BY 4.0",
    citation="""\
@misc{ribeiro2021code15,
  author = {Ribeiro, Ant{\\^o}nio H. and Paix{\\~a}o, Gabriela M. M. and Lima, Emilly M. and Horta Ribeiro, Manoel
            and Pinto Filho, Marcelo M. and Gomes, Paulo R. and Oliveira, Derick M. and Meira Jr, Wagner
            and Sch{\\"o}n, Thomas B. and Ribeiro, Antonio Luiz P.},
  title = {{CODE-15\\%}: a large scale annotated dataset of 12-lead {ECG}s (version 1.0.0)},
  publisher = {Zenodo}, year = {2021}, doi = {10.5281/zenodo.4916206}
}""",
    records=345_779,
    patients=233_770,
    sampling_rates=(SAMPLING_RATE,),
    leads="12",
    length="7 or 10 s",
    labels="6 diagnoses, age, sex, survival",
)

_STRING, _BOOL, _FLOAT = (datasets.Value(dtype) for dtype in ("string", "bool", "float32"))


class Code15(EcgBuilder):
    """The exams whose files are there; see `EcgBuilder`. Some of the 18 files make a smaller data set."""

    FACTS = FACTS
    VERSION = datasets.Version(FACTS.version)
    BUILDER_CONFIGS = [datasets.BuilderConfig(name="default", version=VERSION, description="all exams")]

    _file: Any = None  # the HDF5 file that is being read

    def signal_shape(self) -> tuple[int, int]:
        return len(LEADS), NUM_SAMPLES

    def columns(self) -> dict[str, Any]:
        return {
            "exam_id": datasets.Value("int64"),
            "amplitude_calibrated": _BOOL,  # false: see the head of this file
            "duration_s": _FLOAT,  # without the padding
            **dict.fromkeys((*LABELS, "normal_ecg"), _BOOL),
            "arrhythmia": datasets.List(_STRING),  # SCP-ECG rhythm statements; null where none is said
            "death": _BOOL,  # within the follow-up; only for a patient's first exam
            "follow_up_years": _FLOAT,
            "nn_predicted_age": _FLOAT,  # by the authors' network
            "trace_file": _STRING,
        }

    def is_wanted(self, path: str) -> bool:
        return path == EXAMS_CSV or (path.startswith("exams_part") and path.endswith(".zip"))

    def list_records(self, folder: Path) -> list[RecordEntry]:
        for archive in sorted(folder.glob("exams_part*.zip")) if self.config.data_dir is None else ():
            extract_member(archive, f"{archive.stem}.hdf5", folder, MAX_PART_BYTES)
        places: dict[str, dict[int, int]] = {}
        entries = []
        for exam in read_exams(folder):
            name, patient = exam["trace_file"], exam["patient_id"]
            if name not in places:
                places[name] = find_exams(folder / name)
            # One text for each row: hundreds of thousands of dictionaries would fill the memory.
            facts = {"place": places[name].get(int(exam["exam_id"])), "row": json.dumps(exam)}
            split = split_of_patient(patient, FRACTIONS)
            entries.append(RecordEntry(exam["exam_id"], patient, split, (name,), facts))
        # In the order of the files, so that each is read from its beginning to its end.
        return sorted(entries, key=lambda entry: (entry.files[0], entry.facts["place"] or 0))

    def read_record(self, entry: RecordEntry) -> Iterator[dict[str, Any]]:
        place = entry.facts["place"]
        if place is None:
            raise EcgFileError(f"{entry.files[0]} does not hold it")
        signal, num_samples = without_padding(self._read_tracing(self.folder / entry.files[0], place))
        yield {
            "record_id": entry.record_id,
            "patient_id": entry.patient_id,
            "signal": signal,
            "sampling_rate": SAMPLING_RATE,
            "lead_names": list(LEADS),
            "amplitude_calibrated": False,
            "duration_s": num_samples / SAMPLING_RATE,
            **describe(json.loads(entry.facts["row"])),
        }

    def _read_tracing(self, path: Path, place: int) -> np.ndarray:
        import h5py

        try:
            if self._file is None or Path(self._file.filename) != path:
                self._file = h5py.File(path, "r", rdcc_nbytes=_CACHED_BYTES)
            return np.asarray(self._file["tracings"][place], dtype=np.float32).T
        except (OSError, KeyError, RuntimeError) as error:
            raise EcgFileError(f"{path.name} cannot be read: {error}") from error

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_file": None}  # an open file does not go to another process


def read_exams(folder: Path) -> Iterator[dict[str, str]]:
    """The rows of the exam table, as text.

    Raises:
        FileNotFoundError: it is not there.
        ValueError: it lacks columns or rows, or names files that are none of the data set's.
    """
    path = folder / EXAMS_CSV
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} holds no {EXAMS_CSV}; expected it and exams_part0.hdf5 ...: {FACTS.how_to_get}"
        )
    with path.open(encoding="utf-8", newline="") as file:
        rows = csv.DictReader(file)
        needed = ("exam_id", "age", "is_male", "patient_id", "trace_file", *LABELS)
        lacking = [name for name in needed if name not in (rows.fieldnames or ())]
        if lacking:
            raise ValueError(f"{path} has no {', '.join(lacking)}; {FACTS.how_to_get}")
        for row in rows:
            exam, patient, part = (row[name] or "" for name in ("exam_id", "patient_id", "trace_file"))
            if not (exam.isdecimal() and patient and _PART.fullmatch(part)):
                raise ValueError(
                    f"{path} has a row with exam_id {exam!r}, patient_id {patient!r} and trace_file {part!r}; "
                    f"{FACTS.how_to_get}"
                )
            yield row


def find_exams(path: Path) -> dict[int, int]:
    """Exam id to its place in an HDF5 file; nothing where the file is missing.

    Raises:
        ValueError: the file is there and is not one of the data set's, as after an interrupted download.
    """
    import h5py

    if not path.is_file():
        return {}
    try:
        with h5py.File(path, "r") as file:
            found, tracings = file["exam_id"], file["tracings"]
            shape = tracings.shape
            if any(each.external or each.is_virtual for each in (found, tracings)) or shape[:1] != (found.size,):
                raise ValueError(
                    f"{path} must hold as many exam_id as tracings, both in the file itself; found {found.shape} and "
                    f"{shape}; copy it again"
                )
            if found.nbytes > path.stat().st_size * _MOST_COMPRESSED:
                raise ValueError(f"{path} claims {found.size} exams in {path.stat().st_size} bytes; copy it again")
            ids = np.asarray(found[:]).ravel()
    except (OSError, KeyError, RuntimeError) as error:
        raise ValueError(f"{path} is no whole HDF5 file with exam_id and tracings ({error}); copy it again") from error
    if shape != (len(ids), NUM_SAMPLES, len(LEADS)) or ids.dtype.kind not in "iu":
        raise ValueError(
            f"{path} must hold tracings of shape {(len(ids), NUM_SAMPLES, len(LEADS))}, found {shape}; copy it again"
        )
    return {int(exam): place for place, exam in enumerate(ids)}


def without_padding(signal: np.ndarray) -> tuple[np.ndarray, int]:
    """The signal (leads, samples) with NaN for the zeros before and after it, and how many samples are left.

    Raises:
        EcgFileError: there is nothing but zeros.
    """
    used = np.flatnonzero((signal != 0).any(axis=0))
    if not used.size:
        raise EcgFileError("it holds nothing but zeros")
    signal = signal.copy()
    signal[:, : used[0]] = np.nan
    signal[:, used[-1] + 1 :] = np.nan
    return signal, int(used[-1] - used[0] + 1)


def describe(exam: dict[str, Any]) -> dict[str, Any]:
    """The columns of an exam beside its signal, from its row in the table."""
    flags = {name: _flag(exam.get(name)) for name in (*LABELS, "normal_ecg")}
    found = {statement for name, statement in ARRHYTHMIA.items() if flags[name]}
    is_male = _flag(exam["is_male"])
    return {
        "exam_id": int(exam["exam_id"]),
        "age": _number(exam["age"]),
        "age_over_89": False,
        "sex": None if is_male is None else int(not is_male),
        **flags,
        "arrhythmia": [name for name in RHYTHM_STATEMENTS if name in found] or None,
        "death": _flag(exam.get("death")),
        "follow_up_years": _number(exam.get("timey")),
        "nn_predicted_age": _number(exam.get("nn_predicted_age")),
        "trace_file": exam["trace_file"],
    }


def _flag(text: str | None) -> bool | None:
    return {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}.get((text or "").lower())


def _number(text: str | None) -> float | None:
    return float(text) if text else None
