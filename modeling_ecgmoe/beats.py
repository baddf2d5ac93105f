"""R peaks, RR intervals and cardiac phase, as pure array functions.

The detector follows the plan of Pan and Tompkins (1985), slope energy against an adaptive threshold with search-back,
but joins all leads into one energy before it decides and looks at the whole recording at once: thresholds come from
the heights of the neighbouring peaks on both sides, so there is no learning phase and no delay to correct.
"""

import numpy as np
from scipy.fft import dct, idct, irfft, next_fast_len, rfft
from scipy.ndimage import maximum_filter1d, median_filter, percentile_filter, uniform_filter1d
from scipy.signal import find_peaks

MIN_RR_S = 0.2
MAX_RR_S = 3.0
QRS_BAND_HZ = (5.0, 22.0)
PEAK_BAND_HZ = (3.0, 30.0)
ENERGY_WINDOW_S = 0.09
REFRACTORY_S = 0.22
T_WAVE_S = 0.36
SEARCH_BACK_RR = 1.6


def filter_band(signal: np.ndarray, sampling_rate: float, band_hz: tuple[float, float]) -> np.ndarray:
    """Band-pass without delay, by cosine transform, which continues the signal as its mirror image at both ends.

    Args:
        signal: float array (..., samples) without NaN.
        sampling_rate: Hz.
        band_hz: the half-amplitude frequencies; the edges are raised cosines from 0.7 to 1.3 of each.

    Returns:
        float array of the same shape.
    """
    samples = signal.shape[-1]
    frequency_hz = np.arange(samples) * (0.5 * sampling_rate / samples)
    gain = rise(frequency_hz, 0.7 * band_hz[0], 1.3 * band_hz[0])
    gain *= 1.0 - rise(frequency_hz, 0.7 * band_hz[1], 1.3 * band_hz[1])
    return idct(dct(signal, axis=-1) * gain.astype(signal.dtype), axis=-1)


def rise(frequency_hz: np.ndarray, low_hz: float, high_hz: float) -> np.ndarray:
    """A raised cosine from 0 at `low_hz` to 1 at `high_hz`."""
    return 0.5 - 0.5 * np.cos(np.pi * np.clip((frequency_hz - low_hz) / (high_hz - low_hz), 0.0, 1.0))


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
    known = np.isfinite(signal)
    signal = np.where(known, signal, 0.0) - np.where(known, signal, 0.0).mean(axis=-1, keepdims=True)
    signal = signal[signal.std(axis=-1) > 1e-6]
    if not len(signal):
        return np.empty(0)
    envelope = _qrs_envelope(signal, sampling_rate)
    candidates, _ = find_peaks(envelope, distance=max(1, int(REFRACTORY_S * sampling_rate)))
    if not len(candidates):
        return np.empty(0)
    peaks = _select(candidates, envelope, sampling_rate)
    return _refine(peaks, signal, sampling_rate)


def _qrs_envelope(signal: np.ndarray, sampling_rate: float) -> np.ndarray:
    """Slope energy of all leads in one curve (samples,), each lead counted by how far its QRS stand above the rest."""
    slope = np.gradient(filter_band(signal, sampling_rate, QRS_BAND_HZ), axis=-1)
    energy = uniform_filter1d(slope**2, max(1, int(ENERGY_WINDOW_S * sampling_rate)), axis=-1, mode="nearest")
    energy = np.sqrt(np.maximum(energy, 0.0))
    ranked = np.sort(energy[:, :: max(1, int(sampling_rate // 50))], axis=-1)
    high, middle = (ranked[:, int(share * (ranked.shape[1] - 1)), None] for share in (0.95, 0.40))
    weight = np.clip(high / (middle + 1e-9) - 1.0, 0.05, 10.0) / (high + 1e-9)
    return (weight * energy).sum(axis=0) / weight.shape[0]


def _select(candidates: np.ndarray, envelope: np.ndarray, sampling_rate: float) -> np.ndarray:
    """The candidates that are beats: high beside their neighbours, no T waves, gaps searched again."""
    height = envelope[candidates]
    reference = _local_reference(candidates, height, sampling_rate)
    chosen = list(candidates[height > 0.40 * reference])
    chosen = _drop_t_waves(chosen, envelope, sampling_rate)
    if len(chosen) < 3:
        return np.array(chosen, dtype=int)
    rr = np.diff(chosen)
    usual = median_filter(rr.astype(float), size=min(9, len(rr)), mode="nearest")
    found = []
    for left, right, rr_usual, rr_here in zip(chosen[:-1], chosen[1:], usual, rr, strict=True):
        if rr_here < SEARCH_BACK_RR * rr_usual:
            continue
        inside = (candidates > left + T_WAVE_S * sampling_rate) & (candidates < right - REFRACTORY_S * sampling_rate)
        if inside.any():
            best = candidates[inside][np.argmax(height[inside])]
            if envelope[best] > 0.22 * min(envelope[left], envelope[right]):
                found.append(best)
    return np.array(sorted(chosen + found), dtype=int)


def _local_reference(candidates: np.ndarray, height: np.ndarray, sampling_rate: float) -> np.ndarray:
    """The height of a usual QRS around each candidate: the 70th percentile of each second's highest within 5 s.

    A heart below 42 bpm leaves so many seconds empty that this would be noise; there a share of the usual highest
    within three seconds, the longest interval, counts, and for a lonely beat a small share of the highest of all.
    """
    second = (candidates / sampling_rate).astype(int)
    best = np.zeros(second[-1] + 1)
    np.maximum.at(best, second, height)
    usual = percentile_filter(best, 70, size=11, mode="nearest")
    floor = percentile_filter(maximum_filter1d(best, 3, mode="nearest"), 50, size=11, mode="nearest")
    lonely = maximum_filter1d(best, 11, mode="nearest")
    return np.maximum.reduce([usual, 0.35 * floor, 0.05 * lonely])[second]


def _drop_t_waves(chosen: list[int], envelope: np.ndarray, sampling_rate: float) -> list[int]:
    kept: list[int] = []
    for peak in chosen:
        close = bool(kept) and peak - kept[-1] < T_WAVE_S * sampling_rate
        if close and envelope[peak] < 0.6 * envelope[kept[-1]]:
            continue
        if (
            close
            and envelope[kept[-1]] < 0.45 * envelope[peak]
            and (len(kept) < 2 or kept[-1] - kept[-2] < 1.2 * T_WAVE_S * sampling_rate)
        ):
            kept.pop()
        kept.append(peak)
    return kept


def _refine(peaks: np.ndarray, signal: np.ndarray, sampling_rate: float) -> np.ndarray:
    """Move each detection to the largest deflection of all leads together, by a parabola between samples."""
    if not len(peaks):
        return np.empty(0)
    deflection = np.sqrt((filter_band(signal, sampling_rate, PEAK_BAND_HZ) ** 2).sum(axis=0))
    half = max(1, int(0.06 * sampling_rate))
    samples = len(deflection)
    around = np.clip(peaks[:, None] + np.arange(-half, half + 1), 0, samples - 1)
    best = around[np.arange(len(peaks)), np.argmax(deflection[around], axis=1)]
    before, here, after = (deflection[np.clip(best + step, 0, samples - 1)] for step in (-1, 0, 1))
    curvature = before - 2 * here + after
    shift = np.divide(0.5 * (before - after), curvature, out=np.zeros_like(here), where=np.abs(curvature) > 1e-12)
    return np.unique((best + np.clip(shift, -0.5, 0.5)) / sampling_rate)


def rr_intervals(r_peaks_s: np.ndarray) -> np.ndarray:
    """The intervals between neighbouring beats in seconds, NaN where outside 0.2 to 3 s (300 to 20 bpm)."""
    rr_s = np.diff(np.asarray(r_peaks_s, dtype=np.float64))
    return np.where((rr_s >= MIN_RR_S) & (rr_s <= MAX_RR_S), rr_s, np.nan)


def mean_rr_s(r_peaks_s: np.ndarray) -> float:
    """The mean of the plausible RR intervals in seconds, NaN where there is none."""
    rr_s = rr_intervals(r_peaks_s)
    return float(np.nanmean(rr_s)) if np.isfinite(rr_s).any() else float("nan")


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
    envelope = _qrs_envelope(signal, sampling_rate)
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
