"""From files to answers: records a second, and how far answers move with sampling rate and lead order.

    python -m benchmarks.predict --folder ptb-xl-500hz

The folder holds 500 Hz 12-lead records. Each of the first `--compared` is also written as 16-bit WFDB at other rates
and with its leads reversed, and answered again.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import wfdb
from scipy.signal import resample_poly

from benchmarks.quality import ROOT, origin
from modeling_ecgmoe.adapters import MultiTask
from modeling_ecgmoe.ecg_files import Ecg, find_ecgs, read_ecg
from modeling_ecgmoe.prediction import predict_records

RATES_HZ = {100: (1, 5), 250: (1, 2), 1000: (2, 1)}


def write(ecg: Ecg, folder: Path, name: str, up: int = 1, down: int = 1, reverse: bool = False) -> Path:
    """Write a recording as 16-bit WFDB at `up / down` times its rate; returns the header's path."""
    folder.mkdir(parents=True, exist_ok=True)
    signal = resample_poly(ecg.signal.astype(np.float64), up, down, axis=1) if up != down else ecg.signal
    order = list(range(len(ecg.lead_names)))[:: -1 if reverse else 1]
    wfdb.wrsamp(
        name,
        fs=ecg.sampling_rate * up / down,
        units=["mV"] * len(order),
        sig_name=[ecg.lead_names[i] for i in order],
        p_signal=signal[order].T.astype(np.float64),
        fmt=["16"] * len(order),
        adc_gain=[1000.0] * len(order),
        baseline=[0] * len(order),
        write_dir=str(folder),
    )
    return folder / f"{name}.hea"


def differences(many: MultiTask, first: list[Path], second: list[Path]) -> dict[str, list[float]]:
    """Absolute differences of the answers to two versions of the same recordings, by kind of answer."""
    found: dict[str, list[float]] = {"age, years": [], "RR, ms": [], "any probability": []}
    for one, other in zip(predict_records(many, first), predict_records(many, second), strict=True):
        for name, card in many.cards.items():
            a, b = one["tasks"][name], other["tasks"][name]
            if card.task.kind == "regression":
                key = "age, years" if card.task.unit == "years" else "RR, ms"
                found[key].append(abs(a["value"] - b["value"]))
            else:
                found["any probability"] += [abs(p - b["probabilities"][k]) for k, p in a["probabilities"].items()]
    return found


def throughput(folder: Path, model: str) -> dict[str, Any]:
    """Records a second of the command line on the folder, start and import included and apart."""
    with tempfile.TemporaryDirectory() as temporary:
        out = Path(temporary) / "answers.jsonl"
        command = [
            sys.executable,
            "-m",
            "modeling_ecgmoe.cli",
            "predict",
            "--model",
            model,
            "--quiet",
            "--out",
            str(out),
        ]
        began = time.perf_counter()
        first = subprocess.run([*command, str(find_ecgs([folder])[0])], cwd=ROOT, check=True)
        start_s = time.perf_counter() - began
        out.unlink()
        began = time.perf_counter()
        subprocess.run([*command, str(folder)], cwd=ROOT, check=first.returncode == 0)
        whole_s = time.perf_counter() - began
        records = len(out.read_text().splitlines())
    peak_mib = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    return {"records": records, "whole_s": whole_s, "start_s": start_s, "peak_mib": peak_mib}


def main() -> None:
    """Measure and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="500 Hz WFDB records")
    parser.add_argument("--model", default="hub/model")
    parser.add_argument("--compared", type=int, default=100, help="records that are answered at other rates")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/predict_500hz.json")
    options = parser.parse_args()
    speed = throughput(options.folder, options.model)
    steady = (speed["records"] - 1) / (speed["whole_s"] - speed["start_s"])
    rows: list[dict[str, Any]] = [
        {"what": "records a second, file to answers, once started", "median": round(steady, 1), "worst": None},
        {
            "what": "records a second of the whole command, start included",
            "median": round(speed["records"] / speed["whole_s"], 1),
            "worst": None,
        },
        {"what": "seconds to start and answer one", "median": round(speed["start_s"], 2), "worst": None},
        {"what": "peak memory, MiB", "median": round(speed["peak_mib"]), "worst": None},
    ]
    many = MultiTask.from_pretrained(options.model)
    paths = find_ecgs([options.folder])[: options.compared]
    ecgs = [read_ecg(path) for path in paths]
    with tempfile.TemporaryDirectory() as temporary:
        versions = {f"{rate} Hz": (up, down, False) for rate, (up, down) in RATES_HZ.items()}
        versions["leads reversed"] = (1, 1, True)
        for name, (up, down, reverse) in versions.items():
            folder = Path(temporary) / name.replace(" ", "_")
            written = [write(e, folder, p.stem, up, down, reverse) for e, p in zip(ecgs, paths, strict=True)]
            for kind, values in differences(many, paths, written).items():
                middle, worst = round(float(np.median(values)), 4), round(float(np.max(values)), 4)
                rows.append({"what": f"500 Hz against {name}: {kind}", "median": middle, "worst": worst})
    result = {
        "name": options.out.stem,
        "command": "python -m benchmarks.predict",
        "seed": 0,
        **origin(),
        "data": {"set": "PTB-XL 1.0.3, 500 Hz", "records": speed["records"], "compared": len(paths)},
        "rows": rows,
    }
    options.out.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")
    for row in rows:
        print(row)


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
