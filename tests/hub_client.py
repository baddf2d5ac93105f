"""A process that talks to the Hub of `hub_server.py`, since the client reads HF_ENDPOINT when it is imported.

Each line of stdin is a JSON object with `call`, `arguments` and `environment`; each line of stdout is what came of it.
One process serves many tests: torch is imported once.
"""

import contextlib
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


class Client:
    """The other end of such a process."""

    def __init__(self, url: str, home: Path, package: bool = True) -> None:
        self.home = home
        environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
        environment |= client_environment(url, home)
        environment["PYTHONPATH"] = str(ROOT) if package else ""
        self.log = (home / "stderr.txt").open("w")
        self.process = subprocess.Popen(
            [sys.executable, __file__], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=self.log, text=True, cwd=home,
        )  # fmt: skip

    def __call__(self, call: str, /, *arguments: Any, token: str | None = "hf_writer", **named: Any) -> Any:
        """Call a function of this file over there; `token` is that of the login."""
        environment = {"HF_TOKEN": token or ""}
        line = json.dumps({"call": call, "arguments": arguments, "named": named, "environment": environment})
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        assert answer, (self.home / "stderr.txt").read_text()
        done = json.loads(answer)
        assert "raised" not in done, done["raised"]
        return done["returned"]

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.log.close()


def client_environment(url: str, home: Path) -> dict[str, str]:
    """What a process needs to take that server for the Hub and to leave the user's files alone."""
    return {
        "HF_ENDPOINT": url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1", "OMP_NUM_THREADS": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    }  # fmt: skip


# ------------------------------------------------------------------------------------------------- what can be called


def ecgmoe(*arguments: str) -> dict[str, Any]:
    """The command line: its exit status and what it wrote."""
    from modeling_ecgmoe.cli import main

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main(["publish", *arguments])
    return {"status": status, "out": out.getvalue(), "err": err.getvalue()}


def answer(model: str, tasks: list[str] | None, record: str, revision: str | None = None) -> dict[str, Any]:
    """What a model from the Hub answers for a file, and which tasks it has."""
    from modeling_ecgmoe.adapters import MultiTask
    from modeling_ecgmoe.ecg_files import read_ecg

    many = MultiTask.from_pretrained(model, tasks, revision=revision)
    ecg = read_ecg(Path(record))
    return many.answer([many.prepare(ecg.signal, ecg.sampling_rate, ecg.lead_names)])[0]


def peft_logits(base: str, adapter: str, task: str, record: str) -> list[float]:
    """The logits of an adapter that PEFT loads by its id, on the base it names."""
    import torch
    from peft import PeftConfig, PeftModel

    from modeling_ecgmoe.adapters import SIGNAL_KEYS
    from modeling_ecgmoe.ecg_files import read_ecg
    from modeling_ecgmoe.feature_extraction_ecgmoe import EcgMoeFeatureExtractor
    from modeling_ecgmoe.modeling_ecgmoe import EcgMoeForTasks

    config = PeftConfig.from_pretrained(adapter)
    assert config.base_model_name_or_path == base
    model = EcgMoeForTasks.from_pretrained(base, revision=config.revision)
    wrapped = PeftModel.from_pretrained(model, adapter, adapter_name=task).eval()
    extractor = EcgMoeFeatureExtractor.from_pretrained(base, revision=config.revision)
    ecg = read_ecg(Path(record))
    window = extractor.extract(ecg.signal, ecg.sampling_rate, ecg.lead_names)
    features = extractor.pad([window], return_tensors="pt")
    with torch.no_grad():
        output = wrapped(**{name: features[name] for name in SIGNAL_KEYS})
    return output.logits[task][0].tolist()


def data_differences(repo_id: str, data_dir: str, config: str, split: str, shards: list[str]) -> dict[str, Any]:
    """In what the rows of the Hub, streamed too, and of the shards alone differ from the builder's."""
    import datasets
    import numpy as np

    from data_builders.ptb_xl import PtbXl

    builder = PtbXl(config_name=config, data_dir=data_dir)
    builder.download_and_prepare()
    expected = builder.as_dataset(split)
    ways = {
        "by id": datasets.load_dataset(repo_id, config, split=split),
        "parquet": datasets.load_dataset("parquet", data_files={split: shards}, split=split),
    }
    stream = datasets.load_dataset(repo_id, config, split=split, streaming=True)
    found: dict[str, Any] = {way: {"rows": len(rows)} for way, rows in ways.items()} | {"streamed": {"rows": 0}}
    for way, rows in (ways | {"streamed": stream}).items():
        kinds = expected.features
        found[way]["other features"] = {k: str(v) for k, v in rows.features.items() if v != kinds.get(k)}
    wanted = expected.with_format("numpy", columns=["signal"], output_all_columns=True)
    for way, rows in ways.items():
        pairs = zip(rows.with_format("numpy", columns=["signal"], output_all_columns=True), wanted, strict=True)
        found[way]["wrong"] = [row["record_id"] for row, other in pairs if not _same(row, other, np)]
    wrong = []
    for row, other in zip(stream, wanted, strict=True):
        found["streamed"]["rows"] += 1
        wrong += [] if _same(row, other, np) else [row["record_id"]]
    found["streamed"]["wrong"] = wrong
    return found


def _same(row: dict[str, Any], other: dict[str, Any], np: Any) -> bool:
    rest = {key: value for key, value in row.items() if key != "signal"}
    other_rest = {key: value for key, value in other.items() if key != "signal"}
    signal, other_signal = np.asarray(row["signal"], np.float32), np.asarray(other["signal"], np.float32)
    return rest == other_rest and np.array_equal(signal, other_signal, equal_nan=True)


def download(repo_id: str, repo_type: str, folder: str) -> list[str]:
    """Fetch a repository with the client; the paths that are there then."""
    from huggingface_hub import snapshot_download

    snapshot_download(repo_id, repo_type=repo_type, local_dir=folder)
    files = [path for path in Path(folder).rglob("*") if path.is_file() and ".cache" not in path.parts]
    return sorted(str(path.relative_to(folder)) for path in files)


def refused(call: str, *arguments: Any) -> str:
    """The error that a call ends with."""
    try:
        CALLS[call](*arguments)
    except (OSError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


CALLS: dict[str, Callable[..., Any]] = {
    function.__name__: function for function in (ecgmoe, answer, peft_logits, data_differences, download, refused)
}


def main() -> None:
    """Serve until stdin ends. Whatever else writes to stdout goes to stderr."""
    own, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        asked = json.loads(line)
        os.environ.update(asked["environment"])
        try:
            done = {"returned": CALLS[asked["call"]](*asked["arguments"], **asked["named"])}
        except Exception as error:  # noqa: BLE001 - told to the test, which fails
            done = {"raised": f"{type(error).__name__}: {error}"}
        own.write(json.dumps(done) + "\n")
        own.flush()


if __name__ == "__main__":
    main()
