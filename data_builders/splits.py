"""Splits by patient, for data sets without official ones."""

import hashlib
from collections.abc import Mapping, Sequence


def split_of_patient(patient_id: str, fractions: Mapping[str, float], seed: int = 0) -> str:
    """The split of a patient, from the hash of the id: the same on every machine, whoever else is in the data set.

    Args:
        patient_id: any text that stands for one patient in this data set.
        fractions: split name to the expected share of patients; the shares add up to 1.
        seed: another seed gives another split.

    Raises:
        ValueError: a share is negative or they do not add up to 1.
    """
    if min(fractions.values(), default=-1.0) < 0 or abs(sum(fractions.values()) - 1) > 1e-6:
        raise ValueError(f"the shares of the splits must be positive and add up to 1, found {dict(fractions)}")
    digest = hashlib.sha256(f"{seed}:{patient_id}".encode()).digest()
    position = int.from_bytes(digest[:8]) / 2**64
    edge = 0.0
    for name, fraction in fractions.items():
        edge += fraction
        if position < edge:
            return name
    return name


def check_no_patient_crosses(patients: Mapping[str, Sequence[str]]) -> None:
    """Make sure that no patient is in two splits.

    Args:
        patients: split name to the patient ids of its records.

    Raises:
        ValueError: a patient is in two splits; the message names both and some of the patients.
    """
    split_of: dict[str, str] = {}
    for name, ids in patients.items():
        shared = sorted({i for i in ids if split_of.get(i, name) != name})
        if shared:
            raise ValueError(
                f"{len(shared)} patients are in split {name!r} and in {split_of[shared[0]]!r}, among them "
                f"{', '.join(shared[:5])}; a patient belongs to one split"
            )
        split_of |= dict.fromkeys(ids, name)
