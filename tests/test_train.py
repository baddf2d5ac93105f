"""Training end to end on a miniature PTB-XL."""

import json
import os
import shutil
import signal as process_signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_model import tiny_model

import evaluation
import train
from benchmarks import plain_cnn
from benchmarks.plain_cnn import PlainCnn
from linear_heads import start_at_base_rates
from modeling_ecgmoe.adapters import MultiTask
from modeling_ecgmoe.configuration_ecgmoe import EcgMoeConfig
from modeling_ecgmoe.feature_extraction_ecgmoe import EcgMoeFeatureExtractor
from modeling_ecgmoe.modeling_ecgmoe import EcgMoeForTasks
from modeling_ecgmoe.tasks import TASKS, Task
from records import DataArguments, EncodedRecords, Records, load_split
from report_words import add_report_words

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True, scope="module")
def no_progress_bars() -> Iterator[None]:
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for everything that training writes, with the configuration of a tiny model in it."""
    folder = tmp_path_factory.mktemp("train")
    config = tiny_model().config.to_diff_dict()
    sizes = {name: config[name] for name in EcgMoeConfig.__annotations__ if name in config and name != "tasks"}
    (folder / "tiny.json").write_text(json.dumps(sizes))
    return folder


@pytest.fixture(scope="module")
def data(mini_ptb_xl: Path, workplace: Path) -> dict[str, Any]:
    return {"data_dir": str(mini_ptb_xl), "cache_dir": str(workplace / "cache"), "num_proc": 1}


@pytest.fixture(scope="module")
def settings(data: dict[str, Any], workplace: Path) -> dict[str, Any]:
    """What all pretraining here shares."""
    return data | {"batch_size": 8, "model_config": str(workplace / "tiny.json"), "learning_rate": 0.005}


def arguments(values: dict[str, Any]) -> list[str]:
    return [word for name, value in values.items() for word in (f"--{name}", str(value))]


@pytest.fixture(scope="module")
def pretrained(settings: dict[str, Any], workplace: Path) -> Path:
    """A folder with `model/` after two steps."""
    folder = workplace / "base"
    train.main(["pretrain", *arguments(settings | {"output_dir": folder, "max_steps": 2})])
    return folder


@pytest.fixture(scope="module")
def adapted(pretrained: Path, data: dict[str, Any], workplace: Path) -> Path:
    """The same folder with `adapters/` for age, superclass and a task of our own, after two steps each."""
    own = Task("checked", "binary", "whether a person confirmed it", "validated_by_human", labels=("no", "yes"))
    (workplace / "own.json").write_text(json.dumps(own.to_dict()))
    values = data | {"model": pretrained / "model", "output_dir": pretrained / "adapters", "max_steps": 2}
    train.main(
        ["adapt", "--task", "age", "superclass", str(workplace / "own.json"), *arguments(values | {"batch_size": 16})]
    )
    return pretrained


def log_of(folder: Path) -> list[dict[str, Any]]:
    """What was logged on the way, without what the finished model is worth."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if "finished" not in line]


# The three commands


def test_pretraining_writes_a_model_that_can_be_loaded(pretrained: Path) -> None:
    model = EcgMoeForTasks.from_pretrained(pretrained / "model")
    assert model.config.hidden_size == 16
    assert set(model.tasks) == {"statements", "superclass", "arrhythmia", "age", "sex", "rr_interval", "quality"}
    assert all(torch.isfinite(p).all() for p in model.parameters())
    extractor = EcgMoeFeatureExtractor.from_pretrained(pretrained / "model")
    assert extractor.sampling_rate == model.config.sampling_rate


def test_the_log_says_how_far_and_how_well(pretrained: Path) -> None:
    (line,) = log_of(pretrained)
    assert line["step"] == 2
    assert np.isfinite(line["loss"])
    assert np.isfinite(line["age_mae"])
    for path in ("morphology", "rhythm"):
        assert sum(line[f"{path}_experts"]) == pytest.approx(1.0, abs=0.01)
    # The mean interval is measured, not learned: right from the first step.
    assert line["rr_interval_mae"] < 60


def test_heads_have_settled_when_training_ends(pretrained: Path) -> None:
    lines = [json.loads(line) for line in (pretrained / "log.jsonl").read_text().splitlines()]
    assert [line.get("finished") for line in lines] == [None, True]
    assert lines[1]["age_mae"] <= lines[0]["age_mae"] + 1e-3
    assert EcgMoeForTasks.from_pretrained(pretrained / "model").tasks["superclass"] == TASKS["superclass"]


def test_the_arguments_are_saved_without_the_paths_of_this_machine(adapted: Path, workplace: Path) -> None:
    for path, expected in (("model", {"max_steps": 2, "batch_size": 8}), ("adapters/age", {"lora_rank": 8})):
        text = (adapted / path / "training.json").read_text()
        assert json.loads(text).items() >= expected.items()
        for trace in (str(workplace), str(ROOT), str(Path.home())):
            assert trace not in text


def test_one_json_file_replaces_the_command_line(pretrained: Path, settings: dict[str, Any], workplace: Path) -> None:
    folder = workplace / "from_json"
    (workplace / "run.json").write_text(json.dumps(settings | {"output_dir": str(folder), "max_steps": 2}))
    train.main(["pretrain", str(workplace / "run.json")])
    assert (folder / "model/training.json").read_text() == (pretrained / "model/training.json").read_text()
    first, second = (load_file(f / "model/model.safetensors") for f in (pretrained, folder))
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, msg=name)


def test_adapters_are_written_for_each_task(adapted: Path) -> None:
    many = MultiTask.from_pretrained(adapted / "model")
    assert set(many.cards) == {"age", "superclass", "checked"}
    age = many.cards["age"]
    assert set(age.half_widths) == {"12", "6", "1"}
    assert np.isfinite(age.metrics["validation_mae"])
    assert len(many.cards["superclass"].thresholds) == 5
    assert many.cards["checked"].task.labels == ("no", "yes")
    assert {line["task"] for line in log_of(adapted / "adapters")} == {"age", "superclass", "checked"}


def test_evaluation_writes_the_metric_of_each_adapter_with_its_interval(
    adapted: Path, data: dict[str, Any], tmp_path: Path
) -> None:
    values = data | {"model": adapted / "model", "out": tmp_path / "results.json", "resamples": 50}
    train.main(["evaluate", "--task", "age", "superclass", *arguments(values)])
    results = json.loads((tmp_path / "results.json").read_text())
    assert set(results) == {"age", "superclass"}
    assert results["age"]["metric"] == "mae"
    assert results["age"]["low"] <= results["age"]["value"] <= results["age"]["high"]
    assert results["age"]["n"] == 4


# The conventional baseline, and the words of the reports


def test_the_plain_network_trains_in_the_same_loop(data: dict[str, Any], workplace: Path) -> None:
    folder = workplace / "plain"
    plain_cnn.main(arguments(data | {"output_dir": folder, "max_steps": 1, "batch_size": 8}))
    logits = PlainCnn.from_pretrained(folder / "model")(torch.randn(2, 12, 1000)).logits
    assert all(torch.isfinite(values).all() for values in logits.values())
    assert json.loads((folder / "model" / "training.json").read_text())["processes"] == 1


def test_tasks_weigh_as_told_and_the_others_as_in_the_table() -> None:
    found = train.reweighted({"age": TASKS["age"], "sex": TASKS["sex"]}, {"sex": 3})
    assert {name: task.loss_weight for name, task in found.items()} == {"sex": 3.0}
    assert found["sex"].reads_like(TASKS["sex"])
    with pytest.raises(ValueError, match="loss_weights names height; this model has age"):
        train.reweighted({"age": TASKS["age"]}, {"height": 1})


def test_decay_spares_routers_experts_and_the_state_space() -> None:
    model = tiny_model()
    decaying = {id(p) for p in train._parameter_groups(model, 0.4)[0]["params"]}
    spared = [name for name, p in model.named_parameters() if p.ndim > 1 and id(p) not in decaying]
    ends = ("router.weight", "experts.gate_up_proj", "experts.down_proj", "log_decay", "frequency")
    assert spared == [name for name, _ in model.named_parameters() if name.endswith(ends)]
    assert len(spared) == 2 * 3 + 2


REPORTS = ["sinus rhythm. normal ecg.", "Sinus rhythm, inferior infarct", "atrial fibrillation", "", None, "sinus"]


def test_words_that_several_reports_hold_become_a_task() -> None:
    rows = datasets.Dataset.from_dict({"report": REPORTS})
    rows, task = add_report_words(rows, loss_weight=3.0, min_reports=2)
    assert task.labels == ("rhythm", "sinus", "sinus rhythm")
    assert task.loss_weight == 3.0
    assert rows["report_words"][:] == [["rhythm", "sinus", "sinus rhythm"]] * 2 + [[], None, None, ["sinus"]]


def test_reports_without_a_common_word_are_refused() -> None:
    rows = datasets.Dataset.from_dict({"report": REPORTS})
    with pytest.raises(ValueError, match=r"no word is in 5 of 6 reports; lower --report_min_count"):
        add_report_words(rows, loss_weight=1.0, min_reports=5)
    with pytest.raises(ValueError, match=r"the column 'report', found text; leave out --report_weight"):
        add_report_words(rows.rename_column("report", "text"), loss_weight=1.0, min_reports=1)


def test_the_words_teach_and_leave_no_head(settings: dict[str, Any], workplace: Path) -> None:
    values = settings | {"output_dir": workplace / "words", "max_steps": 2, "report_weight": 5.0}
    train.main(["pretrain", *arguments(values | {"report_min_count": 1})])
    taught = EcgMoeForTasks.from_pretrained(workplace / "words" / "model")
    train.main(["pretrain", *arguments(values | {"output_dir": workplace / "no_words", "report_weight": 0.0})])
    untaught = EcgMoeForTasks.from_pretrained(workplace / "no_words" / "model")
    assert set(taught.heads) == set(untaught.heads)
    assert "report_words" not in taught.config.tasks
    assert log_of(workplace / "words")[-1]["loss"] > log_of(workplace / "no_words")[-1]["loss"] + 0.5


@pytest.mark.parametrize("kind", ["multi_class", "multi_label"])
def test_new_heads_start_at_the_frequencies_of_their_labels(kind: str) -> None:
    task = Task("grade", kind, "of the valve", "grade", labels=("mild", "none", "severe"))
    values = (
        [["mild"], ["none"], ["none"], ["severe"]] if kind == "multi_label" else ["mild", "none", "none", "severe"]
    )
    model = tiny_model()
    model.add_task(task)
    start_at_base_rates(model, {"grade": torch.from_numpy(task.targets([*values, None]))})
    bias = model.heads["head_grade"].bias.detach().numpy()
    np.testing.assert_allclose(task.answers(bias), [0.25, 0.5, 0.25], atol=1e-5)


# Interrupted and parallel


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_number_of_steps(settings: dict[str, Any], workplace: Path) -> None:
    epochs, steps_an_epoch = 3, 16  # 32 records, 2 a step: long enough not to be killed while it writes
    folder, whole = workplace / "killed", workplace / "whole"
    values = arguments(settings | {"epochs": epochs, "batch_size": 2, "evaluate_every": 100})
    command = [sys.executable, "train.py", "pretrain", *values, "--output_dir", str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    run = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        while not (folder / "checkpoint" / "step.json").exists():
            assert run.poll() is None, run.stderr.read().decode()[-2000:] if run.stderr else ""
            time.sleep(0.005)
        run.send_signal(process_signal.SIGKILL)
    finally:
        run.kill()
        run.communicate()
    assert not (folder / "model").exists()
    killed_after = log_of(folder)[-1]["step"]
    assert killed_after < epochs * steps_an_epoch

    # All three parts on one thread: sums of another order drift apart over the steps.
    for more in (["--output_dir", str(folder), "--resume", "True"], ["--output_dir", str(whole)]):
        subprocess.run([*command[:3], *values, *more], cwd=ROOT, env=environment, check=True)
    expected = [line["step"] for line in log_of(whole)]
    assert expected[-1] == epochs * steps_an_epoch
    assert sorted({line["step"] for line in log_of(folder)}) == expected
    resumed, uninterrupted = (load_file(f / "model/model.safetensors") for f in (folder, whole))
    for name, value in uninterrupted.items():
        torch.testing.assert_close(resumed[name], value, atol=1e-3, rtol=1e-3, msg=name)


@pytest.mark.slow
def test_two_processes_train_together(settings: dict[str, Any], workplace: Path) -> None:
    folder = workplace / "two"
    values = arguments(settings | {"output_dir": folder, "max_steps": 2, "batch_size": 4})
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT)}
    command = [*launch, "train.py", "pretrain", *values]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert [line["step"] for line in log_of(folder)] == [2]
    assert all(torch.isfinite(p).all() for p in EcgMoeForTasks.from_pretrained(folder / "model").parameters())


# What is refused


def test_a_file_with_an_unknown_argument_is_refused(tmp_path: Path) -> None:
    (tmp_path / "how.json").write_text('{"epoch": 3}')
    with pytest.raises(ValueError, match=r"how\.json holds epoch; the arguments are .*epochs"):
        train.main(["pretrain", str(tmp_path / "how.json")])


@pytest.mark.parametrize(("argv", "found"), [([], "no command"), (["fit"], "unknown command 'fit'")])
def test_an_unknown_command_is_answered_with_the_known_ones(argv: list[str], found: str) -> None:
    with pytest.raises(ValueError, match=rf"{found}; usage: train\.py \{{pretrain,adapt,evaluate\}}"):
        train.main(argv)


def test_resuming_without_a_checkpoint_is_refused(settings: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no checkpoint to resume in .*leave out --resume"):
        train.main(["pretrain", *arguments(settings | {"output_dir": tmp_path, "resume": True})])


def test_resuming_under_another_pace_is_refused(settings: dict[str, Any], pretrained: Path) -> None:
    values = settings | {"output_dir": pretrained, "max_steps": 3, "resume": True}
    with pytest.raises(ValueError, match=r"the interrupted run had .*'max_steps': 2.*, this one has .*'max_steps': 3"):
        train.main(["pretrain", *arguments(values)])


def test_too_few_records_for_a_batch_are_refused(settings: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"5 training records do not fill a batch of 8 .* lower --batch_size"):
        train.main(["pretrain", *arguments(settings | {"output_dir": tmp_path, "max_records": 5})])


def test_a_model_and_a_configuration_at_once_are_refused(
    settings: dict[str, Any], pretrained: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="pass --model or --model_config"):
        train.main(["pretrain", *arguments(settings | {"output_dir": tmp_path, "model": pretrained / "model"})])


@pytest.mark.parametrize("killed", ["while writing", "while changing places"])
def test_a_kill_leaves_a_whole_checkpoint(settings: dict[str, Any], workplace: Path, killed: str) -> None:
    folder = workplace / killed.replace(" ", "_")
    values = settings | {"output_dir": folder, "epochs": 1}
    train.main(["pretrain", *arguments(values)])
    old, new = folder / "checkpoint", folder / "checkpoint.new"
    shutil.copytree(old, new)
    torn = new if killed == "while writing" else old
    (torn / "step.json").unlink()
    (torn / "model.safetensors").write_bytes(b"torn")
    shutil.rmtree(folder / "model")
    train.main(["pretrain", *arguments(values | {"resume": True})])
    assert (folder / "model" / "model.safetensors").is_file()


def test_adapting_needs_a_task(pretrained: Path, data: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="name the tasks to adapt to: --task rr_interval age sex"):
        train.main(["adapt", *arguments(data | {"model": pretrained / "model"})])


def test_a_task_whose_column_the_data_lack_is_refused_with_both(
    pretrained: Path, data: dict[str, Any], tmp_path: Path
) -> None:
    values = data | {"model": pretrained / "model", "output_dir": tmp_path}
    with pytest.raises(ValueError, match="task potassium reads the column 'potassium', which ptb_xl does not have"):
        train.main(["adapt", "--task", "potassium", *arguments(values)])


def test_an_unknown_dataset_is_refused_with_the_known_ones(data: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="unknown dataset 'mnist'; known are ptb_xl"):
        load_split(DataArguments(**data, dataset="mnist"), "train")


# Recordings in memory


@pytest.fixture(scope="module")
def records(data: dict[str, Any], pretrained: Path) -> Records:
    rows = load_split(DataArguments(**data), "validation")
    return Records(rows, EcgMoeFeatureExtractor(), [TASKS["age"], TASKS["superclass"], TASKS["potassium"]])


def test_records_hold_what_the_extractor_gives(records: Records, mini_ptb_xl: Path) -> None:
    from modeling_ecgmoe.ecg_files import read_ecg

    batch = records.__getitems__([2, 0])
    for row, index in enumerate((2, 0)):
        ecg = read_ecg(mini_ptb_xl / "records100" / "00000" / f"{records.record_ids[index]}.hea")
        expected = EcgMoeFeatureExtractor().extract(ecg.signal, ecg.sampling_rate, ecg.lead_names)
        beats = len(expected["r_peaks"])
        np.testing.assert_allclose(batch["signal"]["input_values"][row], expected["input_values"], atol=0.01)
        np.testing.assert_array_equal(batch["signal"]["r_peaks"][row, :beats], expected["r_peaks"])
        assert (batch["signal"]["r_peaks"][row, beats:] == -1).all()
        assert batch["signal"]["period_s"][row] == expected["period_s"]
    assert set(batch["labels"]) == {"age", "superclass"}


@pytest.mark.parametrize("changes", [{}, {"paths": ["morphology"]}, {"paths": ["rhythm"]}, {"period_aware": False}])
def test_encoded_records_are_answered_nearly_as_the_recordings(records: Records, changes: dict[str, Any]) -> None:
    model, cpu = tiny_model(**changes).eval(), torch.device("cpu")
    direct = evaluation.predict_logits(model, records, cpu, ["age", "superclass"])
    encoded = evaluation.predict_logits(model, EncodedRecords(model, records, cpu), cpu, ["age", "superclass"])
    for name, logits in direct.items():
        np.testing.assert_allclose(encoded[name], logits, atol=0.01)
