"""How well and how fast R peaks are found: `find_r_peaks` beside sleepecg, neurokit2 and wfdb's XQRS.

    python -m benchmarks.r_peaks --mitdb mit-bih-arrhythmia-database-1.0.0 --ludb ludb

Both folders are as PhysioNet ships them, or parts of them. A beat is found where a peak lies within 50 ms of its mark,
one to one. Whole records and, as the model works, 10-second windows. MIT-BIH: lead MLII, or the first lead of records
without it (102, 104: V5), or both leads; with ventricular flutter ("all") and without ("[" to "]", in record 207).
LUDB: between the first and the last mark, as only that is annotated; lead II, or twelve leads against the median of
the leads' marks. The parameters of `find_r_peaks` were chosen on every other record of MIT-BIH, "half chosen on".
Time is of the processor, one thread, the detectors in turn on each record; those for one lead are timed on lead II
and on all leads one after the other.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before numpy

import argparse
import json
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import neurokit2
import numpy as np
import torch
import wfdb
from sleepecg.heartbeats import detect_heartbeats
from wfdb.processing import XQRS

from benchmarks.quality import ROOT, origin
from modeling_ecgmoe.beats import find_r_peaks, mean_rr_s
from modeling_ecgmoe.ecg_files import Ecg, read_ecg

BEAT_SYMBOLS = list("NLRBAaJSVrFejnE/fQ?")
TOLERANCE_S = 0.05
WINDOW_S = 10.0
MIN_WINDOW_S = 2.0
PACKAGES = ("numpy", "scipy", "sleepecg", "neurokit2", "wfdb")
Detector = Callable[[np.ndarray, float], np.ndarray]


@dataclass(frozen=True)
class Record:
    """One recording and its truth.

    Args:
        name: of the file.
        ecg: as read.
        lead: the row that detectors for one lead get.
        marks_s: of the beats on that lead.
        marks_all_s: of the beats on all leads together.
        flutter_s: (first, last) of each stretch of ventricular flutter.
        span_s: (first, last) of what is annotated.
    """

    name: str
    ecg: Ecg
    lead: int
    marks_s: np.ndarray
    marks_all_s: np.ndarray
    flutter_s: list[tuple[float, float]]
    span_s: tuple[float, float]


def find_by_sleepecg(signal: np.ndarray, sampling_rate: float) -> np.ndarray:
    """R peaks in seconds, of (1, samples)."""
    return np.asarray(detect_heartbeats(signal[0].astype(np.float64), sampling_rate)) / sampling_rate


def find_by_neurokit(signal: np.ndarray, sampling_rate: float) -> np.ndarray:
    """R peaks in seconds, of (1, samples)."""
    try:
        cleaned = neurokit2.ecg_clean(signal[0].astype(np.float64), sampling_rate, method="neurokit")
        peaks = neurokit2.ecg_findpeaks(cleaned, sampling_rate, method="neurokit")["ECG_R_Peaks"]
    except (ValueError, IndexError):  # its way of saying that there is no peak
        return np.empty(0)
    return np.asarray(peaks) / sampling_rate


def find_by_xqrs(signal: np.ndarray, sampling_rate: float) -> np.ndarray:
    """R peaks in seconds, of (1, samples)."""
    xqrs = XQRS(signal[0].astype(np.float64), sampling_rate)
    xqrs.detect(verbose=False)
    return np.asarray(xqrs.qrs_inds) / sampling_rate


DETECTORS: dict[str, Detector] = {
    "find_r_peaks": find_r_peaks,
    "sleepecg": find_by_sleepecg,
    "neurokit2": find_by_neurokit,
    "wfdb XQRS": find_by_xqrs,
}


def read_mitdb(folder: Path) -> list[Record]:
    """The records of the MIT-BIH Arrhythmia Database that are there."""
    records = []
    for path in sorted(folder.glob("*.hea")):
        ecg, names = read_ecg(path), wfdb.rdheader(str(path.with_suffix(""))).sig_name
        marks = wfdb.rdann(str(path.with_suffix("")), "atr")
        symbols, times_s = np.array(marks.symbol), marks.sample / ecg.sampling_rate
        beats_s = times_s[np.isin(symbols, BEAT_SYMBOLS)]
        flutter_s = list(zip(times_s[symbols == "["], times_s[symbols == "]"], strict=True))
        lead = names.index("MLII") if "MLII" in names else 0
        end_s = ecg.signal.shape[1] / ecg.sampling_rate
        records.append(Record(path.stem, ecg, lead, beats_s, beats_s, flutter_s, (0.0, end_s)))
    return records


def read_ludb(folder: Path) -> list[Record]:
    """The records of the Lobachevsky University Database that are there."""
    records = []
    for path in sorted((folder / "data").glob("*.hea")):
        ecg, names = read_ecg(path), wfdb.rdheader(str(path.with_suffix(""))).sig_name
        files = [wfdb.rdann(str(path.with_suffix("")), name) for name in names]
        peaks = [marks.sample[np.array(marks.symbol) == "N"] / ecg.sampling_rate for marks in files]
        lead = names.index("ii")
        agreed = np.median([beats for beats in peaks if len(beats) == len(peaks[lead])], axis=0)
        edges = [edge for marks in files for edge in (marks.sample[0], marks.sample[-1])]
        span_s = (
            min(min(edges) / ecg.sampling_rate, agreed[0] - TOLERANCE_S),
            max(max(edges) / ecg.sampling_rate, agreed[-1] + TOLERANCE_S),
        )
        records.append(Record(path.stem, ecg, lead, peaks[lead], agreed, [], span_s))
    return records


def count(marks_s: np.ndarray, found_s: np.ndarray, tolerance_s: float = TOLERANCE_S) -> tuple[int, int, int]:
    """Found, missed and false beats. In the order of time, which pairs as many as can be, one to one."""
    hits = mark = peak = 0
    while mark < len(marks_s) and peak < len(found_s):
        distance_s = found_s[peak] - marks_s[mark]
        is_hit = abs(distance_s) <= tolerance_s
        hits += is_hit
        mark, peak = mark + (is_hit or distance_s > 0), peak + (is_hit or distance_s < 0)
    return hits, len(marks_s) - hits, len(found_s) - hits


def find_in_windows(find: Detector, signal: np.ndarray, sampling_rate: float) -> np.ndarray:
    """The peaks of all 10-second windows, none of which knows its neighbours; a rest under 2 s is left out."""
    length = round(WINDOW_S * sampling_rate)
    starts = range(0, signal.shape[1] - round(MIN_WINDOW_S * sampling_rate) + 1, length)
    found = [find(signal[:, start : start + length], sampling_rate) + start / sampling_rate for start in starts]
    return np.concatenate(found)


def outside(times_s: np.ndarray, stretches_s: Iterable[tuple[float, float]]) -> np.ndarray:
    """The times that lie in none of the stretches."""
    for first, last in stretches_s:
        times_s = times_s[(times_s < first) | (times_s > last)]
    return times_s


def rr_errors_ms(record: Record, marks_s: np.ndarray, found_s: np.ndarray) -> list[float]:
    """The error of the mean RR interval of each 10 s without flutter; where no interval was found, the whole of it."""
    errors = []
    for start in np.arange(0.0, record.span_s[1], WINDOW_S):
        if any(first < start + WINDOW_S and last > start for first, last in record.flutter_s):
            continue
        true_s, rr_s = (mean_rr_s(t[(t >= start) & (t < start + WINDOW_S)]) for t in (marks_s, found_s))
        if np.isfinite(true_s):
            errors.append(1000.0 * abs(np.nan_to_num(rr_s) - true_s))
    return errors


def measure(
    records: Sequence[Record], find: Detector, all_leads: bool, windows: bool, resamples: int, seed: int
) -> dict[str, Any]:
    """Sensitivity, PPV and F1 with and without flutter, and the RR error; intervals by drawing records."""
    counts, counts_all, errors = [], [], []
    for record in records:
        signal = record.ecg.signal if all_leads else record.ecg.signal[record.lead : record.lead + 1]
        rate = record.ecg.sampling_rate
        marks_s = record.marks_all_s if all_leads else record.marks_s
        found_s = find_in_windows(find, signal, rate) if windows else find(signal, rate)
        found_s = found_s[(found_s >= record.span_s[0]) & (found_s <= record.span_s[1])]
        counts_all.append(count(marks_s, found_s))
        counts.append(count(outside(marks_s, record.flutter_s), outside(found_s, record.flutter_s)))
        errors.append(rr_errors_ms(record, marks_s, found_s))
    rng = np.random.default_rng(seed)
    drawn = rng.integers(len(records), size=(resamples, len(records)))
    totals, totals_all = np.array(counts), np.array(counts_all)
    sums = np.array([[sum(of_record), len(of_record)] for of_record in errors])
    metrics: dict[str, tuple[np.ndarray, Callable[[np.ndarray], np.ndarray]]] = {
        "sensitivity_%": (totals, lambda c: 100 * c[..., 0] / (c[..., 0] + c[..., 1])),
        "PPV_%": (totals, lambda c: 100 * c[..., 0] / np.maximum(1, c[..., 0] + c[..., 2])),
        "F1_%": (totals, f1_percent),
        "F1_all_%": (totals_all, f1_percent),
        "RR_error_ms": (sums, lambda c: c[..., 0] / c[..., 1]),
    }
    result: dict[str, Any] = {"beats": int(totals[:, :2].sum())}
    for name, (values, metric) in metrics.items():
        low, high = np.quantile(metric(values[drawn].sum(axis=1)), [0.025, 0.975])
        value = float(metric(values.sum(axis=0)))
        result[name] = {"value": round(value, 3), "low": round(float(low), 3), "high": round(float(high), 3)}
    result["per_record"] = {r.name: list(map(int, c)) for r, c in zip(records, counts, strict=True)}
    return result


def f1_percent(counts: np.ndarray) -> np.ndarray:
    """F1 of (..., found, missed, false)."""
    hits, missed, false = np.moveaxis(counts, -1, 0)
    return 100 * 2 * hits / np.maximum(1, 2 * hits + missed + false)


def time_detectors(records: Sequence[Record], rounds: int) -> dict[str, float]:
    """Processor milliseconds a record, the median: `find_r_peaks` on all leads and on one, the others on one and all.

    The key is the detector's name with ", all leads" or ", one lead".
    """
    spent: dict[str, list[float]] = {}
    for turn in range(rounds + 1):
        for record in records if turn else records[:1]:  # the first turn fills caches
            rate, signal = record.ecg.sampling_rate, record.ecg.signal
            one, leads = signal[record.lead : record.lead + 1], np.split(signal, len(signal))
            for name, find in DETECTORS.items():
                joint = [signal] if name == "find_r_peaks" else leads
                for kind, inputs in (("one lead", [one]), ("all leads", joint)):
                    began = time.process_time()
                    for values in inputs:
                        find(values, rate)
                    if turn:
                        spent.setdefault(f"{name}, {kind}", []).append(1000.0 * (time.process_time() - began))
    return {key: float(np.median(ms)) for key, ms in spent.items()}


def main() -> None:
    """Measure and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mitdb", type=Path, required=True, help="folder of the MIT-BIH Arrhythmia Database")
    parser.add_argument("--ludb", type=Path, required=True, help="folder of the Lobachevsky University Database")
    parser.add_argument("--resamples", type=int, default=2000, help="bootstrap resamples of records")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/r_peaks.json")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", module="neurokit2")  # it warns of every window without a peak
    mitdb, ludb = read_mitdb(options.mitdb), read_ludb(options.ludb)
    others = [name for name in DETECTORS if name != "find_r_peaks"]
    plan: list[tuple[str, str, list[Record], bool, bool, list[str]]] = [
        ("MIT-BIH, MLII", "whole", mitdb, False, False, ["find_r_peaks", *others]),
        ("MIT-BIH, MLII", "10 s", mitdb, False, True, ["find_r_peaks", *others]),
        ("MIT-BIH, MLII, half chosen on", "whole", mitdb[::2], False, False, ["find_r_peaks"]),
        ("MIT-BIH, MLII, other half", "whole", mitdb[1::2], False, False, ["find_r_peaks"]),
        ("MIT-BIH, MLII, other half", "10 s", mitdb[1::2], False, True, ["find_r_peaks"]),
        ("MIT-BIH, both leads", "whole", mitdb, True, False, ["find_r_peaks"]),
        ("MIT-BIH, both leads", "10 s", mitdb, True, True, ["find_r_peaks"]),
        ("LUDB, lead II", "whole", ludb, False, False, ["find_r_peaks", *others]),
        ("LUDB, 12 leads", "whole", ludb, True, False, ["find_r_peaks"]),
    ]
    took = {"LUDB": time_detectors(ludb, rounds=5), "MIT-BIH": time_detectors(mitdb[::6], rounds=1)}
    rows: list[dict[str, Any]] = []
    per_record: dict[str, dict[str, list[int]]] = {}
    for data, use, records, all_leads, windows, names in plan:
        for name in names:
            result = measure(records, DETECTORS[name], all_leads, windows, options.resamples, options.seed)
            per_record[f"{data}, {use}, {name}"] = result.pop("per_record")
            beats = result.pop("beats")
            row = {"records": data, "at a time": use, "detector": name, "beats": beats}
            for metric, value in result.items():
                row[metric] = f"{value['value']:.2f} [{value['low']:.2f}, {value['high']:.2f}]"
            rows.append(row)
            print(row, flush=True)
    for data, milliseconds in took.items():
        ours = milliseconds["find_r_peaks, all leads"]
        for key, value in milliseconds.items():
            name, kind = key.rsplit(", ", 1)
            what = f"{data}, {kind}, {'10 s' if data == 'LUDB' else '30 min'}"
            row = {"records": what, "at a time": "whole", "detector": name, "beats": None}
            rows.append(row | {"CPU ms": value, "CPU, find_r_peaks on all leads = 1": value / ours})
            print(rows[-1], flush=True)
    result = {
        "name": options.out.stem,
        "command": "python -m benchmarks.r_peaks --mitdb mit-bih-arrhythmia-database-1.0.0 --ludb ludb",
        **origin(),
        "seed": options.seed,
        "data": {"set": "MIT-BIH Arrhythmia Database 1.0.0 and LUDB 1.0.1", "records": len(mitdb) + len(ludb)},
        "tolerance_s": TOLERANCE_S,
        "half_chosen_on": [record.name for record in mitdb[::2]],
        "other_half": [record.name for record in mitdb[1::2]],
        "lead": {record.name: record.ecg.lead_names[record.lead] for record in mitdb},
        "found_missed_false": per_record,
        "rows": rows,
    }
    result["versions"] = {name: version(name) for name in PACKAGES}
    result["hardware"]["threads"] = torch.get_num_threads()
    options.out.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")


if __name__ == "__main__":
    main()
