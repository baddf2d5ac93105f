"""What goes wrong in a table of one's own: files listed twice, files that cannot be read, cells that are slips."""

import csv
import io
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from tiny_model import save_tiny_model

import train
from checkpoints import save_arguments
from data_builders.csv_table import _record_of, read_table
from data_builders.synthetic import synthetic_ecg, write_wfdb
from modeling_ecgmoe.adapter_card import AdapterCard
from modeling_ecgmoe.cli import main
from modeling_ecgmoe.feature_extraction_ecgmoe import EcgMoeFeatureExtractor
from modeling_ecgmoe.publish import _first_page
from modeling_ecgmoe.tasks import Task
from records import DataArguments, Records, load_split

EF = Task("ef", "regression", "ejection fraction", "ef")
Row = dict[str, Any]


@pytest.fixture(autouse=True, scope="module")
def no_progress_bars() -> Iterator[None]:
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with sixteen recordings, r0.npz to r15.npz, and one that cannot be read, broken.npz."""
    folder = tmp_path_factory.mktemp("files")
    for number in range(16):
        ecg = synthetic_ecg(sampling_rate=250, duration_s=4, noise_mv=0.01, seed=number).ecg
        facts = {"sampling_rate": ecg.sampling_rate, "lead_names": list(ecg.lead_names[:2]), "unit": "mV"}
        np.savez(folder / f"r{number}.npz", signal=ecg.signal[:2], **facts)
    (folder / "broken.npz").write_bytes(b"PK")
    return folder


def table_of(folder: Path, rows: list[Row]) -> Path:
    path = folder / "labels.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return path


def data_of(files: Path, folder: Path, rows: list[Row], **changes: Any) -> DataArguments:
    values = {"csv": str(table_of(folder, rows)), "data_dir": str(files), "cache_dir": str(folder / "cache")}
    return DataArguments(**values | {"num_proc": 1, "split_column": "split"} | changes)


def row(number: int, ef: object = 55, split: str = "train", **changes: Any) -> Row:
    return {"path": f"r{number}.npz", "split": split, "ef": ef} | changes


def words(data: DataArguments, folder: Path, **more: Any) -> list[str]:
    own = {name: getattr(data, name) for name in ("csv", "data_dir", "cache_dir", "num_proc", "split_column")}
    return [word for name, value in (own | more).items() for word in (f"--{name}", str(value))]


# A file in several rows


@pytest.mark.parametrize("spelling", ["r1.npz", "./r1.npz", "x/../r1.npz"])
def test_a_file_in_two_rows_is_one_recording_and_said_so(
    files: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, spelling: str
) -> None:
    rows = [row(0, 50), row(1, "61.0"), row(2, 40), row(1, 61, path=spelling)]
    found = load_split(data_of(files, tmp_path, rows), "train")
    assert found["record_id"][:] == ["r0", "r1", "r2"]
    assert Records(found, EcgMoeFeatureExtractor(), [EF]).labels["ef"].tolist() == [[50.0], [61.0], [40.0]]
    assert "labels.csv, train: 1 of 3 files are in several rows and used once:\n  rows 2, 4 (r1.npz)" in caplog.text


def test_a_header_and_its_signals_in_mat_are_one_recording(tmp_path: Path) -> None:
    header = write_wfdb(synthetic_ecg(sampling_rate=250).ecg, tmp_path, "m1")
    signals = header.with_suffix(".dat").rename(tmp_path / "m1.mat")
    header.write_text(header.read_text().replace("m1.dat", "m1.mat"))
    assert _record_of(header) == _record_of(signals) == _record_of(tmp_path / "m1")
    assert _record_of(tmp_path / "other.mat") != _record_of(tmp_path / "other")


def test_a_row_without_a_file_is_named_where_the_table_lies_in_the_working_folder(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("r1.npz").symlink_to(files / "r1.npz")
    Path("labels.csv").write_text("path,ef,split\n,55,train\nr1.npz,60,train\n")
    options = DataArguments(csv="labels.csv", split_column="split", cache_dir=str(tmp_path / "cache"), num_proc=1)
    assert load_split(options, "train")["record_id"][:] == ["r1"]
    assert "row 1 names no file" in caplog.text


def test_rows_of_one_file_that_know_different_columns_are_joined(files: Path, tmp_path: Path) -> None:
    rows = [row(1, "", grade="mild"), row(1, 61, grade="n/a"), row(2, 40, grade="none")]
    found = load_split(data_of(files, tmp_path, rows), "train")
    assert found["table"][0] == {"path": "r1.npz", "split": "train", "ef": "61", "grade": "mild"}


def test_a_file_with_two_labels_is_refused_with_both_rows(files: Path, tmp_path: Path) -> None:
    rows = load_split(
        data_of(files, tmp_path, [row(0, 50, seen="1"), row(1, 61, seen="2"), row(1, 16, seen="3")]), "train"
    )
    with pytest.raises(
        ValueError, match=r"task ef: rows 2 and 3 name one file, r1.npz, and hold '61' and '16' in the column 'ef'"
    ):
        Records(rows, EcgMoeFeatureExtractor(), [EF])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"split": "val"}, "rows 1 and 3 name one file, r0.npz, and hold 'train' and 'val' in the column 'split'"),
        ({"patient": "b"}, "rows 1 and 3 name one file, r0.npz, and hold 'a' and 'b' in the column 'patient'"),
    ],
)
def test_a_file_in_two_splits_or_of_two_patients_is_refused(
    files: Path, tmp_path: Path, changes: Row, message: str
) -> None:
    rows = [row(0, patient="a"), row(1, patient="b"), row(0, patient="a") | changes]
    with pytest.raises(ValueError, match=message):
        load_split(data_of(files, tmp_path, rows, patient_column="patient"), "train")


def test_blank_rows_at_the_end_are_no_rows(tmp_path: Path) -> None:
    (tmp_path / "labels.csv").write_text("path,ef\nr0.npz,55\n,\nr1.npz,60\n,\n  ,\n")
    assert [row["ef"] for row in read_table(tmp_path / "labels.csv", {})] == ["55", "", "60"]


def test_a_table_of_a_spreadsheet_may_have_columns_without_names_and_blanks_around_them(tmp_path: Path) -> None:
    (tmp_path / "labels.csv").write_text("path; ef ;;\nr0.npz;55;;\n")
    assert read_table(tmp_path / "labels.csv", {"label_column": "ef"}) == [{"path": "r0.npz", "ef": "55"}]
    (tmp_path / "empty.csv").write_bytes(b"")
    with pytest.raises(ValueError, match=r"empty\.csv has no rows; mend the table"):
        read_table(tmp_path / "empty.csv", {})


def test_two_spellings_of_a_split_are_one(files: Path, tmp_path: Path) -> None:
    rows = load_split(data_of(files, tmp_path, [row(0), row(0, split="Training")]), "train")
    assert len(rows) == 1


# Training


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("hub"), tasks=())


def own_rows(ef: object = 57) -> list[Row]:
    """Eight recordings to learn from, four to calibrate and four to test on; the fourth value is given."""
    rows = [row(n, 50.5 + n, "train" if n < 8 else "val" if n < 12 else "test") for n in range(16)]
    rows[3]["ef"] = ef
    return [*rows, row(0, split="test", path="broken.npz")]


@pytest.fixture(scope="module")
def adapted(files: Path, hub: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of an adapter for `ef`, and what was said while it was made."""
    folder = tmp_path_factory.mktemp("adapted")
    data, heard = data_of(files, folder, own_rows()), logging.StreamHandler(text := io.StringIO())
    logging.getLogger().addHandler(heard)
    try:
        more = {"task": "ef", "model": hub, "output_dir": folder / "adapters", "max_steps": 1, "batch_size": 4}
        train.main(["adapt", *words(data, folder, **more)])
    finally:
        logging.getLogger().removeHandler(heard)
    return folder / "adapters" / "ef", text.getvalue()


def test_files_of_the_test_split_that_cannot_be_read_are_named_in_training(adapted: tuple[Path, str]) -> None:
    assert adapted[1].count("labels.csv, test: 1 of 5 files cannot be read and are left out:\n  broken.npz: ") == 1


def test_an_adapter_says_that_it_was_trained_on_the_table(
    adapted: tuple[Path, str], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = adapted
    training = json.loads((folder / "training.json").read_text())
    assert (training["dataset"], training["csv"]) == (None, "labels.csv")
    assert AdapterCard.load(folder).trained_on.startswith("labels.csv (train 8 labelled recordings, validation 4 ")
    assert main(["publish", "adapter", str(folder), "--repo_id", "me/ef", "--dry_run"]) == 0
    page = capsys.readouterr().out
    assert "ptb" not in page.lower()
    assert "type: custom" in page
    assert "Trained on labels.csv (train 8 labelled recordings" in page


def test_a_model_says_which_table_it_was_trained_on(tmp_path: Path, hub: Path) -> None:
    (tmp_path / "config.json").write_bytes((hub / "config.json").read_bytes())
    soft = train.TrainingArguments(soft_labels=str(tmp_path / "soft.safetensors"))
    save_arguments(tmp_path, DataArguments(csv=str(tmp_path / "labels.csv")), soft)
    assert "- Trained on: labels.csv; `training.json` holds the arguments." in _first_page(tmp_path)
    assert str(tmp_path) not in (tmp_path / "training.json").read_text()


@pytest.mark.parametrize("more", [{}, {"kind": "regression"}])
def test_a_slip_in_a_column_of_numbers_is_named_before_training(
    files: Path, hub: Path, tmp_path: Path, more: dict[str, str]
) -> None:
    data = data_of(files, tmp_path, own_rows(ef="5o"))
    with pytest.raises(ValueError, match=r"column 'ef' holds .*'5o' in row 4 \(r3.npz\).*; empty a cell whose"):
        train.main(["adapt", *words(data, tmp_path, task="ef", model=hub, output_dir=tmp_path, **more)])


@pytest.mark.parametrize(
    ("task", "lowest", "message"),
    [
        ("age", 150.0, r"age is in years, around 60; half .* below 153\.5\. Convert them"),
        ("rr_interval", 70.0, r"rr_interval is in ms, around 850; half .* below 73\.5\. Convert them"),
    ],
)
def test_a_known_task_does_not_learn_from_numbers_of_another_unit(
    files: Path, hub: Path, tmp_path: Path, task: str, lowest: float, message: str
) -> None:
    data = data_of(files, tmp_path, [values | {"ef": lowest + n} for n, values in enumerate(own_rows())])
    with pytest.raises(ValueError, match=message):
        train.main(["adapt", *words(data, tmp_path, task=task, label_column="ef", model=hub, output_dir=tmp_path)])


def test_a_data_set_without_the_split_is_refused_with_those_it_has(mini_ptb_xl: Path, tmp_path: Path) -> None:
    data = DataArguments(data_dir=str(mini_ptb_xl), cache_dir=str(tmp_path), num_proc=1)
    with pytest.raises(ValueError, match="ptb_xl has no split 'dev' here; there are train, validation, test"):
        load_split(data, "dev")


def test_an_evaluation_of_nothing_is_refused(
    files: Path, adapted: tuple[Path, str], hub: Path, tmp_path: Path
) -> None:
    rows = [{"path": r["path"], "split": r["split"], "lvef": r["ef"]} for r in own_rows()]
    data = data_of(files, tmp_path, rows)
    more = {"model": hub, "split": "test", "task": adapted[0]}
    with pytest.raises(ValueError, match="none of the tasks ef can be evaluated on these data; see above why"):
        train.main(["evaluate", *words(data, tmp_path, **more)])


def test_what_is_for_public_sets_is_refused_beside_a_table() -> None:
    with pytest.raises(ValueError, match=r"--csv is a table of your own, and --dataset, --config_name for a public"):
        DataArguments(csv="labels.csv", dataset="mitdb", config_name="100hz")
