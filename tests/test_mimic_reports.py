"""The reports of MIMIC-IV-ECG: what a statement says, and what it takes back."""

import json
from pathlib import Path

import pytest

from data_builders.mimic_reports import (
    OTHER,
    REPORT_CLASSES,
    RHYTHM_FINDINGS,
    first_line_class,
    rhythm_statements,
    stated_classes,
)
from modeling_ecgmoe.tasks import RHYTHM_STATEMENTS, Task

CONFIGS = Path(__file__).resolve().parents[1] / "benchmarks/configs"
SR = "sinus rhythm"


def test_there_are_fifteen_classes_and_the_last_is_for_the_rest() -> None:
    assert len(set(REPORT_CLASSES)) == 15
    assert REPORT_CLASSES[-1] == OTHER


def test_rhythms_are_those_of_ptb_xl() -> None:
    assert set(RHYTHM_FINDINGS) == set(RHYTHM_STATEMENTS)


@pytest.mark.parametrize(("name", "column"), [("report_class", "report_class"), ("report_classes", "report_classes")])
def test_the_task_files_name_the_fifteen_classes(name: str, column: str) -> None:
    task = Task.from_json_file(CONFIGS / f"task_{name}.json")
    assert (task.name, task.column, task.labels) == (name, column, REPORT_CLASSES)
    assert json.loads((CONFIGS / f"task_{name}.json").read_text())["kind"] == task.kind


# The first line as a whole


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("Sinus rhythm", SR),
        ("SINUS RHYTHM.", SR),
        ("  Sinus   rhythm ", SR),
        ("Sinus rhythm with PVC(s)", "sinus rhythm with pvc(s)"),
        ("Sinus rhythm with borderline 1st degree A-V block", "sinus rhythm with borderline 1st degree a-v block"),
        ("*** CONSIDER ACUTE ST ELEVATION MI ***", "consider acute st elevation mi"),
        ("--- Warning: Data quality may affect interpretation ---", "warning: data quality may affect interpretation"),
        ("Possible ectopic atrial rhythm", "possible ectopic atrial rhythm"),
        ("Normal sinus rhythm", OTHER),
        ("Sinus tachycardia with PVC(s)", OTHER),
        ("Probable atrial fibrillation", OTHER),
        ("other", OTHER),
    ],
)
def test_a_first_line_is_a_class_word_for_word(line: str, expected: str) -> None:
    assert first_line_class([line, "Sinus bradycardia"]) == expected


@pytest.mark.parametrize("lines", [[], [""], ["  ", "***", " . "]])
def test_without_a_report_nothing_is_known(lines: list[str]) -> None:
    assert first_line_class(lines) is None
    assert stated_classes(lines) is None
    assert rhythm_statements(lines) is None


def test_empty_lines_before_the_first_are_passed_over() -> None:
    assert first_line_class(["", "Sinus arrhythmia"]) == "sinus arrhythmia"


# What is stated anywhere


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (["Sinus rhythm", "Normal ECG"], [SR]),
        (["Normal sinus rhythm"], [SR]),
        (["Atrial fibrillation with rapid ventricular response"],
         ["atrial fibrillation", "atrial fibrillation with rapid ventricular response"]),
        (["Sinus rhythm with 1st degree A-V block"], [SR, "sinus rhythm with 1st degree a-v block"]),
        (["Sinus rhythm with borderline 1st degree A-V block."],
         [SR, "sinus rhythm with borderline 1st degree a-v block"]),
        (["Sinus rhythm", "- first degree A-V block"], [SR, "sinus rhythm with 1st degree a-v block"]),
        (["Sinus rhythm", "with borderline 1st degree A-V block"],
         [SR, "sinus rhythm with borderline 1st degree a-v block"]),
        (["Sinus bradycardia with 1st degree A-V block"], ["sinus bradycardia"]),
        (["Sinus rhythm with PAC(s) and PVCs"], [SR, "sinus rhythm with pac(s)", "sinus rhythm with pvc(s)"]),
        (["Sinus tachycardia with PVC(s)"], ["sinus tachycardia"]),
        (["--- Warning: Data quality may affect interpretation ---", "Sinus arrhythmia"],
         ["sinus arrhythmia", "warning: data quality may affect interpretation"]),
        (["Ventricular-paced rhythm"], ["ventricular pacing"]),
        (["Sinus rhythm", "*** CONSIDER ACUTE ST ELEVATION MI ***"], [SR, "consider acute st elevation mi"]),
        (["Possible ectopic atrial rhythm"], ["possible ectopic atrial rhythm"]),
        (["Left bundle branch block"], [OTHER]),
        (["Sinus or ectopic atrial rhythm"], [OTHER]),
    ],
)  # fmt: skip
def test_classes_are_all_that_the_lines_state(lines: list[str], expected: list[str]) -> None:
    assert stated_classes(lines) == expected


@pytest.mark.parametrize(
    "line",
    [
        "Atrial fibrillation is no longer present",
        "Atrial fibrillation no longer present",
        "Atrial fibrillation not seen",
        "Atrial fibrillation has resolved",
        "Atrial fibrillation cannot be ruled out",
        "Atrial fibrillation can not be excluded",
        "Cannot rule out atrial fibrillation",
        "Can not exclude atrial fibrillation",
        "Possible atrial fibrillation",
        "Probable atrial fibrillation with PVC(s)",
        "Irregular rhythm, consider atrial fibrillation",
        "Rhythm suggests atrial fibrillation",
        "No atrial fibrillation",
        "Atrial fibrillation?",
        "Atrial fibrillation has been replaced by something else",
        "Atrial flutter/fibrillation",
        "Afib/flutter",
        "Atrial fibrillation or flutter",
    ],
)
def test_what_is_denied_doubted_or_over_is_not_stated(line: str) -> None:
    assert stated_classes([line]) == [OTHER]
    assert rhythm_statements([line]) is None


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("Sinus rhythm has replaced atrial fibrillation", ["SR"]),
        ("Atrial fibrillation has been replaced by sinus rhythm", ["SR"]),
        ("Sinus bradycardia - consider sinus rhythm with 2:1 S-A block.", ["SBRAD"]),
        ("Sinus rhythm, possible atrial flutter", ["SR"]),
        ("Sinus rhythm cannot rule out anterior infarct", ["SR"]),
        ("Atrial fibrillation, no longer paced", ["AFIB"]),
        ("Sinus rhythm with non-specific ST changes", ["SR"]),
        ("Sinus rhythm without P-R prolongation but sinus arrhythmia", ["SR", "SARRH"]),
    ],
)
def test_a_doubt_ends_with_its_clause_and_spares_what_stands_before(line: str, expected: list[str]) -> None:
    assert rhythm_statements([line]) == expected


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("ATRIAL FLUTTER WITH 4:1 A-V BLOCK", ["AFLT"]),
        ("Sinus tachycardia", ["STACH"]),
        ("Demand pacing", ["PACE"]),
        ("Pacemaker rhythm - no further analysis", ["PACE"]),
        ("A-V dual-paced rhythm", ["PACE"]),
        ("Dual chamber pacing", ["PACE"]),
        ("Wandering atrial pacemaker", None),
        ("Sinus rhythm with ventricular bigeminy", ["SR", "BIGU"]),
        ("Ventricular trigeminy", ["TRIGU"]),
        ("Supraventricular tachycardia", ["SVTAC"]),
        ("Paroxysmal supraventricular tachycardia", ["PSVT"]),
        ("Supraventricular arrhythmia", ["SVARR"]),
        ("Left axis deviation", None),
    ],
)
def test_rhythms_become_the_statements_of_ptb_xl(line: str, expected: list[str] | None) -> None:
    assert rhythm_statements([line]) == expected
