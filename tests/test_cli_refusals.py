"""What `ecgmoe` refuses before it reads a single ECG: one line, exit status 2, no traceback."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from tiny_model import TINY_TASKS, save_tiny_model

from data_builders.synthetic import synthetic_ecg, write_wfdb
from modeling_ecgmoe.cli import main

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("hub"))


def run(*arguments: object) -> int:
    """The program in this process; its exit status."""
    return main(["predict", *map(str, arguments)])


REFUSED = {
    "unknown suffix": (("x.hea", "--out", "o.txt"), "expected a file ending in .jsonl or .csv"),
    "no folder for the output": (("x.hea", "--out", "nowhere/o.csv"), "there is no folder nowhere"),
    "a folder as output": (("x.hea", "--out", "folder.csv"), "is a folder"),
    "nothing to read": ((), "name the files or folders"),
    "no ECG in the folder": (("folder.csv",), "no ECG file in folder.csv"),
    "resume from nowhere": (("x.hea", "--resume"), "--resume needs the --out file"),
    "leads that are none": (("x.hea", "--leads", "A", "B"), "none is one of the twelve leads"),
    "no such model": (("x.hea", "--model", "no/such model"), "no/such model"),
}


@pytest.mark.parametrize(("arguments", "words"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_done_as_asked_is_refused_in_one_line_with_status_2(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    words: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.csv").mkdir()
    assert run(*arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.splitlines()) == 1
    assert words in captured.err


def test_files_of_a_folder_that_are_no_ecgs_are_counted(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str], write_record: Callable[..., tuple[Path, Any]]
) -> None:
    folder = write_record("a")[0].parent
    for name in ("letter.pdf", "scan.PDF", "LICENSE", ".hidden"):
        (folder / name).write_bytes(b"\0")
    out = tmp_path / "o.jsonl"
    assert run(folder, "--model", model, "--out", out) == 0
    note = "ecgmoe: passed over in folders: 2 .pdf, 1 without suffix; name a file itself to have it read"
    assert capsys.readouterr().err.splitlines()[0] == note
    out.unlink()
    assert run(folder, "--model", model, "--out", out, "--quiet") == 0
    assert capsys.readouterr().err == ""
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "letter.pdf").touch()
    assert run(tmp_path / "none", "--model", model) == 2
    assert "there is no ECG file in" in (message := capsys.readouterr().err)
    assert "among its files (1 .pdf)" in message


def test_an_unknown_task_is_refused_with_those_there_are(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("x.hea", "--model", model, "--tasks", "age,astrology") == 2
    message = capsys.readouterr().err
    assert "astrology" in message
    assert ", ".join(TINY_TASKS) in message


def test_a_model_without_weights_is_refused(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_bytes((model / "config.json").read_bytes())
    (tmp_path / "preprocessor_config.json").write_bytes((model / "preprocessor_config.json").read_bytes())
    assert run("x.hea", "--model", tmp_path) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_weights_cut_short_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = save_tiny_model(tmp_path, tasks=("age",))
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert run("x.hea", "--model", model) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize("arguments", [["--sampling_rate", "fast"], ["--sampling_rate", "-1"], ["--batch_size", "0"]])
def test_a_number_that_is_none_is_refused(arguments: list[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        run("x.hea", *arguments)


def test_quiet_leaves_stderr_empty(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path / "gone.hea", "--model", model, "--tasks", "age", "--quiet") == 1
    captured = capsys.readouterr()
    assert captured.err == ""
    assert json.loads(captured.out)["status"] == "error"


def test_help_comes_without_loading_a_library() -> None:
    code = (
        "import sys\nfrom modeling_ecgmoe.cli import main\n"
        "try:\n    main(['predict', '--help'])\nexcept SystemExit as end:\n    assert end.code == 0\n"
        "assert not {'torch', 'numpy', 'transformers', 'scipy'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "--resume" in done.stdout
    assert "<task>_low" in done.stdout


def answered(model: Path, folder: Path) -> Path:
    """A file of one record's results by a model."""
    ecg = synthetic_ecg(sampling_rate=100, noise_mv=0.01).ecg
    write_wfdb(ecg, folder, "record")
    out = folder / "o.jsonl"
    assert run(folder / "record.hea", "--model", model, "--tasks", "age", "--out", out, "--quiet") == 0
    return out


def test_a_file_is_not_continued_by_another_model(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = answered(model, tmp_path)
    before = out.read_bytes()
    other = save_tiny_model(tmp_path / "other", tasks=("age",))
    weights = load_file(other.parent / "adapters/age/adapter_model.safetensors")
    weights["base_model.model.heads.head_age.bias"] += 1.0
    save_file(weights, other.parent / "adapters/age/adapter_model.safetensors", metadata={"format": "pt"})
    assert run(tmp_path / "record.hea", "--model", other, "--out", out, "--resume") == 2
    message = capsys.readouterr().err
    assert "it was begun with adapter age" in message
    assert message.count("\n") == 1
    assert out.read_bytes() == before
    assert run(tmp_path / "record.hea", "--model", model, "--tasks", "age", "--out", out, "--resume") == 0


@pytest.mark.parametrize("content", [None, "{", "[]", "{}"])
def test_a_file_of_an_unknown_model_is_not_continued(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str | None
) -> None:
    out = answered(model, tmp_path)
    sidecar = tmp_path / "o.jsonl.model.json"
    assert set(json.loads(sidecar.read_text())) == {"model", "base", "adapters"}
    sidecar.unlink() if content is None else sidecar.write_text(content)
    assert run(tmp_path / "record.hea", "--model", model, "--tasks", "age", "--out", out, "--resume") == 2
    assert "o.jsonl.model.json" in capsys.readouterr().err
