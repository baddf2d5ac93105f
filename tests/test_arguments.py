"""What is asked of `train.py`: read from words and JSON, held to its ranges, and refused in one line with status 2."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import train
from adaptation import AdaptArguments
from arguments import is_refusal, make_folder, parse_arguments, run_program
from evaluation import EvaluateArguments, find_model
from modeling_ecgmoe.tasks import find_task
from records import DataArguments
from train import TrainingArguments, read_config

ROOT = Path(__file__).resolve().parents[1]
KINDS = (DataArguments, AdaptArguments)


def refused(error: Exception) -> str:
    """The line that a program prints for an error that its user can mend."""
    assert is_refusal(error)
    return str(error)


# Words and JSON


def test_a_file_says_what_words_would_say(tmp_path: Path) -> None:
    values = {"task": ["age", "sex"], "epochs": 2, "learning_rate": 1e-3, "trained_on": "-", "max_steps": None}
    (tmp_path / "how.json").write_text(json.dumps(values | {"builder_options": {"max_distance_min": 30}}))
    data, how = parse_arguments(KINDS, [str(tmp_path / "how.json"), "--task", "rr_interval"])
    assert (how.task, how.epochs, how.learning_rate, how.trained_on) == (["rr_interval"], 2, 1e-3, "-")
    assert json.loads(data.builder_options) == {"max_distance_min": 30}


def test_one_task_in_a_file_need_not_be_a_list(tmp_path: Path) -> None:
    (tmp_path / "how.json").write_text('{"task": "age"}')
    assert parse_arguments(KINDS, [str(tmp_path / "how.json")])[1].task == ["age"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"epochs": 2.5}', "argument --epochs: invalid int value: '2.5'; train.py adapt --help lists the arguments"),
        ('{"epochs": 2', "how.json must be a JSON object, and is no JSON"),
        ("[1]", r"how.json must be a JSON object, found \[1\]"),
        ('{"epoch": 2}', "how.json holds epoch; the arguments are data_dir"),
    ],
)
def test_a_file_that_does_not_do_is_refused(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "how.json").write_text(content)
    with pytest.raises(ValueError, match=message) as caught:
        parse_arguments(KINDS, [str(tmp_path / "how.json")], "train.py adapt")
    refused(caught.value)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--epochs", "many"], "argument --epochs: invalid int value: 'many'; train.py adapt --help lists"),
        (["--epoch_number", "3"], "unknown arguments: --epoch_number 3; train.py adapt --help lists"),
        (["--task"], "argument --task: expected at least one argument"),
        (["there_is_no.json"], "there is no file there_is_no.json"),
    ],
)
def test_words_that_are_no_arguments_are_refused(words: list[str], message: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        parse_arguments(KINDS, words, "train.py adapt")
    refused(caught.value)


# Ranges


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        (AdaptArguments, {"lora_rank": 0}, "--lora_rank must be at least 1, found 0"),
        (AdaptArguments, {"epochs": -1}, "--epochs must be at least 1, found -1"),
        (AdaptArguments, {"batch_size": 0}, "--batch_size must be at least 1"),
        (AdaptArguments, {"views": 0}, "--views must be at least 1"),
        (AdaptArguments, {"level": 1.5}, "--level must be between 0 and 1, found 1.5"),
        (AdaptArguments, {"level": float("nan")}, "--level must be between 0 and 1, found nan"),
        (AdaptArguments, {"learning_rate": 0.0}, "--learning_rate must be above 0"),
        (AdaptArguments, {"lora_scope": "head"}, "--lora_scope must be one of fusion, all, found 'head'"),
        (AdaptArguments, {"evidence": "real"}, "--evidence must be one of measured, simulated"),
        (AdaptArguments, {"kind": "ranking"}, "unknown --kind 'ranking'"),
        (TrainingArguments, {"crop_s": 0.0}, "--crop_s must be at least 1, found 0.0"),
        (TrainingArguments, {"max_steps": 0}, "--max_steps must be at least 1"),
        (TrainingArguments, {"noise": 2.0}, "--noise must be from 0 to 1"),
        (TrainingArguments, {"ema_decay": 1.0}, "--ema_decay must be at least 0 and below 1"),
        (TrainingArguments, {"mixed_precision": "16"}, "--mixed_precision must be one of no, bf16"),
        (DataArguments, {"num_proc": 0}, "--num_proc must be at least 1"),
        (DataArguments, {"max_records": 0}, "--max_records must be at least 1"),
        (DataArguments, {"sampling_rate": -250.0}, "--sampling_rate must be above 0"),
        (DataArguments, {"file_unit": "kV"}, "--file_unit must be one of V, mV, uV, nV, found 'kV'"),
        (EvaluateArguments, {"resamples": 0}, "--resamples must be at least 1"),
    ],
)
def test_what_is_out_of_its_range_is_refused_at_once(kind: type, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        kind(**values)
    refused(caught.value)


@pytest.mark.parametrize("name", ["pretrain", "adapt", "plain_cnn"])
def test_the_published_configurations_are_within_the_ranges(name: str) -> None:
    kinds = KINDS if name == "adapt" else (DataArguments, TrainingArguments)
    assert parse_arguments(kinds, [str(ROOT / f"benchmarks/configs/{name}.json")])[1].epochs > 1


@pytest.mark.parametrize(
    ("weights", "message"), [("{sex: 3}", "loss_weights must be a JSON object"), ('{"sex": "3"}', "found '3' for sex")]
)
def test_loss_weights_that_are_none_are_refused(weights: str, message: str) -> None:
    from arguments import parse_json_object

    with pytest.raises(ValueError, match=message):
        train.reweighted({"sex": find_task("sex")}, parse_json_object(weights, "loss_weights"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"hiden_size": 64}', "model.json holds hiden_size; the fields of EcgMoeConfig are leads"),
        ('{"hidden_size": "64"}', "model.json: .*hidden_size.*; mend the file"),
        ('{"token_stride": 8}', "model.json: token_stride must be 16"),
    ],
)
def test_a_configuration_that_does_not_do_is_refused(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "model.json").write_text(content)
    with pytest.raises(ValueError, match=rf"(?s){message}"):
        read_config(tmp_path / "model.json")


def test_a_folder_that_cannot_be_made_is_refused_before_training(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"--output_dir .*file/runs cannot be made \(Not a directory\); name another"):
        make_folder(tmp_path / "file" / "runs", "--output_dir")


# The model


def test_without_a_model_it_is_that_of_the_sources(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert AdaptArguments().model is EvaluateArguments().model is None
    assert find_model(None) == ROOT / "hub" / "model"


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            "runs/none/model",
            "runs/none/model is neither a folder nor an id that the Hub gives out .*check the spelling",
        ),
        ("me/ecg-moe", "me/ecg-moe is neither a folder nor an id that the Hub gives out"),
        (".", r"--model \. holds no config.json and no preprocessor_config.json; name the folder of a model"),
    ],
)
@pytest.mark.parametrize("command", ["pretrain", "adapt", "evaluate"])
def test_a_model_that_is_not_there_is_refused_before_data_are_read(
    command: str, model: str, message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    words = {"pretrain": [], "adapt": ["--task", "age"], "evaluate": []}[command]
    with pytest.raises(FileNotFoundError, match=message) as caught:
        train.main([command, *words, "--model", model, "--data_dir", "there_is_none"])
    assert "\n" not in refused(caught.value)


# One line and a status, or a traceback


def test_errors_of_this_project_are_for_the_user_and_others_are_not() -> None:
    with pytest.raises(ValueError, match="unknown task") as ours:
        find_task("height")
    with pytest.raises(ValueError, match="broadcast") as of_the_interpreter:
        np.zeros(3) + np.zeros(4)
    with pytest.raises(FileNotFoundError) as of_a_library:
        Path("there_is_none").read_text()
    assert [is_refusal(error.value) for error in (ours, of_the_interpreter, of_a_library)] == [True, False, False]


def test_a_defect_keeps_its_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    def program(argv: list[str]) -> None:
        np.zeros(3) + np.zeros(len(argv))

    with pytest.raises(ValueError, match="broadcast"):
        run_program(program, ["a", "b"], "train.py")
    assert run_program(lambda _: print(find_task("height")), [], "train.py") == 2
    assert capsys.readouterr().err.startswith("train.py: unknown task 'height'; known tasks are ")


def run_train(*words: str, launcher: tuple[str, ...] = (), folder: Path = ROOT) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONPATH", None)
    command = [sys.executable, *launcher, str(ROOT / "train.py"), *words]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def test_an_interruption_is_a_line_and_no_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    def program(_: list[str]) -> None:
        raise KeyboardInterrupt

    assert run_program(program, [], "train.py") == 130
    assert capsys.readouterr().err == "train.py: interrupted\n"


def test_help_is_no_error(capsys: pytest.CaptureFixture[str]) -> None:
    train.main(["--help"])
    assert capsys.readouterr().out.startswith("usage: train.py {pretrain,adapt,evaluate}")
    for command in ("pretrain", "adapt", "evaluate"):
        with pytest.raises(SystemExit) as end:
            train.main([command, "--help"])
        assert end.value.code == 0
        assert capsys.readouterr().out.startswith(f"usage: train.py {command} [-h] [--data_dir DATA_DIR]")


def test_a_mistake_is_one_line_and_status_2_wherever_it_is_run(tmp_path: Path) -> None:
    done = run_train("adapt", "--task", "low_ef", "--csv", "labels.csv", folder=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "train.py: no such table: labels.csv; check --csv\n"


@pytest.mark.slow
def test_the_launcher_says_the_same_line() -> None:
    done = run_train("adapt", "--lora_rank", "0", launcher=("-m", "accelerate.commands.launch", "--quiet", "--cpu"))
    assert done.returncode != 0
    assert "train.py: --lora_rank must be at least 1, found 0\n" in done.stderr
    assert "Traceback" not in done.stderr
