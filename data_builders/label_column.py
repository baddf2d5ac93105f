"""A column of labels, as text: the task it is about, and the truth it tells of each recording."""

import logging
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import datasets
import numpy as np

from modeling_ecgmoe.tasks import KINDS, Task

logger = logging.getLogger(__name__)

UNKNOWN = ("", "na", "n/a", "<na>", "nan", "null")  # cells that hold no label
MAX_SHOWN = 9  # cells named in one message
MAX_CLASSES = 20  # more different labels are not taken for classes without being told


def find_labels(rows: datasets.Dataset, task: Task) -> list[Any] | None:
    """The truth of a task for each row, as `Task.targets` takes it; None where the rows lack its column.

    Of a table of the user's own (`csv_table`) its cells count, and no column that all data sets share.

    Raises:
        ValueError: a cell is none of the task's, or a file has two labels; the message says in which rows.
    """
    plain = rows.with_format(None)
    if "table" not in rows.column_names:
        return plain[task.column][:] if task.column in rows.column_names else None
    if task.column not in rows.features["table"]:
        return None
    conflicts = [found["message"] for of in plain["conflicts"][:] for found in of if found["column"] == task.column]
    if conflicts:
        raise ValueError(f"task {task.name}: {_shown(conflicts)}; a recording has one label, so keep the right row")
    labels, odd = [], []
    for cells, place in zip(plain["table"][:], plain["place"][:], strict=True):
        try:
            labels.append(read_label(cells[task.column], task))
        except ValueError as error:
            odd.append(f"{place}: {error}")
    if odd:
        raise ValueError(
            f"task {task.name}, column {task.column!r}: {_shown(odd)}; leave a cell empty where its value is not known"
        )
    return labels


def read_label(text: str, task: Task) -> Any:
    """A cell as `Task.targets` takes it: a number, a label or a list of labels, None where it is not known.

    Raises:
        ValueError: a regression's cell is not a number, or a label is not one of the task's.
    """
    text = text.strip()
    if not is_known(text):
        return None
    if task.kind == "regression":
        number = _number(text)
        if number is None:
            raise ValueError(f"{text!r} is not a number")
        return number
    parts = [part.strip() for part in text.split(";")] if task.kind == "multi_label" else [text]
    labels = [part if part in task.labels else _canonical(part) for part in parts if part]
    strange = [label for label in labels if label not in task.labels]
    if strange:
        raise ValueError(f"{strange[0]!r} is none of {', '.join(task.labels)}")
    return labels if task.kind == "multi_label" else labels[0]


def is_known(text: str) -> bool:
    """Whether a cell holds a label."""
    return text.strip().lower() not in UNKNOWN


def same_label(text: str, other: str) -> bool:
    """Whether two cells hold the same label or labels: 1 is 1.0, and the order of several does not matter."""
    first, second = ({_canonical(part.strip()) for part in cell.split(";")} for cell in (text, other))
    return first == second or (_number(text) is not None and _number(text) == _number(other))


def infer_task(
    name: str,
    column: str,
    texts: Sequence[str],
    every: Sequence[str] = (),
    places: Sequence[str] = (),
    kind: str | None = None,
    unit: str = "",
    description: str = "",
) -> Task:
    """The task that a column of labels is about.

    Args:
        name: of the task and its adapter.
        column: of the table.
        texts: its cells in the training split. Several labels in a cell are joined by ";", and ";" alone says that
            there is none. A regression takes its centre and spread from them.
        every: its cells in the whole table, whose labels are labels too; `texts` where not given.
        places: where each of these stands, for messages; by its number where not given.
        kind: one of `KINDS`, with or without the underscore; where not given it must be unmistakable.
        unit: of a regression.
        description: one line for cards and menus.

    Raises:
        ValueError: there is nothing to learn in the column, or its kind must be told.
    """
    every = every or texts
    places = places or [f"row {number}" for number in range(1, len(every) + 1)]
    known = [text.strip() for text in texts if is_known(text)]
    cells = {place: text.strip() for place, text in zip(places, every, strict=True) if is_known(text)}
    chosen = _infer_kind(column, known, cells) if kind is None else find_kind(kind)
    why = "by what the column holds, --kind says otherwise" if kind is None else "as asked"
    facts: dict[str, Any] = {"name": name, "kind": chosen, "description": description or column, "column": column}
    if chosen == "regression":
        task = Task(**(facts | _scale(column, known, cells)), unit=unit)
        logger.info("task %s: regression, %s; mean %g, deviation %g", name, why, task.center, task.spread)
        return task
    if unit:
        raise ValueError(f"--unit {unit} is of a regression, and the column {column!r} is taken as {chosen}")
    parts = [
        part.strip() for text in cells.values() for part in (text.split(";") if chosen == "multi_label" else [text])
    ]
    labels = sorted({_canonical(part) for part in parts if part}, key=_rank)
    if len(labels) < (1 if chosen == "multi_label" else 2):
        raise ValueError(_nothing_to_learn(column, known))
    if chosen == "binary" and len(labels) > 2:
        raise ValueError(
            f"a binary task has two labels, and the column {column!r} holds {len(labels)}: {', '.join(labels[:9])}; "
            "choose another --kind"
        )
    logger.info("task %s: %s, %s; labels %s", name, chosen, why, ", ".join(labels))
    return Task(**facts, labels=tuple(labels))


def find_kind(name: str) -> str:
    """The kind of a task by its name, however it is joined: "multiclass", "multi-class", "multi_class".

    Raises:
        ValueError: there is none; the message lists the known ones.
    """
    spellings = {kind.replace("_", ""): kind for kind in KINDS}
    spelling = name.lower().replace("_", "").replace("-", "")
    if spelling not in spellings:
        raise ValueError(f"unknown --kind {name!r}; choose among {', '.join(KINDS)}")
    return spellings[spelling]


def _infer_kind(column: str, known: list[str], cells: Mapping[str, str]) -> str:
    different = sorted({_canonical(text) for text in known}, key=_rank)
    numbers = [number for text in different if (number := _number(text)) is not None]
    if len(different) < 2:
        raise ValueError(_nothing_to_learn(column, known))
    # Codes are numbers too, and several of them in a cell are several labels. They come back, where values seldom do.
    few = len(numbers) <= min(MAX_CLASSES, len(cells) / 2) or any(not text.strip("; ") for text in cells.values())
    may_be_codes = few and all(number.is_integer() for number in numbers)
    odd = _not_numbers({p: t for p, t in cells.items() if not (may_be_codes and _are_numbers(t.split(";")))})
    # One number and one word are two classes; several numbers and, less often, something else are a slip of the pen.
    if odd and len(numbers) > 1 and 2 * len(odd) < len(cells):
        raise ValueError(
            f"the column {column!r} holds numbers but for {_shown(odd)}; empty a cell whose value is not known, or "
            f"say with --kind how to read the column: {', '.join(KINDS)}"
        )
    if any(";" in text for text in known):
        return "multi_label"
    if numbers == [0.0, 1.0] == list(map(_number, different)):
        return "binary"
    if len(numbers) == len(different):
        if len(numbers) > MAX_CLASSES or any(not number.is_integer() for number in numbers):
            return "regression"
    elif len(different) == 2:
        return "binary"
    elif len(different) <= MAX_CLASSES and not numbers:
        return "multi_class"
    shown = ", ".join(different[:9]) + (", ..." if len(different) > 9 else "")
    raise ValueError(
        f"the column {column!r} holds {len(different)} different values ({shown}), which can be read in several ways; "
        f"say how with --kind: {', '.join(KINDS)}"
    )


def _scale(column: str, known: list[str], cells: Mapping[str, str]) -> dict[str, float]:
    """Centre and spread of a regression, as mean and standard deviation."""
    if odd := _not_numbers(cells):
        raise ValueError(
            f"the column {column!r} holds {_shown(odd)}, and a regression needs numbers; empty a cell whose value is "
            "not known, or choose another --kind"
        )
    commas = [text for text in cells.values() if "," in text]
    if commas and all(_THOUSANDS.fullmatch(text) for text in commas):
        raise ValueError(
            f"the column {column!r} holds {commas[0]!r}, which may be {commas[0].replace(',', '')} or "
            f"{commas[0].replace(',', '.', 1)}; write numbers without thousands separators, and decimals with a point"
        )
    values = np.array([_number(text) for text in known], dtype=np.float64)
    if len(set(values)) < 2:
        raise ValueError(_nothing_to_learn(column, known))
    return {"center": float(f"{values.mean():.6g}"), "spread": float(f"{values.std():.6g}")}


def _are_numbers(parts: Sequence[str]) -> bool:
    """Whether these are several labels or none, each a number."""
    return len(parts) > 1 and all(_number(part) is not None for part in parts if part.strip())


def _not_numbers(cells: Mapping[str, str]) -> list[str]:
    """The cells that are no numbers, and where they stand."""
    return [f"{text!r} in {place}" for place, text in cells.items() if _number(text) is None]


def _shown(texts: Sequence[str]) -> str:
    """The first of many texts in a line, and how many more there are."""
    more = [f"and {len(texts) - MAX_SHOWN} more"] if len(texts) > MAX_SHOWN else []
    return ", ".join([*texts[:MAX_SHOWN], *more])


def _nothing_to_learn(column: str, known: list[str]) -> str:
    found = f"only {known[0]!r}" if known else "no label"
    return f"the column {column!r} holds {found} in the training split, so there is nothing to learn; check the table"


_THOUSANDS = re.compile(r"[+-]?[1-9]\d{0,2}(,\d{3})+")


def _number(text: str) -> float | None:
    try:
        number = float(text.replace(",", "."))
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _canonical(text: str) -> str:
    """One spelling for the labels 1 and 1.0, which tables make of each other where a cell of the column is empty."""
    number = _number(text)
    return text if number is None or not number.is_integer() else str(int(number))


def _rank(label: str) -> tuple[float, str, str]:
    """Numbers in their order and before words, words in the order of the alphabet."""
    number = _number(label)
    return (math.inf if number is None else number, label.casefold(), label)
