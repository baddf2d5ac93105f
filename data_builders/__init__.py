"""Public ECG data sets as `datasets` builders with one shared row."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from data_builders.ecg_builder import EcgBuilder

# Name to file and class; a file is imported when its data set is asked for.
BUILDERS = {
    "ptb_xl": "PtbXl",
    "cinc2021": "Cinc2021",
    "cinc2017": "Cinc2017",
    "mitdb": "Mitdb",
    "ludb": "Ludb",
    "code15": "Code15",
}


def find_builder(name: str) -> "type[EcgBuilder]":
    """The builder of that name, a key of `BUILDERS`.

    Raises:
        ValueError: there is none; the message lists the known ones.
    """
    if name not in BUILDERS:
        raise ValueError(f"unknown dataset {name!r}; known are {', '.join(BUILDERS)}")
    return getattr(import_module(f"data_builders.{name}"), BUILDERS[name])
