"""Synthetic 12-lead ECGs with known R peaks, for tests, examples and demonstrations.

Each beat is a sum of Gaussian waves (after McSharry et al. 2003, "A dynamical model for generating synthetic
electrocardiogram signals") with an amplitude for each of the eight independent leads; III, aVR, aVL and aVF follow
from I and II by Einthoven's and Goldberger's relations. All but the white noise is a function of continuous time, so
the same seed gives the same heart at any sampling rate.

`python -m data_builders.synthetic FOLDER` writes the bundled examples.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from modeling_ecgmoe.ecg_files import Ecg
from modeling_ecgmoe.leads import LEADS, LIMB_FROM_I_II, canonical_lead

RHYTHMS = ("sinus", "atrial_fibrillation", "paced")


@dataclass(frozen=True)
class Wave:
    """One Gaussian deflection of a beat.

    Args:
        center_s: relative to the R peak; stretched with the square root of the RR interval where `follows_rate`.
        width_s: standard deviation.
        amplitudes_mv: in I, II, V1, V2, V3, V4, V5, V6.
    """

    center_s: float
    width_s: float
    amplitudes_mv: tuple[float, ...]
    follows_rate: bool = False


P_WAVE = Wave(-0.165, 0.020, (0.07, 0.11, 0.04, 0.05, 0.05, 0.05, 0.05, 0.05), follows_rate=True)
QRS_WAVES = (
    Wave(-0.025, 0.008, (-0.06, -0.07, 0.00, 0.00, 0.00, -0.03, -0.07, -0.08)),
    Wave(0.000, 0.011, (0.65, 0.95, 0.22, 0.45, 0.75, 1.20, 1.15, 0.95)),
    Wave(0.026, 0.011, (-0.12, -0.14, -0.80, -1.15, -0.75, -0.40, -0.18, -0.06)),
)
T_WAVE = Wave(0.270, 0.045, (0.18, 0.26, -0.03, 0.28, 0.34, 0.34, 0.28, 0.20), follows_rate=True)
SINUS_BEAT = (P_WAVE, *QRS_WAVES, T_WAVE)
CONDUCTED_BEAT = (*QRS_WAVES, T_WAVE)  # without a P wave
VENTRICULAR_BEAT = (
    Wave(0.000, 0.034, (0.70, 1.10, -0.90, -1.20, -0.60, 0.40, 0.90, 0.90)),
    Wave(0.075, 0.030, (-0.30, -0.45, 0.30, 0.35, 0.25, -0.25, -0.40, -0.40)),
    Wave(0.280, 0.055, (-0.25, -0.35, 0.30, 0.45, 0.30, -0.15, -0.30, -0.30), follows_rate=True),
)
PACED_BEAT = (
    Wave(-0.070, 0.0008, (0.90, -1.20, -0.60, -0.80, -1.00, -1.00, -0.90, -0.80)),  # the stimulus
    Wave(0.000, 0.036, (0.80, -0.90, -0.80, -1.20, -1.30, -1.00, -0.60, -0.40)),
    Wave(0.290, 0.055, (-0.25, 0.30, 0.30, 0.45, 0.45, 0.35, 0.20, 0.15), follows_rate=True),
)
_FIBRILLATION_MV = np.array([0.02, 0.05, 0.07, 0.05, 0.03, 0.02, 0.02, 0.02])  # f waves are largest in V1
_NUM_INDEPENDENT = 8


@dataclass(frozen=True)
class SyntheticEcg:
    """A recording and the truth about it: R-peak times in seconds, and which of those beats are ventricular."""

    ecg: Ecg
    r_peaks_s: np.ndarray
    is_ventricular: np.ndarray

    @property
    def rr_interval_ms(self) -> float:
        """The mean RR interval; NaN with fewer than two beats."""
        return float(np.diff(self.r_peaks_s).mean() * 1000.0) if len(self.r_peaks_s) > 1 else float("nan")


def synthetic_ecg(
    *,
    rate_bpm: float = 75.0,
    rhythm: str = "sinus",
    sampling_rate: float = 500.0,
    duration_s: float = 10.0,
    rr_variation: float = 0.0,
    premature_every: int = 0,
    noise_mv: float = 0.0,
    wander_mv: float = 0.0,
    flat_leads: Sequence[str] = (),
    variation: float = 0.0,
    seed: int = 0,
) -> SyntheticEcg:
    """Make an ECG.

    Args:
        rate_bpm: mean heart rate; the first R peak lies half an interval after the start.
        rhythm: one of `RHYTHMS`.
        sampling_rate: in Hz.
        duration_s: length in seconds.
        rr_variation: relative depth of the breathing-bound variation of the RR intervals; fibrillation has its own.
        premature_every: one in so many beats is ventricular, premature, with a compensatory pause; 0 for none.
        noise_mv: standard deviation of white noise.
        wander_mv: amplitude of the baseline's wander.
        flat_leads: leads of zeros.
        variation: relative spread of the amplitudes between hearts (seeds).
        seed: of everything random.

    Raises:
        ValueError: the rhythm is unknown, or a rate is not positive.
    """
    if rhythm not in RHYTHMS:
        raise ValueError(f"unknown rhythm {rhythm!r}; known are {', '.join(RHYTHMS)}")
    if min(rate_bpm, sampling_rate, duration_s) <= 0:
        raise ValueError(
            f"rate_bpm, sampling_rate and duration_s must be positive, found {rate_bpm}, {sampling_rate}, {duration_s}"
        )
    rng = np.random.default_rng(seed)
    time_s = np.arange(round(duration_s * sampling_rate)) / sampling_rate
    beats_s, intervals_s, is_ventricular = _beat_times(
        rng, rate_bpm, rhythm == "atrial_fibrillation", duration_s, rr_variation, premature_every
    )
    leads_scale = 1.0 + variation * rng.standard_normal(_NUM_INDEPENDENT)
    waves_scale = 1.0 + variation * rng.standard_normal(len(SINUS_BEAT))
    independent = np.zeros((_NUM_INDEPENDENT, time_s.size))
    normal_beat = {"sinus": SINUS_BEAT, "atrial_fibrillation": CONDUCTED_BEAT, "paced": PACED_BEAT}[rhythm]
    for beat_s, interval_s, ventricular in zip(beats_s, intervals_s, is_ventricular, strict=True):
        waves = VENTRICULAR_BEAT if ventricular else normal_beat
        stretch = min(1.2, interval_s**0.5)
        for wave, scale in zip(waves, waves_scale, strict=False):
            center_s = beat_s + wave.center_s * (stretch if wave.follows_rate else 1.0)
            bump = scale * np.exp(-0.5 * ((time_s - center_s) / wave.width_s) ** 2)
            independent += np.outer(np.multiply(wave.amplitudes_mv, leads_scale), bump)
    if rhythm == "atrial_fibrillation":
        independent += _fibrillation(rng, time_s)
    for row in independent:
        row += wander_mv * _slow_drift(rng, time_s)
    independent += noise_mv * rng.standard_normal(independent.shape)
    signal = np.vstack([LIMB_FROM_I_II @ independent[:2], independent[2:]]).astype(np.float32)
    for name in flat_leads:
        signal[LEADS.index(canonical_lead(name))] = 0.0
    inside = (beats_s >= 0) & (beats_s < duration_s)
    return SyntheticEcg(Ecg(signal, float(sampling_rate), LEADS), beats_s[inside], is_ventricular[inside])


def _beat_times(
    rng: np.random.Generator,
    rate_bpm: float,
    is_fibrillation: bool,
    duration_s: float,
    rr_variation: float,
    premature_every: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """R-peak times, the interval before each, which are ventricular; from one beat before the start to one after."""
    mean_s = 60.0 / rate_bpm
    breathing_phase = rng.uniform(0, 2 * np.pi)
    times, intervals, ventricular = [-0.5 * mean_s], [mean_s], [False]
    while times[-1] < duration_s:
        number, interval = len(times), mean_s
        if is_fibrillation:
            interval *= float(np.clip(rng.lognormal(-0.03, 0.25), 0.5, 1.9))
        elif rr_variation:
            interval *= 1.0 + rr_variation * np.sin(2 * np.pi * 0.25 * times[-1] + breathing_phase)
        is_premature = bool(premature_every) and number % premature_every == 0
        if is_premature:
            interval *= 0.6
        elif ventricular[-1]:
            interval *= 1.4  # the sinus node keeps its time, so both intervals make up two
        times.append(times[-1] + interval)
        intervals.append(interval)
        ventricular.append(is_premature)
    return np.array(times), np.array(intervals), np.array(ventricular)


def _fibrillation(rng: np.random.Generator, time_s: np.ndarray) -> np.ndarray:
    """Fibrillatory waves, (leads, samples) in mV: a few unsteady oscillations between 4 and 9 Hz."""
    waves = np.zeros((_NUM_INDEPENDENT, time_s.size))
    for frequency_hz in rng.uniform(4.5, 8.5, size=5):
        phase, swing, swing_hz = rng.uniform(0, 2 * np.pi), rng.uniform(0.5, 2.0), rng.uniform(0.2, 0.7)
        shift = rng.normal(0, 0.4, size=(_NUM_INDEPENDENT, 1))
        angle = 2 * np.pi * frequency_hz * time_s + phase + swing * np.sin(2 * np.pi * swing_hz * time_s)
        waves += 0.45 * np.sin(angle + shift)
    return waves * _FIBRILLATION_MV[:, None]


def _slow_drift(rng: np.random.Generator, time_s: np.ndarray) -> np.ndarray:
    """A baseline wander of unit size below 0.5 Hz."""
    drift = np.zeros(time_s.size)
    for frequency_hz in (0.07, 0.17, 0.31):
        drift += np.sin(2 * np.pi * frequency_hz * time_s + rng.uniform(0, 2 * np.pi)) / 3
    return drift


def write_wfdb(
    ecg: Ecg, folder: str | Path, name: str, fmt: str = "16", gain: float = 1000.0, comments: Sequence[str] = ()
) -> Path:
    """Write a WFDB record with the `wfdb` library.

    Args:
        ecg: NaN becomes the format's mark for an invalid sample.
        folder: made where it does not exist.
        name: of the record: letters, digits, hyphens and underscores.
        fmt: a WFDB signal format such as "16" or "212".
        gain: ADC units per mV.
        comments: lines for the end of the header.

    Returns:
        the path of the header.
    """
    import wfdb

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    num_leads = len(ecg.lead_names)
    wfdb.wrsamp(
        name,
        fs=ecg.sampling_rate,
        units=["mV"] * num_leads,
        sig_name=list(ecg.lead_names),
        p_signal=ecg.signal.T.astype(np.float64),
        fmt=[fmt] * num_leads,
        adc_gain=[gain] * num_leads,
        baseline=[0] * num_leads,
        comments=list(comments),
        write_dir=str(folder),
    )
    return folder / f"{name}.hea"


def write_examples(folder: str | Path) -> list[Path]:
    """Write the bundled example records; nothing in them depends on time or place."""
    shared: dict[str, Any] = {"noise_mv": 0.008, "wander_mv": 0.04, "variation": 0.08}
    examples = {
        "sinus_75bpm": synthetic_ecg(rate_bpm=75, rr_variation=0.03, seed=1, **shared),
        "bradycardia_45bpm": synthetic_ecg(rate_bpm=45, rr_variation=0.02, seed=2, **shared),
        "atrial_fibrillation": synthetic_ecg(rate_bpm=95, rhythm="atrial_fibrillation", seed=3, **shared),
        "premature_beats": synthetic_ecg(rate_bpm=70, rr_variation=0.02, premature_every=5, seed=4, **shared),
    }
    note = "Synthetic signal, not a patient; written by data_builders.synthetic"
    return [write_wfdb(example.ecg, folder, name, comments=[note]) for name, example in examples.items()]


def main() -> None:
    """Command line: write the examples into a folder."""
    parser = argparse.ArgumentParser(description="Write the synthetic example ECGs as WFDB records.")
    parser.add_argument("folder", help="where to write them")
    for path in write_examples(parser.parse_args().folder):
        print(path)


if __name__ == "__main__":
    main()
