"""MIMIC-IV-ECG and MIMIC-IV's hosp tables in miniature, in the layouts of PhysioNet, with synthetic hearts."""

import csv
import gzip
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import polars as pl

from data_builders.synthetic import synthetic_ecg, write_wfdb
from modeling_ecgmoe.ecg_files import Ecg

# The files of MIMIC-IV-ECG have aVF before aVL.
MIMIC_LEADS = ("I", "II", "III", "aVR", "aVF", "aVL", "V1", "V2", "V3", "V4", "V5", "V6")
REPORT_COLUMNS = [f"report_{number}" for number in range(18)]
WAVES = ("p_onset", "p_end", "qrs_onset", "qrs_end", "t_end", "p_axis", "qrs_axis", "t_axis")
# fmt: off
LAB_COLUMNS = (
    "labevent_id", "subject_id", "hadm_id", "specimen_id", "itemid", "order_provider_id", "charttime", "storetime",
    "value", "valuenum", "valueuom", "ref_range_lower", "ref_range_upper", "flag", "priority", "comments",
)
# fmt: on
PATIENT_COLUMNS = ("subject_id", "gender", "anchor_age", "anchor_year", "anchor_year_group", "dod")
ADMISSION_COLUMNS = ("subject_id", "hadm_id", "admittime", "dischtime", "edregtime", "edouttime")
SERUM, WHOLE_BLOOD, SODIUM = 50971, 50822, 50983


@dataclass(frozen=True)
class MimicEcg:
    """One ECG: whose, when, what the machine says, and the heart behind it."""

    subject_id: int
    study_id: int
    ecg_time: datetime
    reports: Sequence[str] = ("Sinus rhythm", "Normal ECG")
    rr_interval: float = 800
    heart: Mapping[str, Any] = field(default_factory=lambda: {"rate_bpm": 75})

    @property
    def path(self) -> str:
        patient = f"p{self.subject_id:08d}"
        return f"files/{patient[:5]}/{patient}/s{self.study_id}/{self.study_id}"


def lab(
    subject_id: int, charttime: datetime, valuenum: float | str = 4.0, itemid: int = SERUM, **more: Any
) -> dict[str, Any]:
    """A row of labevents; `more` replaces what is usual."""
    usual = {"value": valuenum, "valueuom": "mEq/L", "ref_range_lower": 3.3, "ref_range_upper": 5.1, "specimen_id": 1}
    return {"subject_id": subject_id, "charttime": charttime, "valuenum": valuenum, "itemid": itemid} | usual | more


def write_table(
    folder: Path, name: str, columns: Sequence[str], rows: Sequence[Mapping[str, Any]], suffix: str, eol: str = "\n"
) -> Path:
    """Write a table as .csv, .csv.gz or .parquet; a row lacks what is empty."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}{suffix}"
    if suffix == ".parquet":
        texts = {c: [None if row.get(c) in (None, "") else str(row[c]) for row in rows] for c in columns}
        frame = pl.DataFrame(texts, schema=dict.fromkeys(columns, pl.String))
        typed = [c for c in columns if c.endswith("_id") and c not in ("order_provider_id", "cart_id")] + ["itemid"]
        times = [c for c in columns if c.endswith("time")]
        frame.with_columns(pl.col(c).cast(pl.Int64) for c in typed if c in columns).with_columns(
            pl.col(times).str.to_datetime("%Y-%m-%d %H:%M:%S")
        ).write_parquet(path)
        return path
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, restval="", lineterminator=eol)
    writer.writeheader()
    writer.writerows(rows)
    written = text.getvalue().encode()
    path.write_bytes(gzip.compress(written) if suffix == ".csv.gz" else written)
    return path


def write_ecg_tables(folder: Path, ecgs: Sequence[MimicEcg], suffix: str = ".csv", eol: str = "\n") -> None:
    """`record_list` and `machine_measurements`."""
    listed, measured = [], []
    for ecg in ecgs:
        ids = {"subject_id": ecg.subject_id, "study_id": ecg.study_id, "ecg_time": ecg.ecg_time}
        listed.append(ids | {"file_name": ecg.study_id, "path": ecg.path})
        waves = dict(zip(WAVES, (40, 29999, 200, 290, 600, 32767, 30, -32768), strict=True))
        reports = dict(zip(REPORT_COLUMNS, ecg.reports, strict=False))
        machine = {"cart_id": 6848296, "bandwidth": "0.005-150 Hz", "filtering": "60 Hz notch Baseline filter"}
        measured.append(ids | machine | reports | waves | {"rr_interval": ecg.rr_interval})
    write_table(
        folder, "record_list", ("subject_id", "study_id", "file_name", "ecg_time", "path"), listed, suffix, eol
    )
    columns = ("subject_id", "study_id", "cart_id", "ecg_time", *REPORT_COLUMNS, "bandwidth", "filtering")
    write_table(folder, "machine_measurements", (*columns, "rr_interval", *WAVES), measured, suffix, eol)


def write_recordings(folder: Path, ecgs: Sequence[MimicEcg]) -> None:
    """Ten seconds at 500 Hz for each ECG, as MIMIC writes them: format 16, 200 units a millivolt."""
    for ecg in ecgs:
        heart = synthetic_ecg(seed=ecg.study_id, noise_mv=0.01, variation=0.1, **ecg.heart).ecg
        order = [heart.lead_names.index(name) for name in MIMIC_LEADS]
        stored = Ecg(heart.signal[order], heart.sampling_rate, MIMIC_LEADS)
        path = folder / ecg.path
        write_wfdb(stored, path.parent, path.name, gain=200.0)


def write_hosp(
    folder: Path,
    labs: Sequence[Mapping[str, Any]],
    patients: Sequence[Mapping[str, Any]],
    admissions: Sequence[Mapping[str, Any]] | None = None,
    suffix: str = ".csv.gz",
    eol: str = "\n",
) -> Path:
    """`labevents`, `patients` and `admissions`; each laboratory row gets the number of its place where it has none."""
    numbered = [{"labevent_id": number, "storetime": row["charttime"]} | row for number, row in enumerate(labs, 1)]
    write_table(folder, "labevents", LAB_COLUMNS, numbered, suffix, eol)
    write_table(folder, "patients", PATIENT_COLUMNS, patients, suffix, eol)
    if admissions is not None:
        write_table(folder, "admissions", ADMISSION_COLUMNS, admissions, suffix, eol)
    return folder


def write_mini_mimic(folder: Path, num_patients: int = 40) -> tuple[Path, Path]:
    """MIMIC-IV-ECG with two recordings a patient, and the hosp tables that go with them.

    Patient i (from 0) is 10000001 + i. The first ECG has a potassium value 10 minutes before it: 2.9, 4.2 or 6.4 in
    turn, in mmol/L; the second, a day later, has none. High potassium slows the heart, low potassium quickens it.

    Returns:
        `data_dir` and `clinical_dir`.
    """
    ecgs, labs, patients = [], [], []
    for i in range(num_patients):
        subject_id, when = 10_000_001 + i, datetime(2150, 3, 1, 8) + timedelta(days=40 * i)
        value, heart, reports, rr_interval = (
            (2.9, {"rate_bpm": 110}, ("Sinus tachycardia",), 545),
            (4.2, {"rate_bpm": 75}, ("Sinus rhythm",), 800),
            (6.4, {"rate_bpm": 48}, ("Sinus bradycardia with 1st degree A-V block", "Abnormal ECG"), 1250),
        )[i % 3]
        ecgs.append(MimicEcg(subject_id, 40_000_000 + 2 * i, when, reports, rr_interval, heart))
        later = when + timedelta(days=1)
        ecgs.append(MimicEcg(subject_id, 40_000_001 + 2 * i, later, ("Atrial fibrillation",), 29999, {"rate_bpm": 90}))
        labs.append(lab(subject_id, when - timedelta(minutes=10), value))
        labs.append(lab(subject_id, when, 140, SODIUM))
        anchor = {"anchor_age": 91 if i % 10 == 9 else 40 + i, "anchor_year": when.year - 2}
        patients.append({"subject_id": subject_id, "gender": "MF"[i % 2]} | anchor)
    admitted = [
        {"subject_id": e.subject_id, "hadm_id": 20_000_000 + e.study_id, "admittime": e.ecg_time - timedelta(hours=3),
         "dischtime": e.ecg_time + timedelta(hours=5)}
        for e in ecgs[::2]
    ]  # fmt: skip
    data_dir, clinical_dir = folder / "mimic-iv-ecg", folder / "mimiciv"
    write_ecg_tables(data_dir, ecgs)
    write_recordings(data_dir, ecgs)
    write_hosp(clinical_dir / "hosp", labs, patients, admitted)
    return data_dir, clinical_dir
