"""The README's result tables."""

import json
from pathlib import Path

import pytest

from benchmarks import tables
from data_builders import BUILDERS


def measured(metric: str, value: float, **more: object) -> dict:
    return {"metric": metric, "value": value, "low": value - 0.5, "high": value + 0.5, "level": 0.95, **more}


def results(*rows: dict) -> dict:
    return {
        "name": "quality",
        "command": "python measure.py",
        "commit": "0123456789abcdef",
        "seed": 3,
        "versions": {"torch": "2.13.0"},
        "hardware": {"cores": 2},
        "data": {"set": "PTB-XL 1.0.3", "records": 2183},
        "rows": list(rows),
    }


def cells(table: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line[:1] == "|"]


@pytest.fixture
def readme(tmp_path: Path) -> Path:
    """A README with one empty table, its result file beside it."""
    (tmp_path / "quality.json").write_text(json.dumps(results({"model": "ours", "parameters": 12345})))
    path = tmp_path / "README.md"
    path.write_text("before\n<!-- table:quality -->\n<!-- /table -->\nafter\n")
    return path


def run(readme: Path, *options: str) -> int:
    return tables.main(["--readme", str(readme), "--results", str(readme.parent), *options])


def test_each_task_of_the_metrics_gets_a_column_with_metric_unit_and_direction() -> None:
    row = {"model": "ours", "metrics": {"age": measured("mae", 7.123), "sex": measured("macro_auroc", 0.9254)}}
    title, _, line = cells(tables.render_table(results(row)))
    assert title == ["model", "age, MAE (years) ↓", "sex, macro AUROC ↑"]
    assert line == ["ours", "7.12 [6.62, 7.62]", "0.925 [0.425, 1.425]"]


def test_the_best_value_of_a_column_is_bold_in_the_direction_of_its_metric() -> None:
    rows = [
        {"model": name, "metrics": {"age": measured("mae", age), "sex": measured("macro_auroc", sex)}}
        for name, age, sex in (("one", 7.0, 0.9), ("two", 8.0, 0.95))
    ]
    _, _, one, two = cells(tables.render_table(results(*rows)))
    assert [cell.startswith("**") for cell in (*one, *two)] == [False, True, False, False, False, True]


def test_a_column_of_several_metrics_names_them_in_its_cells() -> None:
    rows = [
        {"adapter": "age", "result": measured("mae", 7.0, unit="years")},
        {"adapter": "sex", "result": measured("macro_auroc", 0.9)},
    ]
    title, _, age, sex = cells(tables.render_table(results(*rows)))
    assert title == ["adapter", "result"]
    assert age[1] == "MAE 7.00 [6.50, 7.50] years"
    assert sex[1] == "macro AUROC 0.900 [0.400, 1.400]"


def test_a_column_of_one_metric_in_several_units_names_them_in_its_cells() -> None:
    rows = [
        {"asked": "weight", "error": measured("mae", 9.0, unit="kg")},
        {"asked": "height", "error": measured("mae", 7.0, unit="cm")},
    ]
    title, _, weight, height = cells(tables.render_table(results(*rows)))
    assert title == ["asked", "error"]
    assert (weight[1].split()[-1], height[1].split()[-1]) == ("kg", "cm")


def test_what_a_row_does_not_have_is_a_dash() -> None:
    _, _, _, constant = cells(
        tables.render_table(results({"model": "a", "speed": 1.5}, {"model": "b", "speed": None}))
    )
    assert constant == ["b", "–"]


def test_the_table_says_where_its_numbers_come_from() -> None:
    row = {"model": "ours", "metrics": {"age": measured("mae", 7.0)}}
    origin = tables.render_table(results(row)).splitlines()[-1]
    for fact in (
        "PTB-XL 1.0.3, 2,183 records",
        "95 %",
        "`python measure.py`",
        "seed 3",
        "0123456789ab",
        "torch 2.13.0",
    ):
        assert fact in origin


def test_the_table_of_data_sets_has_a_row_for_each_builder_with_its_official_numbers(readme: Path) -> None:
    readme.write_text("<!-- table:data_sets -->\n<!-- /table -->\n")
    assert run(readme) == 0
    title, _, *rows = cells(readme.read_text())
    assert title[:10] == [
        "set", "records", "patients", "Hz", "leads", "length", "labels", "licence", "access", "command",
    ]  # fmt: skip
    assert [row[9] for row in rows] == [f'`find_builder("{name}")`' for name in BUILDERS]
    assert rows[0][1:4] == ["21,799", "18,869", "500, 100"]


def test_tables_are_written_between_their_markers_and_nothing_else_changes(readme: Path) -> None:
    assert run(readme) == 0
    text = readme.read_text()
    assert text.startswith("before\n<!-- table:quality -->\n| model | parameters |\n")
    assert "| ours | 12,345 |" in text
    assert text.endswith("</sub>\n<!-- /table -->\nafter\n")


def test_a_readme_is_stale_until_it_is_written_and_after_the_results_change(readme: Path) -> None:
    assert run(readme, "--check") == 1
    run(readme)
    assert run(readme, "--check") == 0
    (readme.parent / "quality.json").write_text(json.dumps(results({"model": "ours", "parameters": 99})))
    assert run(readme, "--check") == 1


@pytest.mark.parametrize(
    ("text", "content", "message"),
    [
        ("<!-- table:speed -->\n<!-- /table -->", None, "run the benchmark that writes it"),
        ("<!-- table:speed -->\n", None, "has no `<!-- /table -->`"),
        ("<!-- table:speed -->\n<!-- /table -->", {"rows": []}, "missing or empty: name, command"),
        ("<!-- table:speed -->\n<!-- /table -->", results(), "missing or empty: rows"),
    ],
)
def test_a_table_that_cannot_be_written_is_an_error_in_one_line(readme, capsys, text, content, message) -> None:
    readme.write_text(text)
    if content is not None:
        (readme.parent / "speed.json").write_text(json.dumps(content))
    assert run(readme) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert readme.read_text() == text
