"""The row that every builder gives: one recording, in millivolts, with what is known of the patient.

Unknown values are null. The tasks of `modeling_ecgmoe.tasks` find their truth in the columns of the same names.
"""

from typing import Any

import datasets

SEXES = ("male", "female")


def ecg_features(shape: tuple[int, int] | None, **columns: Any) -> datasets.Features:
    """The features of a builder.

    Args:
        shape: (leads, samples) where all records have the same, which is stored as one block and read without a copy;
            None where records differ.
        columns: what this data set has beyond the shared columns, name to feature.

    Raises:
        ValueError: a column is already one of the shared ones.
    """
    signal = (
        datasets.List(datasets.List(datasets.Value("float32")))
        if shape is None
        else datasets.Array2D(shape, "float32")
    )
    shared = {
        "record_id": datasets.Value("string"),  # the stem of the record's file
        "patient_id": datasets.Value("string"),  # never in two splits
        "signal": signal,  # (leads, samples) in mV, NaN = missing
        "sampling_rate": datasets.Value("float32"),  # Hz
        "lead_names": datasets.List(datasets.Value("string")),  # as in the file, one for each row of `signal`
        "age": datasets.Value("float32"),  # years; null where unknown or hidden
        "age_over_89": datasets.Value("bool"),  # the exact age is hidden for privacy
        "sex": datasets.ClassLabel(names=list(SEXES)),
        "recording_date": datasets.Value("timestamp[s]"),
        "report": datasets.Value("string"),
    }
    repeated = sorted(shared.keys() & columns.keys())
    if repeated:
        raise ValueError(f"columns {', '.join(repeated)} are shared by all builders; leave them out")
    return datasets.Features(shared | columns)
