"""From a recording to the input of ECG-MoE. Saved beside the weights, so that preprocessing travels with them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from scipy.fft import dct, irfft
from transformers import BatchFeature
from transformers.feature_extraction_utils import FeatureExtractionMixin

from .beats import (
    autocorrelation_period_s,
    beat_likeness,
    find_r_peaks,
    mean_or_nan,
    rise,
    rr_intervals,
    seen_intervals,
)
from .leads import LEADS, NUM_LEADS, arrange_leads, find_lead

MIN_SAMPLING_RATE = 50.0
MAX_SAMPLING_RATE = 10_000.0
FLAT_MV = 1e-3
# Standard deviations of the band-passed leads. In PTB-XL, CinC 2021 and LUDB that of the median lead lies between 0.05
# and 0.8 mV and the largest between 0.08 and 2.3: microvolts or volts taken for millivolts are a thousand times off.
MAX_MEDIAN_SD_MV = 5.0
MIN_LARGEST_SD_MV = 0.005


@dataclass
class Prepared:
    """A recording ready for the model.

    Args:
        windows: what the feature extractor made of each window of at most `window_s`, and the `start_s` of each.
        quality: its report, joined over the windows.
        leads: the leads that were read.
    """

    windows: list[dict[str, Any]]
    quality: dict[str, Any]
    leads: list[str]


class EcgMoeFeatureExtractor(FeatureExtractionMixin):
    r"""
    Orders leads by name, derives limb leads, resamples and band-passes in one Fourier step, finds the beats, scales.

    Args:
        sampling_rate: Hz of the output.
        window_s: the longest signal the model sees at once; `windows` splits longer recordings.
        min_duration_s: shorter signals are refused.
        high_pass_hz, low_pass_hz: (start, end) of the two raised-cosine edges of the pass band. The band ends below
            the Nyquist frequency of the output, so that a recording gives the same input whatever rate it came at.
        scale_mv: `input_values` are millivolts divided by this.
        clip_mv: amplitudes beyond are cut.
        max_beats: R peaks beyond are left out.
    """

    model_input_names = ["input_values", "lead_mask", "sample_mask", "r_peaks", "rr_intervals_s", "period_s"]

    def __init__(
        self,
        sampling_rate: int = 100,
        window_s: float = 10.0,
        min_duration_s: float = 2.0,
        high_pass_hz: Sequence[float] = (0.1, 0.4),
        low_pass_hz: Sequence[float] = (38.0, 46.0),
        scale_mv: float = 0.25,
        clip_mv: float = 5.0,
        max_beats: int = 50,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.sampling_rate = sampling_rate
        self.window_s = window_s
        self.min_duration_s = min_duration_s
        self.high_pass_hz = list(high_pass_hz)
        self.low_pass_hz = list(low_pass_hz)
        self.scale_mv = scale_mv
        self.clip_mv = clip_mv
        self.max_beats = max_beats

    @property
    def window_samples(self) -> int:
        """The longest output, in samples."""
        return round(self.window_s * self.sampling_rate)

    def __call__(
        self,
        signal: np.ndarray | Sequence[np.ndarray],
        sampling_rate: float | Sequence[float] | None = None,
        lead_names: Sequence[str] | Sequence[Sequence[str]] | None = None,
        return_tensors: str | None = None,
    ) -> BatchFeature:
        """Prepare one recording or a batch.

        Args:
            signal: float array (leads, samples) in mV, NaN where missing, or a list of such arrays.
            sampling_rate: Hz; one number, or one for each recording. There is no default: a wrong rate gives wrong
                answers without a word.
            lead_names: the name of each row, for all recordings or for each.
            return_tensors: "pt" or "np".

        Returns:
            - **input_values** float32 (B, 12, T), in units of `scale_mv`, 0 where missing, T at most `window_s` long.
              Longer recordings are cut to their first window; see `windows`.
            - **lead_mask** bool (B, 12), the leads that carry signal, read or derived.
            - **sample_mask** bool (B, T), False on padding and where no lead has signal.
            - **r_peaks** float32 (B, N), R peaks in samples of the output, -1 where there are no more.
            - **rr_intervals_s** float32 (B, N), seconds since the beat before, 0 where unknown.
            - **period_s** float32 (B,), the mean RR interval, by autocorrelation where no two beats were found, 0
              where nothing repeats.
            - **quality**, a list of dicts: `leads` read, `flat_leads` of one value or none, `beats`, `period_from`
              (r_peaks, autocorrelation or none), `beat_likeness` of the QRS complexes (1 is the same, noise is
              near 0, None with fewer than three), `clipped` and `missing` shares of the samples.

        Raises:
            ValueError: rate, names or shape are missing or contradict each other; the recording is too short, flat or
                empty, or its amplitudes are no heart's: it is not in mV.
        """
        if isinstance(signal, np.ndarray) and signal.ndim == 1:
            raise ValueError(
                f"`signal` must have shape (leads, samples), found {signal.shape}; pass one lead as signal[None]"
            )
        signals: list[np.ndarray] = [signal] if isinstance(signal, np.ndarray) and signal.ndim == 2 else list(signal)
        if sampling_rate is None or lead_names is None:
            raise ValueError(
                "`sampling_rate` (Hz) and `lead_names` must be given with the signal: an ECG cannot be read without"
            )
        rates = _one_for_each(sampling_rate, len(signals), "sampling_rate", isinstance(sampling_rate, (int, float)))
        names = _one_for_each(lead_names, len(signals), "lead_names", all(isinstance(n, str) for n in lead_names))
        records = [self.extract(s, r, n) for s, r, n in zip(signals, rates, names, strict=True)]
        return self.pad(records, return_tensors)

    def extract(self, signal: np.ndarray, sampling_rate: float, lead_names: Sequence[str]) -> dict[str, Any]:
        """One recording, before padding: the entries of `__call__` without their batch axis."""
        duration_s = self.check(signal, sampling_rate, len(lead_names))
        if duration_s > self.window_s:
            signal = signal[:, : round(self.window_s * sampling_rate)]
        empty = [_is_empty(row) for row in signal] if len(signal) == len(lead_names) else []
        dead = {find_lead(name) for name, nothing in zip(lead_names, empty, strict=False) if nothing}
        others = {find_lead(name) for name, nothing in zip(lead_names, empty, strict=False) if not nothing}
        if any(empty) and any(others):  # a lead that broke off is as one that was not connected
            kept = [i for i, nothing in enumerate(empty) if not nothing]
            signal, lead_names = signal[kept], [lead_names[i] for i in kept]
        arranged, used = arrange_leads(signal, lead_names)
        flat = [lead for lead in used if _is_flat(arranged[LEADS.index(lead)])]
        if len(flat) == len(used):
            raise ValueError(f"all leads are flat ({', '.join(flat)}); is an electrode connected, is the gain right?")
        if flat:  # they are not there, and derive no others
            kept = [i for i, name in enumerate(lead_names) if find_lead(name) not in flat]
            arranged, used = arrange_leads(signal[kept], [lead_names[i] for i in kept])
        known = np.isfinite(arranged)
        lead_mask = known.any(axis=1)
        missing_share = 1.0 - float(known[lead_mask].mean())
        values_mv, sample_known = self.resample(arranged, known, sampling_rate)
        _check_spread(values_mv[lead_mask])
        clipped = np.abs(values_mv) > self.clip_mv
        values_mv = np.clip(values_mv, -self.clip_mv, self.clip_mv) * (sample_known & lead_mask[:, None])
        # A top between samples may lie before the first one; negative is how padding is written.
        peaks_s = np.maximum(find_r_peaks(values_mv[lead_mask], self.sampling_rate)[: self.max_beats], 0.0)
        is_seen = (sample_known & lead_mask[:, None]).any(axis=0)
        known_rr_s = seen_intervals(rr_intervals(peaks_s), peaks_s, is_seen, self.sampling_rate)
        period_s, source = mean_or_nan(known_rr_s), "r_peaks"
        if not math.isfinite(period_s):
            period_s, source = autocorrelation_period_s(values_mv[lead_mask], self.sampling_rate), "autocorrelation"
        if not math.isfinite(period_s):
            period_s, source = 0.0, "none"
        rr_s = np.nan_to_num(np.concatenate([[np.nan], known_rr_s])) if len(peaks_s) else np.empty(0)
        likeness = beat_likeness(values_mv[lead_mask], peaks_s, self.sampling_rate)
        return {
            "input_values": (values_mv / self.scale_mv).astype(np.float32),
            "lead_mask": lead_mask,
            "sample_mask": is_seen,
            "r_peaks": (peaks_s * self.sampling_rate).astype(np.float32),
            "rr_intervals_s": rr_s.astype(np.float32),
            "period_s": np.float32(period_s),
            "quality": {
                "leads": used,
                "flat_leads": [lead for lead in LEADS if lead in {*flat, *dead}],
                "beats": len(peaks_s),
                "period_from": source,
                "beat_likeness": round(likeness, 3) if math.isfinite(likeness) else None,
                "clipped": round(float(clipped.mean()), 4),
                "missing": round(missing_share, 4),
            },
        }

    def check(self, signal: np.ndarray, sampling_rate: float, num_leads: int) -> float:
        """Refuse what cannot be an ECG of so many leads; returns the duration in seconds."""
        if not (MIN_SAMPLING_RATE <= sampling_rate <= MAX_SAMPLING_RATE):
            raise ValueError(
                f"a sampling rate of {sampling_rate:g} Hz is not plausible for an ECG; expected "
                f"{MIN_SAMPLING_RATE:g} to {MAX_SAMPLING_RATE:g} Hz, pass the right one"
            )
        if signal.ndim != 2:
            raise ValueError(
                f"`signal` must have shape (leads, samples), found {signal.shape}; one lead is (1, samples)"
            )
        if signal.shape[0] != num_leads == signal.shape[1]:
            raise ValueError(
                f"`signal` must have shape (leads, samples) with {num_leads} leads, found {signal.shape}; transpose it"
            )
        duration_s = signal.shape[1] / sampling_rate
        if duration_s < self.min_duration_s:
            raise ValueError(
                f"the recording is {duration_s:.2f} s long ({signal.shape[1]} samples at {sampling_rate:g} Hz), "
                f"shorter than the {self.min_duration_s:g} s the model needs; pass a longer one"
            )
        return duration_s

    def windows(self, signal: np.ndarray, sampling_rate: float) -> list[np.ndarray]:
        """Cut a recording of (leads, samples) into windows of `window_s`; the last two may overlap. A rest at the end
        that is shorter than `min_duration_s` is left out."""
        length = round(self.window_s * sampling_rate)
        return [signal[:, start : start + length] for start in self._starts(signal.shape[1], sampling_rate)]

    def _starts(self, samples: int, sampling_rate: float) -> list[int]:
        length = round(self.window_s * sampling_rate)
        if samples <= length:
            return [0]
        starts = list(range(0, samples - length + 1, length))
        if samples - (starts[-1] + length) >= self.min_duration_s * sampling_rate:
            starts.append(samples - length)
        return starts

    def prepare(self, signal: np.ndarray, sampling_rate: float, lead_names: Sequence[str]) -> Prepared:
        """Make a recording of any length ready: all its windows, and one report of them; see `__call__`.

        Raises:
            ValueError: as `__call__`, where no window can be used.
        """
        self.check(signal, sampling_rate, len(lead_names))
        windows, refused = [], []
        beats, counted_to_s = 0, 0.0
        length = round(self.window_s * sampling_rate)
        for start in self._starts(signal.shape[1], sampling_rate):
            try:
                windows.append(self.extract(signal[:, start : start + length], sampling_rate, lead_names))
            except ValueError as error:
                # One bad stretch of a long recording does not lose the rest.
                refused.append(error)
                continue
            # Where windows overlap, beats count once.
            start_s = windows[-1]["start_s"] = start / sampling_rate
            beats += int((start_s + windows[-1]["r_peaks"] / self.sampling_rate >= counted_to_s).sum())
            counted_to_s = start_s + self.window_s
        if not windows:
            raise refused[0]
        quality = dict(windows[0]["quality"])
        flat = {lead for w in windows for lead in w["quality"]["flat_leads"]}
        quality["flat_leads"] = [lead for lead in LEADS if lead in flat]
        used = {lead for w in windows for lead in w["quality"]["leads"]}
        quality["leads"] = [lead for lead in LEADS if lead in used]
        quality["beats"] = beats
        known = [w["quality"]["beat_likeness"] for w in windows if w["quality"]["beat_likeness"] is not None]
        quality["beat_likeness"] = round(float(np.median(known)), 3) if known else None
        for share in ("clipped", "missing"):
            quality[share] = round(float(np.mean([w["quality"][share] for w in windows])), 4)
        quality |= {"windows": len(windows), "windows_refused": len(refused)}
        return Prepared(windows, quality, list(quality["leads"]))

    def resample(self, arranged: np.ndarray, known: np.ndarray, sampling_rate: float) -> tuple[np.ndarray, np.ndarray]:
        """Band-pass and resample (12, samples) in one Fourier step; returns mV and what is known of it, (12, T)."""
        samples_in = arranged.shape[1]
        samples_out = min(max(1, round(samples_in * self.sampling_rate / sampling_rate)), self.window_samples)
        rows = known.any(axis=1)
        filled = arranged[rows] if known[rows].all() else _interpolate(arranged[rows], known[rows])
        length_in, length_out = _transform_lengths(samples_in, float(sampling_rate), self.sampling_rate)
        mirrored = np.concatenate(
            [filled, filled[:, samples_in - 1 - (length_in - samples_in) : samples_in - 1][:, ::-1]], axis=1
        )
        cosines = dct(mirrored, axis=-1)[:, : length_out + 1]
        frequency_hz = np.arange(cosines.shape[1]) * (0.5 * sampling_rate / length_in)
        gain = rise(frequency_hz, *self.high_pass_hz) * (1.0 - rise(frequency_hz, *self.low_pass_hz))
        # The cosine transform counts time from half a sample before the first; a phase moves the output back to it.
        phase = np.exp(1j * np.pi * frequency_hz / sampling_rate)
        spectrum = cosines * (gain * phase * (length_out / length_in)).astype(np.complex64)
        out = np.zeros((NUM_LEADS, samples_out), dtype=np.float32)
        out[rows] = irfft(spectrum, n=2 * length_out, axis=-1)[:, :samples_out]
        source = np.minimum(
            (np.arange(samples_out) * (sampling_rate / self.sampling_rate)).round().astype(int), samples_in - 1
        )
        return out, known[:, source]

    def pad(self, records: Sequence[dict[str, Any]], return_tensors: str | None = None) -> BatchFeature:
        """Join extracted recordings into a batch of the longest one's length and beats."""
        length = max(record["input_values"].shape[1] for record in records)
        beats = max(1, max(len(record["r_peaks"]) for record in records))
        batch = {
            "input_values": np.zeros((len(records), NUM_LEADS, length), np.float32),
            "lead_mask": np.stack([record["lead_mask"] for record in records]),
            "sample_mask": np.zeros((len(records), length), bool),
            "r_peaks": np.full((len(records), beats), -1.0, np.float32),
            "rr_intervals_s": np.zeros((len(records), beats), np.float32),
            "period_s": np.array([record["period_s"] for record in records], np.float32),
        }
        for row, record in enumerate(records):
            batch["input_values"][row, :, : record["input_values"].shape[1]] = record["input_values"]
            batch["sample_mask"][row, : len(record["sample_mask"])] = record["sample_mask"]
            batch["r_peaks"][row, : len(record["r_peaks"])] = record["r_peaks"]
            batch["rr_intervals_s"][row, : len(record["r_peaks"])] = record["rr_intervals_s"]
        features = BatchFeature(batch, tensor_type=return_tensors)
        features["quality"] = [record["quality"] for record in records]
        return features


def _is_empty(row: np.ndarray) -> bool:
    """Whether a lead has no sample at all."""
    return not (np.isfinite(row[0]) or np.isfinite(row).any())


def _is_flat(row: np.ndarray) -> bool:
    """Whether a lead has samples that are all alike."""
    known = row[np.isfinite(row)]
    return len(known) > 0 and float(np.ptp(known)) < FLAT_MV


def _check_spread(values_mv: np.ndarray) -> None:
    """Refuse leads (leads, samples) whose amplitudes only a wrong unit explains."""
    spreads_mv = values_mv.std(axis=1)
    median, largest = float(np.median(spreads_mv)), float(spreads_mv.max())
    if median > MAX_MEDIAN_SD_MV or largest < MIN_LARGEST_SD_MV:
        is_small = largest < MIN_LARGEST_SD_MV
        found, unit = (f"at most {largest:.2g}", "V") if is_small else (f"{median:.3g}", "uV")
        raise ValueError(
            f"the leads' standard deviation is {found} mV, an ECG's is 0.05 to 0.8 mV; is the signal in {unit}? "
            "Pass it in mV, without what is no ECG"
        )


def _one_for_each(value: Any, count: int, name: str, shared: bool) -> list[Any]:
    values = [value] * count if shared else list(value)
    if len(values) != count:
        raise ValueError(f"{count} signals but {len(values)} {name}; pass one for all, or one for each")
    return values


def _interpolate(signal: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Bridge gaps by straight lines, so that the filter does not ring; the mask still tells where they are."""
    filled = signal.copy()
    grid = np.arange(signal.shape[1])
    for row, here in zip(filled, known, strict=True):
        row[~here] = np.interp(grid[~here], grid[here], row[here])
    return filled


@lru_cache(maxsize=64)
def _transform_lengths(samples: int, rate_in: float, rate_out: int) -> tuple[int, int]:
    """Lengths (in, out) of the transforms: at least `samples`, and as near to the rates' exact ratio as it gets."""
    candidates = range(samples, samples + min(samples // 2, math.ceil(rate_in)))

    def drift(length_in: int) -> float:
        length_out = round(length_in * rate_out / rate_in)
        return round(abs(length_out * rate_in / (length_in * rate_out) - 1.0), 7)

    best = min(candidates, key=drift)
    return best, round(best * rate_out / rate_in)


EcgMoeFeatureExtractor.register_for_auto_class()

__all__ = ["EcgMoeFeatureExtractor"]
