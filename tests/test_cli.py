"""`ecgmoe predict` on real files with a small real model: what comes out, what is refused, what survives a crash."""

import contextlib
import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny_model import TINY_TASKS, save_tiny_model

from data_builders.synthetic import SyntheticEcg, synthetic_ecg, write_wfdb
from modeling_ecgmoe.cli import main
from modeling_ecgmoe.ecg_files import Ecg
from modeling_ecgmoe.leads import LEADS

ROOT = Path(__file__).resolve().parents[1]
WriteRecord = Callable[..., tuple[Path, SyntheticEcg]]


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("hub"))


def ecgmoe(*arguments: object, **options: Any) -> subprocess.Popen[str]:
    """The program in a process of its own."""
    command = [sys.executable, "-m", "modeling_ecgmoe.cli", *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    # Tests that a shell started in its background ignore Ctrl-C, and so would whatever they start.
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return subprocess.Popen(command, cwd=ROOT, text=True, env=environment, **pipes)
    finally:
        signal.signal(signal.SIGINT, handler)


def run(*arguments: object) -> int:
    """The program in this process; its exit status."""
    return main(["predict", *map(str, arguments)])


def read_lines(path: Path) -> list[dict[str, Any]]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text("utf-8").splitlines()]


def write_npz(path: Path, ecg: Ecg) -> Path:
    np.savez(path, signal=ecg.signal, sampling_rate=ecg.sampling_rate, lead_names=list(ecg.lead_names), unit="mV")
    return path


# One folder with every kind of bad record between good ones, predicted once by the real program


def write_bad_records(folder: Path) -> None:
    good = synthetic_ecg(sampling_rate=250).ecg

    def write(name: str, ecg: Ecg = good, change: Callable[[str], str] = str) -> Path:
        header = write_wfdb(ecg, folder, name)
        header.write_text(change(header.read_text()))
        return header

    def named(names: tuple[str, ...]) -> Ecg:
        return Ecg(good.signal, good.sampling_rate, names)

    def changed(signal: np.ndarray) -> Ecg:
        return Ecg(signal, good.sampling_rate, good.lead_names)

    write("a_good")
    data = write("truncated").with_suffix(".dat")
    data.write_bytes(data.read_bytes()[: data.stat().st_size // 2])
    write("missing_file").with_suffix(".dat").unlink()
    write("outside").with_suffix(".dat").rename(folder.parent / "outside.dat")
    (folder / "outside.hea").write_text((folder / "outside.hea").read_text().replace("outside.dat", "../outside.dat"))
    write("nan_leads", changed(np.full_like(good.signal, np.nan)))
    write("flat", changed(np.zeros_like(good.signal)))
    write("no_samples", change=lambda text: text.replace(" 250 2500\n", " 250 0\n")).with_suffix(".dat").write_bytes(
        b""
    )
    write("half_second", changed(good.signal[:, :125]))
    write("unknown_leads", named(tuple(f"X{i}" for i in range(12))))
    write("absurd_rate", change=lambda text: text.replace(" 250 2500\n", " 2000000 2500\n"))
    (folder / "not_a_header.hea").write_bytes(b"\x89PNG\r\n\x1a\n\xff\xfe")
    write("z_good")


BAD_RECORDS = {
    "truncated": "again",
    "missing_file": "missing_file.dat",
    "outside": "outside",
    "nan_leads": "leave it out",
    "flat": "flat",
    "no_samples": "no samples",
    "half_second": "shorter than the 2 s",
    "unknown_leads": "pass the right ones as lead_names (--leads)",
    "absurd_rate": "2e+06 Hz",
    "not_a_header": "header",
}


@pytest.fixture(scope="session")
def bad_run(tmp_path_factory: pytest.TempPathFactory, model: Path) -> tuple[int, dict[str, Any], str]:
    """Exit status, lines by record and stderr of a run over `write_bad_records` and a file that does not exist."""
    folder = tmp_path_factory.mktemp("bad") / "records"
    write_bad_records(folder)
    process = ecgmoe("predict", folder, folder / "not_there.hea", "--model", model)
    stdout, stderr = process.communicate(timeout=600)
    lines = [json.loads(line) for line in stdout.splitlines()]
    assert len({line["record"] for line in lines}) == len(lines)
    return process.returncode, {line["record"]: line for line in lines}, stderr


@pytest.mark.parametrize(("record", "words"), BAD_RECORDS.items())
def test_a_bad_record_gets_one_line_that_names_it_and_the_way_out(
    bad_run: tuple[int, dict[str, Any], str], record: str, words: str
) -> None:
    _, lines, _ = bad_run
    line = lines[record]
    assert set(line) == {"record", "path", "status", "error"}
    assert line["status"] == "error"
    assert line["error"].startswith(f"{record}: ")
    assert "\n" not in line["error"]
    assert words in line["error"]


def test_a_path_that_does_not_exist_is_a_bad_record(bad_run: tuple[int, dict[str, Any], str]) -> None:
    _, lines, _ = bad_run
    assert lines["not_there"]["status"] == "error"
    assert "check the path" in lines["not_there"]["error"]


def test_good_records_among_bad_ones_are_answered(bad_run: tuple[int, dict[str, Any], str]) -> None:
    _, lines, _ = bad_run
    assert [record for record, line in lines.items() if line["status"] == "ok"] == ["a_good", "z_good"]


def test_a_run_with_bad_records_ends_with_status_1(bad_run: tuple[int, dict[str, Any], str]) -> None:
    status, _, _ = bad_run
    assert status == 1


def test_stderr_tells_each_failure_in_one_line_and_then_how_many_were_answered(
    bad_run: tuple[int, dict[str, Any], str],
) -> None:
    _, lines, stderr = bad_run
    *failures, summary = stderr.splitlines()
    assert len(failures) == len(BAD_RECORDS) + 1
    assert all(failure.startswith("ecgmoe: ") for failure in failures)
    assert f"2 of {len(lines)} records answered" in summary


# The contract of the output


def test_a_line_is_the_contract(tmp_path: Path, model: Path, write_record: WriteRecord) -> None:
    path, _ = write_record("record_one", sampling_rate=500)
    assert run(path, "--model", model, "--out", tmp_path / "o.jsonl") == 0
    (line,) = read_lines(tmp_path / "o.jsonl")
    assert list(line) == [
        "record", "path", "status", "sampling_rate", "leads", "duration_s", "quality", "tasks"
    ]  # fmt: skip
    assert (line["record"], line["path"], line["status"]) == ("record_one", str(path), "ok")
    assert (line["sampling_rate"], line["duration_s"], line["leads"]) == (500, 10.0, list(LEADS))
    assert list(line["tasks"]) == sorted(TINY_TASKS)
    age, arrhythmia = line["tasks"]["age"], line["tasks"]["arrhythmia"]
    assert set(age) == {"value", "unit", "interval", "level"}
    assert age["unit"] == "years"
    assert age["interval"][0] < age["value"] < age["interval"][1]
    assert set(arrhythmia) == {"labels", "probabilities"}
    assert set(arrhythmia["labels"]) <= set(arrhythmia["probabilities"])


def test_a_csv_row_says_what_the_json_line_says(tmp_path: Path, model: Path, write_record: WriteRecord) -> None:
    path, _ = write_record()
    arguments = (path, tmp_path / "gone.hea", "--model", model, "--tasks", "age,sex")
    assert run(*arguments, "--out", tmp_path / "o.jsonl") == run(*arguments, "--out", tmp_path / "o.csv") == 1
    line, gone = read_lines(tmp_path / "o.jsonl")
    with (tmp_path / "o.csv").open(newline="") as file:
        row, gone_row = csv.DictReader(file)
    assert list(row) == [
        "record", "path", "status", "error", "sampling_rate", "leads", "duration_s", "warnings",
        "age", "age_low", "age_high", "sex", "sex_male", "sex_female",
    ]  # fmt: skip
    age, sex = line["tasks"]["age"], line["tasks"]["sex"]
    assert [float(row[key]) for key in ("age", "age_low", "age_high")] == [age["value"], *age["interval"]]
    assert row["sex"] == ";".join(sex["labels"])
    assert float(row["sex_female"]) == sex["probabilities"]["female"]
    assert row["leads"].split(";") == list(LEADS)
    assert (gone_row["status"], gone_row["error"], gone_row["age"]) == ("error", gone["error"], "")


def test_simulated_evidence_is_said_in_every_form_of_output(
    tmp_path: Path, write_record: WriteRecord, capsys: pytest.CaptureFixture[str]
) -> None:
    path, _ = write_record()
    model = save_tiny_model(tmp_path, tasks=("age", "sex"), simulated=("sex",))
    for out in ("o.jsonl", "o.csv"):
        assert run(path, "--model", model, "--out", tmp_path / out, "--table") == 0
    (line,) = read_lines(tmp_path / "o.jsonl")
    assert line["tasks"]["sex"]["evidence"] == "simulated"
    assert "evidence" not in line["tasks"]["age"]
    with (tmp_path / "o.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert row["sex_evidence"] == "simulated"
    assert "age_evidence" not in row
    assert capsys.readouterr().out.count("[evidence: simulated]") == 2


def test_the_table_shows_every_task(
    model: Path, write_record: WriteRecord, capsys: pytest.CaptureFixture[str]
) -> None:
    path, _ = write_record("shown")
    assert run(path, "--model", model, "--table") == 0
    first, *rows = capsys.readouterr().out.splitlines()
    assert first.startswith("shown: 10 s at 250 Hz")
    for task in TINY_TASKS:
        assert any(row.split()[0] == task for row in rows)
    assert max(map(len, rows)) <= 120


def test_on_a_terminal_the_answers_are_a_table(
    model: Path, write_record: WriteRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, _ = write_record("shown")
    reader, writer = os.openpty()
    with os.fdopen(writer, "w") as terminal:
        monkeypatch.setattr(sys, "stdout", terminal)
        assert run(path, "--model", model, "--tasks", "age") == 0
    assert os.read(reader, 1000).startswith(b"shown: 10 s")
    os.close(reader)


def test_what_a_file_name_holds_does_not_reach_the_terminal(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_npz(tmp_path / "a\x1b[2Jb.npz", synthetic_ecg(sampling_rate=100).ecg)
    assert run(path, tmp_path / "\x1b[31m.npz", "--model", model, "--tasks", "age", "--table") == 1
    captured = capsys.readouterr()
    assert "\x1b" not in captured.out + captured.err
    assert r"a\x1b[2Jb" in captured.out


def test_a_model_that_gives_no_finite_number_is_an_error_and_not_nan(
    tmp_path: Path, write_record: WriteRecord
) -> None:
    path, _ = write_record()
    model = save_tiny_model(tmp_path, tasks=("age",))
    weights_path = tmp_path / "adapters" / "age" / "adapter_model.safetensors"
    weights = load_file(weights_path)
    (bias,) = [name for name in weights if name.endswith("head_age.bias")]
    save_file(weights | {bias: np.full_like(weights[bias], np.nan)}, weights_path, metadata={"format": "pt"})
    assert run(path, "--model", model, "--out", tmp_path / "o.jsonl") == 1
    (line,) = read_lines(tmp_path / "o.jsonl")
    assert line["status"] == "error"
    assert "no finite answer" in line["error"]


def test_an_array_without_names_rate_or_unit_is_answered_with_those_of_the_command_line(
    tmp_path: Path, model: Path, write_record: WriteRecord
) -> None:
    path, truth = write_record(sampling_rate=250)
    np.save(tmp_path / "bare.npy", truth.ecg.signal)
    facts = ("--sampling_rate", 250, "--unit", "mV", "--leads", *LEADS[:6], ",".join(LEADS[6:]))
    assert run(tmp_path / "bare.npy", path, "--model", model, "--out", tmp_path / "o.jsonl", *facts) == 0
    bare, wfdb = read_lines(tmp_path / "o.jsonl")
    assert bare["tasks"]["rr_interval"]["value"] == pytest.approx(wfdb["tasks"]["rr_interval"]["value"], abs=1)


def test_a_record_named_twice_counts_once(tmp_path: Path, model: Path, write_record: WriteRecord) -> None:
    path, _ = write_record()
    named = (path, path.with_suffix(".dat"), path.with_suffix(""), path.parent)
    assert run(*named, "--model", model, "--tasks", "age", "--out", tmp_path / "o.jsonl") == 0
    assert len(read_lines(tmp_path / "o.jsonl")) == 1


# Crashes and second runs


@pytest.fixture(scope="session")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """600 files of 10 s."""
    folder = tmp_path_factory.mktemp("archive")
    first = write_npz(folder / "000.npz", synthetic_ecg(sampling_rate=100).ecg)
    for number in range(1, 600):
        os.link(first, folder / f"{number:03}.npz")
    return folder


def start_and_wait_for_lines(archive: Path, model: Path, out: Path) -> Iterator[subprocess.Popen[str]]:
    """A run that has written some of its lines."""
    process = ecgmoe("predict", archive, "--model", model, "--tasks", "age,sex", "--batch_size", 1, "--out", out)
    deadline = time.monotonic() + 300
    while not (out.exists() and out.read_bytes().count(b"\n") >= 20):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    yield process
    process.kill()
    process.communicate()


@pytest.mark.parametrize("suffix", [".jsonl"])
def test_a_killed_run_is_resumed_to_one_line_a_record(archive: Path, model: Path, tmp_path: Path, suffix: str) -> None:
    out = tmp_path / f"o{suffix}"
    for process in start_and_wait_for_lines(archive, model, out):
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    survived = out.read_bytes()
    whole = survived[: survived.rfind(b"\n") + 1]
    assert 20 <= whole.count(b"\n") < 600
    out.write_bytes(whole + b'{"record": "x", "pa')  # what a crash in the middle of a line leaves
    assert run(archive, "--model", model, "--tasks", "age,sex", "--out", out, "--resume") == 0
    assert out.read_bytes().startswith(whole)
    lines = read_lines(out)
    assert [line["path"] for line in lines] == [str(archive / f"{number:03}.npz") for number in range(600)]
    assert all(line["status"] == "ok" for line in lines)


def test_an_interrupted_run_ends_with_status_130_and_whole_lines(archive: Path, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "o.csv"
    for process in start_and_wait_for_lines(archive, model, out):
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=120)
        assert process.returncode == 130
        assert stderr.splitlines() == ["ecgmoe: interrupted; with --out, the same command and --resume goes on"]
    text = out.read_text()
    assert text.endswith("\n")
    assert {row["status"] for row in csv.DictReader(text.splitlines())} == {"ok"}


def test_resuming_tries_failed_records_again_and_leaves_the_others_alone(
    tmp_path: Path, model: Path, write_record: WriteRecord
) -> None:
    good, _ = write_record("good")
    bad, _ = write_record("bad")
    signal_path = bad.with_suffix(".dat")
    content = signal_path.read_bytes()
    for out in (tmp_path / "o.jsonl", tmp_path / "o.csv"):
        signal_path.unlink()
        arguments = (bad, good, "--model", model, "--tasks", "age", "--out", out)
        assert run(*arguments) == 1
        signal_path.write_bytes(content)
        assert run(*arguments, "--resume") == 0
        rows = read_lines(out) if out.suffix == ".jsonl" else list(csv.DictReader(out.read_text().splitlines()))
        assert [(row["record"], row["status"]) for row in rows] == [("good", "ok"), ("bad", "ok")]


def test_resuming_a_whole_run_changes_nothing(tmp_path: Path, model: Path, write_record: WriteRecord) -> None:
    path, _ = write_record()
    for out in (tmp_path / "o.jsonl", tmp_path / "o.csv"):
        assert run(path, "--model", model, "--tasks", "age", "--out", out) == 0
        before = out.read_bytes()
        assert run(path, "--model", model, "--tasks", "age", "--out", out, "--resume") == 0
        assert out.read_bytes() == before


def test_resuming_keeps_the_lines_of_other_records(tmp_path: Path, model: Path, write_record: WriteRecord) -> None:
    first, _ = write_record("first")
    second, _ = write_record("second")
    out = tmp_path / "o.jsonl"
    assert run(first, tmp_path / "gone.hea", "--model", model, "--tasks", "age", "--out", out) == 1
    assert run(second, "--model", model, "--tasks", "age", "--out", out, "--resume") == 0
    assert [line["record"] for line in read_lines(out)] == ["first", "gone", "second"]


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
def test_results_of_other_tasks_are_not_mixed(
    tmp_path: Path, model: Path, write_record: WriteRecord, capsys: pytest.CaptureFixture[str], suffix: str
) -> None:
    path, _ = write_record()
    out = tmp_path / f"o{suffix}"
    assert run(path, "--model", model, "--tasks", "age", "--out", out) == 0
    before = out.read_bytes()
    assert run(path, "--model", model, "--tasks", "sex", "--out", out, "--resume", "--quiet") == 2
    assert "cannot be resumed" in capsys.readouterr().err
    assert out.read_bytes() == before
    assert list(tmp_path.glob("*.part")) == []


def test_results_are_not_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "o.jsonl"
    out.write_text("precious\n")
    assert run("x.hea", "--out", out) == 2
    assert "--resume" in capsys.readouterr().err
    assert out.read_text() == "precious\n"


def test_an_empty_output_file_is_written_to(tmp_path: Path, model: Path, write_record: WriteRecord) -> None:
    path, _ = write_record()
    (tmp_path / "o.csv").touch()
    assert run(path, "--model", model, "--tasks", "age", "--out", tmp_path / "o.csv") == 0
    assert len((tmp_path / "o.csv").read_text().splitlines()) == 2


def test_a_reader_that_goes_away_ends_the_run_quietly(
    model: Path, write_record: WriteRecord, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path, _ = write_record()
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        assert run(path, "--model", model, "--tasks", "age") == 141
    assert capsys.readouterr().err == ""


def test_a_full_disk_is_told_in_one_line(
    model: Path, write_record: WriteRecord, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    path, _ = write_record()
    with contextlib.suppress(OSError), open("/dev/full", "w") as full:  # closing it fails again
        monkeypatch.setattr(sys, "stdout", full)
        assert run(path, "--model", model, "--tasks", "age") == 2
    assert "No space left on device" in capsys.readouterr().err
