"""The robustness card: each condition changes a recording as it says, and the figures are those of the project."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from mini_sets import write_cinc2017
from tiny_model import save_tiny_model

from benchmarks import robustness, single_lead_af
from benchmarks.plain_cnn import PlainCnn
from benchmarks.robustness import (
    CLEAN,
    CONDITIONS,
    NOISE_BANDS_HZ,
    NOISE_RATE_HZ,
    ChangedRecords,
    changes,
    draw_weights,
    noise_like,
    patient_groups,
    with_interval,
)
from benchmarks.single_lead_af import RHYTHMS, afib_scores, pooled, rr_irregularity
from benchmarks.tables import read_results, render_table
from data_builders.synthetic import synthetic_ecg
from evaluation import predict_adapters
from modeling_ecgmoe.adapters import MultiTask
from modeling_ecgmoe.leads import LEADS
from modeling_ecgmoe.metrics import bootstrap_difference, bootstrap_interval, find_metric
from modeling_ecgmoe.tasks import TASKS
from records import DataArguments, Records, load_split

BY_NAME = {condition.name: condition for condition in CONDITIONS}


@pytest.fixture(autouse=True, scope="module")
def no_progress_bars() -> Iterator[None]:
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("hub"))


@pytest.fixture(scope="module")
def many(model: Path) -> MultiTask:
    return MultiTask.from_pretrained(model)


@pytest.fixture(scope="module")
def cnn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("cnn")
    PlainCnn().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(mini_ptb_xl: Path, tmp_path_factory: pytest.TempPathFactory) -> DataArguments:
    cache = tmp_path_factory.mktemp("cache")
    return DataArguments(data_dir=str(mini_ptb_xl), cache_dir=str(cache), num_proc=1)


@pytest.fixture(scope="module")
def rows(data: DataArguments) -> datasets.Dataset:
    return load_split(data, "validation")


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


# Conditions


@pytest.mark.parametrize("noise", NOISE_BANDS_HZ)
@pytest.mark.parametrize("snr_db", [12.0, 0.0, -3.0])
def test_noise_has_the_stated_ratio_in_every_lead_and_lies_in_its_band(
    noise: str, snr_db: float, rng: np.random.Generator
) -> None:
    signal = synthetic_ecg(sampling_rate=NOISE_RATE_HZ, flat_leads=("V3",), seed=1).ecg.signal
    added = noise_like(signal, NOISE_RATE_HZ, NOISE_BANDS_HZ[noise], snr_db, rng)
    flat = LEADS.index("V3")
    assert not added[flat].any()
    signal, added = np.delete(signal, flat, axis=0).astype(np.float64), np.delete(added, flat, axis=0)
    np.testing.assert_allclose(10 * np.log10(signal.var(axis=1) / added.var(axis=1)), snr_db, atol=1e-3)
    power = np.abs(np.fft.rfft(added, axis=1)) ** 2
    frequency_hz = np.fft.rfftfreq(added.shape[1], 1 / NOISE_RATE_HZ)
    low_hz, high_hz = NOISE_BANDS_HZ[noise]
    inside = (frequency_hz > low_hz - 0.06) & (frequency_hz < high_hz + 0.06)
    assert power[:, inside].sum() > 0.999 * power.sum()
    correlations = np.corrcoef(added)[~np.eye(len(added), dtype=bool)]
    assert np.abs(correlations).max() < 1 - 1e-6  # each lead has its own


def test_noise_is_added_at_500_hz_and_reaches_the_model_where_its_pass_band_lets_it(
    many: MultiTask, rng: np.random.Generator
) -> None:
    ecg = synthetic_ecg(sampling_rate=100, noise_mv=0.005).ecg
    clean = many.extractor.extract(ecg.signal, 100, LEADS)["input_values"]
    shares = {}
    for noise in NOISE_BANDS_HZ:
        signal, rate_hz, names = BY_NAME[f"{noise}, 0 dB"].apply(ecg.signal, 100.0, LEADS, rng)
        assert (signal.shape, rate_hz) == ((12, 5000), 500.0)
        shares[noise] = float((many.extractor.extract(signal, rate_hz, names)["input_values"] - clean).var()) / float(
            clean.var()
        )
    assert shares["mains noise"] < 0.001
    assert 0.2 < shares["muscle noise"] < 0.6  # of 10 to 100 Hz what lies below 38 to 46 Hz
    assert 0.5 < shares["baseline wander"] < 1.0


@pytest.mark.parametrize(
    ("name", "given", "seen"),
    [
        ("lead I", ["I"], ["I"]),
        ("lead II", ["II"], ["II"]),
        ("leads I, II", ["I", "II"], list(LEADS[:6])),  # the rest of the six follow from two
        ("6 limb leads", list(LEADS[:6]), list(LEADS[:6])),
        ("leads V1–V6", list(LEADS[6:]), list(LEADS[6:])),
    ],
)
def test_a_lead_subset_reaches_the_model_as_missing_leads(
    name: str, given: list[str], seen: list[str], many: MultiTask, rng: np.random.Generator
) -> None:
    ecg = synthetic_ecg(sampling_rate=100).ecg
    signal, rate_hz, names = BY_NAME[name].apply(ecg.signal, 100.0, [f"Lead {lead}" for lead in LEADS], rng)
    assert [name.removeprefix("Lead ") for name in names] == given
    np.testing.assert_array_equal(signal, ecg.signal[[LEADS.index(lead) for lead in given]])
    features = many.extractor.extract(signal, rate_hz, names)
    assert [lead for lead, is_there in zip(LEADS, features["lead_mask"], strict=True) if is_there] == seen
    assert not features["input_values"][~features["lead_mask"]].any()


def test_a_recording_without_the_leads_is_refused(rng: np.random.Generator) -> None:
    with pytest.raises(ValueError, match="lead I: expected one of I, found II, V1"):
        BY_NAME["lead I"].apply(np.ones((2, 1000)), 100.0, ["II", "V1"], rng)


@pytest.mark.parametrize("rate_hz", [250, 500, 1000])
def test_the_rate_a_recording_is_given_at_does_not_change_the_answers(
    rate_hz: int, many: MultiTask, rng: np.random.Generator
) -> None:
    ecg = synthetic_ecg(sampling_rate=100, noise_mv=0.02, wander_mv=0.1, seed=3).ecg
    signal, given_hz, _ = BY_NAME[f"given at {rate_hz} Hz"].apply(ecg.signal, 100.0, LEADS, rng)
    assert (given_hz, signal.shape) == (rate_hz, (12, 10 * rate_hz))
    before, after = (many.prepare(s, r, LEADS) for s, r in ((ecg.signal, 100.0), (signal, given_hz)))
    difference_mv = (after.windows[0]["input_values"] - before.windows[0]["input_values"]) * many.extractor.scale_mv
    # At the ends the mirror of the feature extractor lies elsewhere between the samples.
    assert np.abs(difference_mv[:, 50:-50]).max() < 0.005
    logits = [many.logits(record.windows) for record in (before, after)]
    for task in many.cards:
        np.testing.assert_allclose(logits[1][task], logits[0][task], atol=0.05)


def test_a_window_is_the_middle_of_the_recording(rng: np.random.Generator) -> None:
    signal = np.tile(np.arange(1000.0), (12, 1))
    cut, _, _ = BY_NAME["3 s"].apply(signal, 100.0, LEADS, rng)
    np.testing.assert_array_equal(cut[0], np.arange(350.0, 650.0))


# Records


def test_clean_records_are_what_training_and_evaluation_read(many: MultiTask, rows: datasets.Dataset) -> None:
    expected = predict_adapters(many, Records(rows, many.extractor, []))
    answers = robustness.answers_under(ChangedRecords(rows, many.extractor, CLEAN, 0), many, None, 0)
    assert set(answers) == {"ECG-MoE"}
    for name, values in answers["ECG-MoE"].items():
        # Records are kept in half precision.
        np.testing.assert_allclose(values, TASKS[name].answers(expected[name]), rtol=0.01, atol=0.01)


def test_a_recording_that_a_condition_loses_is_no_answer_and_the_others_stay(
    many: MultiTask, rows: datasets.Dataset
) -> None:
    def flatten(row: dict[str, Any], index: int) -> dict[str, Any]:
        signal = np.array(row["signal"])
        signal[0] *= index != 1
        return {"signal": signal}

    broken = rows.map(flatten, with_indices=True, features=rows.features)
    records = ChangedRecords(broken, many.extractor, BY_NAME["lead I"], 0)
    assert records[1] == (1, None)
    answers = robustness.answers_under(records, many, None, 0)["ECG-MoE"]["age"]
    assert np.isfinite(answers[:, 0]).tolist() == [index != 1 for index in range(len(rows))]


def test_groups_part_the_patients_and_hidden_ages_are_the_oldest() -> None:
    ages, hidden = [20.0, 39.9, 40.0, 60.0, 80.0, None, None], [False] * 5 + [True, False]
    rows = datasets.Dataset.from_dict(
        {"age": ages, "age_over_89": hidden, "sex": ["male", "female", "male", None, "female", "male", "male"]}
    )
    groups = {name: np.flatnonzero(mask).tolist() for name, mask in patient_groups(rows).items()}
    assert groups == {
        "male": [0, 2, 5, 6],
        "female": [1, 4],
        "younger than 40": [0, 1],
        "40 to 59 years": [2],
        "60 to 79 years": [3],
        "80 years or older": [4, 5],
    }


# Figures


def test_intervals_and_changes_are_those_of_the_metrics(rng: np.random.Generator) -> None:
    patients = rng.integers(40, size=90)
    truth = rng.integers(0, 2, (90, 5)).astype(float)
    truth[:, 4] = 1.0  # cannot be ranked
    clean, worse = (np.clip(truth * weight + rng.uniform(0, 1, truth.shape), 0, 1) for weight in (0.4, 0.1))
    weights = draw_weights(patients, 100, seed=0)
    compute = find_metric("macro_auroc").compute
    values = [compute(truth, answers, weights) for answers in (clean, worse)]
    expected = bootstrap_interval("macro_auroc", truth, clean, resamples=100, groups=patients).to_dict()
    found = with_interval("macro_auroc", values[0], 90)
    assert found is not None
    assert found.pop("per_label") == pytest.approx(expected.pop("per_label"))
    assert found == pytest.approx(expected)
    change = changes({"superclass": values[1]}, {"superclass": values[0]})
    difference = bootstrap_difference("macro_auroc", truth, clean, worse, resamples=100, groups=patients)
    for name in ("superclass", "mean_auroc"):
        found = with_interval("macro_auroc", change[name], 90)
        assert found is not None
        assert (found["value"], found["low"], found["high"]) == pytest.approx(
            (difference.value, difference.low, difference.high)
        )


def test_the_mean_change_weighs_tasks_alike_and_passes_over_undefined_ones() -> None:
    clean = {"statements": np.full((3, 2), 0.9), "superclass": np.full((1, 2), 0.8), "sex": np.full((1, 2), np.nan)}
    now = {"statements": np.full((3, 2), 0.7), "superclass": np.full((1, 2), 0.7), "sex": np.full((1, 2), 0.7)}
    assert changes(now, clean)["mean_auroc"] == pytest.approx(np.full((1, 2), -0.15))


def test_the_card_end_to_end(data: DataArguments, model: Path, cnn: Path, tmp_path: Path) -> None:
    out = tmp_path / "robustness.json"
    words = ["--data_dir", data.data_dir, "--cache_dir", str(data.cache_dir), "--num_proc", "1", "--resamples", "20"]
    robustness.main([*words, "--model", str(model), "--cnn", str(cnn), "--out", str(out)])
    results = read_results(out)
    rows = {row["condition"]: row for row in results["rows"]}
    assert len(rows) == len(results["rows"]) <= 22
    assert set(rows) < set(results["details"])
    assert set(BY_NAME) < set(results["details"])
    assert results["data"]["records"] == 4
    assert results["left_out"] == []
    clean, single = rows[CLEAN.name], rows["lead I"]
    assert clean["change, ECG-MoE"] is None
    assert clean["metrics"]["age"]["value"] != single["metrics"]["age"]["value"]
    of_cnn = results["details"]["lead I"]["plain CNN"]
    before = results["details"][CLEAN.name]["plain CNN"]["metrics"]["age"]["value"]
    assert of_cnn["change"]["age"]["value"] == pytest.approx(of_cnn["metrics"]["age"]["value"] - before)
    advantage = single["change, ECG-MoE"]["value"] - single["change, plain CNN"]["value"]
    assert single["change, ECG-MoE less CNN"]["value"] == pytest.approx(advantage)
    assert "| lead I | 4 |" in render_table(results)


# Atrial fibrillation from one lead


def test_one_hand_held_lead_end_to_end(model: Path, cnn: Path, tmp_path: Path) -> None:
    folder, out = write_cinc2017(tmp_path / "cinc2017"), tmp_path / "single_lead_af.json"
    words = ["--data_dir", str(folder), "--cache_dir", str(tmp_path / "cache"), "--num_proc", "1"]
    single_lead_af.main([*words, "--model", str(model), "--cnn", str(cnn), "--out", str(out), "--resamples", "20"])
    results = read_results(out)
    assert results["data"] | {"set": ""} == {
        "set": "", "records": 5, "of class N": 2, "of class A": 2, "of class O": 1
    }  # fmt: skip
    assert [(row["answer"], row["score"]) for row in results["rows"]] == [
        ("ECG-MoE", "AFIB"),
        ("ECG-MoE", "AFIB + AFLT"),
        ("plain CNN", "AFIB"),
        ("plain CNN", "AFIB + AFLT"),
        ("RR intervals alone", "SD / mean"),
        ("RR intervals alone", "RMSSD / mean"),
    ]
    assert all(row["metrics"]["A against N and O"]["n"] == 5 for row in results["rows"])
    assert "A against N, AUROC ↑" in render_table(results)


def test_a_set_without_fibrillation_is_refused(model: Path, tmp_path: Path) -> None:
    folder = write_cinc2017(tmp_path / "cinc2017", with_validation=False)
    (folder / "REFERENCE-v3.csv").write_text("A00001,N\nA00005,N\n")
    words = ["--data_dir", str(folder), "--cache_dir", str(tmp_path / "cache"), "--num_proc", "1"]
    with pytest.raises(ValueError, match=r"expected recordings of N and A, found 2 without A; use more"):
        single_lead_af.main([*words, "--model", str(model)])


def test_windows_are_averaged_as_prediction_averages_them(many: MultiTask) -> None:
    ecg = synthetic_ecg(sampling_rate=300, duration_s=34, rhythm="atrial_fibrillation", noise_mv=0.02).ecg
    record = many.prepare(ecg.signal[:1], 300, ["I"])
    assert len(record.windows) == 4
    logits = torch.from_numpy(many.cards["arrhythmia"].calibrated(many.logits(record.windows)["arrhythmia"]))
    ways = pooled(logits, torch.zeros(4, dtype=torch.long))
    expected = many.answer([record])[0]["arrhythmia"]["probabilities"]
    found = dict(zip(RHYTHMS, next(iter(ways.values()))[0], strict=True))
    assert found == pytest.approx(expected, abs=1e-4)
    np.testing.assert_allclose(ways["maximum"][0], logits.sigmoid().amax(dim=0), rtol=1e-6)
    np.testing.assert_allclose(ways["mean probability"][0], logits.sigmoid().mean(dim=0), rtol=1e-6)
    scores = afib_scores(ways["maximum"])
    assert scores["AFIB + AFLT"][0] == pytest.approx(
        ways["maximum"][0][[RHYTHMS.index(s) for s in ("AFIB", "AFLT")]].sum()
    )


def test_fibrillation_is_more_irregular_than_sinus_rhythm_and_too_few_beats_are_regular() -> None:
    irregular, regular = (
        rr_irregularity(synthetic_ecg(sampling_rate=300, duration_s=30, rhythm=rhythm, seed=2).ecg.signal[:1], 300)
        for rhythm in ("atrial_fibrillation", "sinus")
    )
    assert min(irregular) > 0.1
    assert max(regular) < 0.02
    assert rr_irregularity(synthetic_ecg(sampling_rate=300, duration_s=2.5).ecg.signal[:1], 300) == (0.0, 0.0)
