"""R peaks, RR intervals and cardiac phase, as pure array functions.

The detector keeps the measure of Pan and Tompkins (1985), slope energy in the band of the QRS complex, but joins all
leads into one curve and decides about the whole recording at once: its peaks are candidates, and the beats are the
chain of candidates that explains the curve best, high ones in a rhythm like that around them. One rule so replaces
thresholds that learn, blanking after a beat, the T-wave test and the search backwards.
"""

from functools import lru_cache
from math import log

import numpy as np
from scipy.fft import dct, idct, irfft, next_fast_len, rfft
from scipy.ndimage import uniform_filter1d
from scipy.signal import find_peaks

MIN_RR_S = 0.2
MAX_RR_S = 3.0
ANALYSIS_RATE_HZ = 100  # signals are averaged down to between this and twice this
QRS_BAND_HZ = (5.0, 22.0)
PEAK_BAND_HZ = (3.0, 30.0)
ENERGY_WINDOW_S = 0.09
FULL_CLEARNESS = 2.0  # less clear leads count less for where the R peak is
PEAK_SEARCH_S = 0.05
EDGE_S = 0.02  # a top closer to an end of the recording may be a slope that the end cuts

# Chosen on half of the records of the MIT-BIH Arrhythmia Database; benchmarks/r_peaks.py shows the other half apart.
REFRACTORY_S = 0.18
BEAT_HEIGHT = 0.36  # of a usual QRS complex: what stands exactly so high counts neither for a beat nor against one
NO_BEAT_HEIGHT = 0.2  # lower ones are not looked at
REFERENCE_S = 9  # each way
T_WAVE_S = 0.33  # closer neighbours must be nearly as high as each other, or one is a P or T wave
EQUAL_HEIGHT = 0.8
SHORT_RR, SHORT_RR_COST = 0.65, 0.8  # of the RR interval around; the cost is for each natural logarithm beyond it
LONG_RR, LONG_RR_COST = 1.2, 1.5
UNEQUAL_FREE, UNEQUAL_COST = 0.5, 2.0
MAX_GAIN = 1.0
PEAK_DRIFT_S = 0.07  # how far the R peak moves within the QRS complex from beat to beat, one standard deviation
RR_NEIGHBOURS = 9


def filter_band(signal: np.ndarray, sampling_rate: float, band_hz: tuple[float, float]) -> np.ndarray:
    """Band-pass without delay, by cosine transform, which continues the signal as its mirror image at both ends.

    Args:
        signal: float array (..., samples) without NaN.
        sampling_rate: Hz.
        band_hz: the half-amplitude frequencies; the edges are raised cosines from 0.7 to 1.3 of each.

    Returns:
        float array of the same shape.
    """
    return idct(dct(signal, axis=-1) * _gain(signal.shape[-1], sampling_rate, band_hz).astype(signal.dtype), axis=-1)


def rise(frequency_hz: np.ndarray, low_hz: float, high_hz: float) -> np.ndarray:
    """A raised cosine from 0 at `low_hz` to 1 at `high_hz`."""
    return 0.5 - 0.5 * np.cos(np.pi * np.clip((frequency_hz - low_hz) / (high_hz - low_hz), 0.0, 1.0))


@lru_cache(maxsize=16)
def _gain(samples: int, sampling_rate: float, band_hz: tuple[float, float]) -> np.ndarray:
    """What a band-pass leaves of each cosine, float32 (samples,)."""
    frequency_hz = np.arange(samples) * (0.5 * sampling_rate / samples)
    gain = rise(frequency_hz, 0.7 * band_hz[0], 1.3 * band_hz[0])
    gain *= 1.0 - rise(frequency_hz, 0.7 * band_hz[1], 1.3 * band_hz[1])
    gain = gain.astype(np.float32)
    gain.flags.writeable = False
    return gain


def find_r_peaks(signal: np.ndarray, sampling_rate: float) -> np.ndarray:
    """Where the heart beats.

    Args:
        signal: float array (leads, samples) or (samples,) in any unit, NaN where missing. Leads without signal do not
            disturb.
        sampling_rate: Hz.

    Returns:
        float64 (beats,), times of the R peaks in seconds from the first sample, finer than a sample; empty where no
        beat stands out.
    """
    signal = np.atleast_2d(np.asarray(signal, dtype=np.float32))
    if signal.shape[-1] < sampling_rate * MIN_RR_S * 2:
        return np.empty(0)
    step = max(1, int(sampling_rate // ANALYSIS_RATE_HZ))
    signal, known = _average(signal, step)
    rate = sampling_rate / step
    cosines = _cosines(signal)
    if not len(cosines):
        return np.empty(0)
    slow, fast = (_gain(signal.shape[-1], rate, band) for band in (PEAK_BAND_HZ, QRS_BAND_HZ))
    deflection, qrs = idct(np.stack([cosines * slow, cosines * fast]), axis=-1)
    envelope, clearness = _qrs_envelope(qrs, rate)
    candidates, _ = find_peaks(envelope, distance=max(1, int(REFRACTORY_S * rate)))
    if not len(candidates):
        return np.empty(0)
    beats = _select(candidates, envelope[candidates], rate)
    deflection *= np.minimum(clearness / FULL_CLEARNESS, 1.0)[:, None]
    peaks = _refine(beats, np.sqrt(np.einsum("ln,ln->n", deflection, deflection)), rate)
    if known is not None:
        peaks = peaks[known[np.round(peaks).astype(int)]]
    return (peaks * step + 0.5 * (step - 1)) / sampling_rate


def _average(signal: np.ndarray, step: int) -> tuple[np.ndarray, np.ndarray | None]:
    """Means of `step` samples, gaps bridged by straight lines; and where any lead is known, None for everywhere.

    Each lead begins at zero, so that one without signal is nothing but zeros whatever its offset.
    """
    if step > 1:
        samples = signal.shape[-1] // step
        whole = np.ascontiguousarray(signal[:, : samples * step])
        signal = (whole.reshape(-1, step) @ np.full(step, 1 / step, np.float32)).reshape(-1, samples)
    known = np.isfinite(signal)
    if known.all():
        return signal - signal[:, :1], None
    rows = known.any(axis=-1)
    if not rows.any():
        return signal[:0], None
    signal, known, grid = signal[rows], known[rows], np.arange(signal.shape[-1])
    signal = np.stack([np.interp(grid, grid[here], row[here]) for row, here in zip(signal, known, strict=True)])
    return (signal - signal[:, :1]).astype(np.float32), known.any(axis=0)


def _cosines(signal: np.ndarray) -> np.ndarray:
    """The cosine transform of the leads that carry a signal, without their means."""
    cosines = dct(signal, axis=-1)
    cosines[:, :1] = 0.0
    power = np.einsum("ln,ln->l", cosines, cosines) / (2.0 * signal.shape[-1] ** 2)
    alive = power > 1e-12
    return cosines if alive.all() else cosines[alive]


def _qrs_envelope(qrs: np.ndarray, rate: float) -> tuple[np.ndarray, np.ndarray]:
    """Slope energy of all leads in one curve, each lead counted by how far its QRS complexes stand above the rest.

    Args:
        qrs: (leads, samples) in the band of the QRS complex.
        rate: Hz.

    Returns:
        the curve (samples,), and of each lead (leads,) how many times its QRS complexes exceed the rest, less one.
    """
    slope = np.abs(qrs[:, 2:] - qrs[:, :-2])
    # The highest of each tenth of a second: one in ten holds a QRS complex at 60 bpm.
    highest = np.maximum.reduceat(slope, np.arange(0, slope.shape[1], max(1, int(0.1 * rate))), axis=1)
    highest.sort(axis=-1)
    middle, high = (highest[:, int(share * (highest.shape[1] - 1))] for share in (0.40, 0.93))
    clearness = np.clip(high / (middle + 1e-9) - 1.0, 0.05, 10.0)
    joined = (clearness / (high + 1e-9) / len(high)) @ slope
    energy = uniform_filter1d(joined * joined, max(1, int(ENERGY_WINDOW_S * rate)), mode="constant")
    return np.concatenate([[0.0], np.sqrt(np.maximum(energy, 0.0)), [0.0]]), clearness


def _running(values: np.ndarray, size: int, *shares: float) -> np.ndarray:
    """Quantiles of each value and its neighbours, (shares, values): of the `size` nearest, of all where fewer."""
    size = min(size, len(values))
    first = np.minimum(np.maximum(np.arange(len(values)) - size // 2, 0), len(values) - size)
    around = values[first[:, None] + np.arange(size)]
    ranks = [int(share * (size - 1) + 0.5) for share in shares]
    around.partition(ranks, axis=-1)
    return around[:, ranks].T


def _usual_height(candidates: np.ndarray, height: np.ndarray, rate: float) -> np.ndarray:
    """The height of a usual QRS complex around each candidate: the 40th percentile of each second's highest nearby.

    A heart below 42 bpm leaves so many seconds empty that this would be noise; there a share of the usual highest
    within three seconds, the longest interval, counts, and for a lonely beat a small share of the highest of all.
    """
    second = (candidates / rate).astype(int)
    best = np.zeros(second[-1] + 1)
    np.maximum.at(best, second, height)
    usual, lonely = _running(best, 2 * REFERENCE_S + 1, 0.4, 1.0)
    (of_three,) = _running(best, 3, 1.0)
    (slow,) = _running(of_three, 2 * REFERENCE_S + 1, 0.5)
    return np.maximum(np.maximum(usual, 0.35 * slow), 0.05 * lonely)[second]


def _select(candidates: np.ndarray, height: np.ndarray, rate: float) -> np.ndarray:
    """The candidates that are beats, from all of them and their heights in the envelope."""
    height = height / (_usual_height(candidates, height, rate) + 1e-12)
    seen = height > NO_BEAT_HEIGHT
    candidates, height = candidates[seen], height[seen]
    clear = candidates[_are_clear(candidates, height, rate)]
    if len(clear) < 3:
        return clear
    (rr_s,) = _running(np.diff(clear) / rate, RR_NEIGHBOURS, 0.5)
    rr_s = rr_s[np.clip(np.searchsorted(clear, candidates) - 1, 0, len(rr_s) - 1)]
    chain = _best_chain((candidates / rate).tolist(), np.log(height / BEAT_HEIGHT).tolist(), np.log(rr_s).tolist())
    return candidates[chain]


def _are_clear(candidates: np.ndarray, height: np.ndarray, rate: float) -> np.ndarray:
    """Which candidates are beats without doubt: high, and not small beside a close neighbour; bool, as candidates."""
    close = np.diff(candidates) < T_WAVE_S * rate
    clear = height > BEAT_HEIGHT
    clear[1:] &= ~(close & (height[1:] < EQUAL_HEIGHT * height[:-1]))
    clear[:-1] &= ~(close & (height[:-1] < EQUAL_HEIGHT * height[1:]))
    return clear


def _best_chain(time_s: list[float], log_height: list[float], log_rr: list[float]) -> list[int]:
    """The candidates that together gain most, by dynamic programming.

    A beat gains the logarithm of its height over `BEAT_HEIGHT`. An interval costs what it is shorter or longer than
    the intervals around it, beyond `SHORT_RR` and `LONG_RR` of them, and what its ends differ in height where they
    are as close as a T wave. Beyond the longest interval nothing costs more.

    Args:
        time_s, log_height: of each candidate, the height relative to `BEAT_HEIGHT`.
        log_rr: the usual interval around each.

    Returns:
        rising indices.
    """
    log_short, log_long, log_close, log_longest = log(SHORT_RR), log(LONG_RR), log(T_WAVE_S), log(MAX_RR_S)
    gain: list[float] = []  # of the best chain that ends here
    before: list[int] = []  # its last but one
    record: list[float] = []  # the best gain so far
    for here, now_s in enumerate(time_s):
        best, last = 0.0, -1
        short, long = log_short + log_rr[here], log_long + log_rr[here]
        for there in range(here - 1, -1, -1):
            length = log(now_s - time_s[there])
            value = gain[there]
            if length > long:
                value -= LONG_RR_COST * max(0.0, min(length, log_longest) - long)
            elif length < short:
                value -= SHORT_RR_COST * (short - length)
            if length < log_close:
                value -= UNEQUAL_COST * max(0.0, abs(log_height[here] - log_height[there]) - UNEQUAL_FREE)
            if value > best:
                best, last = value, there
            # No earlier one gains more, and the interval would only get longer.
            if length >= max(short, log_close) and gain[there] >= record[there]:
                break
        gain.append(best + min(log_height[here], MAX_GAIN))
        before.append(last)
        record.append(max(gain[-1], record[-1]) if record else gain[-1])
    here = gain.index(record[-1])
    chain = []
    while here >= 0:
        chain.append(here)
        here = before[here]
    return chain[::-1]


def _refine(beats: np.ndarray, deflection: np.ndarray, rate: float) -> np.ndarray:
    """The place of the largest deflection of all leads together around each beat, by a parabola between samples.

    Of two deflections alike, such as R and S, the one counts that lies as in the beats around. A beat whose largest
    deflection is within `EDGE_S` of an end counts as outside, at every sampling rate.
    """
    if not len(beats):
        return np.empty(0)
    last = len(deflection) - 1
    steps = np.arange(-max(1, int(PEAK_SEARCH_S * rate)), max(1, int(PEAK_SEARCH_S * rate)) + 1)
    around = np.clip(beats[:, None] + steps, 0, last)
    size = deflection[around]
    (usual,) = _running(steps[np.argmax(size, axis=1)], RR_NEIGHBOURS, 0.5)
    likely = np.exp(-0.5 * ((steps - usual[:, None]) / (PEAK_DRIFT_S * rate)) ** 2)
    best = around[np.arange(len(beats)), np.argmax(size * likely, axis=1)]
    best = best[(best > 0) & (best < last)]
    before, here, after = deflection[best - 1], deflection[best], deflection[best + 1]
    curvature = before - 2 * here + after
    shift = np.divide(0.5 * (before - after), curvature, out=np.zeros(len(best)), where=curvature < -1e-12)
    place = np.unique(best + np.clip(shift, -0.5, 0.5))
    return place[(place >= EDGE_S * rate) & (place <= last - EDGE_S * rate)]


def rr_intervals(r_peaks_s: np.ndarray) -> np.ndarray:
    """The intervals between neighbouring beats in seconds, NaN where outside 0.2 to 3 s (300 to 20 bpm)."""
    rr_s = np.diff(np.asarray(r_peaks_s, dtype=np.float64))
    return np.where((rr_s >= MIN_RR_S) & (rr_s <= MAX_RR_S), rr_s, np.nan)


def seen_intervals(
    rr_intervals_s: np.ndarray, r_peaks_s: np.ndarray, is_seen: np.ndarray, sampling_rate: float
) -> np.ndarray:
    """The intervals between beats, NaN also where the signal is missing for so long that a beat may be.

    Args:
        rr_intervals_s: (beats - 1,); r_peaks_s: (beats,).
        is_seen: bool (samples,), whether any lead has signal.
    """
    unseen = np.concatenate([[0], np.cumsum(~is_seen)])
    at = np.clip(np.round(r_peaks_s * sampling_rate).astype(int), 0, len(is_seen))
    return np.where(np.diff(unseen[at]) >= MIN_RR_S * sampling_rate, np.nan, rr_intervals_s)


def mean_or_nan(values: np.ndarray) -> float:
    """The mean of the finite values, NaN where there is none."""
    return float(np.nanmean(values)) if np.isfinite(values).any() else float("nan")


def mean_rr_s(r_peaks_s: np.ndarray) -> float:
    """The mean of the plausible RR intervals in seconds, NaN where there is none."""
    return mean_or_nan(rr_intervals(r_peaks_s))


# What is known of one interval alone, and how far a peak may be off: both in ms.
SD_OF_ONE_RR_MS, R_PEAK_ERROR_MS = 100.0, 10.0


def mean_rr_error_ms(rr_intervals_s: np.ndarray) -> float:
    """How far the mean of RR intervals is off by one beat more, less or misplaced: (SD + 10 ms) / number.

    Args:
        rr_intervals_s: (n,) seconds, 0 or NaN where unknown; without any the longest interval is the error.
    """
    known_ms = 1000.0 * rr_intervals_s[np.nan_to_num(rr_intervals_s) > 0]
    if not len(known_ms):
        return 1000.0 * MAX_RR_S
    sd_ms = float(np.std(known_ms)) if len(known_ms) > 1 else SD_OF_ONE_RR_MS
    return (sd_ms + R_PEAK_ERROR_MS) / len(known_ms)


LIKENESS_S = 0.1  # each way of the R peak: the QRS complex, whose shape the rhythm does not change


def beat_likeness(signal: np.ndarray, r_peaks_s: np.ndarray, sampling_rate: float) -> float:
    """How alike the QRS complexes are, 1 where they are the same: what a heart does and noise does not.

    Args:
        signal: float array (leads, samples); r_peaks_s: (beats,).

    Returns:
        The median over the beats of the correlation with the mean of all others, NaN where there are fewer than three.
    """
    reach = round(LIKENESS_S * sampling_rate)
    at = np.round(r_peaks_s * sampling_rate).astype(int)
    at = at[(at >= reach) & (at < signal.shape[1] - reach)]
    if len(at) < 3:
        return float("nan")
    complexes = signal[:, at[:, None] + np.arange(-reach, reach + 1)].swapaxes(0, 1).reshape(len(at), -1)
    complexes = complexes - complexes.mean(axis=1, keepdims=True)
    others = complexes.sum(axis=0) - complexes
    norms = np.linalg.norm(complexes, axis=1) * np.linalg.norm(others, axis=1)
    return float(np.median((complexes * others).sum(axis=1) / np.maximum(norms, 1e-9)))


def autocorrelation_period_s(signal: np.ndarray, sampling_rate: float) -> float:
    """The heart period where no beat stands out: the first strong peak of the slope energy's autocorrelation.

    Args:
        signal: float array (leads, samples), NaN where missing.
        sampling_rate: Hz.

    Returns:
        Seconds, NaN where nothing repeats between 20 and 300 bpm.
    """
    signal = np.nan_to_num(np.atleast_2d(np.asarray(signal, dtype=np.float32)))
    signal = signal[signal.std(axis=-1) > 1e-6]
    if not len(signal):
        return float("nan")
    envelope, _ = _qrs_envelope(filter_band(signal, sampling_rate, QRS_BAND_HZ), sampling_rate)
    envelope = envelope - envelope.mean()
    length = next_fast_len(2 * len(envelope), real=True)
    power = np.abs(rfft(envelope, n=length)) ** 2
    correlation = irfft(power, n=length)[: len(envelope)]
    if correlation[0] <= 0:
        return float("nan")
    correlation = correlation / correlation[0]
    peaks, _ = find_peaks(correlation, height=0.2)
    lags_s = peaks / sampling_rate
    lags_s = lags_s[(lags_s >= MIN_RR_S) & (lags_s <= MAX_RR_S)]
    return float(lags_s[0]) if len(lags_s) else float("nan")
