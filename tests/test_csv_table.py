"""A table of one's own: files of all kinds to rows, splits by patient, and one command to an adapter that answers."""

import csv
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from peft import PeftModel
from test_space import app  # noqa: F401
from tiny_model import save_tiny_model, tiny_model
from transformers import pipeline

import train
from adaptation import AdaptArguments, describe_data, find_known_task, prior_errors_of
from data_builders.csv_table import EcgCsv
from data_builders.synthetic import synthetic_ecg, write_wfdb
from evaluation import predict_adapters, predict_logits
from modeling_ecgmoe.adapter_card import AdapterCard
from modeling_ecgmoe.adapters import MultiTask
from modeling_ecgmoe.cli import main
from modeling_ecgmoe.ecg_files import Ecg, read_ecg
from modeling_ecgmoe.feature_extraction_ecgmoe import EcgMoeFeatureExtractor
from modeling_ecgmoe.leads import LEADS
from modeling_ecgmoe.modeling_ecgmoe import EcgMoeForTasks
from modeling_ecgmoe.tasks import TASKS, Task
from records import DataArguments, EncodedRecords, Records, load_split

ROOT = Path(__file__).resolve().parents[1]
EF = Task("ef", "regression", "ejection fraction", "ef")
Row = dict[str, Any]


@pytest.fixture(autouse=True, scope="module")
def no_progress_bars() -> Iterator[None]:
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


def write_file(folder: Path, number: int, **kind: Any) -> str:
    """A recording as WFDB, NPZ or CSV in turn, of its own rate, leads and length; gives its path in the folder."""
    rate = (250, 500, 360)[number % 3]
    ecg = synthetic_ecg(**{"sampling_rate": rate, "duration_s": 4, "noise_mv": 0.01, "seed": number} | kind).ecg
    if number % 3 == 0:
        write_wfdb(ecg, folder / "wfdb", f"r{number}")
        return f"wfdb/r{number}"
    if number % 3 == 1:
        facts = {"sampling_rate": ecg.sampling_rate, "lead_names": list(ecg.lead_names[:2]), "unit": "mV"}
        np.savez(folder / f"r{number}.npz", signal=ecg.signal[:2], **facts)
        return f"r{number}.npz"
    seconds = np.arange(ecg.signal.shape[1]) / ecg.sampling_rate
    head = ",".join(["time [s]", *(f"{name} [mV]" for name in ecg.lead_names)])
    table = np.column_stack([seconds, ecg.signal.T])
    np.savetxt(folder / f"r{number}.csv", table, "%.5f", ",", header=head, comments="")
    return f"r{number}.csv"


def write_table(path: Path, rows: list[Row], delimiter: str = ",") -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0], delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)
    return path


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with 24 recordings of 12 patients, three that cannot be used, and `labels.csv`."""
    folder = tmp_path_factory.mktemp("own")
    rows: list[Row] = []
    for number in range(24):
        patient = number // 2
        rows.append(
            {
                "path": write_file(folder, number, rate_bpm=60 + number),
                "patient": f"p{patient}",
                "split": ("train", "val", "Training", "test")[patient % 4],
                "ef": "" if number == 4 else 40.5 + number,
                "grade": ("mild", "none", "severe")[number % 3],
            }
        )
    (folder / "broken.npz").write_bytes(b"PK")
    np.savez(folder / "flat.npz", signal=np.zeros((1, 2500)), sampling_rate=250, lead_names=["I"], unit="mV")
    for name in ("broken.npz", "flat.npz", "not_there.hea"):
        rows.append(rows[0] | {"path": name, "patient": name})
    write_table(folder / "labels.csv", rows)
    return folder


def rows_of(own: Path, split: str = "train", **changes: Any) -> datasets.Dataset:
    values = {"csv": str(own / "labels.csv"), "patient_column": "patient", "split_column": "split", "num_proc": 1}
    return load_split(DataArguments(**values | {"cache_dir": str(own / "cache")} | changes), split)


# Rows


def test_files_of_all_kinds_become_rows_with_what_the_table_says(own: Path) -> None:
    rows = rows_of(own).with_format("numpy")
    assert [str(name) for name in rows[:3]["record_id"]] == ["r0", "r1", "r4"]
    for row in rows:
        ecg = read_ecg(own / str(row["path"]))
        np.testing.assert_array_equal(row["signal"], ecg.signal)
        assert row["sampling_rate"] == ecg.sampling_rate
        assert tuple(row["lead_names"]) == ecg.lead_names
    table = rows.with_format(None)["table"][:]
    assert table[1] == {"path": "r1.npz", "patient": "p0", "split": "train", "ef": "41.5", "grade": "none"}


def test_files_that_cannot_be_read_are_named_whenever_a_split_is_opened(
    own: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(2):  # read, and taken from the cache
        caplog.clear()
        rows = rows_of(own)
        assert len(rows) == 13
        assert "labels.csv, train: 2 of 15 files cannot be read and are left out" in caplog.text
        assert "broken.npz: this is not a whole NPZ archive" in caplog.text
        assert "not_there.hea: no such file" in caplog.text


def test_a_changed_file_is_read_again(own: Path, tmp_path: Path) -> None:
    def write(seed: int) -> np.ndarray:
        write_wfdb(ecg := synthetic_ecg(sampling_rate=250, seed=seed, noise_mv=0.05).ecg, tmp_path, "a")
        return ecg.signal

    write_table(tmp_path / "t.csv", [{"path": "a.hea", "ef": 1, "s": "train"}])
    options = {"csv": tmp_path / "t.csv", "split_column": "s", "cache_dir": tmp_path / "cache"}
    for seed in (1, 2):
        signal = write(seed)
        builder = EcgCsv(**options)
        builder.download_and_prepare()
        np.testing.assert_allclose(np.array(builder.as_dataset("train")[0]["signal"]), signal, atol=0.001)


def test_patients_never_cross_splits_whatever_else_is_in_the_table(tmp_path: Path) -> None:
    wanted = [{"path": f"{i}.hea", "patient": f"p{i // 3}"} for i in range(300)]

    def splits(rows: list[Row]) -> dict[str, set[str]]:
        builder = EcgCsv(csv=write_table(tmp_path / "t.csv", rows), patient_column="patient", cache_dir=tmp_path)
        made = builder._split_generators(None)
        return {str(split.name): {entry[1] for entry in split.gen_kwargs["entries"]} for split in made}

    found = splits(wanted)
    assert list(found) == ["train", "validation", "test"]
    assert len(set.union(*found.values())) == sum(map(len, found.values())) == 100
    assert 50 < len(found["train"]) < 90
    half = splits(wanted[150:][::-1])
    assert all(half[name] <= found[name] for name in found)


@pytest.mark.parametrize("form", ["semicolons", "tabs", "another folder", "an index column"])
def test_tables_come_in_many_forms(own: Path, tmp_path: Path, form: str) -> None:
    row: Row = {"file": "wfdb/r0.hea", "findings": "AF;PVC" if form != "semicolons" else "AF", "s": "train"}
    row = {"": "0", **row} if form == "an index column" else row
    table = write_table(tmp_path / "t.csv", [row], {"semicolons": ";", "tabs": "\t"}.get(form, ","))
    options = {"path_column": "file", "split_column": "s", "cache_dir": tmp_path / "cache"}
    builder = EcgCsv(csv=table, data_dir=own, **options)
    builder.download_and_prepare()
    found = builder.as_dataset("train")[0]
    assert found["record_id"] == "r0"
    assert found["table"]["findings"] == row["findings"]


def test_what_files_do_not_say_can_be_told_for_all(tmp_path: Path) -> None:
    signal = synthetic_ecg(sampling_rate=250).ecg.signal[:2]
    np.save(tmp_path / "a.npy", signal * 1000)
    table = write_table(tmp_path / "t.csv", [{"path": "a.npy", "s": "train"}])
    facts = {"sampling_rate": 250.0, "lead_names": ["I", "II"], "file_unit": "uV", "split_column": "s"}
    builder = EcgCsv(csv=table, cache_dir=tmp_path / "cache", **facts)
    builder.download_and_prepare()
    row = builder.as_dataset("train")[0]
    np.testing.assert_allclose(row["signal"], signal, atol=1e-5)
    assert (row["sampling_rate"], row["lead_names"]) == (250.0, ["I", "II"])


@pytest.mark.parametrize(
    ("rows", "changes", "message"),
    [
        (
            [{"file": "a", "patient": "p"}],
            {},
            "has no column 'path'; its columns are file, patient; pass --path_column",
        ),
        ([{"path": "a", "patient": "p"}], {"split_column": "s"}, "has no column 's'.*pass --split_column"),
        ([{"path": "a", "patient": ""}], {}, "row 1 has no patient; a patient must not be in two splits"),
        (
            [{"path": "a", "patient": "p", "s": "dog"}],
            {"split_column": "s"},
            "'dog'; expected train, validation, test",
        ),
        (
            [{"path": "a", "patient": "p", "s": "train"}, {"path": "b", "patient": "p", "s": "test"}],
            {"split_column": "s"},
            "1 patients are in split 'test' and in 'train', among them p",
        ),
        ([{"path": "a", "patient": "p", "s": "train"}], {"split_column": "s"}, "none of the 1 files of train can be"),
        ([{"path": "a", "patient": "p", "s": "test"}], {"split_column": "s"}, "no recording is in the split train"),
    ],
    ids=["path", "split column", "patient", "split", "crossing", "all unreadable", "empty split"],
)
def test_a_table_that_does_not_do_is_refused(
    tmp_path: Path, rows: list[Row], changes: dict[str, str], message: str
) -> None:
    write_table(tmp_path / "labels.csv", rows)
    with pytest.raises(ValueError, match=message):
        rows_of(tmp_path, **({"split_column": None} | changes))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"path,path\na,b\n", "has the column 'path' twice"),
        (b"path,ef\n", "has no rows"),
        (b"path,ef\na,1,2\n", "row 1 has more cells than the first line"),
        (b"path,ef\n\xff\xfe,1\n", "is not a CSV table in UTF-8"),
    ],
)
def test_a_file_that_is_no_such_table_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "t.csv").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        EcgCsv(csv=tmp_path / "t.csv", cache_dir=tmp_path)


def test_a_table_that_is_not_there_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no such table: .*t\.csv; check --csv"):
        EcgCsv(csv=tmp_path / "t.csv")


# Windows


def test_recordings_are_seen_through_the_windows_of_prediction(tmp_path: Path) -> None:
    ecgs = [synthetic_ecg(sampling_rate=250, duration_s=s, seed=s, noise_mv=0.02).ecg for s in (25, 8)]
    for name, ecg in zip(("long", "short"), ecgs, strict=True):
        write_wfdb(ecg, tmp_path, name)
    flat = Ecg(np.zeros((12, 2500), np.float32), 250.0, ecgs[0].lead_names)
    write_wfdb(flat, tmp_path, "flat")
    truth = {"long": 50, "flat": 1, "short": 60}
    rows = [{"path": name, "patient": name, "ef": ef, "split": "train"} for name, ef in truth.items()]
    write_table(tmp_path / "labels.csv", rows)
    records = Records(rows_of(tmp_path), EcgMoeFeatureExtractor(), [EF])
    assert records.record_ids == ["long", "short"]
    assert records.record_of.tolist() == [0, 0, 0, 1]
    assert records.labels["ef"].tolist() == [[50.0], [60.0]]
    assert records.__getitems__([2, 3])["labels"]["ef"].tolist() == [[50.0], [60.0]]

    model, cpu = tiny_model().eval(), torch.device("cpu")
    found = predict_logits(model, records, cpu, ["age"])["age"]
    encoded = predict_logits(model, EncodedRecords(model, records, cpu), cpu, ["age"])["age"]
    extractor = EcgMoeFeatureExtractor()
    for row, ecg in enumerate(ecgs):
        windows = extractor.prepare(ecg.signal, 250, ecg.lead_names).windows
        features = extractor.pad(windows, return_tensors="pt")
        features.pop("quality")
        with torch.no_grad():
            expected = model(**features, tasks=["age"]).logits["age"].mean(dim=0).numpy()
        np.testing.assert_allclose(found[row], expected, atol=0.02)  # half precision, padded to whole windows
        np.testing.assert_allclose(encoded[row], expected, atol=0.02)


def test_a_night_of_ecg_does_not_outweigh_all_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("records.MAX_WINDOWS", 2)
    ecg = synthetic_ecg(sampling_rate=250, duration_s=40, noise_mv=0.02).ecg
    row = {"record_id": "a", "patient_id": "a", "signal": ecg.signal, "sampling_rate": 250}
    rows = datasets.Dataset.from_list([row | {"lead_names": list(ecg.lead_names)}])
    records = Records(rows, EcgMoeFeatureExtractor(), [])
    windows = EcgMoeFeatureExtractor().prepare(ecg.signal, 250, ecg.lead_names).windows
    assert len(windows) == 4
    found = records.__getitems__([0, 1])["signal"]["input_values"]
    for values, window in zip(found, (windows[0], windows[-1]), strict=True):
        np.testing.assert_allclose(values, window["input_values"], atol=0.01)


def test_windows_without_beats_count_as_they_do_in_prediction(tmp_path: Path) -> None:
    many = MultiTask.from_pretrained(save_tiny_model(tmp_path, ("age", "rr_interval")))
    beats = synthetic_ecg(sampling_rate=250, rate_bpm=100, noise_mv=0.01).ecg.signal
    wander = np.tile(0.2 * np.sin(2 * np.pi * 0.8 * np.arange(2500) / 250), (12, 1)).astype(np.float32)
    signals = np.concatenate([beats, wander], axis=1), wander, beats
    facts = {"patient_id": "a", "sampling_rate": 250, "lead_names": list(LEADS)}
    rows = datasets.Dataset.from_list([{"record_id": str(i), "signal": s, **facts} for i, s in enumerate(signals)])
    records = Records(rows, many.extractor, [])
    assert records.has_rr.tolist() == [True, False, False, True]
    logits, cpu = predict_adapters(many, records), torch.device("cpu")
    for i, answers in enumerate(many.answer([many.prepare(signal, 250, LEADS) for signal in signals])):
        card = many.cards["age"]
        assert card.answer(logits["age"][i], 12)["value"] == pytest.approx(answers["age"]["value"], abs=0.1)
        if i != 1:
            value = many.cards["rr_interval"].answer(logits["rr_interval"][i], 12)["value"]
            assert value == pytest.approx(answers["rr_interval"]["value"], abs=0.1)
    joint = predict_logits(many.model, records, cpu)["rr_interval"]
    encoded = predict_logits(many.model, EncodedRecords(many.model, records, cpu), cpu)["rr_interval"]
    np.testing.assert_allclose(joint[0], joint[2], atol=1e-4)
    np.testing.assert_allclose(joint, encoded, atol=0.02)
    assert np.isfinite(joint).all()
    errors = prior_errors_of(records)
    assert errors[0] == pytest.approx(errors[2])
    assert errors[1] > 2000


# One command


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with one adapter beside it."""
    return save_tiny_model(tmp_path_factory.mktemp("hub"), tasks=("age",))


def words(own: Path, hub: Path, **changes: Any) -> list[str]:
    values = {
        "csv": own / "labels.csv", "patient_column": "patient", "split_column": "split", "cache_dir": own / "cache",
        "num_proc": 1, "model": hub, "output_dir": hub.parent / "adapters",
        "epochs": 1, "min_steps": 3, "batch_size": 8,
    }  # fmt: skip
    merged = {name: value for name, value in (values | changes).items() if value is not None}
    return [word for name, value in merged.items() for word in (f"--{name}", str(value))]


def run_program(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Python in a process of its own."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


@pytest.fixture(scope="module")
def adapted(own: Path, hub: Path) -> tuple[Path, str]:
    """The model with adapters for `ef` and `grade` that the program made in a process of its own, and what it said."""
    return hub, run_program("train.py", "adapt", "--task", "ef", "grade", *words(own, hub)).stderr


def test_the_program_says_what_it_takes_the_labels_for_and_what_it_leaves_out(adapted: tuple[Path, str]) -> None:
    _, said = adapted
    assert "task ef: regression, by what the column holds, --kind says otherwise; mean" in said
    assert "task grade: multi_class, by what the column holds, --kind says otherwise; labels mild, none" in said
    assert "labels.csv, train: 2 of 15 files cannot be read and are left out" in said
    assert "train: 1 of 13 recordings are left out:\n  flat.npz: all leads are flat" in said
    assert "task ef, train: 1 of 12 recordings have no label and do not count" in said


def test_a_small_table_is_passed_until_enough_steps_are_done(adapted: tuple[Path, str]) -> None:
    # 12 recordings are one batch of 8: three steps are three passes, and the metric is taken before and after each.
    (course,) = re.findall(r"grade: macro_auroc on validation by epoch \[(.*?)\]", adapted[1])
    assert len(course.split(",")) == 4


def test_the_adapter_says_all_that_its_answers_need(adapted: tuple[Path, str]) -> None:
    hub, _ = adapted
    folder = hub.parent / "adapters"
    ef, grade = AdapterCard.load(folder / "ef"), AdapterCard.load(folder / "grade")
    known = [40.5 + n for n in range(24) if n // 2 % 4 in (0, 2) and n != 4]
    assert ef.task.center == pytest.approx(np.mean([*known, 40.5]), rel=1e-5)  # the flat one has a label too
    assert set(ef.half_widths) == {"12", "6", "1"}
    assert ef.trained_on == (
        "labels.csv (train 11 labelled recordings of 6 patients, validation 6 labelled recordings of 3 patients; "
        "split by a column of the table)"
    )
    assert set(grade.metrics) == {
        "validation_macro_auroc", "low", "high", "validation_accuracy", "accuracy_low", "accuracy_high",
    }  # fmt: skip
    assert grade.temperature != 1.0
    page = (folder / "grade" / "README.md").read_text()
    assert "| severe |" in page
    assert "- accuracy: " in page


def test_what_is_saved_names_neither_this_machine_nor_its_files(adapted: tuple[Path, str], own: Path) -> None:
    hub, _ = adapted
    for path in (hub.parent / "adapters" / "grade").iterdir():
        for trace in (str(own), str(hub.parent), str(ROOT), str(Path.home())):
            assert trace.encode() not in path.read_bytes(), f"{path.name} holds {trace}"


def test_another_process_answers_the_new_tasks(adapted: tuple[Path, str], own: Path, tmp_path: Path) -> None:
    hub, _ = adapted
    asked = [own / "r1.npz", "--model", hub, "--table", "--out", tmp_path / "out.csv"]
    done = run_program("-m", "modeling_ecgmoe.cli", "predict", *map(str, asked))
    (row,) = csv.DictReader((tmp_path / "out.csv").open(newline=""))
    probabilities = {label: float(row[f"grade_{label}"]) for label in ("mild", "none", "severe")}
    assert sum(probabilities.values()) == pytest.approx(1.0, abs=2e-4)
    assert row["grade"] == max(probabilities, key=lambda label: probabilities[label])
    assert float(row["ef_low"]) < float(row["ef"]) < float(row["ef_high"])
    assert f"grade  {row['grade']} {probabilities[row['grade']]:.2f}" in done.stdout


def test_every_door_gives_the_same_answers(
    adapted: tuple[Path, str],
    own: Path,
    tmp_path: Path,
    app: Any,  # noqa: F811
) -> None:
    hub, _ = adapted
    path, folder, out = own / "wfdb" / "r0.hea", hub.parent / "adapters", tmp_path / "out.jsonl"
    main(["predict", str(path), "--model", str(hub), "--tasks", str(folder / "grade"), "--out", str(out), "--quiet"])
    line = json.loads(out.read_text())
    assert list(line["tasks"]) == ["grade"]
    grade, many = line["tasks"]["grade"], MultiTask.from_pretrained(hub)
    assert pipeline("ecg-analysis", model=str(hub), adapters=folder)(str(path))["tasks"]["grade"] == grade
    assert f"<b>{grade['labels'][0]}</b>" in app.answers_html(line["tasks"], many)

    ecg, card = read_ecg(path), many.cards["grade"]
    features = many.extractor(ecg.signal, ecg.sampling_rate, ecg.lead_names, return_tensors="pt")
    features.pop("quality")
    base = EcgMoeForTasks.from_pretrained(hub)
    base.add_task(card.task)
    alone = PeftModel.from_pretrained(base, str(folder / "grade"), adapter_name="grade").eval()
    with torch.no_grad():
        logits = alone(**features, tasks=["grade"]).logits["grade"][0]
    expected = torch.softmax(logits / card.temperature, dim=-1)
    np.testing.assert_allclose(list(grade["probabilities"].values()), expected, atol=2e-4)


def test_an_adapter_is_evaluated_on_the_test_split_of_the_table(
    adapted: tuple[Path, str], own: Path, tmp_path: Path
) -> None:
    hub, _ = adapted
    options: Row = dict.fromkeys(("output_dir", "epochs", "min_steps", "batch_size"))
    options |= {"split": "test", "out": tmp_path / "r.json", "resamples": 20}
    train.main(["evaluate", "--task", "ef", *words(own, hub, **options)])
    result = json.loads((tmp_path / "r.json").read_text())["ef"]
    assert (result["metric"], result["n"]) == ("mae", 6)


@pytest.mark.parametrize(
    ("task", "changes", "message"),
    [
        ("weight", {}, "has no column 'weight'; its columns are path, patient, split, ef, grade; pass --label_column"),
        ("ef", {"kind": "binary"}, "a binary task has two labels, and the column 'ef' holds"),
        ("age", {"kind": "binary", "label_column": "ef"}, "task age is a regression, and --kind says binary"),
        ("sex", {}, "has no column 'sex'; its columns are path, patient, split, ef, grade; pass --label_column"),
        ("my-task", {"label_column": "ef"}, "letters, digits and underscores, found 'my-task'"),
        ("ef", {"csv": None, "label_column": "ef"}, "--label_column names the labels of one --task in a --csv"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_it_is(
    own: Path, hub: Path, mini_ptb_xl: Path, task: str, changes: dict[str, Any], message: str
) -> None:
    changes = changes | ({"data_dir": mini_ptb_xl} if "csv" in changes else {})
    with pytest.raises(ValueError, match=message):
        train.main(["adapt", "--task", task, *words(own, hub, **changes)])


def test_a_split_that_cannot_tell_good_from_bad_is_refused(own: Path, hub: Path, tmp_path: Path) -> None:
    rows = [dict(row) for row in csv.DictReader((own / "labels.csv").open(newline=""))]
    for row in rows:
        row["low"] = "no" if row["split"] == "val" else ("no", "yes")[int(row["patient"][-1] in "048")]
    write_table(tmp_path / "labels.csv", rows)
    with pytest.raises(
        ValueError, match="the validation split has no label that some recordings have and others lack"
    ):
        train.main(["adapt", "--task", "low", *words(own, hub, csv=tmp_path / "labels.csv", data_dir=own)])


def test_a_known_task_reads_a_column_of_the_table(own: Path) -> None:
    data, arguments = DataArguments(csv=str(own / "labels.csv")), AdaptArguments(task=["age"], label_column="ef")
    task = find_known_task("age", data, arguments)
    assert task == replace(TASKS["age"], column="ef")


@pytest.mark.parametrize(
    ("columns", "words_of_it"),
    [
        ({}, "split by recording; the table names no patients, so one may be in two splits"),
        ({"patient_column": "patient"}, "of 6 patients, validation"),
    ],
)
def test_the_card_says_whether_patients_were_kept_apart(own: Path, columns: dict[str, str], words_of_it: str) -> None:
    records = Records(rows_of(own), EcgMoeFeatureExtractor(), [EF])
    data = DataArguments(csv=str(own / "labels.csv"), **columns)
    assert words_of_it in describe_data(EF, data, {"train": records, "validation": records})
