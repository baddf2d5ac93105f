"""Write what `hub/` says of results: the pages, `results.json` and `.eval_results/` of the model and its adapters.

    python -m benchmarks.cards            from benchmarks/results/quality_fold9.json
    python -m benchmarks.cards --check    exit with 1 where hub/ does not say what was measured

`ecgmoe publish` makes the same pages, with the ids they are published under.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.tables import read_results
from modeling_ecgmoe.adapter_card import BASE_MODEL
from modeling_ecgmoe.cards import RESULTS_FILE
from modeling_ecgmoe.publish import adapter_upload, model_upload

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "quality_fold9.json"
DATASET = {"id": "ecg-moe/ptb-xl", "config": "100hz", "split": "validation"}
NOTE = (
    "Calibration, thresholds, intervals, the adapters' epochs and whether heads settle were chosen on this "
    "fold, and the recipe after looking at it: the figures lean to the good side."
)
MODEL_ROW, ADAPTER_ROW = "ECG-MoE, joint heads", "ECG-MoE, adapters"


def results_of(results: dict[str, Any], row: str, tasks: Sequence[str] | None) -> dict[str, Any]:
    """The part of a result file that is about one thing: its row first, then those to compare it with.

    Args:
        results: of `benchmarks.tables.read_results`.
        row: the `model` of the row.
        tasks: of which the metrics are kept; all where None.

    Raises:
        ValueError: there is no such row.
    """
    own = [found for found in results["rows"] if found["model"] == row]
    if not own:
        raise ValueError(f"{RESULTS} has no row {row!r}; run benchmarks/quality.py")
    others = [found for found in results["rows"] if found["model"] not in (MODEL_ROW, ADAPTER_ROW)]
    rows = []
    for found in (*own, *others):
        metrics = {
            task: {key: value for key, value in measured.items() if key != "per_label"}
            for task, measured in found["metrics"].items()
            if tasks is None or task in tasks
        }
        rows += [found | {"metrics": metrics}] if metrics else []
    return results | {"dataset": DATASET, "note": NOTE, "rows": rows}


def pages(hub: Path, results: dict[str, Any]) -> dict[Path, bytes]:
    """What `hub/` must hold: path to content. `results.json` is written first, the pages are made from it."""
    folders = {hub / "model": results_of(results, MODEL_ROW, None)}
    for folder in sorted((hub / "adapters").iterdir()):
        folders[folder] = results_of(results, ADAPTER_ROW, (folder.name,))
    texts = {folder / RESULTS_FILE: json.dumps(part, indent=1) + "\n" for folder, part in folders.items()}
    written: dict[Path, bytes] = {}
    for path, text in texts.items():
        folder, written[path] = path.parent, text.encode()
        if not path.is_file() or path.read_bytes() != written[path]:
            continue  # the pages below would be those of other results
        if folder.name == "model":
            upload = model_upload(folder, BASE_MODEL)
        else:
            upload = adapter_upload(folder, f"{BASE_MODEL}-{folder.name}", BASE_MODEL, None)
        written |= {folder / name: content for name, content in upload.files.items() if isinstance(content, bytes)}
    return written


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description="Write what hub/ says of results.")
    parser.add_argument("--check", action="store_true", help="write nothing, exit with 1 where something is stale")
    options = parser.parse_args(arguments)
    results = read_results(RESULTS)
    for _ in range(1 if options.check else 2):  # the results, then the pages made from them
        wanted = pages(ROOT / "hub", results)
        stale = [path for path, content in wanted.items() if not path.is_file() or path.read_bytes() != content]
        if not options.check:
            for path in stale:
                path.parent.mkdir(exist_ok=True)
                path.write_bytes(wanted[path])
    for path in stale if options.check else []:
        print(f"cards: {path.relative_to(ROOT)} does not say what was measured; run `python -m benchmarks.cards`")
    return int(options.check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
