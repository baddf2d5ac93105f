"""Write the result tables of README.md from `benchmarks/results/*.json`.

    python benchmarks/tables.py            rewrite the tables
    python benchmarks/tables.py --check    exit with 1 where README.md does not show the results as they are

The block `<!-- table:data_sets -->` shows the facts that the builders of `data_builders` state. Every other block
between `<!-- table:NAME -->` and `<!-- /table -->` shows `benchmarks/results/NAME.json`. Such a file says where its
numbers come from (`KEYS`) and holds `rows`, one object a row and one key a column. A value is

- a text or a number;
- a metric with its interval, as `MetricResult.to_dict` gives it (`unit` may be added):
  `{"metric": "mae", "value": 7.1, "low": 6.9, "high": 7.3}`;
- under the key `metrics` an object of such metrics, one column for each task: `{"age": {...}, "sex": {...}}`.
"""

import argparse
import json
import math
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_builders import BUILDERS, find_builder
from modeling_ecgmoe.metrics import find_metric
from modeling_ecgmoe.tasks import TASKS

ROOT = Path(__file__).resolve().parents[1]
KEYS = ("name", "command", "commit", "seed", "versions", "hardware", "data", "rows")
DATA_SETS = "data_sets"
MISSING = "–"
_BLOCK = re.compile(r"<!-- table:(\S+) -->\n(.*?)<!-- /table -->", re.DOTALL)


def read_results(path: Path) -> dict[str, Any]:
    """A result file.

    Raises:
        FileNotFoundError: there is none.
        ValueError: a key of `KEYS` is missing, or there are no rows.
    """
    if not path.is_file():
        raise FileNotFoundError(f"a table of the README needs {path}; run the benchmark that writes it")
    results = json.loads(path.read_text(encoding="utf-8"))
    missing = [key for key in KEYS if key not in results]
    if missing or not results["rows"]:
        raise ValueError(f"{path} must hold {', '.join(KEYS)}; missing or empty: {', '.join(missing) or 'rows'}")
    return results


def render_table(results: dict[str, Any]) -> str:
    """A result file as a Markdown table with a line below that says where the numbers come from."""
    rows = [_flatten(row) for row in results["rows"]]
    return f"{_markdown(rows)}\n\n<sub>{_origin(results, rows)}</sub>\n"


def _markdown(rows: Sequence[dict[str, Any]]) -> str:
    names = dict.fromkeys(name for row in rows for name in row)
    columns = [_column(name, [row.get(name) for row in rows]) for name in names]
    rule = ["---" if isinstance(rows[0].get(name), str) else "---:" for name in names]
    title, *cells = zip(*columns, strict=True)
    return "\n".join("| " + " | ".join(line) + " |" for line in (title, rule, *cells))


def render_data_sets() -> str:
    """What the builders say about their data sets, one row for each."""
    rows = []
    for name in BUILDERS:
        builder = find_builder(name)
        facts = builder.FACTS
        rows.append(
            {
                "set": f"[{facts.title} {facts.version}]({facts.homepage})",
                "records": facts.records,
                "patients": facts.patients,
                "Hz": ", ".join(str(rate) for rate in facts.sampling_rates),
                "leads": facts.leads,
                "length": facts.length,
                "labels": facts.labels,
                "licence": facts.license,
                "access": facts.access,
                "command": f'`find_builder("{name}")`',
                "configurations": ", ".join(f"`{config.name}`" for config in builder.BUILDER_CONFIGS),
            }
        )
    return _markdown(rows) + "\n"


def render_readme(text: str, results_dir: Path) -> str:
    """The README's text with every table written anew from the files in `results_dir`.

    Raises:
        FileNotFoundError, ValueError: as `read_results`; a block that does not end is a ValueError.
    """
    if text.count("<!-- table:") != len(_BLOCK.findall(text)):
        raise ValueError("a `<!-- table:NAME -->` line has no `<!-- /table -->` after it; add it")

    def render_block(block: re.Match[str]) -> str:
        is_data = block[1] == DATA_SETS
        table = render_data_sets() if is_data else render_table(read_results(results_dir / f"{block[1]}.json"))
        return f"<!-- table:{block[1]} -->\n{table}<!-- /table -->"

    return _BLOCK.sub(render_block, text)


def _flatten(row: dict[str, Any]) -> dict[str, Any]:
    """The row with the metrics of `metrics` as columns of their own."""
    columns: dict[str, Any] = {}
    for key, value in row.items():
        columns |= value if key == "metrics" else {key: value}
    return columns


def _is_metric(value: Any) -> bool:
    return isinstance(value, dict)


def _column(name: str, values: Sequence[Any]) -> list[str]:
    """Title and cells of a column. Of one metric the best value is bold, of several each cell names its own."""
    title = name.replace("_", " ")
    measured = [value for value in values if _is_metric(value)]
    metrics = {value["metric"] for value in measured}
    if len(metrics) != 1 or len({value.get("unit") for value in measured}) != 1:
        names = [f"{find_metric(value['metric']).title} " if _is_metric(value) else "" for value in values]
        return [title, *(metric + _cell(value, with_unit=True) for metric, value in zip(names, values, strict=True))]
    metric = find_metric(metrics.pop())
    unit = measured[0].get("unit") or (TASKS[name].unit if name in TASKS else "")
    title += f", {metric.title} {f'({unit}) ' if unit else ''}{'↑' if metric.higher_is_better else '↓'}"
    best = (max if metric.higher_is_better else min)(value["value"] for value in measured)
    cells = [_cell(value) for value in values]
    is_best = [len(measured) > 1 and _is_metric(value) and value["value"] == best for value in values]
    return [title, *(f"**{cell}**" if bold else cell for cell, bold in zip(cells, is_best, strict=True))]


def _cell(value: Any, with_unit: bool = False) -> str:
    if value is None:
        return MISSING
    if _is_metric(value):
        decimals = 3 if find_metric(value["metric"]).is_probability else _three_digits(value["value"])
        number = f"{value['value']:.{decimals}f}"
        if "low" in value and "high" in value:
            number += f" [{value['low']:.{decimals}f}, {value['high']:.{decimals}f}]"
        return f"{number} {value['unit']}" if with_unit and value.get("unit") else number
    if isinstance(value, float):
        return f"{value:,.{_three_digits(value)}f}"
    return f"{value:,}" if isinstance(value, int) else str(value).replace("|", "\\|")


def _three_digits(value: float) -> int:
    """How many decimals show three digits of a number."""
    return 2 if value == 0 else max(0, 2 - math.floor(math.log10(abs(value))))


def _origin(results: dict[str, Any], rows: Sequence[dict[str, Any]]) -> str:
    levels = {value["level"] for row in rows for value in row.values() if _is_metric(value) and "level" in value}
    intervals = "".join(f"; {100 * level:g} % bootstrap intervals in brackets" for level in sorted(levels))
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    return (
        f"{_facts(results['data'])}{intervals}. Written by `{results['command']}`, seed {results['seed']}, commit "
        f"{results['commit'][:12]}, {versions}; {_facts(results['hardware'])}."
    )


def _facts(facts: dict[str, Any]) -> str:
    """Facts as words: texts as they are, numbers with their names."""
    return ", ".join(
        value if isinstance(value, str) else f"{_cell(value)} {name.replace('_', ' ')}"
        for name, value in facts.items()
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description="Write the result tables of README.md.")
    parser.add_argument("--check", action="store_true", help="write nothing, exit with 1 where a table is stale")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results", help="folder of JSON files")
    options = parser.parse_args(arguments)
    try:
        text = options.readme.read_text(encoding="utf-8")
        rendered = render_readme(text, options.results)
    except (FileNotFoundError, ValueError) as error:
        print(f"tables: {error}", file=sys.stderr)
        return 1
    if options.check:
        if text != rendered:
            print(
                f"tables: {options.readme} does not show the results as they are; run `make tables`", file=sys.stderr
            )
        return int(text != rendered)
    options.readme.write_text(rendered, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
