"""The builders on synthetic data in the real layout, and on real data where there is some; the synthetic data."""

import ast
import csv
import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import datasets
import numpy as np
import pytest
import wfdb
from sleepecg.heartbeats import detect_heartbeats

from data_builders.ptb_xl import PtbXl
from data_builders.rr_consensus import add_rr_interval, agreed_beats, reaches_edges, rr_interval_ms
from data_builders.schema import ecg_features
from data_builders.splits import check_no_patient_crosses, split_of_patient
from data_builders.synthetic import RHYTHMS, SyntheticEcg, synthetic_ecg, write_examples
from modeling_ecgmoe.ecg_files import find_ecgs, read_ecg
from modeling_ecgmoe.leads import LEADS
from modeling_ecgmoe.tasks import DIAGNOSTIC_STATEMENTS, FORM_STATEMENTS, RHYTHM_STATEMENTS, STATEMENTS, TASKS

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(autouse=True)
def no_progress_bars() -> Iterator[None]:
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


def build(folder: Path, cache: Path, config: str = "100hz", num_proc: int | None = None) -> datasets.DatasetDict:
    builder = PtbXl(config_name=config, data_dir=folder, cache_dir=str(cache))
    builder.download_and_prepare(num_proc=num_proc)
    return builder.as_dataset()


@pytest.fixture(scope="module")
def mini(mini_ptb_xl: Path, tmp_path_factory: pytest.TempPathFactory) -> datasets.DatasetDict:
    return build(mini_ptb_xl, tmp_path_factory.mktemp("cache"))


@pytest.fixture
def copy_of_mini(mini_ptb_xl: Path, tmp_path: Path) -> Path:
    """A miniature PTB-XL that a test may spoil."""
    return Path(shutil.copytree(mini_ptb_xl, tmp_path / "ptb-xl"))


def row_of(dataset: datasets.DatasetDict, ecg_id: int) -> dict[str, object]:
    for split in dataset.values():
        ids = list(split["ecg_id"])
        if ecg_id in ids:
            return split[ids.index(ecg_id)]
    raise KeyError(ecg_id)


# PTB-XL


def test_the_official_folds_are_the_splits(mini: datasets.DatasetDict) -> None:
    assert {name: set(split["fold"]) for name, split in mini.items()} == {
        "train": set(range(1, 9)),
        "validation": {9},
        "test": {10},
    }
    assert {name: len(split) for name, split in mini.items()} == {"train": 32, "validation": 4, "test": 4}


def test_no_patient_of_ptb_xl_crosses_the_splits(mini: datasets.DatasetDict) -> None:
    patients = {name: list(split["patient_id"]) for name, split in mini.items()}
    check_no_patient_crosses(patients)
    assert sorted(set().union(*patients.values()))[0] == "1000"


@pytest.mark.parametrize(("config", "suffix", "num_samples"), [("100hz", "lr", 1000), ("500hz", "hr", 5000)])
def test_both_rates_hold_the_millivolts_of_their_files(
    mini_ptb_xl: Path, tmp_path: Path, config: str, suffix: str, num_samples: int
) -> None:
    dataset = build(mini_ptb_xl, tmp_path, config)["train"].with_format("numpy")
    row = dataset[1]
    path = mini_ptb_xl / f"records{config.removesuffix('hz')}/00000/00002_{suffix}"
    assert row["record_id"] == path.name
    assert row["signal"].shape == (12, num_samples)
    assert row["signal"].dtype == np.float32
    np.testing.assert_allclose(row["signal"], wfdb.rdrecord(str(path)).p_signal.T, atol=1e-6)
    assert row["sampling_rate"] == num_samples / 10
    assert tuple(row["lead_names"]) == LEADS


def test_statements_become_the_columns_that_the_tasks_read(mini: datasets.DatasetDict) -> None:
    row = row_of(mini, 2)
    assert row["statements"] == ["IMI", "CLBBB", "SBRAD"]
    assert row["scp_codes"][0] == {"code": "IMI", "likelihood": 50.0}  # type: ignore[index]
    assert row["superclass"] == ["MI", "CD"]
    assert row["arrhythmia"] == ["SBRAD"]
    assert row_of(mini, 4)["superclass"] is None  # PACE is not diagnostic
    assert row_of(mini, 3)["arrhythmia"] is None  # LVH and PVC say nothing about rhythm
    assert row_of(mini, 4)["quality"] == ["static_noise"]
    assert row_of(mini, 4)["static_noise"] == "I-V1"
    assert row_of(mini, 2)["quality"] == []


def test_unknown_and_hidden_ages_are_null(mini: datasets.DatasetDict) -> None:
    assert (row_of(mini, 1)["age"], row_of(mini, 1)["age_over_89"]) == (20.0, False)
    assert (row_of(mini, 3)["age"], row_of(mini, 3)["age_over_89"]) == (None, True)  # 300 in the table
    assert (row_of(mini, 5)["age"], row_of(mini, 5)["age_over_89"]) == (None, False)


def test_sex_is_male_where_the_table_says_zero(mini: datasets.DatasetDict) -> None:
    assert mini["train"].features["sex"].int2str(row_of(mini, 1)["sex"]) == "male"
    assert mini["train"].features["sex"].int2str(row_of(mini, 3)["sex"]) == "female"


@pytest.mark.parametrize("task", ["age", "sex", "arrhythmia", "statements", "superclass", "quality"])
def test_every_task_finds_its_truth(mini: datasets.DatasetDict, task: str) -> None:
    targets = TASKS[task].targets(mini["train"][TASKS[task].column][:])
    assert targets.shape == (32, TASKS[task].num_outputs)
    assert np.isfinite(targets).any(axis=1).sum() >= 24


def test_two_processes_build_the_same_rows(mini: datasets.DatasetDict, mini_ptb_xl: Path, tmp_path: Path) -> None:
    parallel = build(mini_ptb_xl, tmp_path, num_proc=2)
    for name, split in mini.items():
        assert parallel[name].to_list() == split.to_list()


def test_rows_can_be_streamed(mini: datasets.DatasetDict, mini_ptb_xl: Path, tmp_path: Path) -> None:
    stream = PtbXl(data_dir=mini_ptb_xl, cache_dir=str(tmp_path)).as_streaming_dataset("validation")
    assert [row["record_id"] for row in stream] == list(mini["validation"]["record_id"])


def test_a_fold_without_files_is_left_out_and_logged(
    copy_of_mini: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with (copy_of_mini / "ptbxl_database.csv").open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            if row["strat_fold"] == "10":
                for suffix in (".hea", ".dat"):
                    (copy_of_mini / f"{row['filename_lr']}{suffix}").unlink()
    with caplog.at_level(logging.WARNING):
        dataset = build(copy_of_mini, tmp_path)
    assert set(dataset) == {"train", "validation"}
    assert "test: none of its records is there; the split is left out" in caplog.text


def test_missing_and_broken_records_are_skipped_counted_and_named(
    copy_of_mini: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = copy_of_mini / "records100" / "00000"
    (folder / "00001_lr.dat").unlink()
    (folder / "00002_lr.dat").write_bytes((folder / "00002_lr.dat").read_bytes()[:6000])
    (folder / "00003_lr.hea").write_text("gone\n")
    with caplog.at_level(logging.WARNING):
        dataset = build(copy_of_mini, tmp_path)
    assert len(dataset["train"]) == 29
    assert "1 of 32 records have no files" in caplog.text
    assert "2 broken records are skipped" in caplog.text
    assert "00002_lr: the header promises 1000 samples a lead, '00002_lr.dat' holds 250" in caplog.text
    assert "00003_lr" in caplog.text


def test_a_completed_download_is_not_hidden_by_an_older_build(copy_of_mini: Path, tmp_path: Path) -> None:
    signal_file = copy_of_mini / "records100" / "00000" / "00001_lr.dat"
    content = signal_file.read_bytes()
    signal_file.unlink()
    assert len(build(copy_of_mini, tmp_path)["train"]) == 31
    signal_file.write_bytes(content)
    assert len(build(copy_of_mini, tmp_path)["train"]) == 32


@pytest.mark.parametrize("lost", ["ptbxl_database.csv", "scp_statements.csv", "records100"])
def test_a_half_downloaded_copy_says_what_is_missing_and_where_to_get_it(
    copy_of_mini: Path, tmp_path: Path, lost: str
) -> None:
    (copy_of_mini / lost).rename(copy_of_mini / "elsewhere")
    with pytest.raises(FileNotFoundError, match=rf"(?s){lost}.*10\.13026/kfzx-aw45.*wget"):
        build(copy_of_mini, tmp_path)


def test_a_table_that_breaks_off_is_refused(copy_of_mini: Path, tmp_path: Path) -> None:
    table = copy_of_mini / "ptbxl_database.csv"
    table.write_bytes(table.read_bytes()[:-40])
    with pytest.raises(ValueError, match="breaks off in its last line"):
        build(copy_of_mini, tmp_path)


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [("patient_id", "1018.0", "1 patients are in split"), ("filename_lr", "../../secret", "outside")],
)
def test_a_table_that_must_not_be_believed_is_refused(
    copy_of_mini: Path, tmp_path: Path, column: str, value: str, message: str
) -> None:
    table = copy_of_mini / "ptbxl_database.csv"
    with table.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    rows[0][column] = value  # patient 1018 is in fold 9, the first row in fold 1
    with table.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    with pytest.raises(ValueError, match=message):
        build(copy_of_mini, tmp_path)


def test_a_missing_folder_is_asked_for(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"(?s)no folder.*nowhere.*10\.13026/kfzx-aw45.*wget"):
        build(tmp_path / "nowhere", tmp_path)


def test_the_facts_of_the_data_set_travel_with_it(mini: datasets.DatasetDict) -> None:
    info = mini["train"].info
    assert info.license == "CC BY 4.0"
    assert "10.13026/kfzx-aw45" in info.citation
    assert "21,799" in info.description


# Real PTB-XL


def test_real_ptb_xl_builds_with_the_labels_of_its_table(test_data: Path, tmp_path: Path) -> None:
    source = test_data / "ptb-xl"
    folder = tmp_path / "ptb-xl"
    (folder / "records100").mkdir(parents=True)
    (folder / "records100" / "00000").symlink_to(source / "records100" / "00000")
    for name in ("ptbxl_database.csv", "scp_statements.csv"):
        shutil.copy(source / name, folder)
    dataset = build(folder, tmp_path / "cache")
    with (folder / "ptbxl_database.csv").open(encoding="utf-8", newline="") as file:
        table = {int(row["ecg_id"]): row for row in csv.DictReader(file) if "/00000/" in row["filename_lr"]}
    present = {i: row for i, row in table.items() if (folder / f"{row['filename_lr']}.dat").exists()}
    rows = {row["ecg_id"]: row for split in dataset.values() for row in split.remove_columns("signal")}
    assert rows.keys() == present.keys()
    for ecg_id, row in rows.items():
        codes = ast.literal_eval(present[ecg_id]["scp_codes"])
        assert {code["code"]: code["likelihood"] for code in row["scp_codes"]} == codes
        assert set(row["arrhythmia"] or []) == {code for code in codes if code in RHYTHM_STATEMENTS}
        assert row["fold"] == int(present[ecg_id]["strat_fold"])
    first = next(iter(dataset.values())).with_format("numpy")[0]
    oracle = wfdb.rdrecord(str(folder / "records100" / "00000" / first["record_id"]))
    np.testing.assert_allclose(first["signal"], oracle.p_signal.T, atol=1e-6)


def test_the_task_table_agrees_with_ptb_xls_own_statements(test_data: Path) -> None:
    with (test_data / "ptb-xl" / "scp_statements.csv").open(encoding="utf-8", newline="") as file:
        table = {row[""]: row for row in csv.DictReader(file)}
    assert {s.code for s in STATEMENTS} == set(table)
    for group, codes in (
        ("diagnostic", DIAGNOSTIC_STATEMENTS), ("form", FORM_STATEMENTS), ("rhythm", RHYTHM_STATEMENTS),
    ):  # fmt: skip
        assert set(codes) == {code for code, row in table.items() if row[group]}
    assert {s.code: s.superclass for s in STATEMENTS} == {c: row["diagnostic_class"] for c, row in table.items()}


# The shared row and the splits


def test_a_column_that_all_builders_share_cannot_be_redefined() -> None:
    with pytest.raises(ValueError, match="age"):
        ecg_features((12, 1000), age=datasets.Value("string"))


def test_records_of_different_length_fit_the_shared_row() -> None:
    features = ecg_features(None)
    rows = [
        {"record_id": str(n), "signal": np.full((2, n), 0.5, np.float32), "lead_names": ["I", "II"]}
        for n in (300, 450)
    ]
    dataset = datasets.Dataset.from_list(
        [dict.fromkeys(features) | row for row in rows], features=features
    ).with_format("numpy")
    assert [row["signal"].shape for row in dataset] == [(2, 300), (2, 450)]
    assert dataset[0]["signal"].dtype == np.float32


def test_a_patients_split_depends_on_nothing_but_the_patient() -> None:
    fractions = {"train": 0.8, "validation": 0.1, "test": 0.1}
    splits = [split_of_patient(str(i), fractions) for i in range(5000)]
    assert splits == [split_of_patient(str(i), fractions) for i in range(5000)]
    for name, fraction in fractions.items():
        # Four standard deviations of a binomial of 5000.
        assert abs(splits.count(name) / 5000 - fraction) < 4 * (fraction * (1 - fraction) / 5000) ** 0.5
    assert splits != [split_of_patient(str(i), fractions, seed=1) for i in range(5000)]


def test_shares_that_do_not_add_up_are_refused() -> None:
    with pytest.raises(ValueError, match="add up to 1"):
        split_of_patient("p", {"train": 0.8, "test": 0.1})


def test_a_patient_in_two_splits_is_named() -> None:
    with pytest.raises(ValueError, match="'test' and in 'train', among them b"):
        check_no_patient_crosses({"train": ["a", "b", "b"], "test": ["c", "b"]})


# RR intervals by consensus


def test_a_regular_rhythm_gives_its_interval() -> None:
    ecg = synthetic_ecg(rate_bpm=75, sampling_rate=100, noise_mv=0.01).ecg
    assert rr_interval_ms(ecg.signal, 100, LEADS) == pytest.approx(800, abs=2)


@pytest.mark.parametrize("lead", ["V1", "aVR", "II"])
def test_one_lead_is_enough(lead: str) -> None:
    ecg = synthetic_ecg(rate_bpm=60, sampling_rate=250, noise_mv=0.01).ecg
    assert rr_interval_ms(ecg.signal[[LEADS.index(lead)]], 250, [lead]) == pytest.approx(1000, abs=3)


def test_padding_at_the_edges_changes_nothing() -> None:
    signal = synthetic_ecg(rate_bpm=75, sampling_rate=100, noise_mv=0.01).ecg.signal
    padded = np.pad(signal, ((0, 0), (300, 200)), constant_values=np.nan)
    assert rr_interval_ms(padded, 100, LEADS) == rr_interval_ms(signal, 100, LEADS)


@pytest.mark.parametrize("kind", ["flat", "noise", "missing"])
def test_no_heart_beat_gives_no_interval(kind: str) -> None:
    signal = {
        "flat": np.zeros((12, 1000)),
        "noise": np.random.default_rng(0).normal(0, 0.1, (12, 1000)),
        "missing": np.full((12, 1000), np.nan),
    }[kind]
    assert np.isnan(rr_interval_ms(signal.astype(np.float32), 100, LEADS))


def test_detectors_agree_where_they_find_the_same_beats() -> None:
    beats = np.arange(0.5, 10, 0.8)
    np.testing.assert_allclose(agreed_beats(beats, beats + 0.02), beats + 0.01)


def test_a_beat_that_one_detector_misses_at_the_edge_does_no_harm() -> None:
    beats = np.arange(0.5, 10, 0.8)
    np.testing.assert_allclose(agreed_beats(beats[1:], beats[:-1]), beats[1:-1])


@pytest.mark.parametrize("spoilt", ["missed", "added", "shifted", "too few"])
def test_detectors_disagree_where_their_beats_differ(spoilt: str) -> None:
    beats = np.arange(0.5, 10, 0.8)
    other = {
        "missed": np.delete(beats, 5),
        "added": np.sort(np.append(beats, 4.9)),
        "shifted": beats + 0.3,
        "too few": beats[:2],
    }[spoilt]
    assert agreed_beats(beats, other).size == 0
    assert agreed_beats(other, beats).size == 0


def test_an_irregular_rhythm_must_reach_the_edges() -> None:
    regular, irregular = np.arange(1.3, 9, 0.8), np.cumsum([1.3, 0.5, 1.1, 0.6, 1.2, 0.5, 1.1, 0.7, 0.9, 0.6])
    assert reaches_edges(regular, 10)
    assert not reaches_edges(irregular, 10)
    assert reaches_edges(irregular - 1.0, 8.5)


def test_blocked_p_waves_are_not_counted_as_beats() -> None:
    # Every second beat's QRS and T removed: P waves as large as small QRS complexes remain, as in 2:1 block.
    whole = synthetic_ecg(rate_bpm=80, sampling_rate=100)
    signal = whole.ecg.signal.copy()
    for beat_s in whole.r_peaks_s[1::2]:
        around = slice(round((beat_s - 0.08) * 100), round((beat_s + 0.5) * 100))
        signal[:, around] = 0.0
        center = round((beat_s - 0.16) * 100)
        signal[:, center - 8 : center + 9] += 0.35 * np.hanning(17).astype(np.float32)
    interval = rr_interval_ms(signal, 100, LEADS)
    assert np.isnan(interval) or interval == pytest.approx(1500, abs=10)


def test_the_column_holds_null_where_the_detectors_disagree(
    copy_of_mini: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (copy_of_mini / "records100" / "00000" / "00001_lr.dat").write_bytes(bytes(24_000))  # a flat line
    with caplog.at_level(logging.INFO):
        with_interval = add_rr_interval(build(copy_of_mini, tmp_path)["train"])
    intervals = with_interval["rr_interval_ms"][:]
    assert intervals[0] is None
    assert f"disagree on {intervals.count(None)} of 32 records" in caplog.text
    assert intervals[1] == pytest.approx(60_000 / 48, abs=5)
    assert with_interval.features["rr_interval_ms"].dtype == "float32"
    assert np.isnan(TASKS["rr_interval"].targets(intervals)[0, 0])


def test_intervals_agree_with_the_beats_that_cardiologists_marked(test_data: Path) -> None:
    errors = []
    for record in ("100", "106", "119", "231"):
        path = test_data / "mit-bih-arrhythmia-database-1.0.0" / f"{record}.hea"
        ecg = read_ecg(path)
        marks = wfdb.rdann(str(path.with_suffix("")), "atr")
        is_beat = np.isin(marks.symbol, list("NLRAVaJSFejE"))
        beats_s = marks.sample[is_beat] / ecg.sampling_rate
        for start_s in range(0, 300, 20):
            window = ecg.signal[:, start_s * 360 : (start_s + 10) * 360]
            interval = rr_interval_ms(window, 360, ecg.lead_names)
            inside = beats_s[(beats_s >= start_s) & (beats_s < start_s + 10)]
            errors.append(interval - np.diff(inside).mean() * 1000)
    assert np.isfinite(errors).mean() > 0.7
    assert np.nanmedian(np.abs(errors)) < 3
    assert np.nanmax(np.abs(errors)) < 100


# Synthetic ECGs


def test_75_beats_a_minute_are_0_8_seconds_apart() -> None:
    truth = synthetic_ecg(rate_bpm=75)
    np.testing.assert_allclose(np.diff(truth.r_peaks_s), 0.8)
    assert truth.rr_interval_ms == pytest.approx(800)
    np.testing.assert_allclose(truth.r_peaks_s[:2], [0.4, 1.2])


@pytest.mark.parametrize("rhythm", RHYTHMS)
def test_an_independent_detector_finds_the_true_beats(rhythm: str) -> None:
    truth = synthetic_ecg(rate_bpm=80, rhythm=rhythm, noise_mv=0.01, wander_mv=0.05, variation=0.1, duration_s=30)
    found_s = detect_heartbeats(truth.ecg.signal[1].astype(np.float64), 500) / 500
    inner = truth.r_peaks_s[(truth.r_peaks_s > 1) & (truth.r_peaks_s < 29)]
    distances = np.abs(found_s[None, :] - inner[:, None]).min(axis=1)
    assert distances.max() < 0.1  # of a paced beat, the detector finds the stimulus, 70 ms before the R peak


def test_the_limb_leads_obey_einthoven_and_goldberger() -> None:
    i, ii, iii, avr, avl, avf = synthetic_ecg(noise_mv=0.02, wander_mv=0.1, variation=0.2).ecg.signal[:6]
    np.testing.assert_allclose(i + iii, ii, atol=1e-5)
    np.testing.assert_allclose(avr + avl + avf, 0, atol=1e-5)
    np.testing.assert_allclose(avf, (ii + iii) / 2, atol=1e-5)


def test_the_same_seed_is_the_same_heart_at_every_sampling_rate() -> None:
    slow, fast = (
        synthetic_ecg(rhythm="atrial_fibrillation", sampling_rate=rate, wander_mv=0.1, variation=0.1, seed=5)
        for rate in (100, 1000)
    )
    np.testing.assert_allclose(slow.ecg.signal, fast.ecg.signal[:, ::10], atol=1e-5)
    np.testing.assert_array_equal(slow.r_peaks_s, fast.r_peaks_s)


def test_fibrillation_is_irregular_and_has_no_p_waves() -> None:
    sinus, fibrillation = (synthetic_ecg(rhythm=rhythm, duration_s=60) for rhythm in ("sinus", "atrial_fibrillation"))

    def p_wave_mv(truth: SyntheticEcg) -> float:
        peaks = np.round((truth.r_peaks_s[2:-2] - 0.16) * 500).astype(int)
        return float(np.mean([truth.ecg.signal[1, p - 15 : p + 16].mean() for p in peaks]))

    assert np.diff(sinus.r_peaks_s).std() < 1e-9
    assert np.diff(fibrillation.r_peaks_s).std() > 0.1
    assert p_wave_mv(sinus) > 0.06
    assert abs(p_wave_mv(fibrillation)) < 0.03


def test_premature_beats_come_early_and_the_pause_makes_up_for_it() -> None:
    truth = synthetic_ecg(rate_bpm=60, premature_every=4, duration_s=20)
    early = np.flatnonzero(truth.is_ventricular[:-1])
    assert len(early) >= 3
    intervals = np.diff(truth.r_peaks_s)
    np.testing.assert_allclose(intervals[early - 1], 0.6)
    np.testing.assert_allclose(intervals[early - 1] + intervals[early], 2.0)


def test_flat_leads_are_flat_and_the_others_are_not() -> None:
    signal = synthetic_ecg(flat_leads=["V3", "avl"], noise_mv=0.01).ecg.signal
    assert [LEADS[i] for i in np.flatnonzero(np.ptp(signal, axis=1) == 0)] == ["aVL", "V3"]


@pytest.mark.parametrize("bad", [{"rhythm": "tango"}, {"rate_bpm": 0}, {"sampling_rate": -1}, {"duration_s": 0}])
def test_impossible_hearts_are_refused(bad: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"known are sinus|must be positive"):
        synthetic_ecg(**bad)  # type: ignore[arg-type]


def test_the_bundled_examples_are_what_the_generator_writes(tmp_path: Path) -> None:
    fresh = write_examples(tmp_path)
    assert sorted(path.name for path in fresh) == [path.name for path in find_ecgs([EXAMPLES])]
    for path in fresh:
        # One step of the converter: mathematical functions may round differently on another machine.
        np.testing.assert_allclose(read_ecg(EXAMPLES / path.name).signal, read_ecg(path).signal, atol=0.00101)


def test_records_written_with_the_fixture_are_found(
    write_record: Callable[..., tuple[Path, SyntheticEcg]],
) -> None:
    path, truth = write_record(rate_bpm=100)
    assert rr_interval_ms(read_ecg(path).signal, 250, LEADS) == pytest.approx(truth.rr_interval_ms, abs=3)
