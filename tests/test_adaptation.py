"""Small matters of training: few records for many processes, the log, crops of short recordings."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from tiny_model import save_tiny_model

from checkpoints import write_log
from records import crop

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
def test_two_processes_adapt_to_fewer_records_than_both_batches(mini_ptb_xl: Path, tmp_path: Path) -> None:
    values = {"data_dir": mini_ptb_xl, "task": "age", "model": save_tiny_model(tmp_path), "batch_size": 20}
    values |= {"output_dir": tmp_path / "adapted", "min_steps": 3, "epochs": 1, "cache_dir": tmp_path / "cache"}
    words = [word for name, value in values.items() for word in (f"--{name}", str(value))]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT)}
    command = [*launch, "train.py", "adapt", *words]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "adapted/age/adapter_model.safetensors").is_file()


def test_what_is_not_finite_is_null_in_the_log(tmp_path: Path) -> None:
    write_log(Accelerator(cpu=True), tmp_path, {"loss": 1.0, "arrhythmia_macro_auroc": math.nan})
    assert json.loads((tmp_path / "log.jsonl").read_text(), parse_constant=pytest.fail) == {
        "loss": 1.0,
        "arrhythmia_macro_auroc": None,
    }


def test_a_crop_of_a_short_recording_lies_within_it() -> None:
    known = torch.zeros(64, 1000, dtype=torch.bool)
    known[:, :300] = True
    signal = {"input_values": torch.randn(64, 12, 1000), "sample_mask": known, "r_peaks": torch.full((64, 1), -1.0)}
    assert crop(signal, 512, 100)["sample_mask"].sum(dim=1).tolist() == [300] * 64
    known[:, :600] = True
    found = crop(signal, 512, 100)["sample_mask"].sum(dim=1)
    assert found.min() == 512
