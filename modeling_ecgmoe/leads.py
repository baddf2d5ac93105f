"""The twelve standard leads: one order, every spelling of their names, and the limb leads that follow from two others.

Limb leads lie in a plane (Einthoven 1908, Goldberger 1942): with I and II known,
III = II - I, aVR = -(I + II) / 2, aVL = I - II / 2, aVF = II - I / 2. Any two of the six determine the other four.
"""

import re
from collections.abc import Sequence

import numpy as np

LEADS = ("I", "II", "III", "aVR", "aVL", "aVF", "V1", "V2", "V3", "V4", "V5", "V6")
NUM_LEADS = len(LEADS)
NUM_LIMB_LEADS = 6

# Each limb lead as a combination of (I, II), in the order of LEADS.
LIMB_FROM_I_II = np.array(
    [[1.0, 0.0], [0.0, 1.0], [-1.0, 1.0], [-0.5, -0.5], [1.0, -0.5], [-0.5, 1.0]],
)

_PREFIXES = ("mdc_ecg_lead_", "ecg_lead_", "lead_", "lead", "ecg_", "ecg")
_ALIASES = {
    "i": "I", "1": "I", "di": "I", "d1": "I", "li": "I",
    "ii": "II", "2": "II", "dii": "II", "d2": "II", "lii": "II", "mlii": "II",
    "iii": "III", "3": "III", "diii": "III", "d3": "III", "liii": "III", "mliii": "III",
    "avr": "aVR", "avl": "aVL", "avf": "aVF",
    **{f"{prefix}{number}": f"V{number}" for prefix in ("v", "c", "mv") for number in range(1, 7)},
}  # fmt: skip


def find_lead(name: str) -> str | None:
    """The canonical name behind a recorder's spelling, or None where `name` is not one of the twelve leads.

    Case, blanks and the prefixes of WFDB, HL7 and DICOM ("Lead I", "MDC_ECG_LEAD_aVR", "ECG V1") do not matter. The
    modified limb lead MLII of ambulatory recorders counts as II.
    """
    key = name.strip().lower().replace(" ", "_").replace("-", "_")
    if re.fullmatch(r"ecg_?\d+", key):  # the channel of a monitor, wherever its electrodes are
        return None
    for prefix in ("", *_PREFIXES):
        if key.startswith(prefix):
            lead = _ALIASES.get(key.removeprefix(prefix).strip("_"))
            if lead is not None:
                return lead
    return None


def canonical_lead(name: str) -> str:
    """The canonical name behind a recorder's spelling.

    Raises:
        ValueError: `name` is not one of the twelve standard leads.
    """
    lead = find_lead(name)
    if lead is None:
        raise ValueError(f"unknown lead name {name!r}; known leads are {', '.join(LEADS)}")
    return lead


def arrange_leads(signal: np.ndarray, lead_names: Sequence[str]) -> tuple[np.ndarray, list[str]]:
    """Bring a signal into the order of `LEADS` and derive the limb leads that two others determine.

    Leads that are not one of the twelve (Vx, Vy, Vz, respiration) are left out.

    Args:
        signal: float array (leads, samples) in mV, NaN where missing.
        lead_names: one name for each row of `signal`, in any spelling that `find_lead` knows.

    Returns:
        The signal as float32 (12, samples) in mV, rows of NaN where a lead is missing, and the names of the leads that
        were read (derived ones are not among them), in the order of `LEADS`.

    Raises:
        ValueError: shapes do not fit, a lead occurs twice or has no finite sample, or none of the twelve is there.
    """
    signal = np.asarray(signal)
    if signal.ndim != 2 or len(lead_names) != signal.shape[0]:
        raise ValueError(
            f"`signal` must have shape (leads, samples) with one of the {len(lead_names)} lead names for each row, "
            f"found shape {signal.shape}. Is it (samples, leads)?"
        )
    arranged = np.full((NUM_LEADS, signal.shape[1]), np.nan, dtype=np.float32)
    seen: dict[str, str] = {}
    used = []
    for row, name in zip(signal, lead_names, strict=True):
        lead = find_lead(name)
        if lead is None:
            continue
        if lead in seen:
            raise ValueError(f"lead {lead} occurs twice, as {seen[lead]!r} and as {name!r}; pass one of them")
        seen[lead] = name
        if not np.isfinite(row).any():
            raise ValueError(f"lead {lead} holds no finite sample; leave it out and name the leads that remain")
        arranged[LEADS.index(lead)] = row
        used.append(lead)
    if not seen:
        raise ValueError(
            f"none of the lead names {list(lead_names)} is one of the twelve leads {', '.join(LEADS)}; pass the right "
            "ones as lead_names (--leads)"
        )
    _derive_limb_leads(arranged)
    return arranged, sorted(used, key=LEADS.index)


def _derive_limb_leads(arranged: np.ndarray) -> None:
    """Fill missing limb leads of `arranged` (12, samples) in place where two or more others are there."""
    limbs = arranged[:NUM_LIMB_LEADS]
    present = np.isfinite(limbs).any(axis=1)
    if present.sum() < 2 or present.all():
        return
    # NaN samples of a contributing lead stay NaN in the derived ones.
    i_and_ii = np.linalg.pinv(LIMB_FROM_I_II[present]) @ limbs[present]
    limbs[~present] = (LIMB_FROM_I_II[~present] @ i_and_ii).astype(np.float32)
