"""The builders of all sets: each on a miniature in its publisher's layout, and on real records."""

import logging
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import wfdb

from data_builders import BUILDERS, find_builder
from data_builders.cinc2021 import DIAGNOSES, SOURCES, find_source
from data_builders.code15 import without_padding
from data_builders.ecg_builder import find_headers
from data_builders.mitdb import DS1, DS2, PACED
from data_builders.ptb_xl import PtbXl, describe, read_records, read_statement_groups
from data_builders.signal_view import SignalView
from data_builders.splits import check_no_patient_crosses
from modeling_ecgmoe.ecg_files import EcgFileError
from modeling_ecgmoe.tasks import RHYTHM_STATEMENTS, TASKS
from tests.mini_sets import write_cinc2017, write_cinc2021, write_code15, write_ludb, write_mitdb

WRITERS: dict[str, Callable[[Path], Path]] = {
    "cinc2021": write_cinc2021,
    "cinc2017": write_cinc2017,
    "mitdb": write_mitdb,
    "ludb": write_ludb,
    "code15": write_code15,
}
REAL = {
    "cinc2021": ("challenge-2021", 35),
    "cinc2017": ("training2017", 200),
    "mitdb": ("mit-bih-arrhythmia-database-1.0.0", 24 * 180),
    "ludb": ("ludb", 20),
}


@pytest.fixture(autouse=True)
def no_progress_bars() -> Iterator[None]:
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


def build(name: str, folder: Path, cache: Path, num_proc: int | None = None, **options: Any) -> datasets.DatasetDict:
    builder = find_builder(name)(data_dir=folder, cache_dir=str(cache), **options)
    builder.download_and_prepare(num_proc=num_proc)
    return builder.as_dataset()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The miniatures. Do not write into them."""
    return {name: write(tmp_path_factory.mktemp(name) / "data") for name, write in WRITERS.items()}


@pytest.fixture(scope="module")
def built(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, datasets.DatasetDict]:
    cache = tmp_path_factory.mktemp("cache")
    return {name: build(name, folder, cache) for name, folder in folders.items()}


@pytest.fixture(scope="module")
def real_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where real records are built once for all tests."""
    return tmp_path_factory.mktemp("real")


def rows_of(dataset: datasets.DatasetDict) -> dict[str, dict[str, Any]]:
    return {row["record_id"]: row | {"split": name} for name, split in dataset.items() for row in split}


# All builders


def test_every_builder_of_the_list_is_there_under_its_name() -> None:
    assert {find_builder(name).__module__ for name in BUILDERS} == {f"data_builders.{name}" for name in BUILDERS}


@pytest.mark.parametrize("name", BUILDERS)
def test_every_builder_states_its_facts(name: str) -> None:
    facts = find_builder(name).FACTS
    assert re.fullmatch(r"10\.\d{4,5}/\S+", facts.doi)
    assert facts.homepage in facts.how_to_get
    assert facts.citation.startswith("@")
    assert facts.license.startswith(("CC BY", "ODC-By", "PhysioNet", "ODbL"))


@pytest.mark.parametrize("name", WRITERS)
def test_no_patient_is_in_two_splits(built: dict[str, datasets.DatasetDict], name: str) -> None:
    patients = {split: list(rows["patient_id"]) for split, rows in built[name].items()}
    assert len(patients) > 1
    assert None not in set().union(*patients.values())
    check_no_patient_crosses(patients)


@pytest.mark.parametrize("name", WRITERS)
def test_rows_have_the_shared_columns_and_millivolts(built: dict[str, datasets.DatasetDict], name: str) -> None:
    for split in built[name].with_format("numpy").values():
        for row in split.select(range(min(20, len(split)))):
            assert row["signal"].dtype == np.float32
            assert row["signal"].shape[0] == len(row["lead_names"])
            assert 0.2 < np.nanmax(np.nanmax(row["signal"], axis=1) - np.nanmin(row["signal"], axis=1)) < 20


@pytest.mark.parametrize("name", WRITERS)
def test_the_tasks_that_a_set_has_find_their_truth(built: dict[str, datasets.DatasetDict], name: str) -> None:
    train = built[name]["train"]
    tasks = [task for task in TASKS.values() if task.column in train.column_names]
    assert {"age", "sex", "arrhythmia"} <= {task.name for task in tasks}
    for task in tasks:
        assert task.targets(train[task.column][:]).shape == (len(train), task.num_outputs)


@pytest.mark.parametrize("name", ["cinc2021", "code15"])
def test_two_processes_build_the_same_rows(
    built: dict[str, datasets.DatasetDict], folders: dict[str, Path], tmp_path: Path, name: str
) -> None:
    parallel = build(name, folders[name], tmp_path, num_proc=2)
    for split, rows in built[name].items():
        assert parallel[split].remove_columns("signal").to_list() == rows.remove_columns("signal").to_list()
        for one, other in zip(parallel[split].with_format("numpy"), rows.with_format("numpy"), strict=True):
            np.testing.assert_array_equal(one["signal"], other["signal"])


@pytest.mark.parametrize("name", WRITERS)
def test_a_missing_or_empty_folder_says_what_was_expected_and_where_to_get_it(name: str, tmp_path: Path) -> None:
    facts = find_builder(name).FACTS
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "nowhere", tmp_path / "empty"):
        with pytest.raises(FileNotFoundError, match=rf"(?s){folder}.*{re.escape(facts.doi)}.*(wget|zenodo_get)"):
            build(name, folder, tmp_path / "cache")


def test_what_is_missing_and_what_is_broken_can_be_asked_for_after_the_build(tmp_path: Path) -> None:
    folder = write_cinc2017(tmp_path / "data", with_validation=False)
    records = folder / "training" / "A00"
    (records / "A00001.mat").unlink()
    (records / "A00003.mat").write_bytes((records / "A00003.mat").read_bytes()[:500])
    for num_proc in (None, 2):
        builder = find_builder("cinc2017")(data_dir=folder, cache_dir=str(tmp_path / f"cache{num_proc}"))
        builder.download_and_prepare(num_proc=num_proc)
        again = find_builder("cinc2017")(data_dir=folder, cache_dir=str(tmp_path / f"cache{num_proc}"))
        again.download_and_prepare()
        for one in (builder, again):
            missing, broken = one.skipped_records()
            assert (missing.record_id, missing.split, missing.reason) == ("A00001", "train", "its files are missing")
            assert broken.record_id == "A00003"
            assert "it is cut off" in broken.reason
            assert "left out were 1 records whose files are missing and 1 broken ones" in one.info.description
            assert one.as_dataset("train").num_rows == 4


def test_a_folder_of_broken_records_only_is_refused(tmp_path: Path) -> None:
    folder = write_cinc2017(tmp_path / "data", with_validation=False)
    for path in folder.rglob("*.hea"):
        path.write_text("gone\n")
    with pytest.raises(ValueError, match=r"(?s)not one record .* is sound.*10\.13026/d3hm-sf11"):
        build("cinc2017", folder, tmp_path / "cache")


@pytest.mark.parametrize("name", REAL)
def test_real_records_build(test_data: Path, real_cache: Path, name: str) -> None:
    folder, num_rows = REAL[name]
    dataset = build(name, test_data / folder, real_cache)
    assert sum(len(rows) for rows in dataset.values()) == num_rows
    check_no_patient_crosses({split: list(rows["patient_id"]) for split, rows in dataset.items()})


# PTB-XL, whose other tests are in test_data_builders.py


def test_folds_1_to_9_have_the_official_numbers_of_records_and_labels(test_data: Path, tmp_path: Path) -> None:
    folder = test_data / "ptb-xl"
    rows = read_records(folder)
    if {row["strat_fold"] for row in rows} != {str(fold) for fold in range(1, 10)}:
        pytest.skip("the table in ECGMOE_TEST_DATA does not hold folds 1 to 9")
    groups = read_statement_groups(folder)
    counts = Counter(name for row in rows for name in describe(row, groups)["superclass"] or ())
    assert len(rows) == 21_799 - 2_198
    # PhysioNet's totals less those of fold 10.
    assert counts == {
        "NORM": 9_514 - 963, "MI": 5_469 - 550, "STTC": 5_235 - 521, "CD": 4_898 - 496, "HYP": 2_649 - 262,
    }  # fmt: skip
    entries = PtbXl(data_dir=folder, cache_dir=str(tmp_path)).list_records(folder)
    assert Counter(entry.split for entry in entries) == {"train": 17_418, "validation": 2_183}


# CinC 2021


def test_a_record_belongs_to_the_source_that_its_name_begins_like() -> None:
    names = ("A0001", "Q3581", "I0001", "S0549", "HR21837", "E10344", "JS10646", "JS10647")
    assert [find_source(name) for name in names] == list(SOURCES)
    assert [find_source(name) for name in ("X0001", "A", "JSx", "README")] == [None] * 4


def test_the_sources_add_up_to_the_official_number_of_records() -> None:
    assert find_builder("cinc2021").FACTS.records == 88_253


def test_the_table_of_diagnoses_has_those_of_the_challenge() -> None:
    assert Counter(row["scored"] for row in DIAGNOSES.values()) == {"yes": 30, "no": 103}
    assert DIAGNOSES["164889003"]["name"] == "atrial fibrillation"
    statements = {name for row in DIAGNOSES.values() for name in row["rhythm_statement"].split()}
    assert statements == set(RHYTHM_STATEMENTS) - {"SVARR"}


def test_header_comments_become_columns(built: dict[str, datasets.DatasetDict]) -> None:
    rows = rows_of(built["cinc2021"])
    first = rows["A0001"]
    assert (first["age"], first["sex"], first["source"]) == (74.0, 0, "cpsc2018")
    assert first["snomed_codes"] == ["59118001", "426783006"]
    assert first["abbreviations"] == ["RBBB", "NSR"]
    assert first["diagnoses"] == ["right bundle branch block", "sinus rhythm"]
    assert first["arrhythmia"] == ["SR"]
    assert first["medication"] is None
    other = rows["Q0001"]
    assert (other["age"], other["sex"], other["medication"]) == (None, 1, "Aspirin")
    assert other["diagnoses"] == ["atrial fibrillation", None]  # a code that the challenge does not list
    assert (rows["S0001"]["age"], rows["S0001"]["sex"], rows["S0001"]["arrhythmia"]) == (None, None, None)
    assert (rows["HR00001"]["age"], rows["HR00001"]["age_over_89"]) == (None, True)


def test_flutter_is_believed_in_all_sources_but_ningbo(built: dict[str, datasets.DatasetDict]) -> None:
    rows = rows_of(built["cinc2021"])
    assert rows["HR00001"]["arrhythmia"] == ["AFLT"]
    assert rows["JS10647"]["arrhythmia"] is None


def test_sources_with_several_records_a_patient_stay_together(built: dict[str, datasets.DatasetDict]) -> None:
    rows = rows_of(built["cinc2021"])
    assert {row["split"] for row in rows.values() if row["source"] in ("ptb", "ptb_xl", "st_petersburg")} == {"train"}
    assert {row["split"] for row in rows.values() if row["source"] == "georgia"} >= {"train", "test"}


@pytest.mark.parametrize("config", SOURCES)
def test_a_configuration_reads_its_source_alone(folders: dict[str, Path], tmp_path: Path, config: str) -> None:
    builder = find_builder("cinc2021")(config_name=config, data_dir=folders["cinc2021"], cache_dir=str(tmp_path))
    entries = builder.list_records(folders["cinc2021"])
    assert entries
    assert {find_source(entry.record_id) for entry in entries} == {config}


@pytest.mark.parametrize("record", ["E00001", "JS00001", "HR00001", "S0001", "A0001", "Q0001", "JS45542"])
def test_cinc2021_signals_are_those_of_wfdb(test_data: Path, tmp_path: Path, record: str) -> None:
    folder = test_data / "challenge-2021"
    builder = find_builder("cinc2021")(data_dir=folder, cache_dir=str(tmp_path))
    (entry,) = [entry for entry in builder.list_records(folder) if entry.record_id == record]
    (row,) = builder.read_record(entry)
    oracle = wfdb.rdrecord(str(folder / entry.files[0])[:-4])
    np.testing.assert_allclose(row["signal"], oracle.p_signal.T, atol=1e-6)
    assert list(row["lead_names"]) == oracle.sig_name
    assert f"Dx: {','.join(row['snomed_codes'])}" in oracle.comments


# CinC 2017


def test_the_newest_labels_are_read_and_the_validation_records_kept_apart(
    built: dict[str, datasets.DatasetDict],
) -> None:
    rows = rows_of(built["cinc2017"])
    assert {name: row["split"] for name, row in rows.items() if row["split"] != "train"} == {
        "A00002": "validation",
        "A00005": "validation",
    }
    assert len(rows) == 6
    assert rows["A00004"]["label_name"] == "too noisy"  # normal in the older table
    assert [rows[f"A0000{n}"]["arrhythmia"] for n in (1, 2, 3, 4)] == [["SR"], ["AFIB"], None, None]
    assert [len(rows[f"A0000{n}"]["signal"][0]) for n in (1, 2, 3)] == [2700, 3000, 3300]


def test_real_labels_of_cinc2017_are_all_there(test_data: Path, real_cache: Path) -> None:
    folder = test_data / "training2017"
    dataset = build("cinc2017", folder, real_cache)["train"]
    lines = (folder / "REFERENCE.csv").read_text().split()
    label_of = dict(line.split(",") for line in lines)
    names = dataset.features["label"].names
    assert {r["record_id"]: names[r["label"]] for r in dataset.remove_columns("signal")} == label_of
    row = dataset.with_format("numpy")[3]
    np.testing.assert_allclose(row["signal"], wfdb.rdrecord(str(folder / str(row["record_id"]))).p_signal.T, atol=1e-6)


# MIT-BIH


def test_the_division_of_de_chazal_holds_every_record_once() -> None:
    assert (len(DS1), len(DS2), len(PACED)) == (22, 22, 4)
    assert len({*DS1, *DS2, *PACED}) == 48


def test_the_two_records_of_one_patient_are_in_one_split_and_the_paced_apart(
    built: dict[str, datasets.DatasetDict],
) -> None:
    records = {split: set(rows["record"]) for split, rows in built["mitdb"].items()}
    assert records == {"train": {"201", "202"}, "test": {"100"}, "paced": {"102"}}
    assert {row["ds"] for row in built["mitdb"]["train"].remove_columns("signal")} == {"DS1", "DS2"}
    assert all(built["mitdb"]["paced"]["paced"])


def test_windows_carry_their_beats_and_the_rhythm_in_force(built: dict[str, datasets.DatasetDict]) -> None:
    rows = rows_of(built["mitdb"])
    assert len(built["mitdb"]["test"]) == 180
    first, second, third = (rows[f"100_{start:04d}s"] for start in (0, 10, 20))
    assert first["beat_samples"] == list(range(180, 3600, 360))
    assert first["beat_symbols"] == ["N", "N", "N", "V", "N", "N", "N", "N", "N", "N"]
    assert first["beat_classes"] == first["beat_symbols"]
    assert first["rhythms"] == [{"start_sample": 0, "rhythm": "(N"}, {"start_sample": 1801, "rhythm": "(B"}]
    assert second["rhythms"] == [{"start_sample": 0, "rhythm": "(B"}, {"start_sample": 1801, "rhythm": "(NOD"}]
    assert third["rhythms"] == [{"start_sample": 0, "rhythm": "(NOD"}]
    assert [row["arrhythmia"] for row in (first, second, third)] == [["SR", "BIGU"], ["BIGU"], None]
    assert first["rr_interval_ms"] == pytest.approx(1000.0)
    assert (first["age"], first["sex"], first["medication"]) == (69.0, 0, "Digoxin")
    assert (rows["201_0000s"]["age"], rows["201_0000s"]["sex"]) == (None, 1)
    assert list(first["lead_names"]) == ["MLII", "V1"]


def test_windows_and_whole_records_of_real_mitdb_hold_the_same_beats_and_millivolts(
    test_data: Path, tmp_path: Path
) -> None:
    folder = test_data / "mit-bih-arrhythmia-database-1.0.0"
    record = str(folder / "207")  # bundle branch block, flutter, idioventricular rhythm
    rows = {}
    for config in ("windows", "records"):
        builder = find_builder("mitdb")(config_name=config, data_dir=folder, cache_dir=str(tmp_path))
        (entry,) = [entry for entry in builder.list_records(folder) if entry.record_id == "207"]
        rows[config] = list(builder.read_record(entry))
    (whole,) = rows["records"]
    np.testing.assert_allclose(whole["signal"], wfdb.rdrecord(record).p_signal.T, atol=1e-6)
    oracle = wfdb.rdann(record, "atr")
    beats = [(int(s), t) for s, t in zip(oracle.sample, oracle.symbol, strict=True) if t in "NLRBAaJSVrFejnE/fQ?"]
    assert list(zip(whole["beat_samples"], whole["beat_symbols"], strict=True)) == beats
    inside = [
        (row["start_sample"] + s, t)
        for row in rows["windows"]
        for s, t in zip(row["beat_samples"], row["beat_symbols"], strict=True)
    ]
    assert inside == [beat for beat in beats if beat[0] < 180 * 3600]
    np.testing.assert_array_equal(
        np.hstack([row["signal"] for row in rows["windows"]]), whole["signal"][:, : 180 * 3600]
    )
    assert [rhythm["rhythm"] for rhythm in whole["rhythms"]] == [
        note.rstrip("\0") for symbol, note in zip(oracle.symbol, oracle.aux_note, strict=True) if symbol == "+"
    ]


# LUDB


def test_gains_that_are_no_calibration_are_seen_and_counts_read_as_microvolts(
    built: dict[str, datasets.DatasetDict], folders: dict[str, Path]
) -> None:
    rows = rows_of(built["ludb"])
    assert {name for name, row in rows.items() if row["amplitude_calibrated"]} == {"12"}
    for name in ("1", "12"):
        counts = wfdb.rdrecord(str(folders["ludb"] / "data" / name), physical=False).d_signal.T
        np.testing.assert_allclose(rows[name]["signal"], counts / 1000, atol=1e-6)


def test_real_ludb_obeys_einthoven_in_the_amplitude_that_is_read(test_data: Path, real_cache: Path) -> None:
    dataset = build("ludb", test_data / "ludb", real_cache).with_format("numpy")
    for rows in dataset.values():
        for row in rows:
            i, ii, iii = row["signal"][:3]
            np.testing.assert_allclose(i + iii, ii, atol=1e-5)
            assert not row["amplitude_calibrated"]


def test_waves_have_the_bounds_that_are_marked(built: dict[str, datasets.DatasetDict]) -> None:
    waves = rows_of(built["ludb"])["1"]["waves"]
    assert Counter(wave["lead"] for wave in waves) == dict.fromkeys(
        ("i", "ii", "iii", "avr", "avl", "avf", "v1", "v2", "v3", "v4", "v5", "v6"), 12
    )
    first, second = waves[:2]
    assert (first["wave"], second["wave"]) == ("QRS", "T")
    assert (first["peak"] - first["onset"], first["offset"] - first["peak"]) == (20, 20)
    assert waves[10]["offset"] is None  # the last QRS complex has no end
    assert rows_of(built["ludb"])["1"]["rr_interval_ms"] == pytest.approx(1000, abs=1)


def test_statements_of_the_table_become_lists(built: dict[str, datasets.DatasetDict]) -> None:
    rows = rows_of(built["ludb"])
    assert rows["1"]["hypertrophies"] == ["Left atrial hypertrophy", "Left ventricular hypertrophy"]
    assert [rows[name]["arrhythmia"] for name in ("1", "2", "4")] == [
        ["SARRH", "SBRAD"], ["AFIB"], ["SARRH", "SBRAD", "PACE"],
    ]  # fmt: skip
    assert (rows["3"]["age"], rows["3"]["age_over_89"]) == (None, True)
    assert (rows["1"]["age"], rows["1"]["sex"], rows["2"]["sex"]) == (21.0, 0, 1)


def test_real_wave_marks_of_ludb_are_all_there(test_data: Path, real_cache: Path) -> None:
    folder = test_data / "ludb"
    rows = rows_of(build("ludb", folder, real_cache))
    for name in ("5", "95"):  # in 95 some onsets are not marked
        for lead in ("ii", "v3"):
            oracle = wfdb.rdann(str(folder / "data" / name), lead)
            peaks = [int(s) for s, symbol in zip(oracle.sample, oracle.symbol, strict=True) if symbol in "pNt"]
            waves = [wave for wave in rows[name]["waves"] if wave["lead"] == lead]
            assert [wave["peak"] for wave in waves] == peaks
            assert sum(wave["onset"] is not None for wave in waves) == oracle.symbol.count("(")
            assert sum(wave["offset"] is not None for wave in waves) == oracle.symbol.count(")")


# CODE-15 %


def test_exams_find_their_place_and_padding_is_no_signal(built: dict[str, datasets.DatasetDict]) -> None:
    rows = rows_of(built["code15"])
    assert len(rows) == 24
    short, long = np.array(rows["1002"]["signal"]), np.array(rows["1003"]["signal"])
    assert (rows["1002"]["duration_s"], rows["1003"]["duration_s"]) == (7.0, 10.0)
    assert np.isfinite(short).all(axis=0).sum() == 2800
    assert np.flatnonzero(np.isfinite(short[0]))[0] == 648
    assert np.isfinite(long).all(axis=0).sum() == 4000
    assert rows["1001"]["arrhythmia"] == ["SBRAD"]
    assert rows["1002"]["arrhythmia"] == ["AFIB"]
    assert rows["1003"]["arrhythmia"] is None
    assert rows["1011"]["arrhythmia"] == ["SR"]
    assert (rows["1000"]["sex"], rows["1001"]["sex"], rows["1000"]["death"], rows["1001"]["death"]) == (
        0,
        1,
        False,
        None,
    )


def test_zeros_inside_a_signal_stay() -> None:
    signal = np.zeros((12, 20), np.float32)
    signal[:, 5] = signal[3, 15] = 1.0
    padded, num_samples = without_padding(signal)
    assert num_samples == 11
    assert np.flatnonzero(np.isfinite(padded[0])).tolist() == list(range(5, 16))
    with pytest.raises(EcgFileError, match="nothing but zeros"):
        without_padding(np.zeros((12, 20), np.float32))


def test_a_part_that_is_missing_or_cut_off_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = write_code15(tmp_path / "data")
    part = folder / "exams_part1.hdf5"
    content = part.read_bytes()
    part.unlink()
    with caplog.at_level(logging.WARNING):
        dataset = build("code15", folder, tmp_path / "cache")
    assert sum(len(rows) for rows in dataset.values()) == 12
    assert "records have no files" in caplog.text
    part.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"exams_part1\.hdf5 is no whole HDF5 file"):
        build("code15", folder, tmp_path / "cache")


# The records of a folder, and random access


def test_headers_are_found_at_any_depth(folders: dict[str, Path]) -> None:
    stems = find_headers(folders["cinc2021"])
    assert "JS10646" in stems
    assert "training/cpsc_2018/g1/A0001" in stems


def test_a_view_gives_the_signals_of_shuffled_rows(built: dict[str, datasets.DatasetDict]) -> None:
    rows = built["mitdb"]["train"].shuffle(seed=3).select(range(50))
    view, truth = SignalView(rows), rows.with_format("numpy")
    assert view.shape == (50, 2, 3600)
    np.testing.assert_array_equal(view[-1], truth[49]["signal"])
    np.testing.assert_array_equal(view[[7, 3, 3]], truth[[7, 3, 3]]["signal"])
    np.testing.assert_array_equal(view[10:13], truth[10:13]["signal"])
    with pytest.raises(IndexError):
        view[50]
    view[0][:] = 0.0  # a copy
    assert view[0].any()


def test_a_view_of_signals_of_different_length_is_refused(built: dict[str, datasets.DatasetDict]) -> None:
    with pytest.raises(ValueError, match="fixed shape"):
        SignalView(built["cinc2017"]["train"])
