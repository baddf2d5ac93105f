"""`ecgmoe export`: the graph answers as PyTorch does, the folder is all that a runtime needs, faults are refused."""

import json
import re
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_remote_code import ROOT
from tiny_model import save_tiny_model

from data_builders.synthetic import synthetic_ecg, write_wfdb
from modeling_ecgmoe import export_model
from modeling_ecgmoe.adapter_card import AdapterCard, calibrate_intervals
from modeling_ecgmoe.adapters import MultiTask
from modeling_ecgmoe.beats import mean_rr_error_ms
from modeling_ecgmoe.cli import main
from modeling_ecgmoe.ecg_files import read_ecg
from modeling_ecgmoe.export_page import export_page
from modeling_ecgmoe.leads import LEADS
from modeling_ecgmoe.tasks import TASKS as TASK_TABLE

TASKS = ("arrhythmia", "rr_interval", "sex")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_tiny_model(tmp_path_factory.mktemp("hub"), TASKS)
    # As the published one: an adapter that leaves the measured RR interval as it is.
    weights = folder.parent / "adapters" / "rr_interval" / "adapter_model.safetensors"
    tensors = load_file(weights)
    tensors["base_model.model.heads.head_rr_interval.weight"].zero_()
    save_file(tensors, weights)
    return folder


@pytest.fixture(scope="module")
def many(model: Path) -> MultiTask:
    return MultiTask.from_pretrained(model)


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of three recordings that differ in length, rate and rhythm."""
    folder = tmp_path_factory.mktemp("records")
    hearts: list[dict[str, Any]] = [
        {"rate_bpm": 62},
        {"rate_bpm": 95, "rhythm": "atrial_fibrillation", "sampling_rate": 500},
        {"rate_bpm": 48, "duration_s": 7},
    ]
    for number, heart in enumerate(hearts):
        ecg = synthetic_ecg(**{"sampling_rate": 250, "duration_s": 10, "noise_mv": 0.01, "seed": number} | heart).ecg
        write_wfdb(ecg, folder, f"r{number}")
    return folder


@pytest.fixture(scope="module")
def program(many: MultiTask, records: Path) -> torch.export.ExportedProgram:
    """The traced model, which takes most of the time and is the same for all forms."""
    windows = read_windows(many, records)
    return export_model.trace(many, [*map(export_model._without_beats, windows), *windows])


@pytest.fixture(scope="module")
def exported(
    model: Path, records: Path, program: torch.export.ExportedProgram, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """What the command wrote, the 8-bit variant included."""
    out = tmp_path_factory.mktemp("exported") / "onnx"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export_model, "trace", lambda *_: program)
        assert main(["export", "--model", str(model), "--out", str(out), "--check", str(records), "--int8"]) == 0
    return out


def read_windows(many: MultiTask, records: Path) -> list[dict[str, Any]]:
    ecgs = [read_ecg(path) for path in sorted(records.glob("*.hea"))]
    return [w for ecg in ecgs for w in many.prepare(ecg.signal, ecg.sampling_rate, ecg.lead_names).windows]


def test_the_folder_is_all_that_another_runtime_needs(exported: Path) -> None:
    names = {path.name for path in exported.iterdir()}
    assert names == {
        "README.md", "check.npz", "export.json", "model.onnx", "model_int8.onnx", "preprocessor_config.json",
        "tasks.json",
    }  # fmt: skip
    assert set(json.loads((exported / "tasks.json").read_text())) == set(TASKS)
    for path in exported.glob("*.[jm][sd]*"):
        assert str(ROOT) not in path.read_text()


def test_the_report_has_every_case_within_the_tolerance(exported: Path) -> None:
    report = json.loads((exported / "export.json").read_text())
    differences = report["files"]["model.onnx"]["differences"]
    assert {"one record", "two records", "five records", "two leads", "no beats", "all short"} <= set(differences)
    assert all(0.0 <= value <= 1e-4 for value in differences.values())
    assert report["windows_compared"] == 3
    assert report["files"]["model_int8.onnx"]["largest_difference"] > differences["one record"]


@pytest.mark.parametrize("size", [1, 2, 5])
def test_batches_of_any_size_are_answered_as_by_torch(
    exported: Path, many: MultiTask, records: Path, size: int
) -> None:
    windows = (read_windows(many, records) * 2)[:size]
    one_lead = many.extractor.extract(synthetic_ecg(sampling_rate=250, seed=9).ecg.signal[6:7], 250, [LEADS[6]])
    windows[-1] = one_lead | {"r_peaks": one_lead["r_peaks"][:3], "rr_intervals_s": one_lead["rr_intervals_s"][:3]}
    session = onnxruntime.InferenceSession(exported / "model.onnx")
    found = session.run(list(TASKS), export_model.batch_of(many, windows))
    for task, logits in zip(TASKS, found, strict=True):
        np.testing.assert_allclose(logits, many.logits(windows)[task], atol=1e-4)


def test_axes_and_outputs_have_names_that_people_read(exported: Path) -> None:
    session = onnxruntime.InferenceSession(exported / "model.onnx")
    shapes = {value.name: value.shape for value in (*session.get_inputs(), *session.get_outputs())}
    assert shapes["input_values"] == ["batch", 12, 1000]
    assert shapes["r_peaks"] == shapes["rr_intervals_s"] == ["batch", "beats"]
    assert shapes["arrhythmia"] == ["batch", 12]


def test_what_the_page_says_to_run_runs_and_gives_what_is_expected(exported: Path) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (exported / "README.md").read_text(), re.DOTALL)
    code += "    np.testing.assert_allclose(logits, given[f'logits_{name}'], atol=1e-5)\n    print('alike')\n"
    done = subprocess.run([sys.executable, "-c", code], cwd=exported, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("alike") == len(TASKS)


def test_a_program_of_torch_answers_too_and_one_that_differs_is_refused(
    model: Path,
    records: Path,
    program: torch.export.ExportedProgram,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    many = MultiTask.from_pretrained(model, TASKS)
    monkeypatch.setattr(export_model, "trace", lambda *_: program)
    export_model.export_model(many, tmp_path / "good", "torch_export", [records])
    report = json.loads((tmp_path / "good" / "export.json").read_text())
    assert report["files"]["model.pt2"]["largest_difference"] <= 1e-4
    assert "torch.export.load" in (tmp_path / "good" / "README.md").read_text()
    with torch.no_grad():
        many.model.ecgmoe.encoder.temporal.norm.weight.mul_(1.01)
    with pytest.raises(export_model.ExportError, match="differs by"):
        export_model.export_model(many, tmp_path / "bad", "torch_export", [records])
    assert [path.name for path in tmp_path.iterdir()] == ["good"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--int8"], "--check"),
        (["--int8", "--check", "x.hea", "--format", "torch_export"], "--format onnx"),
        (["--check", "nothing_here"], "no such file"),
    ],
)
def test_what_cannot_be_exported_is_refused_with_the_way_out(
    model: Path, tmp_path: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", "--model", str(model), "--out", str(tmp_path / "out"), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_missing_packages_are_named_with_the_extra_that_brings_them(
    many: MultiTask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export_model, "find_spec", lambda name: None if name == "onnxscript" else name)
    with pytest.raises(export_model.ExportError, match=r"onnxscript must be there .* 'ecg-moe\[onnx\]'"):
        export_model.export_model(many, tmp_path / "out")


def test_the_graph_does_not_say_where_the_sources_lie(exported: Path) -> None:
    assert str(ROOT).encode() not in (exported / "model.onnx").read_bytes()


def test_a_folder_with_files_is_not_written_into(
    exported: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.stat().st_mtime_ns for path in exported.iterdir()}
    assert main(["export", "--model", str(model), "--out", str(exported)]) == 2
    assert "holds files already" in capsys.readouterr().err
    assert main(["export", "--model", str(model), "--out", str(exported / "model.onnx")]) == 2
    assert "is a file or holds files already; name another folder" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in exported.iterdir()} == before


def test_the_page_says_how_many_labels_there_are_and_where_all_of_them_are(many: MultiTask) -> None:
    report = {"opset": 20, "files": {}, "windows_compared": 3}
    cards = many.cards | {"statements": AdapterCard(TASK_TABLE["statements"], many.base)}
    page = export_page(SimpleNamespace(base=many.base, cards=cards, extractor=many.extractor), report)
    assert "IRBBB, 1AVB, ... (71 labels) |" in page
    assert '`json.load(open("tasks.json"))["statements"]["task"]["labels"]`' in page
    assert "PSVT, TRIGU |" in page.partition("| arrhythmia")[2].partition("\n")[0]


def test_a_folder_that_cannot_be_is_refused_before_any_work(many: MultiTask, model: Path, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    for folder, message in (
        (file, "is a file or holds"),
        (tmp_path, "holds files"),
        (file / "in", "cannot be written"),
    ):
        with pytest.raises(export_model.ExportError, match=message):
            export_model.export_model(many, folder, "torch_export")
    with pytest.raises(export_model.ExportError, match="no task to export; load an adapter"):
        export_model.export_model(MultiTask.from_pretrained(model, []), tmp_path / "out", "torch_export")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


# The example for runtimes without torch

BARE = """
import importlib.abc, runpy, sys

class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] in {"torch", "transformers", "scipy", "peft", "modeling_ecgmoe", "data_builders"}:
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Refuse())
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_the_example_needs_onnxruntime_and_numpy_alone(exported: Path, many: MultiTask, records: Path) -> None:
    for record in sorted(records.glob("*.hea")):
        command = [sys.executable, "-I", "-c", BARE, ROOT / "examples" / "run_onnx.py", exported, record]
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        shown = dict(line.split(maxsplit=1) for line in done.stdout.splitlines())
        ecg = read_ecg(record)
        expected = many.answer([many.prepare(ecg.signal, ecg.sampling_rate, ecg.lead_names)])[0]
        assert float(shown["rr_interval"].split()[0]) == pytest.approx(expected["rr_interval"]["value"], abs=5)
        assert shown["sex"] == expected["sex"]["labels"][0]


@pytest.fixture(scope="module")
def example() -> dict[str, Any]:
    """What the example defines."""
    return runpy.run_path(str(ROOT / "examples" / "run_onnx.py"))


def test_the_examples_intervals_are_those_of_the_package(example: dict[str, Any], tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    ages, rr = AdapterCard(TASK_TABLE["age"], "abc"), AdapterCard(TASK_TABLE["rr_interval"], "abc")
    truth = rng.uniform(0, 95, 3000)
    for leads in (12, 6):
        calibrate_intervals(ages, 0.6 * truth + rng.normal(20, 8, 3000), truth, leads)
        calibrate_intervals(rr, truth + rng.normal(0, 1, 3000), truth, leads, np.ones(3000))
    assert ages.group_half_widths
    assert rr.relative_widths
    for card in (ages, rr):
        card.save(tmp_path)
        saved = json.loads((tmp_path / "task.json").read_text())
        for intervals_s in (np.array([0.8, 0.9, 0.7]), np.array([0.8])):
            for value in (0.0, 7.0, 44.0, 90.0, 800.0):
                expected = card.intervals(np.array([value]), 12, np.array([mean_rr_error_ms(intervals_s)]))[0]
                assert example["interval"](value, saved, intervals_s) == pytest.approx(tuple(expected))


def test_the_examples_labels_are_those_of_the_package(example: dict[str, Any], tmp_path: Path) -> None:
    tasks = (TASK_TABLE["sex"], TASK_TABLE["superclass"])
    for task, outputs in ((task, len(task.labels) if task.kind == "multi_label" else 1) for task in tasks):
        curve = {"shifts": [0.5] * outputs, "slopes": [0.6] * outputs, "bends": [1.5] * outputs}
        card = AdapterCard(task, "abc", temperature=1.3, thresholds=[0.7] * outputs, **curve)
        card.save(tmp_path)
        saved = json.loads((tmp_path / "task.json").read_text())
        answered = set()
        for logit in np.linspace(-3.0, 3.0, 61):
            logits = np.full(outputs, logit)
            expected = card.answer(logits, 12)["labels"]
            assert example["answer"](logits, saved, np.array([0.8])) == (", ".join(expected) or "no label")
            answered.add(tuple(expected))
        assert len(answered) == 2


def rewritten(records: Path, folder: Path, skip: int = 0, **changes: str) -> Path:
    """A record with its signals after some bytes of another header, and texts of its own header changed."""
    text = (records / "r0.hea").read_text()
    for old, new in changes.items():
        assert old in text
        text = text.replace(old, new)
    (folder / "r0.hea").write_text(text)
    for name in ("r0.dat", "r0.mat"):
        (folder / name).write_bytes(bytes(skip) + (records / "r0.dat").read_bytes())
    return folder / "r0.hea"


def test_the_example_reads_what_the_package_reads(example: dict[str, Any], records: Path, tmp_path: Path) -> None:
    gain = re.search(r" 16 (\S+)/mV 16 0 ", (records / "r0.hea").read_text())
    assert gain is not None
    number = gain[1].partition("(")[0]
    for new in (f" 16+24 {gain[1]}/mV 16 0 ", f" 16+24 {number}(100)/mV 16 0 ", f" 16+24 {number} 16 -70 "):
        path = rewritten(records, tmp_path, 24, **{"r0.dat": "r0.mat", gain[0]: new})
        expected = read_ecg(path)
        signal, rate = example["read"](path)
        assert rate == expected.sampling_rate
        np.testing.assert_allclose(signal, expected.signal, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({" 16 ": " 212 "}, "expected signals of format 16 in mV in one file, found r0.dat 212"),
        ({"/mV": "/uV"}, "expected signals of format 16 in mV in one file"),
        ({" V3\n": " V9\n"}, "the leads V3 are missing; `ecgmoe predict` needs no more than one"),
        ({" 2500": " 2501"}, "r0.dat is cut off, 30000 of 30012 values are there"),
        ({"r0 12": "r0 13"}, "no header of a WFDB record in one segment"),
        ({"r0.dat": "gone.dat"}, "No such file"),
    ],
)
def test_what_the_example_cannot_read_it_refuses(
    example: dict[str, Any], records: Path, tmp_path: Path, changes: dict[str, str], message: str
) -> None:
    with pytest.raises((OSError, ValueError), match=re.escape(message)):
        example["read"](rewritten(records, tmp_path, **changes))


def test_the_example_answers_mistakes_in_one_line(exported: Path, records: Path, tmp_path: Path) -> None:
    script = str(ROOT / "examples" / "run_onnx.py")
    for arguments, message in (
        ([], "usage: python run_onnx.py FOLDER_OF_ECGMOE_EXPORT RECORD.hea"),
        ([tmp_path, records / "r0.hea"], f"{tmp_path} holds no model.onnx and no tasks.json and no preprocessor_con"),
        ([exported, records / "r0.dat"], f"{records / 'r0.dat'}: this is no header of a WFDB record"),
        ([exported, tmp_path / "none.hea"], f"{tmp_path / 'none.hea'}: [Errno 2] No such file"),
    ):
        done = subprocess.run(
            [sys.executable, script, *map(str, arguments)], capture_output=True, text=True, check=False
        )
        assert done.returncode == 1
        assert done.stderr.startswith(message)
        assert done.stderr.count("\n") == 1
