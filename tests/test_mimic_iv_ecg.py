"""MIMIC-IV-ECG as a data set: its rows, its configurations, what is refused, and training on them."""

import http.server
import json
import logging
import shutil
import threading
from collections.abc import Iterator
from datetime import datetime
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import wfdb
from mini_mimic import MIMIC_LEADS, MimicEcg, lab, write_ecg_tables, write_hosp, write_mini_mimic, write_recordings
from test_mimic_labels import ecgs_around, plain_labels
from tiny_model import save_tiny_model

import train
from data_builders.mimic_iv_ecg import SPLIT_SHARES, MimicIvEcg
from data_builders.mimic_labels import PotassiumRule
from data_builders.schema import SEXES
from data_builders.splits import check_no_patient_crosses, split_of_patient
from modeling_ecgmoe.adapters import MultiTask
from modeling_ecgmoe.prediction import predict_records
from modeling_ecgmoe.tasks import TASKS, Task
from records import DataArguments, load_split


@pytest.fixture(autouse=True, scope="module")
def no_progress_bars() -> Iterator[None]:
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


@pytest.fixture(scope="module")
def mini_mimic(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """`data_dir` and `clinical_dir` of 40 patients; do not write into them."""
    return write_mini_mimic(tmp_path_factory.mktemp("mimic"))


def build(config: str, cache: Path, num_proc: int | None = None, **options: Any) -> datasets.DatasetDict:
    builder = MimicIvEcg(config_name=config, cache_dir=str(cache), **options)
    builder.download_and_prepare(num_proc=num_proc)
    return builder.as_dataset()


@pytest.fixture(scope="module")
def rows(mini_mimic: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> datasets.DatasetDict:
    data_dir, clinical_dir = mini_mimic
    return build("all", tmp_path_factory.mktemp("cache"), data_dir=data_dir, clinical_dir=clinical_dir)


def by_id(rows: datasets.DatasetDict) -> dict[str, dict[str, Any]]:
    return {row["record_id"]: row for split in rows.values() for row in split.remove_columns("signal")}


# Rows


def test_every_recording_is_a_row_in_the_split_of_its_patient(rows: datasets.DatasetDict) -> None:
    found = by_id(rows)
    assert len(found) == 80
    check_no_patient_crosses({name: list(split["patient_id"]) for name, split in rows.items()})
    for name, split in rows.items():
        assert {split_of_patient(patient, SPLIT_SHARES) for patient in split["patient_id"]} == {name}


def test_signals_are_the_millivolts_of_the_files_under_the_files_lead_names(
    rows: datasets.DatasetDict, mini_mimic: tuple[Path, Path]
) -> None:
    row = rows["train"].with_format("numpy")[0]
    patient, study = str(row["patient_id"]), str(row["record_id"])
    path = mini_mimic[0] / "files" / f"p{patient[:4]}" / f"p{patient}" / f"s{study}" / study
    assert row["signal"].shape == (12, 5000)
    np.testing.assert_allclose(row["signal"], wfdb.rdrecord(str(path)).p_signal.T, atol=1e-6)
    assert tuple(row["lead_names"]) == MIMIC_LEADS  # aVF before aVL
    assert row["sampling_rate"] == 500


def test_a_row_says_what_machine_laboratory_and_hospital_know(rows: datasets.DatasetDict) -> None:
    row = by_id(rows)["40000004"]  # the first ECG of the third patient
    expected = {
        "patient_id": "10000003",
        "age": 44.0,
        "age_over_89": False,
        "sex": 0,
        "recording_date": datetime(2150, 5, 20, 8),
        "report": "Sinus bradycardia with 1st degree A-V block\nAbnormal ECG",
        "report_class": "other",
        "report_classes": ["sinus bradycardia"],
        "arrhythmia": ["SBRAD"],
        "rr_interval_ms": 1250.0,
        "p_onset_ms": 40.0,
        "p_end_ms": None,
        "qrs_axis_deg": 30.0,
        "cart_id": "6848296",
        "hadm_id": 60_000_004,
        "potassium": ["hyperkalaemia"],
        "potassium_mmol_l": pytest.approx(6.4),
        "potassium_distance_min": -10.0,
        "potassium_specimen": "serum",
        "potassium_hemolysed": False,
    }
    assert {name: row[name] for name in expected} == expected


def test_what_is_not_known_is_null(rows: datasets.DatasetDict) -> None:
    row = by_id(rows)["40000019"]  # the second ECG of the tenth patient, who is over 89
    assert (row["age"], row["age_over_89"]) == (None, True)
    for name in ("rr_interval_ms", "hadm_id", "potassium", "potassium_mmol_l", "potassium_distance_min"):
        assert row[name] is None, name
    assert row["report_class"] == "atrial fibrillation"


@pytest.mark.parametrize("name", ["age", "sex", "rr_interval", "arrhythmia", "potassium"])
def test_every_task_finds_its_truth(rows: datasets.DatasetDict, name: str) -> None:
    task = TASKS[name]
    targets = task.targets(rows["train"][task.column][:])
    assert np.isfinite(targets).any(axis=0).all() or name == "arrhythmia"
    assert np.isfinite(targets).any()


def test_potassium_becomes_two_outputs(rows: datasets.DatasetDict) -> None:
    found = by_id(rows)
    columns = [found[f"4000000{n}"]["potassium"] for n in (0, 2, 4, 1)]
    np.testing.assert_array_equal(TASKS["potassium"].targets(columns), [[1, 0], [0, 0], [0, 1], [np.nan, np.nan]])


def test_the_classes_of_the_report_train_from_a_task_file(rows: datasets.DatasetDict) -> None:
    task = Task.from_json_file(Path(__file__).parents[1] / "benchmarks/configs/task_report_class.json")
    targets = task.targets(rows["train"][task.column][:])
    assert (targets.sum(axis=1) == 1).all()


# Configurations


def test_the_labelled_configuration_leaves_out_the_rest(mini_mimic: tuple[Path, Path], tmp_path: Path) -> None:
    data_dir, clinical_dir = mini_mimic
    found = by_id(build("potassium", tmp_path, data_dir=data_dir, clinical_dir=clinical_dir, num_proc=2))
    assert len(found) == 40
    assert all(row["potassium"] is not None for row in found.values())


def test_the_rule_of_potassium_is_an_argument(mini_mimic: tuple[Path, Path], tmp_path: Path) -> None:
    data_dir, clinical_dir = mini_mimic
    near = build("all", tmp_path, data_dir=data_dir, clinical_dir=clinical_dir / "hosp", max_distance_min=9)
    assert {row["potassium"] is None for row in by_id(near).values()} == {True}
    strict = build("potassium", tmp_path, data_dir=data_dir, clinical_dir=clinical_dir, low_mmol_l=2.5, high_mmol_l=7)
    assert {tuple(row["potassium"]) for row in by_id(strict).values()} == {()}


def test_without_clinical_tables_their_columns_are_null_and_it_is_said(
    mini_mimic: tuple[Path, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    builder = MimicIvEcg(data_dir=mini_mimic[0], cache_dir=str(tmp_path))
    with caplog.at_level(logging.WARNING):
        builder.download_and_prepare()
    assert "Without clinical_dir, age, sex, admission and potassium are null." in caplog.text
    assert "Without clinical_dir" in builder.info.description
    for row in by_id(builder.as_dataset()).values():
        assert (row["age"], row["sex"], row["hadm_id"], row["potassium"]) == (None, None, None, None)
        assert row["report_class"] is not None


def test_the_description_says_how_many_got_labels(mini_mimic: tuple[Path, Path], tmp_path: Path) -> None:
    data_dir, clinical_dir = mini_mimic
    builder = MimicIvEcg(data_dir=data_dir, clinical_dir=clinical_dir, cache_dir=str(tmp_path))
    builder.download_and_prepare()
    for part in ("40 with a potassium value", "14 of these with hypokalaemia", "13 of these with hyperkalaemia"):
        assert part in builder.info.description
    assert "40 without a valid RR interval" in builder.info.description


def test_some_of_the_folders_can_be_read_alone(mini_mimic: tuple[Path, Path], tmp_path: Path) -> None:
    data_dir = mini_mimic[0]
    assert len(by_id(build("all", tmp_path, data_dir=data_dir, folders=("p1000",)))) == 80
    with pytest.raises(FileNotFoundError, match="holds none of the"):
        build("all", tmp_path, data_dir=data_dir, folders=("p1001",))


def test_rows_stream(mini_mimic: tuple[Path, Path], tmp_path: Path) -> None:
    data_dir, clinical_dir = mini_mimic
    builder = MimicIvEcg(
        config_name="potassium", data_dir=data_dir, clinical_dir=clinical_dir, cache_dir=str(tmp_path)
    )
    row = next(iter(builder.as_streaming_dataset("train")))
    assert row["potassium"] is not None
    assert np.shape(row["signal"]) == (12, 5000)


# Copies that are not whole, and caches


def test_missing_and_broken_records_are_left_out_and_named(mini_mimic: tuple[Path, Path], tmp_path: Path) -> None:
    data_dir = Path(shutil.copytree(mini_mimic[0], tmp_path / "ecg"))
    (data_dir / "files/p1000/p10000001/s40000000/40000000.dat").unlink()
    (data_dir / "files/p1000/p10000002/s40000002/40000002.dat").write_bytes(b"short")
    ecg = MimicEcg(10_000_003, 40_000_004, datetime(2150, 1, 1), heart={"rate_bpm": 60, "duration_s": 8})
    write_recordings(data_dir, [ecg])
    builder = MimicIvEcg(data_dir=data_dir, cache_dir=str(tmp_path / "cache"))
    builder.download_and_prepare()
    assert len(by_id(builder.as_dataset())) == 77
    reasons = {record.record_id: record.reason for record in builder.skipped_records()}
    assert reasons["40000000"] == "its files are missing"
    assert "40000002" in reasons
    assert "expected shape (12, 5000) at 500 Hz, found (12, 4000)" in reasons["40000004"]


@pytest.mark.parametrize("changed", ["recording", "laboratory"])
def test_a_changed_copy_is_built_anew(mini_mimic: tuple[Path, Path], tmp_path: Path, changed: str) -> None:
    data_dir = Path(shutil.copytree(mini_mimic[0], tmp_path / "ecg"))
    clinical_dir = Path(shutil.copytree(mini_mimic[1], tmp_path / "clinical"))

    def cache() -> str:
        return MimicIvEcg(data_dir=data_dir, clinical_dir=clinical_dir, cache_dir=str(tmp_path / "c")).cache_dir

    before = cache()
    assert cache() == before
    if changed == "recording":
        (data_dir / "files/p1000/p10000001/s40000000/40000000.dat").unlink()
    else:
        write_hosp(clinical_dir / "hosp", [lab(10_000_001, datetime(2150, 3, 1, 8), 5.1)], [])
    assert cache() != before


def test_a_folder_without_the_tables_is_refused_with_the_way_out(tmp_path: Path) -> None:
    (tmp_path / "files").mkdir()
    with pytest.raises(FileNotFoundError, match=r"(?s)no record_list\.csv and no machine_measurements\.csv: .*wget"):
        build("all", tmp_path / "cache", data_dir=tmp_path)


def test_labelled_records_need_the_clinical_tables(mini_mimic: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="configuration potassium needs clinical_dir"):
        build("potassium", tmp_path, data_dir=mini_mimic[0])


def test_its_access_says_that_rows_are_not_to_be_passed_on() -> None:
    assert MimicIvEcg.FACTS.is_open
    assert MimicIvEcg.FACTS.access != "open"
    assert "--user" not in MimicIvEcg.FACTS.how_to_get


def test_the_whole_set_is_not_downloaded_by_accident(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"90 GB in 1\.6 million files; pass some of its folders"):
        build("all", tmp_path)


def test_a_folder_of_the_open_set_is_downloaded(
    mini_mimic: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)  # 127.0.0.1 is no network
    site = tmp_path / "site" / "files" / "mimic-iv-ecg" / "1.0"
    shutil.copytree(mini_mimic[0], site)
    shutil.copytree(site / "files/p1000/p10000001", site / "files/p1001/p10010001")
    listed = sorted(path.relative_to(site) for path in site.rglob("*") if path.is_file())
    sums = [f"{sha256((site / name).read_bytes()).hexdigest()} {name}\n" for name in listed]
    (site / "SHA256SUMS.txt").write_text("".join(sums))
    handler = partial(QuietHandler, directory=str(tmp_path / "site"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            url = f"http://127.0.0.1:{server.server_port}"
            found = by_id(build("all", tmp_path / "cache", base_url=url, folders=("p1000",)))
        finally:
            server.shutdown()
    assert len(found) == 80
    assert not list((tmp_path / "cache").rglob("p1001"))


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args: Any) -> None:
        pass


# Real laboratory values


def test_recordings_around_real_values_get_them(test_data: Path, tmp_path: Path) -> None:
    hosp = test_data / "mimic-iv-clinical-database-demo-2.2" / "hosp"
    if not hosp.is_dir():
        pytest.skip(f"{hosp.parent.name} (open, PhysioNet) is not in ECGMOE_TEST_DATA")
    ecgs = ecgs_around(hosp, every=150)
    write_ecg_tables(tmp_path / "ecg", ecgs)
    write_recordings(tmp_path / "ecg", ecgs)
    found = by_id(build("all", tmp_path / "cache", data_dir=tmp_path / "ecg", clinical_dir=hosp.parent))
    assert len(found) == len(ecgs) == 23
    for ecg, plain in zip(ecgs, plain_labels(hosp, ecgs, PotassiumRule()), strict=True):
        row = found[str(ecg.study_id)]
        plain["sex"] = SEXES.index(plain["sex"])
        assert {name: row[name] for name in plain} == pytest.approx(plain)


# Training


@pytest.fixture(scope="module")
def adapted(mini_mimic: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model and a potassium adapter after a step on synthetic hearts."""
    folder = tmp_path_factory.mktemp("train")
    data_dir, clinical_dir = mini_mimic
    save_tiny_model(folder, ())
    words = {
        "task": "potassium", "model": folder / "model", "output_dir": folder / "adapters", "data_dir": data_dir,
        "clinical_dir": clinical_dir, "dataset": "mimic_iv_ecg", "config_name": "potassium", "num_proc": 1,
        "cache_dir": folder / "cache", "max_steps": 1, "batch_size": 16, "evidence": "simulated",
        "trained_on": "synthetic ECGs in the layout of MIMIC-IV-ECG",
    }  # fmt: skip
    train.main(["adapt", *(word for name, value in words.items() for word in (f"--{name}", str(value)))])
    return folder


def test_a_potassium_adapter_trains_and_says_that_its_ecgs_were_simulated(
    adapted: Path, mini_mimic: tuple[Path, Path]
) -> None:
    many = MultiTask.from_pretrained(adapted / "model")
    card = many.cards["potassium"]
    assert (card.evidence, card.task.labels) == ("simulated", ("hypokalaemia", "hyperkalaemia"))
    assert json.loads((adapted / "adapters/potassium/task.json").read_text())["evidence"] == "simulated"
    path = mini_mimic[0] / "files/p1000/p10000001/s40000000/40000000.hea"
    (record,) = predict_records(many, [path])
    answer = record["tasks"]["potassium"]
    assert answer["evidence"] == "simulated"
    assert set(answer["probabilities"]) == {"hypokalaemia", "hyperkalaemia"}


def test_no_path_of_this_machine_is_saved_with_the_adapter(adapted: Path, mini_mimic: tuple[Path, Path]) -> None:
    text = (adapted / "adapters/potassium/training.json").read_text()
    assert str(mini_mimic[1]) not in text
    assert str(adapted) not in text


def test_training_takes_the_interval_of_the_electrocardiograph(mini_mimic: tuple[Path, Path], tmp_path: Path) -> None:
    values = DataArguments(
        data_dir=str(mini_mimic[0]),
        dataset="mimic_iv_ecg",
        config_name="all",
        cache_dir=str(tmp_path),
        num_proc=1,
        builder_options='{"folders": ["p1000"]}',
    )
    assert set(load_split(values, "train")["rr_interval_ms"]) == {545.0, 800.0, 1250.0, None}


@pytest.mark.parametrize("options", ["[1]", '"x"'])
def test_builder_options_must_be_an_object(options: str) -> None:
    with pytest.raises(ValueError, match="builder_options must be a JSON object"):
        load_split(DataArguments(dataset="mimic_iv_ecg", builder_options=options), "train")
