"""What every reader gives and asks for: a recording in millivolts, and the facts that make it one.

What a file does not say (sampling rate, unit, lead names) is asked for, never assumed. What it does say is believed
only as far as it is possible: a rate no recorder has or amplitudes no heart makes are refused with an `EcgFileError`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .leads import find_lead

MAX_VALUES = 2**28  # samples times channels; 1 GiB as float32, more than 24 hours of 12 leads at 250 Hz
MIN_SAMPLING_RATE = 50.0  # below, the QRS complex (up to 25 Hz) is lost; also catches a period given for a rate
MAX_SAMPLING_RATE = 10_000.0
# A lead's swing is the distance of the 2nd and 98th percentile. In folds 1 to 9 of PTB-XL the median swing of the
# leads lies between 0.14 and 3.3 mV, the largest between 0.37 and 13.4 mV: microvolts taken for millivolts give a
# median above 100, volts taken for millivolts a largest below 0.014.
MAX_MEDIAN_SWING_MV = 20.0
MIN_LARGEST_SWING_MV = 0.02
MIN_LEADS_SCALED_ALIKE = 6
MAX_RATIO_SCALED_ALIKE = 1.05


_MILLIVOLTS = {"v": 1e3, "mv": 1.0, "uv": 1e-3, "µv": 1e-3, "μv": 1e-3, "nv": 1e-6}


class EcgFileWarning(UserWarning):
    """What was read is probably not what the file says it is, but nothing proves it."""


class EcgFileError(ValueError):
    """An ECG file that cannot be read or must not be believed. The message is one line: what is wrong, what to do."""


@dataclass(frozen=True, eq=False)
class Ecg:
    """One recording.

    Args:
        signal: float32 (leads, samples) in mV, NaN where missing.
        sampling_rate: in Hz.
        lead_names: one for each row of `signal`, spelled as in the file; where it has codes, what they stand for.
        metadata: what else the file says, empty unless asked for: it may identify the patient.
        remark: what to know of the signal, see `EcgFileWarning`.
    """

    signal: np.ndarray
    sampling_rate: float
    lead_names: tuple[str, ...]
    metadata: dict[str, Any] = field(default_factory=dict)
    remark: str = ""

    @property
    def duration_s(self) -> float:
        """Length of the recording in seconds."""
        return self.signal.shape[1] / self.sampling_rate


def shown(text: object, length: int = 60) -> str:
    """A stranger's text made fit for a one-line message: quoted, control characters escaped, cut at `length`."""
    text = str(text)
    return ascii(text if len(text) <= length else text[: length - 3] + "...")


def millivolts_per(unit: str) -> float | None:
    """How many millivolts one `unit` is, or None where it is not a voltage this project knows."""
    return _MILLIVOLTS.get(unit.strip().lower())


@dataclass(frozen=True)
class Facts:
    """What the caller says about a file, None where it is left to the file."""

    sampling_rate: float | None = None
    lead_names: tuple[str, ...] | None = None
    unit: str | None = None

    def settle(
        self, rate: float | None, names: Sequence[str] | None, num_leads: int, unit: str | None
    ) -> tuple[float, tuple[str, ...], float]:
        """Sampling rate, lead names and scale in mV at once, so that all that is missing is asked for in one line."""
        missing = [
            how
            for how, known in (
                ("sampling_rate (--sampling_rate), in Hz", rate or self.sampling_rate),
                ("unit (--unit): V, mV, uV or nV", unit or self.unit),
                (f"lead_names (--leads), {num_leads} in file order", any(names or ()) or self.lead_names),
            )
            if not known
        ]
        if len(missing) > 1:
            *first, last = missing
            raise EcgFileError(f"the file does not say all that must be known; pass {', '.join(first)} and {last}")
        settled, scale = self.settle_names(names, num_leads), self.settle_unit(unit)
        return self.settle_rate(rate), settled, scale

    def settle_rate(self, own: float | None) -> float:
        """The sampling rate, from the file or the caller, who must agree."""
        given = self.sampling_rate
        if own is not None and given is not None and abs(own - given) > 1e-3 * given:
            raise EcgFileError(f"its sampling rate is {own:g} Hz in the file and {given:g} Hz as passed; pass none")
        rate = own if own is not None else given
        if rate is None:
            raise EcgFileError("the file does not give its sampling rate; pass sampling_rate (--sampling_rate), in Hz")
        if not MIN_SAMPLING_RATE <= rate <= MAX_SAMPLING_RATE:
            raise EcgFileError(
                f"its sampling rate is {rate:g} Hz, expected {MIN_SAMPLING_RATE:g} to {MAX_SAMPLING_RATE:g} Hz; "
                "correct it"
            )
        return float(rate)

    def settle_names(self, own: Sequence[str] | None, num_leads: int) -> tuple[str, ...]:
        """The lead names, from the file or the caller; the caller may name what the file calls by no lead's name."""
        given = self.lead_names
        if own is not None and not any(own):
            own = None
        if given is not None and len(given) != num_leads:
            raise EcgFileError(f"{len(given)} lead names were passed for {num_leads} leads; pass one for each")
        if own is None and given is None:
            raise EcgFileError(
                f"the file does not name its {num_leads} leads; pass lead_names (--leads), in file order"
            )
        if own is None or given is None:
            return tuple((own or given) or ())
        for own_name, given_name in zip(own, given, strict=True):
            lead = find_lead(own_name)
            if lead is not None and lead != find_lead(given_name):
                raise EcgFileError(
                    f"the file names a lead {shown(own_name)}, passed was {shown(given_name)}; pass none"
                )
        return given

    def settle_unit(self, own: str | None) -> float:
        """How many mV one unit of the file is; file and caller must agree."""
        scales = {}
        for unit in (own, self.unit):
            if unit is not None:
                scale = millivolts_per(unit)
                if scale is None:
                    raise EcgFileError(f"unit {shown(unit)} is not a voltage; expected V, mV, uV or nV")
                scales[unit] = scale
        if not scales:
            raise EcgFileError("the file does not give its unit; pass unit (--unit): V, mV, uV or nV")
        if len(set(scales.values())) > 1:
            raise EcgFileError(f"its unit is {shown(own)} in the file and {shown(self.unit)} as passed; pass none")
        return next(iter(scales.values()))


def check_amplitude(signal: np.ndarray) -> str:
    """Refuse amplitudes that only a wrong unit or gain explains, and find leads that were scaled one by one.

    Returns:
        what to know where six leads or more all have the same range from lowest to highest sample, else nothing. In
        PTB-XL and CinC 2021 the widest lead is at least twice as wide as the narrowest; in LUDB all are forced to a
        range of 1.

    Raises:
        EcgFileError: see `MAX_MEDIAN_SWING_MV` and `MIN_LARGEST_SWING_MV`.
    """
    if signal.shape[0] == 0 or signal.shape[1] == 0:
        raise EcgFileError("it holds no samples; record or copy it again")
    if np.isinf(signal).any():
        raise EcgFileError("it holds infinite values; mark missing samples as NaN")
    sample = signal[:, :: max(1, signal.shape[1] // 500)]
    sample = sample[np.isfinite(sample).any(axis=1)]
    if not sample.size:
        return ""
    percentile = np.nanpercentile if np.isnan(sample).any() else np.percentile
    low, high = percentile(sample, [2, 98], axis=1)
    swings = (high - low)[high > low]
    if not swings.size:
        return ""
    median, largest = float(np.median(swings)), float(swings.max())
    if median > MAX_MEDIAN_SWING_MV:
        raise EcgFileError(f"its leads swing by {median:.3g} mV, an ECG's by 0.1 to 5 mV; is the gain or unit right?")
    if largest < MIN_LARGEST_SWING_MV:
        raise EcgFileError(f"no lead swings by more than {largest * 1000:.3g} uV; is the gain or unit right?")
    ranges = signal.max(axis=1) - signal.min(axis=1)  # NaN where a sample is missing
    if np.isnan(ranges).any():
        ranges = np.fmax.reduce(signal, axis=1) - np.fmin.reduce(signal, axis=1)
    ranges = ranges[ranges > 0]
    if len(ranges) < MIN_LEADS_SCALED_ALIKE or ranges.max() >= MAX_RATIO_SCALED_ALIKE * ranges.min():
        return ""
    return f"all its leads range over {ranges.max():.3g} mV: they were scaled one by one, and millivolts are lost"
