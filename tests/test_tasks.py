"""The task table: truth in, numbers out, and back."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from modeling_ecgmoe.heads import read_head
from modeling_ecgmoe.tasks import (
    DESCRIPTIONS,
    RHYTHM_STATEMENTS,
    STATEMENTS,
    SUPERCLASS_OF,
    SUPERCLASSES,
    TASKS,
    Task,
    find_task,
)

COLOURS = Task("colour", "multi_class", "of the paper", "colour", labels=("pink", "green", "white"))


def test_ptb_xl_has_71_statements_44_of_them_diagnostic_in_5_superclasses() -> None:
    assert len({s.code for s in STATEMENTS}) == len(STATEMENTS) == 71
    assert len(RHYTHM_STATEMENTS) == 12
    assert len(SUPERCLASS_OF) == 44
    assert set(SUPERCLASS_OF.values()) == set(SUPERCLASSES)
    assert DESCRIPTIONS["AFIB"] == "atrial fibrillation"


def test_the_table_is_keyed_by_the_names_of_its_tasks() -> None:
    assert all(name == task.name for name, task in TASKS.items())
    assert {"rr_interval", "age", "sex", "potassium", "arrhythmia", "statements", "superclass"} <= set(TASKS)


@pytest.mark.parametrize(("name", "outputs"), [("age", 1), ("sex", 1), ("potassium", 2), ("superclass", 5)])
def test_a_head_has_as_many_outputs_as_its_kind_asks_for(name: str, outputs: int) -> None:
    assert TASKS[name].num_outputs == outputs


def test_an_unknown_task_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"unknown task 'weight'.*rr_interval, age, sex.*JSON"):
        find_task("weight")


# Codes


def verhoeff(digits: str) -> int:
    """0 where the last digit is the check digit of a SNOMED CT identifier (Verhoeff 1969: the dihedral group D5)."""
    times = [[(a + b) % 5 if a < 5 and b < 5 else 0 for b in range(10)] for a in range(10)]
    for a in range(10):
        for b in range(10):
            turn = (a + b) if a < 5 else (a - b)
            times[a][b] = turn % 5 + (5 if (a < 5) != (b < 5) else 0)
    step, check = [1, 5, 7, 6, 2, 8, 3, 0, 9, 4], 0
    for position, digit in enumerate(reversed(digits)):
        value = int(digit)
        for _ in range(position):
            value = step[value]
        check = times[check][value]
    return check


def test_the_check_digit_is_computed_as_in_the_specification() -> None:
    assert verhoeff("2363") == 0  # the textbook's example
    assert verhoeff("2364") != 0
    assert verhoeff("73211009") == 0  # diabetes mellitus, of the SNOMED CT release guide


@pytest.mark.parametrize("task", [task for task in TASKS.values() if task.codes], ids=lambda task: task.name)
def test_every_code_is_one_that_snomed_ct_could_have_given(task: Task) -> None:
    assert set(task.codes) <= set(task.labels)
    ids = [codes["snomed_ct"] for codes in task.codes.values() if "snomed_ct" in codes]
    assert ids
    assert len(set(ids)) == len(ids)
    for snomed_ct in ids:
        assert verhoeff(snomed_ct) == 0, snomed_ct


def test_statements_are_their_own_scp_codes() -> None:
    arrhythmia = TASKS["arrhythmia"]
    assert arrhythmia.codes["AFIB"] == {"scp_ecg": "AFIB", "snomed_ct": "164889003"}
    assert all(codes["scp_ecg"] == label for label, codes in TASKS["statements"].codes.items())


def test_a_code_for_a_label_that_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match="task colour: codes for blue, which are not among its labels"):
        replace(COLOURS, codes={"blue": {"snomed_ct": "1"}})


@pytest.mark.parametrize(("spread", "decimals"), [(200.0, 0), (17.0, 0), (1.0, 1), (0.5, 2), (0.003, 4)])
def test_values_are_read_with_two_digits_of_their_spread(spread: float, decimals: int) -> None:
    assert replace(TASKS["age"], spread=spread).decimals == decimals


def test_classes_have_an_accuracy_too() -> None:
    assert COLOURS.metrics == ("macro_auroc", "accuracy")
    assert TASKS["superclass"].metrics == ("macro_auroc",)


# Truth to targets


@pytest.mark.parametrize("unknown", [None, float("nan"), np.float32("nan"), np.float64("nan")])
@pytest.mark.parametrize("name", ["age", "sex", "superclass"])
def test_what_is_not_known_is_nan(name: str, unknown: Any) -> None:
    assert np.isnan(TASKS[name].targets([unknown])).all()


def test_a_regression_keeps_its_unit() -> None:
    targets = TASKS["age"].targets([55, 31.5, None])
    np.testing.assert_array_equal(targets, np.array([[55.0], [31.5], [np.nan]], np.float32))
    assert targets.dtype == np.float32


@pytest.mark.parametrize(("value", "target"), [("male", 0.0), ("female", 1.0), (0, 0.0), (1, 1.0), (np.int64(1), 1.0)])
def test_a_binary_truth_is_a_label_or_its_index(value: Any, target: float) -> None:
    assert TASKS["sex"].targets([value])[0, 0] == target


def test_a_multi_label_truth_is_one_where_a_label_is_given_and_zero_elsewhere() -> None:
    targets = TASKS["superclass"].targets([["MI", "HYP"], [], ["NORM"]])
    np.testing.assert_array_equal(targets, [[0, 1, 0, 0, 1], [0, 0, 0, 0, 0], [1, 0, 0, 0, 0]])


def test_a_multi_class_truth_is_one_hot() -> None:
    np.testing.assert_array_equal(COLOURS.targets(["white", 1]), [[0, 0, 1], [0, 1, 0]])


@pytest.mark.parametrize(
    ("name", "value"), [("sex", "unknown"), ("sex", 2), ("sex", -1), ("superclass", ["NORM", "BAD"])]
)
def test_a_label_that_the_task_does_not_have_is_refused_with_those_it_has(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"task {name}: label .* is not one of {', '.join(TASKS[name].labels)}"):
        TASKS[name].targets([value])


# Outputs to answers


def test_a_regression_answers_in_its_unit() -> None:
    age = TASKS["age"]
    assert age.answers(np.array([[0.0], [1.0], [-1.0]]))[:, 0].tolist() == [
        age.center,
        age.center + age.spread,
        age.center - age.spread,
    ]


def test_a_regression_answers_nothing_below_its_minimum_and_without_one_anything() -> None:
    age, own = TASKS["age"], Task("balance", "regression", "of a ledger", "balance")
    assert TASKS["rr_interval"].minimum == age.minimum == 0.0
    assert age.answers(np.array([[-10.0]])).tolist() == [[0.0]]
    assert own.answers(np.array([[-10.0]])).tolist() == [[-10.0]]


def test_a_truth_below_the_minimum_is_refused_with_the_way_out() -> None:
    with pytest.raises(ValueError, match=r"task age: the label -1 is below the minimum 0; leave it empty where"):
        TASKS["age"].targets([50, -1])


def test_a_task_without_a_minimum_is_written_as_it_was_before_there_were_any() -> None:
    assert "minimum" not in TASKS["sex"].to_dict()
    assert TASKS["age"].to_dict()["minimum"] == 0.0
    old = {name: value for name, value in TASKS["age"].to_dict().items() if name != "minimum"}
    assert Task.from_dict(old) == replace(TASKS["age"], minimum=None)


def test_labels_answer_with_independent_probabilities() -> None:
    answers = TASKS["superclass"].answers(np.array([[0.0, math.log(3.0), -math.log(3.0), 20.0, -20.0]]))
    np.testing.assert_allclose(answers[0], [0.5, 0.75, 0.25, 1.0, 0.0], atol=1e-6)


def test_classes_answer_with_probabilities_that_sum_to_one() -> None:
    answers = COLOURS.answers(np.array([[0.0, math.log(2.0), 0.0], [1000.0, 0.0, -1000.0]]))
    np.testing.assert_allclose(answers, [[0.25, 0.5, 0.25], [1.0, 0.0, 0.0]], atol=1e-12)


# A task of one's own


@pytest.mark.parametrize("task", [*TASKS.values(), COLOURS], ids=lambda task: task.name)
def test_a_task_survives_json(task: Task, tmp_path: Path) -> None:
    path = tmp_path / "task.json"
    path.write_text(json.dumps(task.to_dict()), encoding="utf-8")
    assert Task.from_json_file(path) == task


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "ranking"}, "kind must be one of regression, binary, multi_class, multi_label, found 'ranking'"),
        ({"name": "two words"}, "letters, digits and underscores, found 'two words'"),
        ({"labels": ()}, "a multi_class task needs its labels"),
        ({"labels": ("a", "a")}, "a label occurs twice"),
        ({"kind": "binary"}, "a binary task has two labels"),
        ({"kind": "regression"}, "a regression has a unit and no labels"),
        ({"spread": 0.0}, "spread must be positive, found 0"),
        ({"spread": float("nan")}, "spread must be positive"),
        (
            {"prior": "rr_interval_ms"},
            "prior must be empty, or for a regression rr_interval_ms; found 'rr_interval_ms'",
        ),
        ({"minimum": 0.0}, "minimum must be a finite number, of a regression; found 0.0 of a multi_class task"),
        ({"kind": "regression", "labels": (), "minimum": float("nan")}, "a finite number, of a regression; found nan"),
        ({"kind": "regression", "labels": (), "prior": "qt_ms"}, "for a regression rr_interval_ms; found 'qt_ms'"),
    ],
)
def test_a_task_that_contradicts_itself_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(COLOURS, **changes)


def test_the_main_metric_follows_from_the_kind() -> None:
    assert Task("ef", "regression", "ejection fraction", "ef").metric == "mae"
    assert Task("low", "binary", "low ejection fraction", "low", labels=("no", "yes")).metric == "macro_auroc"


def test_heads_are_alike_where_their_outputs_mean_the_same() -> None:
    age = TASKS["age"]
    assert age.reads_like(replace(age, description="another text", column="age_years"))
    assert not age.reads_like(replace(age, center=50.0))


def test_a_field_that_no_task_has_is_refused_with_those_it_has() -> None:
    with pytest.raises(ValueError, match=r"unknown task fields colour, shape; known are name, kind, description"):
        Task.from_dict(COLOURS.to_dict() | {"shape": 1, "colour": 2})


def test_a_field_that_a_task_lacks_is_named() -> None:
    with pytest.raises(ValueError, match="a task needs description, column; found kind, name"):
        Task.from_dict({"name": "x", "kind": "binary"})


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_a_name_that_peft_would_mix_up_with_its_own_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"choose another name, such as body_{name}"):
        Task(name, "regression", "of the body", name, unit="kg")


# Parts


def test_a_label_made_of_parts_is_true_where_any_of_them_is() -> None:
    task = Task("block", "multi_label", "of the heart", "block", ("left", "right"), parts={"left": ["LAFB", "CLBBB"],
        "right": ["CRBBB"]}, parts_task="statements")  # fmt: skip
    assert task.part_names == ("LAFB", "CLBBB", "CRBBB")
    assert (task.num_outputs, task.head_size) == (2, 5)
    assert Task.from_dict(json.loads(json.dumps(task.to_dict()))) == task
    assert not task.reads_like(task.plain())
    p = np.array([[0.3, 0.6, 0.2, 0.5, 0.9], [0.5, 0.5, 1e-7, 1e-7, 1.0 - 1e-7]])
    outputs = torch.from_numpy(np.log(p / (1 - p))).float()
    logits = read_head(outputs, task, torch.zeros(2)).numpy()
    either = np.stack([1 - (1 - p[:, 2]) * (1 - p[:, 3]), p[:, 4]], axis=1)
    expected = (np.log(p[:, :2] / (1 - p[:, :2])) + np.log(either / (1 - either))) / 2
    np.testing.assert_allclose(logits[0], expected[0], atol=1e-4)
    assert np.isfinite(logits).all()
    assert logits[1, 0] < -4.0
    assert logits[1, 1] > 7.0


def test_parts_keep_their_digits_where_they_are_small() -> None:
    task = Task("block", "multi_label", "of the heart", "block", ("any",), parts={"any": ["LAFB", "CLBBB"]},
        parts_task="statements")  # fmt: skip
    raw = torch.linspace(-11.0, 11.0, 500)
    outputs = torch.stack([torch.zeros(500), raw, raw.flip(0) - 11.0], dim=1)
    absent = torch.nn.functional.softplus(outputs[:, 1:].double()).sum(dim=1)
    expected = 0.5 * (absent + torch.log(-torch.expm1(-absent)))
    found = read_head(outputs, task, torch.zeros(500))[:, 0].double()
    torch.testing.assert_close(found, expected, atol=3e-6, rtol=1e-6)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"parts": {"MI": ["IMI"]}, "parts_task": "statements"}, "every label"),
        ({"kind": "multi_class", "parts": {"MI": ["IMI"], "CD": ["LAFB"]}, "parts_task": "statements"}, "multi-label"),
        ({"parts": {"MI": ["IMI"], "CD": []}, "parts_task": "statements"}, "every label"),
        ({"parts": {"MI": ["IMI"], "CD": ["LAFB"]}}, "go together"),
        ({"parts_task": "statements"}, "go together"),
    ],
)
def test_parts_that_do_not_fit_are_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Task(
            **{"name": "x", "kind": "multi_label", "description": "", "column": "x", "labels": ("MI", "CD")} | changes
        )


def test_a_task_without_parts_is_written_as_before_there_were_any() -> None:
    assert not {"parts", "parts_task"} & set(TASKS["statements"].to_dict())
    assert TASKS["superclass"].to_dict()["parts_task"] == "statements"
    assert sum(map(len, TASKS["superclass"].parts.values())) == 44
