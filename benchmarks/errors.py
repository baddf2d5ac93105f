"""Where the statements go wrong: how well each is told, and the recordings behind the worst of them.

    python -m benchmarks.errors --data_dir ptb-xl --cnn runs/plain_cnn/model

Each statement is ranked by itself over the split. `instead` are the statements that its false alarms carry most: among
the records without it that get the highest answers, as many as there are with it (at least ten), those whose share
exceeds that of the whole split by the most. The result file has the recordings too: with the statement and the lowest
answers (`missed`), without it and the highest (`false`).
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import HfArgumentParser

from benchmarks.plain_cnn import PlainCnn
from benchmarks.quality import origin
from evaluation import predict_adapters, predict_logits
from modeling_ecgmoe.adapters import MultiTask
from modeling_ecgmoe.metrics import bootstrap_interval
from modeling_ecgmoe.tasks import TASKS
from records import DataArguments, Records, load_split

STATEMENTS = TASKS["statements"]
LISTED, FEWEST_ALARMS, EXCESS = 5, 10, 0.1


@dataclass
class ErrorsArguments:
    """What to look at."""

    model: str = field(default="hub/model", metadata={"help": "ECG-MoE, with its statements adapter beside it"})
    cnn: str = field(default="", metadata={"help": "folder of a plain CNN to stand beside it"})
    split: str = field(default="validation", metadata={"help": "validation or test"})
    shown: int = field(default=20, metadata={"help": "how many statements the README shows, the worst first"})
    resamples: int = field(default=1000, metadata={"help": "bootstrap resamples of patients"})
    out: Path = field(default=Path("benchmarks/results/errors.json"), metadata={"help": "result file"})


def look_at(targets: np.ndarray, answers: np.ndarray, record_ids: list[str]) -> list[dict[str, Any]]:
    """For each statement that the split can rank: its false alarms and misses.

    Args:
        targets: 0 or 1, (records, statements); answers: probabilities, alike.
    """
    names = np.array(STATEMENTS.labels)
    found = []
    for column in np.flatnonzero(np.ptp(targets, axis=0) > 0):
        has = targets[:, column] > 0
        rising = np.argsort(answers[:, column], kind="stable")
        above = 1.0 - (np.argsort(rising, kind="stable") + 1) / len(rising)
        alarms = rising[~has[rising]][::-1]
        among = targets[alarms[: max(int(has.sum()), FEWEST_ALARMS)]].mean(axis=0)
        excess = among - targets.mean(axis=0)
        excess[column] = 0.0
        most = [i for i in np.argsort(-excess, kind="stable")[:3] if excess[i] > EXCESS]

        def named(index: np.ndarray, above: np.ndarray = above) -> list[dict[str, Any]]:
            return [
                {
                    "record": record_ids[i],
                    "records_above": round(float(above[i]), 4),
                    "statements": names[targets[i] > 0].tolist(),
                }
                for i in index[:LISTED]
            ]

        found.append(
            {
                "statement": str(names[column]),
                "column": int(column),
                "instead": ", ".join(f"{names[i]} {among[i]:.0%}" for i in most) or None,
                "missed": named(rising[has[rising]]),
                "false": named(alarms),
            }
        )
    return found


def main() -> None:
    """Look at all statements and write the file."""
    data, arguments = HfArgumentParser((DataArguments, ErrorsArguments)).parse_args_into_dataclasses()
    many = MultiTask.from_pretrained(arguments.model, [STATEMENTS.name])
    train, records = (
        Records(load_split(data, split), many.extractor, [STATEMENTS], data.num_proc)
        for split in ("train", arguments.split)
    )
    targets = records.labels[STATEMENTS.name].numpy()
    answers = {"ECG-MoE": STATEMENTS.answers(predict_adapters(many, records)[STATEMENTS.name])}
    if arguments.cnn:
        logits = predict_logits(PlainCnn.from_pretrained(arguments.cnn), records, torch.device("cpu"))
        answers["plain CNN"] = STATEMENTS.answers(logits[STATEMENTS.name])
    rows = []
    for one in look_at(targets, answers["ECG-MoE"], records.record_ids):
        column = [one.pop("column")]
        metrics = {
            name: bootstrap_interval(
                "macro_auroc",
                targets[:, column],
                values[:, column],
                resamples=arguments.resamples,
                groups=records.patient_ids,
            ).to_dict()
            for name, values in answers.items()
        }
        counts = {
            "in training": int(train.labels[STATEMENTS.name][:, column].sum()),
            f"in {arguments.split}": int(targets[:, column].sum()),
        }
        rows.append({"statement": one["statement"]} | counts | {"metrics": metrics} | one)
    rows.sort(key=lambda row: row["metrics"]["ECG-MoE"]["value"])
    cnn = f" --cnn {arguments.cnn}" if arguments.cnn else ""
    result = {
        "name": arguments.out.stem,
        "command": f"python -m benchmarks.errors --data_dir ptb-xl{cnn} --split {arguments.split}",
        "seed": 0,
        **origin(),
        "data": {"set": f"PTB-XL 1.0.3, 100 Hz, {arguments.split}", "records": len(records), "statements": len(rows)},
        "rows": [{k: v for k, v in row.items() if k not in ("missed", "false")} for row in rows[: arguments.shown]],
        "statements": rows,
    }
    arguments.out.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")
    for row in rows[: arguments.shown]:
        values = {name: round(metric["value"], 3) for name, metric in row["metrics"].items()}
        print(f"{row['statement']:8} {values}, instead {row['instead']}")


if __name__ == "__main__":
    main()
