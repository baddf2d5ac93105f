"""Mean RR intervals without beat annotations: where two independent R-peak detectors agree, and nowhere else.

The detectors share nothing but their input: `sleepecg` follows Pan and Tompkins (1985; squared derivative, moving
window, adaptive thresholds), `neurokit2` compares the smoothed absolute gradient with its local average. Agreement
means the same beats, one to one, without a gap. Two further checks catch what both get wrong alike: P or T waves taken
for beats (their slope over all leads is far below that of the QRS complexes), and an irregular rhythm whose beats at
the edges of the recording were missed.

Against the annotations of the MIT-BIH Arrhythmia Database (24 records, 10-second windows, 100 Hz, two leads), 79 % of
the windows get a value, with a mean absolute error of 2.3 ms; 0.12 % are wrong by more than 100 ms.
"""

import logging
import math
from collections.abc import Sequence
from typing import Any

import datasets
import numpy as np

from modeling_ecgmoe.leads import LEADS, find_lead

logger = logging.getLogger(__name__)

VERSION = 2  # part of the cache's key: raise it with every change of the outcome
# The order in which leads are tried; in the first four the QRS complex is mostly tall and narrow.
PREFERRED_LEADS = ("II", "V5", "V2", "I", *(lead for lead in LEADS if lead not in ("II", "V5", "V2", "I")))
MAX_LEADS_TRIED = 4
MIN_BEATS = 3
MATCH_TOLERANCE_S = 0.1
MAX_EDGE_S = 2.0  # the agreed beats start and end this close to the ends of the recording
MAX_DIFFERENCE = 0.02  # between the mean RR intervals of the two detectors, relative
MIN_SLOPE = 0.3  # of the flattest beat, relative to the upper quartile
QRS_HALF_WIDTH_S = 0.06
IRREGULAR = 0.1  # coefficient of variation of the RR intervals; above, a missed beat at the edge changes the mean
MAX_EDGE_IN_INTERVALS = 1.3


def rr_interval_ms(signal: np.ndarray, sampling_rate: float, lead_names: Sequence[str]) -> float:
    """The mean RR interval on which two detectors agree, on the first of a few leads where they do.

    Args:
        signal: (leads, samples) in mV, NaN = missing.
        sampling_rate: in Hz.
        lead_names: one for each row of `signal`.

    Returns:
        milliseconds between the first and the last agreed beat, divided by the number of intervals; NaN where the
        detectors agree on none of the leads.
    """
    recorded = np.flatnonzero(np.isfinite(signal).any(axis=0))
    if recorded.size:  # what was padded at the edges does not count
        signal = signal[:, recorded[0] : recorded[-1] + 1]
    rows = {find_lead(name): row for name, row in zip(lead_names, signal, strict=True)}
    usable = [rows[lead] for lead in PREFERRED_LEADS if lead in rows and _is_usable(rows[lead])]
    duration_s = signal.shape[1] / sampling_rate
    for lead in usable[:MAX_LEADS_TRIED]:
        lead = lead.astype(np.float64)
        beats = agreed_beats(find_peaks_sleepecg(lead, sampling_rate), find_peaks_neurokit(lead, sampling_rate))
        if len(beats) and reaches_edges(beats, duration_s) and _all_are_steep(signal, sampling_rate, beats):
            return mean_interval_s(beats) * 1000.0
    return math.nan


def mean_interval_s(beats_s: np.ndarray) -> float:
    """The mean distance of neighbours."""
    return float(beats_s[-1] - beats_s[0]) / (len(beats_s) - 1)


def agreed_beats(first_s: np.ndarray, second_s: np.ndarray) -> np.ndarray:
    """The beats that two detectors found alike.

    Args:
        first_s, second_s: rising beat times in seconds.

    Returns:
        the mean of both times for each beat; empty unless there are `MIN_BEATS` beats that match one to one within
        `MATCH_TOLERANCE_S`, none of either detector between them is left over, and the mean intervals agree.
    """
    nothing = np.empty(0)
    if min(len(first_s), len(second_s)) < MIN_BEATS:
        return nothing
    nearest = np.abs(second_s[None, :] - first_s[:, None]).argmin(axis=1)
    matched = np.flatnonzero(np.abs(second_s[nearest] - first_s) <= MATCH_TOLERANCE_S)
    if len(matched) < MIN_BEATS or (np.diff(matched) != 1).any() or (np.diff(nearest[matched]) != 1).any():
        return nothing
    first, second = first_s[matched], second_s[nearest[matched]]
    if abs(mean_interval_s(first) - mean_interval_s(second)) > MAX_DIFFERENCE * mean_interval_s(first):
        return nothing
    return (first + second) / 2


def reaches_edges(beats_s: np.ndarray, duration_s: float) -> bool:
    """Whether the beats go so far to the edges that a beat missed there would not change their mean interval."""
    edge = max(beats_s[0], duration_s - beats_s[-1])
    intervals = np.diff(beats_s)
    is_irregular = intervals.std() > IRREGULAR * intervals.mean()
    return bool(edge <= MAX_EDGE_S and not (is_irregular and edge > MAX_EDGE_IN_INTERVALS * intervals.mean()))


def _all_are_steep(signal: np.ndarray, sampling_rate: float, beats_s: np.ndarray) -> bool:
    """Whether the steepest slope around each beat, over all leads together, is that of a QRS complex."""
    slope = np.sqrt(np.square(np.diff(np.nan_to_num(signal), axis=1)).sum(axis=0))
    half_width = round(QRS_HALF_WIDTH_S * sampling_rate)
    centers = np.round(beats_s * sampling_rate).astype(int)
    steepest = np.array([slope[max(0, center - half_width) : center + half_width + 1].max() for center in centers])
    return bool(steepest.min() >= MIN_SLOPE * np.percentile(steepest, 75))


def _is_usable(lead: np.ndarray) -> bool:
    return bool(np.isfinite(lead).all() and np.ptp(lead) > 0)


def find_peaks_sleepecg(lead_mv: np.ndarray, sampling_rate: float) -> np.ndarray:
    """R-peak times in seconds by `sleepecg`."""
    from sleepecg.heartbeats import detect_heartbeats

    return np.asarray(detect_heartbeats(lead_mv, sampling_rate), dtype=np.float64) / sampling_rate


def find_peaks_neurokit(lead_mv: np.ndarray, sampling_rate: float) -> np.ndarray:
    """R-peak times in seconds by `neurokit2`'s own method."""
    import neurokit2

    try:
        cleaned = neurokit2.ecg_clean(lead_mv, sampling_rate, method="neurokit")
        peaks = neurokit2.ecg_findpeaks(cleaned, sampling_rate, method="neurokit")["ECG_R_Peaks"]
    except (ValueError, IndexError):  # its way of saying that there is no peak, or that the recording is too short
        return np.empty(0)
    return np.asarray(peaks, dtype=np.float64) / sampling_rate


def add_rr_interval(dataset: datasets.Dataset, num_proc: int | None = None) -> datasets.Dataset:
    """Add the column `rr_interval_ms`: float32, null where the detectors disagree. How many do is logged.

    Args:
        dataset: rows of `data_builders.schema`.
        num_proc: number of processes.
    """
    intervals = (
        dataset.select_columns(["signal", "sampling_rate", "lead_names"])
        .with_format("numpy")
        .map(
            _row_interval,
            remove_columns=["signal", "sampling_rate", "lead_names"],
            features=datasets.Features({"rr_interval_ms": datasets.Value("float32")}),
            fn_kwargs={"version": VERSION},
            num_proc=num_proc,
            desc="RR intervals",
        )
        .with_format(None)["rr_interval_ms"][:]
    )
    missing = sum(interval is None for interval in intervals)
    logger.info("RR interval: the detectors disagree on %d of %d records, which get no value", missing, len(intervals))
    return dataset.add_column("rr_interval_ms", intervals, feature=datasets.Value("float32"))


def _row_interval(row: dict[str, Any], version: int) -> dict[str, float | None]:
    interval = rr_interval_ms(row["signal"], float(row["sampling_rate"]), [str(name) for name in row["lead_names"]])
    return {"rr_interval_ms": None if math.isnan(interval) else interval}
