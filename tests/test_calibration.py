"""What calibration promises: probabilities that are frequencies, intervals that cover, cards that stay readable."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.special import expit
from tiny_model import save_tiny_model, tiny_model

from benchmarks.calibration import (
    CalibrationArguments,
    by_chance,
    first_half,
    groups_of,
    measure_intervals,
    measure_probabilities,
    table,
)
from data_builders.synthetic import synthetic_ecg
from modeling_ecgmoe.adapter_card import AdapterCard, best_threshold, calibrate, calibrate_intervals
from modeling_ecgmoe.adapters import MultiTask
from modeling_ecgmoe.answer_files import FORMATS, show_record
from modeling_ecgmoe.beats import mean_rr_error_ms
from modeling_ecgmoe.leads import LEADS
from modeling_ecgmoe.lora import lora_model, save_adapter
from modeling_ecgmoe.metrics import bootstrap_interval
from modeling_ecgmoe.tasks import TASKS

NUM_LABELS = len(TASKS["superclass"].labels)


def exaggerated_logits(num_records: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Logits (records, labels) whose labels are wrong in ways of their own, and labels drawn from honest ones."""
    rng = np.random.default_rng(seed)
    honest = rng.normal(-1.0, 2.0, size=(num_records, NUM_LABELS))
    truth = (rng.random(honest.shape) < expit(honest)).astype(float)
    scales, shifts = np.array([4.0, 2.0, 1.0, 0.5, 1.0]), np.array([0.0, 1.0, 0.0, 0.0, -2.0])
    return honest * scales + shifts, truth


def ages_drawn_to_the_middle(num_records: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Values and true ages (records,): a guess that keeps half of the distance to the mean, as unsure ones do."""
    rng = np.random.default_rng(seed)
    truth = rng.normal(60.0, 17.0, num_records)
    return 60.0 + 0.6 * (truth - 60.0) + rng.normal(0.0, 6.0, num_records), truth


def logits_of_ages(values: np.ndarray) -> np.ndarray:
    return ((values - TASKS["age"].center) / TASKS["age"].spread)[:, None]


# Probabilities


def test_calibration_mends_exaggerated_probabilities() -> None:
    rng = np.random.default_rng(0)
    honest = rng.normal(-1.0, 2.0, size=(26_000, NUM_LABELS))
    truth = (rng.random(honest.shape) < expit(honest)).astype(float)
    card = AdapterCard(TASKS["superclass"], "abc")
    calibrate(card, 3.0 * honest[:6000], truth[:6000])
    before, after = (
        bootstrap_interval("ece_equal_mass", truth[6000:], expit(logits[6000:]), resamples=0).value
        for logits in (3.0 * honest, 3.0 * honest / card.temperature)
    )
    assert after < 0.02
    assert before > 0.06


def test_a_shift_of_each_label_mends_what_one_temperature_cannot() -> None:
    rng = np.random.default_rng(0)
    honest = rng.normal(-1.0, 2.0, (26_000, 5))
    truth = (rng.random(honest.shape) < expit(honest)).astype(float)
    logits = 2.0 * honest + np.array([1.5, -1.0, 0.0, 0.8, -0.6])
    part = np.arange(26_000) < 6000
    card = AdapterCard(TASKS["superclass"], "abc")
    calibrate(card, logits[part], truth[part])
    after, before = (
        bootstrap_interval("ece_equal_mass", truth[~part], told[~part], resamples=0)
        for told in (card.probabilities(logits), expit(logits / card.temperature))
    )
    assert card.temperature / np.array(card.slopes) == pytest.approx(np.full(5, 2.0), rel=0.06)
    assert card.shifts == pytest.approx([-1.5, 1.0, 0.0, -0.8, 0.6], abs=0.2)
    assert after.value < 0.015
    assert before.value > 3 * after.value
    answer = card.answer(logits[0], 12)
    assert answer["probabilities"]["NORM"] == pytest.approx(card.probabilities(logits)[0, 0], abs=1e-4)


def test_a_slope_of_each_label_mends_what_one_temperature_cannot(tmp_path: Path) -> None:
    logits, truth = exaggerated_logits(26_000, seed=0)
    part = np.arange(26_000) < 6000
    card = AdapterCard(TASKS["superclass"], "abc")
    calibrate(card, logits[part], truth[part])
    found = np.array(card.slopes) / card.temperature
    assert found == pytest.approx([0.25, 0.5, 1.0, 2.0, 1.0], rel=0.1)
    told = card.probabilities(logits[~part])
    assert bootstrap_interval("ece_equal_mass", truth[~part], told, resamples=0).value < 0.015
    card.save(tmp_path)
    assert AdapterCard.load(tmp_path).slopes == card.slopes


def test_a_label_that_is_too_sure_at_its_ends_alone_is_bent(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(0.0, 3.0, (26_000, 1))
    honest = 0.5 * logits + 1.5 * np.tanh(logits)
    truth = (rng.random(honest.shape) < expit(honest)).astype(float)
    part = np.arange(26_000) < 6000
    card = AdapterCard(TASKS["sex"], "abc")
    calibrate(card, logits[part], truth[part])
    assert card.slopes[0] / card.temperature == pytest.approx(0.5, abs=0.08)
    assert card.bends[0] / card.temperature == pytest.approx(1.5, abs=0.2)
    told, straight = card.probabilities(logits[~part]), expit(logits[~part] / card.temperature)
    after, before = (bootstrap_interval("ece", truth[~part], p, resamples=0).value for p in (told, straight))
    assert after < 0.012
    assert before > 2 * after
    assert (np.diff(card.probabilities(np.linspace(-9.0, 9.0, 100)[:, None])[:, 0]) > 0).all()
    card.save(tmp_path)
    np.testing.assert_array_equal(AdapterCard.load(tmp_path).probabilities(logits), card.probabilities(logits))
    calibrate(card, logits[:300], truth[:300])
    assert card.bends == []


def test_a_few_records_that_lie_apart_do_not_make_certain() -> None:
    rng, before, after = np.random.default_rng(0), [], []
    for _ in range(30):
        truth = np.append(np.arange(44) < 22, rng.random(4000) < 0.5).astype(float)[:, None]
        logits = rng.normal(np.where(truth > 0, 1.6, -1.6))
        card = AdapterCard(TASKS["sex"], "abc")
        calibrate(card, logits[:44], truth[:44])
        for told, losses in ((expit(logits[44:]), before), (card.probabilities(logits[44:]), after)):
            losses.append(-np.log(np.where(truth[44:] > 0, told, 1 - told)).mean())
    assert np.mean(after) < np.mean(before)
    assert max(after) < 1.2 * max(before)


def test_a_rare_label_is_not_shifted() -> None:
    logits, truth = exaggerated_logits(1000, seed=0)
    truth[:, 1] = np.arange(1000) < 19
    card = AdapterCard(TASKS["superclass"], "abc")
    calibrate(card, logits, truth)
    assert (card.shifts[1], card.slopes[1]) == (0.0, 1.0)
    assert np.count_nonzero(card.shifts) == 4
    calibrate(card, logits[:30], truth[:30])
    assert (card.shifts, card.slopes) == ([], [])
    assert np.array_equal(card.calibrated(logits), logits / card.temperature)


# Intervals


def test_intervals_by_groups_cover_the_old_and_the_young_as_often_as_promised() -> None:
    values, truth = ages_drawn_to_the_middle(6000, seed=0)
    card = AdapterCard(TASKS["age"], "abc")
    calibrate_intervals(card, values, truth, 12)
    fresh, fresh_truth = ages_drawn_to_the_middle(20_000, seed=1)
    group = np.searchsorted(card.group_bounds, fresh_truth, side="right")

    def covered(how: AdapterCard) -> np.ndarray:
        low, high = how.intervals(fresh, 12).T
        inside = (low <= fresh_truth) & (fresh_truth <= high)
        return np.array([inside[group == i].mean() for i in range(len(card.group_bounds) + 1)])

    by_groups = covered(card)
    card.group_half_widths = {}
    one_width = covered(card)
    assert by_groups.min() > 0.88
    assert by_groups.max() < 0.95
    assert one_width.min() < 0.85


def test_an_interval_is_one_stretch_with_its_value_inside() -> None:
    values, truth = ages_drawn_to_the_middle(3000, seed=3)
    card = AdapterCard(TASKS["age"], "abc")
    calibrate(card, logits_of_ages(values), truth[:, None])
    asked = np.linspace(0.0, 400.0, 401)
    low, high = card.intervals(asked, 12).T
    assert np.isfinite([low, high]).all()
    assert (low <= asked).all()
    assert (asked <= high).all()
    answer = card.answer(logits_of_ages(np.array([60.0]))[0], 12)
    assert answer["interval"] == [pytest.approx(end, abs=0.006) for end in card.intervals(np.array([60.0]), 12)[0]]


def test_an_interval_ends_where_the_quantity_does_and_covers_no_less() -> None:
    values, truth = ages_drawn_to_the_middle(3000, seed=0)
    truth = np.abs(truth - 50.0)  # many are young
    card = AdapterCard(TASKS["age"], "abc")
    calibrate_intervals(card, values, truth, 12)
    free = replace(card, task=replace(card.task, minimum=None))
    for groups in (card.group_half_widths, {}):
        card.group_half_widths = free.group_half_widths = groups
        (low, high), (free_low, free_high) = card.intervals(values, 12).T, free.intervals(values, 12).T
        assert free_low.min() < low.min() == 0.0
        covered, before = (low <= truth) & (truth <= high), (free_low <= truth) & (truth <= free_high)
        assert (covered == before).all()
    answer = card.answer(logits_of_ages(np.array([-3.0]))[0], 12)
    assert answer["value"] == answer["interval"][0] == 0.0
    assert free.answer(logits_of_ages(np.array([-3.0]))[0], 12)["value"] == -3.0


def test_few_records_make_no_groups() -> None:
    values, truth = ages_drawn_to_the_middle(150, seed=0)
    card = AdapterCard(TASKS["age"], "abc")
    calibrate_intervals(card, values, truth, 12)
    assert (card.group_bounds, card.group_half_widths) == ([], {})
    low, high = card.intervals(np.array([50.0]), 12)[0]
    assert high - low == pytest.approx(2 * card.half_widths["12"])


def test_fewer_leads_have_errors_of_their_own_in_the_same_groups() -> None:
    values, truth = ages_drawn_to_the_middle(3000, seed=0)
    worse = values + np.random.default_rng(1).normal(0.0, 12.0, len(values))
    card = AdapterCard(TASKS["age"], "abc")
    calibrate_intervals(card, values, truth, 12)
    bounds = list(card.group_bounds)
    calibrate_intervals(card, worse, truth, 6)
    assert card.group_bounds == bounds
    widths = {leads: np.diff(card.intervals(np.array([60.0]), leads))[0, 0] for leads in (12, 8, 2)}
    assert widths[12] < widths[8] == widths[2]


def test_what_starts_from_a_measurement_has_one_width() -> None:
    card = AdapterCard(TASKS["rr_interval"], "abc")
    truth = np.random.default_rng(0).normal(850.0, 200.0, 2000)
    calibrate_intervals(card, truth + np.random.default_rng(1).normal(0.0, 3.0, 2000), truth, 12)
    assert card.group_bounds == []
    assert 4.5 < card.half_widths["12"] < 5.5


def irregular_hearts(records: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Values, truth and expected errors of the mean RR interval, a quarter of the hearts ten times as irregular."""
    rng = np.random.default_rng(seed)
    sd_ms = np.where(np.arange(records) % 4 == 0, 100.0, 10.0)
    errors = np.array([mean_rr_error_ms(rng.normal(0.85, sd / 1000, 11)) for sd in sd_ms])
    truth = rng.normal(850.0, 100.0, records)
    return truth + 0.5 * (sd_ms + 10.0) / 11 * rng.standard_normal(records), truth, errors


def test_the_interval_of_an_irregular_heart_is_wider_and_covers_as_often() -> None:
    card, plain = AdapterCard(TASKS["rr_interval"], "abc"), AdapterCard(TASKS["rr_interval"], "abc")
    values, truth, errors = irregular_hearts(4000, seed=0)
    calibrate_intervals(card, values, truth, 12, errors)
    calibrate_intervals(plain, values, truth, 12)
    values, truth, errors = irregular_hearts(4000, seed=1)
    irregular = np.arange(4000) % 4 == 0
    covered = []
    for low, high in (card.intervals(values, 12, errors).T, plain.intervals(values, 12).T):
        inside = (low <= truth) & (truth <= high)
        covered.append((inside[irregular].mean(), inside[~irregular].mean()))
    assert min(covered[0]) > 0.87
    assert covered[1][0] < 0.8
    with pytest.raises(ValueError, match="prior_errors"):
        card.answer(np.zeros(1), 12)
    narrow, wide = (np.diff(card.answer(np.zeros(1), 12, error)["interval"])[0] for error in (1.0, 10.0))
    assert wide == pytest.approx(10 * narrow, rel=0.01)


def test_the_error_of_a_mean_interval_grows_with_spread_and_shrinks_with_beats() -> None:
    assert mean_rr_error_ms(np.array([0.0, 0.8, 0.9, 0.7])) == pytest.approx((81.65 + 10.0) / 3, abs=0.01)
    assert mean_rr_error_ms(np.array([0.8])) == 110.0
    assert mean_rr_error_ms(np.array([0.0, np.nan])) == mean_rr_error_ms(np.zeros(0)) == 3000.0


def test_a_mean_interval_that_was_not_measured_is_none_and_says_why() -> None:
    card = AdapterCard(TASKS["rr_interval"], "abc", half_widths={"12": 1.0}, relative_widths=True)
    answer = card.answer(np.zeros(1), 12, mean_rr_error_ms(np.zeros(0)), measured=False)
    assert answer == {"value": None, "unit": "ms", "reason": "no RR interval was found"}
    card.evidence = "simulated"
    assert card.answer(np.zeros(1), 12, 3000.0, measured=False) == answer | {"evidence": "simulated"}
    assert AdapterCard(TASKS["age"], "abc").answer(np.zeros(1), 12, measured=False)["value"] is not None


def test_a_stretch_without_beats_does_not_move_the_mean_interval_and_no_beats_at_all_are_shown(tmp_path: Path) -> None:
    many = MultiTask.from_pretrained(save_tiny_model(tmp_path, ("age", "rr_interval")))
    signal = synthetic_ecg(sampling_rate=250, rate_bpm=100, noise_mv=0.01).ecg.signal
    wander = np.tile(0.2 * np.sin(2 * np.pi * 0.8 * np.arange(2500) / 250), (12, 1)).astype(np.float32)
    signals = signal, np.concatenate([signal, wander], axis=1), wander
    alone, both, none = many.answer([many.prepare(each, 250, LEADS) for each in signals])
    assert both["rr_interval"] == alone["rr_interval"]
    assert none["rr_interval"]["value"] is None
    assert none["age"]["value"] > 0.0
    line = {"record": "a", "path": "a", "status": "ok", "sampling_rate": 250, "leads": ["I"], "duration_s": 10.0}
    line |= {"quality": {"beats": 0, "warnings": []}, "tasks": none}
    assert "rr_interval  none: no RR interval was found" in show_record(line, many.cards)
    for form in FORMATS.values():
        assert "None" not in form(many.cards).dump(line)


def test_a_truth_that_is_always_the_same_makes_one_group() -> None:
    card = AdapterCard(TASKS["age"], "abc")
    calibrate_intervals(card, np.random.default_rng(0).normal(60.0, 5.0, 1000), np.full(1000, 60.0), 12)
    assert card.answer(np.zeros(1), 12)["interval"][0] < 60.0 < card.answer(np.zeros(1), 12)["interval"][1]


# Cards


def test_a_card_without_the_later_fields_is_the_file_that_it_always_was(tmp_path: Path) -> None:
    AdapterCard(TASKS["age"], "abc", half_widths={"12": 8.0}).save(tmp_path)
    assert set(json.loads((tmp_path / "task.json").read_text())) == {
        "task", "base", "evidence", "trained_on", "temperature", "thresholds", "half_widths", "level", "metrics",
    }  # fmt: skip
    assert AdapterCard.load(tmp_path).intervals(np.array([60.0]), 12).tolist() == [[52.0, 68.0]]


@pytest.mark.parametrize("name", ["age", "superclass"])
def test_a_calibrated_card_comes_back_as_it_was(name: str, tmp_path: Path) -> None:
    card = AdapterCard(TASKS[name], "abc")
    if name == "age":
        values, truth = ages_drawn_to_the_middle(1000, seed=0)
        calibrate(card, logits_of_ages(values), truth[:, None])
    else:
        calibrate(card, *exaggerated_logits(1000, seed=0))
    card.save(tmp_path)
    assert AdapterCard.load(tmp_path) == card
    assert bool(card.group_half_widths) == (name == "age")


def test_a_card_cut_off_while_it_was_copied_is_named(tmp_path: Path) -> None:
    AdapterCard(TASKS["age"], "abc").save(tmp_path)
    text = (tmp_path / "task.json").read_text()
    (tmp_path / "task.json").write_text(text[:-20])
    with pytest.raises(ValueError, match=rf"{tmp_path}.*task\.json is not JSON \(.*\); copy it again"):
        AdapterCard.load(tmp_path)
    assert "Trained on data that nobody stated. Evidence" in AdapterCard(TASKS["age"], "abc").to_markdown("me/base")


# The benchmark


def test_bins_of_equal_mass_see_what_bins_of_equal_width_leave_out() -> None:
    # 15 kinds of records, as many of each, all of them rare: of equal width there is one bin, and in it they cancel.
    predictions = np.repeat(np.linspace(0.001, 0.06, 15), 1000)
    frequencies = np.linspace(0.06, 0.001, 15)
    truth = np.concatenate([np.arange(1000) < round(1000 * f) for f in frequencies]).astype(float)
    expected = np.abs(predictions.reshape(15, 1000)[:, 0] - truth.reshape(15, 1000).mean(axis=1)).mean()
    mass, width = (bootstrap_interval(m, truth, predictions, resamples=0).value for m in ("ece_equal_mass", "ece"))
    assert mass == pytest.approx(expected, abs=1e-9)
    assert width < 0.1 * mass


def test_a_constant_probability_is_one_bin() -> None:
    truth = (np.arange(400) < 100).astype(float)
    assert bootstrap_interval("ece_equal_mass", truth, np.full(400, 0.4), resamples=0).value == pytest.approx(0.15)


def test_right_probabilities_have_the_error_of_chance() -> None:
    rng = np.random.default_rng(0)
    probabilities = rng.random(2000)
    truth = (rng.random(2000) < probabilities).astype(float)
    chance = by_chance("ece_equal_mass", probabilities, rng)
    found = bootstrap_interval("ece_equal_mass", truth, probabilities, resamples=0).value
    assert 0.01 < chance < 0.05
    assert found == pytest.approx(chance, abs=0.015)


def test_coverage_takes_the_share_of_several_intervals() -> None:
    result = bootstrap_interval("coverage", np.ones(4), np.array([1.0, 0.5, 0.5, 0.0]), resamples=0)
    assert result.value == 0.5


def test_no_patient_is_in_both_halves() -> None:
    patients = [f"p{i // 3}" for i in range(300)]
    half = first_half(patients, seed=0)
    assert not {p for p, first in zip(patients, half, strict=True) if first} & {
        p for p, first in zip(patients, half, strict=True) if not first
    }
    assert 100 < half.sum() < 200
    assert (first_half(patients, seed=1) != half).any()


def test_the_table_shows_each_label_and_the_worst_group_of_each_interval() -> None:
    arguments = CalibrationArguments(resamples=20, splits=3)
    logits, truth = exaggerated_logits(2000, seed=0)
    values, ages = ages_drawn_to_the_middle(2000, seed=0)
    patients = [str(i // 2) for i in range(2000)]
    labels = measure_probabilities(AdapterCard(TASKS["superclass"], "abc"), logits, truth, patients, arguments)
    groups = groups_of(ages, np.arange(2000) % 2)
    card = AdapterCard(TASKS["age"], "abc")
    errors = np.ones(2000)
    intervals = measure_intervals(card, logits_of_ages(values), ages[:, None], errors, groups, patients, arguments)
    assert [row["answer"] for row in labels] == list(TASKS["superclass"].labels)
    losses = {how: np.mean([row["log_loss"][how] for row in labels]) for how in labels[0]["log_loss"]}
    assert losses["temperature and shifts"] < losses["temperature"] < losses["uncalibrated"]
    assert {row["group"] for row in intervals} == set(groups)
    assert card == AdapterCard(TASKS["age"], "abc"), "measuring leaves the card alone"
    rows = table(labels, intervals)
    worst = [row for row in rows if row["answer"].startswith("90 % interval of age, ")][1:]
    assert min(row["one temperature or width"]["value"] for row in worst) < 0.85
    assert all(0.86 < row["as the adapters do"]["value"] < 0.95 for row in worst)


def test_measurements_of_the_adapter_before_do_not_stay(tmp_path: Path) -> None:
    (tmp_path / ".eval_results").mkdir()
    (tmp_path / "results.json").write_text("{}")
    save_adapter(lora_model(tiny_model(), TASKS["age"]), AdapterCard(TASKS["age"], "abc"), tmp_path)
    assert not (tmp_path / "results.json").exists()
    assert not (tmp_path / ".eval_results").exists()


def test_a_threshold_lies_where_the_probabilities_can_be_told_apart() -> None:
    truth = np.repeat([1.0, 0.0], [10, 30])
    tied = np.full(40, 0.3)
    assert best_threshold(tied, truth) == best_threshold(tied, truth[::-1]) == pytest.approx(0.15)
