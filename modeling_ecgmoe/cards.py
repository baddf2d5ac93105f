"""What a page on the Hub says of a model or an adapter: its header, and the results that were measured.

Results come from `results.json` beside the weights: a result file of `benchmarks/`, whose first row is what is
published and whose other rows are for comparison, with `dataset` (id, config and split) added, and a `note` where
something must be known to read them.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, EvalResultEntry, ModelCard, ModelCardData, eval_result_entries_to_yaml
from huggingface_hub.utils import yaml_dump

from .adapter_card import AdapterCard
from .metrics import METRICS, Metric, find_metric
from .tasks import TASKS, Task

RESULTS_FILE = "results.json"
KEYS = ("command", "commit", "data", "dataset", "rows")
TAGS = ("ecg", "electrocardiogram", "medical", "ecg-moe")
TASK_NAME = "answers from an ECG"
PIPELINE_TAGS = {"model": "feature-extraction", "adapter": "other"}  # the Hub has no tag for answers from an ECG
_BLOCK = re.compile(r"<!-- results -->\n.*?<!-- /results -->\n?", re.DOTALL)


def read_results(folder: Path) -> dict[str, Any] | None:
    """The results beside the weights, None where there are none.

    Raises:
        ValueError: the file is not such a one; the message names what is missing.
    """
    path = folder / RESULTS_FILE
    if not path.is_file():
        return None
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON ({error}); write it anew, or take it away") from error
    missing = [key for key in KEYS if not isinstance(results, dict) or not results.get(key)]
    if missing or not results["rows"][0].get("metrics"):
        raise ValueError(f"{path} must hold {', '.join(KEYS)}; missing or empty: {', '.join(missing) or 'metrics'}")
    return results


def model_header(base: str | None, task: Task | None) -> dict[str, Any]:
    """The header of a page, without results.

    Args:
        base: id of the model that an adapter adapts, None for a model.
        task: of an adapter.
    """
    header: dict[str, Any] = {"license": "apache-2.0", "pipeline_tag": PIPELINE_TAGS["adapter" if base else "model"]}
    if base is None:
        return header | {"library_name": "transformers", "tags": [*TAGS, "mixture-of-experts", "custom_code"]}
    name = [] if task is None else [task.name]
    tags = [*TAGS, "lora", f"base_model:adapter:{base}", *name]
    return header | {"base_model": base, "base_model_relation": "adapter", "library_name": "peft", "tags": tags}


def fill_card(
    text: str, header: dict[str, Any], name: str, measured: list[EvalResult], table: str | None = None
) -> str:
    """A page with its header completed and its results written anew; whatever else it says stays.

    Args:
        text: the page as it is, with or without a header.
        header: what it must say; tags are added to those there are.
        name: of the model, for the `model-index`.
        measured: its results; where there are none, those that the page has stay.
        table: the results in Markdown, for the body.
    """
    card = ModelCard(text, ignore_metadata_errors=False)
    values = card.data.to_dict()
    values.pop("model-index", None)
    tags = list(dict.fromkeys([*(values.get("tags") or []), *header["tags"]]))
    # An earlier page may name an earlier base.
    tags = [tag for tag in tags if not tag.startswith("base_model:") or tag in header["tags"]]
    values |= header | {"tags": tags}
    measured = measured or card.data.get("eval_results") or []
    if measured:
        metrics = dict.fromkeys([*(values.get("metrics") or []), *(result.metric_type for result in measured)])
        values |= {"model_name": name, "eval_results": measured, "metrics": list(metrics)}
    body = card.text.lstrip("\n")
    if table is not None:
        block = f"<!-- results -->\n{table}<!-- /results -->\n"
        body = (
            _BLOCK.sub(lambda _: block, body) if _BLOCK.search(body) else f"{body.rstrip()}\n\n## Results\n\n{block}"
        )
    return f"---\n{ModelCardData(**dict(sorted(values.items()))).to_yaml()}\n---\n\n{body}"


def eval_results(results: dict[str, Any]) -> list[EvalResult]:
    """The published row as entries of a `model-index`, the interval in the name of the metric."""
    dataset = results["dataset"]
    found = []
    for task, measured in results["rows"][0]["metrics"].items():
        title = f"{task}: {_title(find_metric(measured['metric']), task)}{_interval(measured)}"
        found.append(
            EvalResult(
                task_type="other",
                task_name=TASK_NAME,
                dataset_type=dataset["id"],
                dataset_name=_facts(results),
                dataset_config=dataset.get("config"),
                dataset_split=dataset.get("split"),
                metric_type=measured["metric"],
                metric_value=round(measured["value"], 4),
                metric_name=title,
            )
        )
    return found


def eval_files(results: dict[str, Any]) -> dict[str, bytes]:
    """The published row in the form of `.eval_results/*.yaml`: path to content, intervals in the notes."""
    dataset = results["dataset"]
    entries = []
    for task, measured in results["rows"][0]["metrics"].items():
        title = _title(find_metric(measured["metric"]), task)
        note = f"; {results['note']}" if results.get("note") else ""
        notes = f"{title}{_interval(measured)}, {measured['n']} records; {_facts(results)}{note}"
        entries.append(EvalResultEntry(dataset["id"], task, round(measured["value"], 4), notes=notes))
    text = yaml_dump(eval_result_entries_to_yaml(entries), sort_keys=False)
    return {f".eval_results/{dataset['id'].rpartition('/')[2]}.yaml": text.encode()}


def results_table(results: dict[str, Any]) -> str:
    """All rows as a Markdown table, a line for each task that the published row answers."""
    rows = results["rows"]
    tasks = rows[0]["metrics"]
    others = [row for row in rows[1:] if set(tasks) & set(row["metrics"])]
    lines = [
        " | ".join(["| task", "metric", *(str(row["model"]) for row in (rows[0], *others)), "records |"]),
        "| --- | --- | ---: |" + " ---: |" * (len(others) + 1),
    ]
    for task, measured in tasks.items():
        metric = find_metric(measured["metric"])
        arrow = "↑" if metric.higher_is_better else "↓"
        cells = [_cell(metric, row["metrics"].get(task)) for row in (rows[0], *others)]
        lines.append(f"| {task} | {_title(metric, task)} {arrow} | {' | '.join(cells)} | {measured['n']:,} |")
    levels = sorted({measured["level"] for measured in tasks.values() if "low" in measured})
    brackets = "".join(f" {level:.0%} bootstrap intervals in brackets." for level in levels)
    origin = f"{_facts(results)}.{brackets} Written by `{results['command']}` at commit {results['commit'][:12]}."
    note = f" {results['note']}" if results.get("note") else ""
    return "\n".join([*lines, "", f"<sub>{origin}{note}</sub>"]) + "\n"


def calibration_results(card: AdapterCard, training: dict[str, Any]) -> list[EvalResult]:
    """What an adapter's own `task.json` says was measured, as entries of a `model-index`.

    Args:
        training: its `training.json`.
    """
    metrics = {key: METRICS.get(key.removeprefix("validation_")) for key in card.metrics}
    return [
        EvalResult(
            task_type="other",
            task_name=TASK_NAME,
            dataset_type=training.get("dataset") or "custom",
            dataset_name=f"validation data beside {card.trained_on or 'the training data'}",
            dataset_config=training.get("config_name"),
            dataset_split="validation",
            metric_type=metric.name,
            metric_value=card.metrics[key],
            metric_name=f"{card.task.name}: {_title(metric, card.task.name)}{_interval(_ends(card, metric.name))}, on "
            "the data of the calibration",
        )
        for key, metric in metrics.items()
        if metric is not None
    ]


def _ends(card: AdapterCard, metric: str) -> dict[str, float]:
    """The interval of one of a card's metrics, empty where it has none; the main one's has no name before its ends."""
    before = "" if metric == card.task.metrics[0] else f"{metric}_"
    return {end: card.metrics[f"{before}{end}"] for end in ("low", "high") if f"{before}{end}" in card.metrics}


def _title(metric: Metric, task: str) -> str:
    unit = TASKS[task].unit if task in TASKS and not metric.is_probability else ""
    return f"{metric.title} ({unit})" if unit else metric.title


def _interval(measured: dict[str, Any]) -> str:
    """The interval in words; where no level is given it is that of `bootstrap_interval`."""
    if "low" not in measured:
        return ""
    return f", {measured.get('level', 0.95):.0%} interval {measured['low']:.4g} to {measured['high']:.4g}"


def _cell(metric: Metric, measured: dict[str, Any] | None) -> str:
    if measured is None or measured["metric"] != metric.name:
        return "–"
    names = ("value", "low", "high") if "low" in measured else ("value",)
    form = ".3f" if metric.is_probability else "#.3g"
    value, *low_high = (f"{measured[name]:{form}}".rstrip(".") for name in names)
    return f"{value} [{', '.join(low_high)}]" if low_high else value


def _facts(results: dict[str, Any]) -> str:
    facts: Sequence[Any] = list(results["data"].values())
    text = ", ".join(fact for fact in facts if isinstance(fact, str))
    return f"{text}, {results['dataset']['split']} split" if results["dataset"].get("split") else text
