"""Miniatures of the public data sets, in the layouts of their publishers, with synthetic hearts."""

import csv
import hashlib
import shutil
from pathlib import Path

import h5py
import numpy as np
import wfdb

from data_builders.synthetic import synthetic_ecg
from modeling_ecgmoe.ecg_files import Ecg
from modeling_ecgmoe.leads import LEADS

LUDB_COLUMNS = (
    "ID", "Sex", "Age", "Rhythms", "Electric axis of the heart", "Conduction abnormalities", "Extrasystolies",
    "Hypertrophies", "Cardiac pacing", "Ischemia", "Non-specific repolarization abnormalities", "Other states",
)  # fmt: skip


def heart(seed: int, rate_hz: int, duration_s: float = 10.0) -> Ecg:
    return synthetic_ecg(sampling_rate=rate_hz, duration_s=duration_s, seed=seed, noise_mv=0.01, variation=0.1).ecg


def write_mat(ecg: Ecg, folder: Path, name: str, comments: list[str]) -> None:
    """A record as the challenges ship it: 16-bit counts of microvolts behind the 24 bytes of a MATLAB 4 header."""
    folder.mkdir(parents=True, exist_ok=True)
    counts = np.round(ecg.signal * 1000).astype("<i2")
    num_leads, num_samples = counts.shape
    (folder / f"{name}.mat").write_bytes(bytes(24) + counts.T.tobytes())
    lines = [f"{name} {num_leads} {ecg.sampling_rate:g} {num_samples} 05-May-2020 14:50:55"]
    for lead, row in zip(ecg.lead_names, counts, strict=True):
        lines.append(f"{name}.mat 16+24 1000/mV 16 0 {row[0]} 0 0 {lead}")
    lines += [f"#{comment}" for comment in comments]
    (folder / f"{name}.hea").write_text("\n".join(lines) + "\n")


def write_cinc2021(folder: Path) -> Path:
    """One record of each source and some more, two of them in other folders than PhysioNet's."""
    places = {
        "A0001": "training/cpsc_2018/g1", "Q0001": "training/cpsc_2018_extra/g1", "S0001": "training/ptb/g1",
        "I0001": "training/st_petersburg_incart/g1", "I0002": "training/st_petersburg_incart/g1",
        "HR00001": "training/ptb-xl/g1", "E00001": "G12EC", "JS10646": "", "JS10647": "training/ningbo/g1",
        "JS10648": "training/ningbo/g1", **{f"E{n:05d}": "training/georgia/g1" for n in range(2, 30)},
    }  # fmt: skip
    said = {
        "A0001": ["Age: 74", "Sex: Male", "Dx: 59118001,426783006", "Rx: Unknown", "Hx: Unknown", "Sx: Unknown"],
        "Q0001": ["Age: NaN", "Sex: F", "Dx: 164889003,999", "Rx: Aspirin"],
        "S0001": ["Age: -1", "Sex: Unknown", "Dx: 164865005"],
        "HR00001": ["Age: 300", "Sex: female", "Dx: 164890007"],
        "JS10647": ["Age: 20", "Sex: M", "Dx: 164890007,426177001"],
    }
    for seed, (name, place) in enumerate(places.items()):
        rate_hz = 257 if name[0] == "I" else 1000 if name[0] == "S" else 500
        ecg = heart(seed, rate_hz, duration_s=12.0 if name[0] == "I" else 10.0)
        write_mat(ecg, folder / place, name, said.get(name, ["Age: 60", "Sex: Female", "Dx: 426783006"]))
    return folder


def write_cinc2017(folder: Path, with_validation: bool = True) -> Path:
    """Six records of different length, two of which the validation folder repeats; two revisions of the labels."""
    labels = {"A00001": "N", "A00002": "A", "A00003": "O", "A00004": "~", "A00005": "N", "A00006": "A"}
    for seed, name in enumerate(labels):
        ecg = heart(seed, 300, duration_s=9 + seed)
        single = Ecg(ecg.signal[:1], ecg.sampling_rate, ("ECG",))
        write_mat(single, folder / "training" / "A00", name, [])
        if with_validation and name in ("A00002", "A00005"):
            write_mat(single, folder / "validation", name, [])
    _write_labels(folder / "training" / "REFERENCE.csv", labels | {"A00004": "N"})
    _write_labels(folder / "REFERENCE-v3.csv", labels)
    if with_validation:
        _write_labels(folder / "validation" / "REFERENCE.csv", {"A00002": "A", "A00005": "N"})
    return folder


def _write_labels(path: Path, labels: dict[str, str]) -> None:
    path.write_text("".join(f"{name},{label}\n" for name, label in labels.items()))


def write_mitdb(folder: Path, names: tuple[str, ...] = ("102", "201", "202")) -> Path:
    """Record 100, made of one repeated stretch of ten seconds with a beat each second, and copies of it."""
    folder.mkdir(parents=True, exist_ok=True)
    piece = synthetic_ecg(rate_bpm=60, sampling_rate=360, noise_mv=0.01).ecg.signal[[1, 6]]
    signal = np.tile(piece, 181)[:, :650_000]
    wfdb.wrsamp(
        "100", fs=360, units=["mV"] * 2, sig_name=["MLII", "V1"], p_signal=signal.T.astype(np.float64),
        fmt=["212"] * 2, adc_gain=[200.0] * 2, baseline=[1024] * 2, write_dir=str(folder),
        comments=["69 M 1085 1629 x1", "Digoxin"],
    )  # fmt: skip
    beats = np.arange(180, 650_000, 360)
    symbols = ["V" if i % 7 == 3 else "N" for i in range(len(beats))]
    # The rhythm begins at sample 20, turns at 5 s into bigeminy and at 15 s into a rhythm without a statement.
    samples = np.array([20, 1801, 5401, *beats])
    notes = ["(N", "(B", "(NOD", *[""] * len(beats)]
    order = np.argsort(samples, kind="stable")
    wfdb.wrann(
        "100", "atr", samples[order], symbol=[["+", "+", "+", *symbols][i] for i in order],
        aux_note=[notes[i] for i in order], write_dir=str(folder),
    )  # fmt: skip
    header = (folder / "100.hea").read_text().replace("69 M", "-1 F").replace("Digoxin", "None")
    for name in names:
        for suffix in ("dat", "atr"):
            shutil.copy(folder / f"100.{suffix}", folder / f"{name}.{suffix}")
        own = header.replace("100 2 360", f"{name} 2 360").replace("100.dat", f"{name}.dat")
        (folder / f"{name}.hea").write_text(own)
    return folder


def write_ludb(folder: Path, num_records: int = 12) -> Path:
    """Records whose gains make every lead swing by 1, as in the release; record 12 has honest gains."""
    (folder / "data").mkdir(parents=True)
    rows = []
    for number in range(1, num_records + 1):
        truth = synthetic_ecg(rate_bpm=60, sampling_rate=500, seed=number, noise_mv=0.005)
        counts = np.round(truth.ecg.signal.T * 1000).astype(np.int64)
        swings = np.ptp(counts, axis=0)
        wfdb.wrsamp(
            str(number), fs=500, units=["mV"] * 12, sig_name=[lead.lower() for lead in LEADS], d_signal=counts,
            fmt=["16"] * 12, adc_gain=[1000.0] * 12 if number == 12 else [float(s) for s in swings],
            baseline=[0 if number == 12 else 3] * 12, write_dir=str(folder / "data"),
        )  # fmt: skip
        peaks = np.round(truth.r_peaks_s * 500).astype(int)[2:-2]
        for lead in LEADS:
            # The last QRS complex has no end.
            samples = np.array([[p - 20, p, p + 20, p + 110, p + 140, p + 165] for p in peaks]).ravel()
            symbols = ["(", "N", ")", "(", "t", ")"] * len(peaks)
            last = len(samples) - 4
            wfdb.wrann(
                str(number), "x", np.delete(samples, last), symbol=symbols[:last] + symbols[last + 1 :],
                write_dir=str(folder / "data"),
            )  # fmt: skip
            # The library writes no suffix with a digit in it.
            (folder / "data" / f"{number}.x").rename(folder / "data" / f"{number}.{lead.lower()}")
        row = dict.fromkeys(LUDB_COLUMNS, "") | {
            "ID": number, "Sex": "M\n" if number % 2 else "F\n", "Age": ">89\n" if number == 3 else f"{20 + number}\n",
            "Rhythms": "Atrial fibrillation" if number == 2 else "Sinus bradycardia\nSinus arrhythmia",
            "Hypertrophies": "Left atrial hypertrophy\nLeft ventricular hypertrophy",
            "Cardiac pacing": "Unipolar ventricular pacing" if number == 4 else "",
        }  # fmt: skip
        rows.append(row)
    with (folder / "ludb.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, LUDB_COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    return folder


def write_code15(folder: Path, num_exams: int = 24) -> Path:
    """Two files; exam 1000 + i is of patient 1 + i // 2, every third lasts 7 s; files end with an unused place."""
    folder.mkdir(parents=True)
    rows = []
    for part in range(2):
        exams = [1000 + i for i in range(num_exams) if i % 2 == part]
        tracings = np.zeros((len(exams) + 1, 4096, 12), np.float32)
        for place, exam in enumerate(exams):
            num_samples = 2800 if exam % 3 == 0 else 4000
            start = (4096 - num_samples) // 2
            signal = heart(exam, 400, num_samples / 400).signal
            tracings[place, start : start + num_samples] = signal.T
            rows.append(
                {
                    "exam_id": exam, "age": 30 + place, "is_male": exam % 2 == 0, "nn_predicted_age": 31.5,
                    "1dAVb": False, "RBBB": False, "LBBB": False, "SB": exam == 1001, "ST": False, "AF": exam == 1002,
                    "patient_id": 1 + (exam - 1000) // 2, "death": "" if exam % 2 else False,
                    "timey": "" if exam % 2 else 2.5, "normal_ecg": exam > 1010,
                    "trace_file": f"exams_part{part}.hdf5",
                }
            )  # fmt: skip
        with h5py.File(folder / f"exams_part{part}.hdf5", "w") as file:
            file["exam_id"] = np.array([*exams, 0], np.int64)
            file.create_dataset("tracings", data=tracings, chunks=(4, 4096, 12), compression="gzip")
    with (folder / "exams.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(sorted(rows, key=lambda row: row["exam_id"]))
    return folder


def write_sums(folder: Path) -> None:
    """PhysioNet's list of all files and their digests."""
    lines = [
        f"{hashlib.sha256(path.read_bytes()).hexdigest()} {path.relative_to(folder).as_posix()}"
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    ]
    (folder / "SHA256SUMS.txt").write_text("\n".join(lines) + "\n")
