"""A column of labels as text: what kind of task it is taken for, when it has to be told, and what its cells say."""

from dataclasses import replace
from typing import Any

import datasets
import pytest

from data_builders.label_column import find_kind, find_labels, infer_task, read_label, same_label
from modeling_ecgmoe.tasks import KINDS, Task

GRADE = Task("grade", "multi_class", "of the valve", "grade", labels=("mild", "none", "severe"))
FINDINGS = Task("findings", "multi_label", "in the report", "findings", labels=("AF", "PVC"))


@pytest.mark.parametrize(
    ("texts", "kind", "labels"),
    [
        (["0", "1", "1", ""], "binary", ("0", "1")),
        (["1.0", "", "0.0"], "binary", ("0", "1")),
        (["yes", "no", " yes ", "NA"], "binary", ("no", "yes")),
        (["True", "False"], "binary", ("False", "True")),
        (["mild", "none", "severe"], "multi_class", ("mild", "none", "severe")),
        (["AF;PVC", "PVC", ";"], "multi_label", ("AF", "PVC")),
        (["3.5", "4.1", "", "nan"], "regression", ()),
        (["3,5", "4,1"], "regression", ()),
        ([str(age) for age in range(30, 60)], "regression", ()),
    ],
)
def test_an_unmistakable_kind_is_recognised(texts: list[str], kind: str, labels: tuple[str, ...]) -> None:
    task = infer_task("x", "column", texts)
    assert (task.kind, task.labels, task.column) == (kind, labels, "column")


@pytest.mark.parametrize(
    "texts",
    [
        ["1", "2"],  # two codes, or a measurement
        ["0", "1", "2", "3"],  # grades, or a count
        ["12", "high", "low"],
        [f"patient said {i}" for i in range(30)],
    ],
    ids=["two numbers", "a few whole numbers", "numbers and words", "free text"],
)
def test_a_kind_that_could_be_several_is_asked_for_with_the_choices(texts: list[str]) -> None:
    with pytest.raises(
        ValueError, match=r"column 'c' holds .* several ways; say how with --kind: " + ", ".join(KINDS)
    ):
        infer_task("x", "c", texts)


@pytest.mark.parametrize("kind", ["multi_class", "regression"])
def test_the_kind_that_is_told_counts(kind: str) -> None:
    assert infer_task("x", "c", ["0", "1", "2", "10"], kind=kind).kind == kind


@pytest.mark.parametrize("spelling", ["multiclass", "multi-class", "Multi_Class"])
def test_a_kind_may_be_spelled_as_people_do(spelling: str) -> None:
    assert find_kind(spelling) == "multi_class"


def test_labels_that_are_numbers_keep_their_order() -> None:
    assert infer_task("x", "c", ["10", "9", "1"], kind="multiclass").labels == ("1", "9", "10")


def test_a_regression_is_scaled_by_its_training_split() -> None:
    train = ["1", "3", "", "5.5"]
    task = infer_task("x", "c", train, [*train, "1000"], unit="mmol/L")
    assert task.center == pytest.approx(9.5 / 3, rel=1e-5)
    assert task.spread == pytest.approx(((1 + 9 + 5.5**2) / 3 - (9.5 / 3) ** 2) ** 0.5, rel=1e-5)
    assert task.unit == "mmol/L"


def test_labels_of_the_other_splits_are_labels_too() -> None:
    train = ["mild", "none", "severe"]
    assert infer_task("x", "c", train, [*train, "", "moderate"]).labels == ("mild", "moderate", "none", "severe")


@pytest.mark.parametrize(
    ("texts", "options", "message"),
    [
        (["", "nan"], {}, "holds no label in the training split, so there is nothing to learn"),
        (["yes", "yes"], {}, "holds only 'yes'"),
        (["2.5", "2.5"], {"kind": "regression"}, "holds only '2.5'"),
        (["a", "b", "c"], {"kind": "binary"}, "a binary task has two labels, and the column 'c' holds 3: a, b, c"),
        (["1", "high"], {"kind": "regression"}, "holds 'high' in row 2, and a regression needs numbers; empty a cell"),
        (["a", "b"], {"unit": "mV"}, "--unit mV is of a regression"),
        (["a", "b"], {"kind": "ranking"}, f"unknown --kind 'ranking'; choose among {', '.join(KINDS)}"),
    ],
)
def test_what_cannot_be_learned_is_refused(texts: list[str], options: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        infer_task("x", "c", texts, **options)


@pytest.mark.parametrize(
    ("task", "text", "value"),
    [
        (GRADE, " severe ", "severe"),
        (GRADE, "none", "none"),  # a grade, and not an empty cell
        (GRADE, "n/a", None),
        (FINDINGS, "PVC; AF", ["PVC", "AF"]),
        (FINDINGS, ";", []),
        (FINDINGS, "", None),
        (Task("low", "binary", "ejection fraction", "low", labels=("0", "1")), "1.0", "1"),
        (Task("ef", "regression", "ejection fraction", "ef"), "55,5", 55.5),
        (Task("ef", "regression", "ejection fraction", "ef"), "NaN", None),
    ],
)
def test_a_cell_is_read_as_its_task_needs_it(task: Task, text: str, value: Any) -> None:
    assert read_label(text, task) == value


def own_rows(column: str, cells: list[str], **columns: list[Any]) -> datasets.Dataset:
    """Rows as those of a table of one's own, with these cells in one column."""
    places = [f"row {number} (r{number}.npz)" for number, _ in enumerate(cells, start=1)]
    table = [{column: cell} for cell in cells]
    return datasets.Dataset.from_dict({"table": table, "place": places, "conflicts": [[] for _ in cells]} | columns)


@pytest.mark.parametrize(
    ("task", "cells", "message"),
    [
        (
            Task("ef", "regression", "ejection fraction", "ef"),
            ["55", "low", "", "n.d."],
            r"task ef, column 'ef': row 2 \(r2.npz\): 'low' is not a number, row 4 \(r4.npz\): 'n.d.' is not a number"
            "; leave a cell empty",
        ),
        (GRADE, ["mild", "moderate"], r"row 2 \(r2.npz\): 'moderate' is none of mild, none, severe"),
        (FINDINGS, ["AF;VT", ";"], r"row 1 \(r1.npz\): 'VT' is none of AF, PVC"),
    ],
)
def test_a_cell_that_is_none_of_the_task_is_named_with_its_row(task: Task, cells: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        find_labels(own_rows(task.column, cells), task)


def test_a_file_with_two_labels_is_refused_for_the_task_of_these_labels_alone() -> None:
    conflicts = [[{"column": "grade", "message": "rows 1 and 2 name one file"}]]
    rows = own_rows("grade", ["mild"], conflicts=conflicts)
    with pytest.raises(ValueError, match="task grade: rows 1 and 2 name one file; a recording has one label"):
        find_labels(rows, GRADE)
    conflicts[0][0]["column"] = "ef"
    assert find_labels(own_rows("grade", ["mild"], conflicts=conflicts), GRADE) == ["mild"]


@pytest.mark.parametrize(
    "cells", [["426783006", "164889003"] * 3 + ["426783006;164889003"], ["1", "2", "3", "1;2", ";"]]
)
def test_codes_are_labels_and_several_of_them_in_a_cell_are_several(cells: list[str]) -> None:
    task = infer_task("findings", "findings", cells)
    assert task.kind == "multi_label"
    assert task.labels == tuple(sorted({label for cell in cells for label in cell.split(";") if label}, key=int))


@pytest.mark.parametrize("kind", [None, "regression"])
@pytest.mark.parametrize("slip", ["low", "55;60", "5O"])
def test_a_few_slips_among_numbers_are_named_with_their_rows(kind: str | None, slip: str) -> None:
    train = ["55", "60", "61.5", "", "58"] * 3
    every, places = [*train, "57", slip], [f"row {number} (r{number}.npz)" for number in range(1, 18)]
    with pytest.raises(ValueError, match=rf"'{slip}' in row 17 \(r17\.npz\).*; empty a cell .*--kind"):
        infer_task("ef", "ef", train, every, places, kind=kind)


def test_a_number_and_a_word_are_two_classes() -> None:
    assert infer_task("x", "c", ["0"] * 9 + ["PVC"]).labels == ("0", "PVC")


def test_of_many_slips_the_first_are_named() -> None:
    with pytest.raises(ValueError, match="'x' in row 39, and 11 more; empty a cell"):
        infer_task("x", "c", ["1", "2.5"] * 15 + ["x"] * 20)


@pytest.mark.parametrize(
    ("text", "other", "same"),
    [("1", "1.0", True), ("0", "0.0", True), ("55,5", "55.50", True), ("AF;PVC", "PVC; AF", True), ("a", "b", False),
     (";", "AF", False), ("1", "1;2", False)],
)  # fmt: skip
def test_cells_hold_the_same_label_however_it_is_written(text: str, other: str, same: bool) -> None:
    assert same_label(text, other) is same


def test_of_a_table_the_cells_count_and_elsewhere_the_column() -> None:
    rows = own_rows("severity", ["mild", ""], grade=[0, 1])
    assert find_labels(rows, replace(GRADE, column="severity")) == ["mild", None]
    assert find_labels(rows, GRADE) is None
    assert find_labels(rows.remove_columns("table"), GRADE) == [0, 1]
    assert find_labels(rows.remove_columns("table"), FINDINGS) is None


def test_numbers_with_thousands_separators_are_not_read_as_a_thousandth() -> None:
    with pytest.raises(ValueError, match=r"holds '1,234', which may be 1234 or 1\.234"):
        infer_task("weight_g", "weight", ["950", "1,234", "12,500"] * 5, kind="regression")
    commas = infer_task("x", "x", ["0,123", "1,234", "12,5"] * 5, kind="regression")
    assert commas.spread > 1.0  # they can only be decimal ones
