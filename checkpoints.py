"""What a training run leaves on disk: its log, its arguments, and checkpoints from which it goes on when killed."""

import dataclasses
import json
import math
import shutil
from pathlib import Path
from typing import Any

from accelerate import Accelerator


def save_checkpoint(accelerator: Accelerator, folder: Path, step: int, pace: dict[str, int | None]) -> None:
    """Write the state beside the last checkpoint of `folder`, and let it take its place once it is whole.

    Args:
        step: how many steps are done.
        pace: what a step means; whoever goes on must have the same.
    """
    old, new = folder / "checkpoint", folder / "checkpoint.new"
    accelerator.save_state(str(new))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        (new / "step.json").write_text(json.dumps({"step": step} | pace))
        (old / "step.json").unlink(missing_ok=True)
        shutil.rmtree(old, ignore_errors=True)
        new.rename(old)
    accelerator.wait_for_everyone()


def resume_checkpoint(accelerator: Accelerator, folder: Path, pace: dict[str, int | None]) -> int:
    """Load the last whole checkpoint of `folder`; returns the steps that are done.

    Raises:
        FileNotFoundError: there is none.
        ValueError: the interrupted run had another pace.
    """
    whole = [f for f in (folder / "checkpoint", folder / "checkpoint.new") if (f / "step.json").is_file()]
    if not whole:
        raise FileNotFoundError(
            f"no checkpoint to resume in {folder / 'checkpoint'}; leave out --resume to start anew"
        )
    noted = json.loads((whole[0] / "step.json").read_text())
    step = int(noted.pop("step"))
    if noted != pace:
        raise ValueError(f"the interrupted run had {noted}, this one has {pace}; resume with the same")
    accelerator.load_state(str(whole[0]))
    return step


def write_log(accelerator: Accelerator, output_dir: Path, line: dict[str, Any]) -> None:
    """Append a line to the run's `log.jsonl`, and print it."""
    if not accelerator.is_main_process:
        return
    output_dir.mkdir(parents=True, exist_ok=True)
    rounded = {key: _rounded(value) if isinstance(value, float) else value for key, value in line.items()}
    with (output_dir / "log.jsonl").open("a") as log:
        log.write(json.dumps(rounded) + "\n")
    accelerator.print(json.dumps(rounded))


def _rounded(value: float) -> float | None:
    return round(value, 5) if math.isfinite(value) else None  # NaN is not JSON


def save_arguments(folder: Path, *arguments: Any, **more: Any) -> None:
    """Write the resolved arguments beside the weights, without the paths of this machine.

    Of a user's own table and of soft labels the file's name stays. With a table there is no `dataset`.
    """
    paths = ("data_dir", "clinical_dir", "cache_dir", "output_dir", "model", "model_config", "csv")
    given = {k: v for a in arguments for k, v in dataclasses.asdict(a).items()}
    merged = {k: v for k, v in given.items() if k not in paths}
    if given.get("csv"):
        merged |= {"dataset": None, "csv": Path(given["csv"]).name}
    if Path(merged.get("soft_labels", "")).is_absolute():
        merged["soft_labels"] = Path(merged["soft_labels"]).name
    (folder / "training.json").write_text(json.dumps(merged | more, indent=2) + "\n")
