"""What is typical: noise is not, the file beside the weights is checked, and a model without it answers as before."""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from tiny_model import save_tiny_model
from transformers import pipeline

from benchmarks.refusal import SPOILED, amiss, most_suspicious, pink_noise, swap_arms
from data_builders.synthetic import synthetic_ecg
from modeling_ecgmoe import EcgMoeFeatureExtractor, EcgMoeForTasks
from modeling_ecgmoe.adapters import MultiTask
from modeling_ecgmoe.cli import main
from modeling_ecgmoe.leads import LEADS
from modeling_ecgmoe.record_answers import answer_records, find_warnings, prepare_record
from modeling_ecgmoe.temporal import mean_and_max
from modeling_ecgmoe.typicality import TYPICALITY_FILE, Typicality, fit_typicality

ROOT = Path(__file__).resolve().parents[1]
HUB = ROOT / "hub" / "model"
SIZE = 8


def features(count: int, seed: int) -> np.ndarray:
    """Correlated numbers (count, SIZE) of different spreads, as a network gives them."""
    mixing = np.random.default_rng(99).normal(size=(SIZE, SIZE))
    return (np.random.default_rng(seed).normal(size=(count, SIZE)) @ mixing + 3.0).astype(np.float32)


@pytest.fixture(scope="module")
def fitted() -> Typicality:
    training = features(2000, seed=0)
    return fit_typicality("abc", training, training + 1.5, features(1000, seed=1), training, training - 1.5)


def hearts(count: int, seed: int = 0) -> list[np.ndarray]:
    """Synthetic recordings (12, samples) in mV at 100 Hz."""
    rates = np.random.default_rng(seed).uniform(50, 110, count)
    return [
        synthetic_ecg(sampling_rate=100, seed=seed + i, rate_bpm=float(rate), noise_mv=0.01, variation=0.2).ecg.signal
        for i, rate in enumerate(rates)
    ]


def quality_of(many: MultiTask, signal: np.ndarray) -> dict[str, Any]:
    record = prepare_record(many, {"record": "r", "path": None}, signal.astype(np.float32), 100.0, LEADS)
    return answer_records(many, [record], 8)[0]["quality"]


# The distance


def test_percentiles_say_how_many_are_farther_away(fitted: Typicality) -> None:
    fresh = fitted.percentiles(fitted.distances(features(4000, seed=2)))
    assert [np.mean(fresh <= p) for p in (10, 50, 90)] == pytest.approx([0.1, 0.5, 0.9], abs=0.05)
    assert fitted.percentiles(np.array([0.0, 1e6])).tolist() == [100.0, 0.0]


def test_the_distance_does_not_care_for_units(fitted: Typicality) -> None:
    scale = np.array([1, 10, 100, 1, 1, 0.1, 1, 1], np.float32)
    training = features(2000, seed=0)
    same = training * scale
    other = fit_typicality("abc", same, same, features(1000, seed=1) * scale, same, same)
    fresh = features(100, seed=3)
    np.testing.assert_allclose(other.distances(fresh * scale), fitted.distances(fresh), rtol=1e-3)


def test_the_probe_finds_what_was_swapped(fitted: Typicality) -> None:
    fresh = features(500, seed=4)
    assert np.mean(fitted.swap_logits(fresh) < 0) > 0.8
    assert np.mean(fitted.swap_logits(fresh + 1.5) > 0) > 0.8
    assert np.mean(fitted.swap_logits(fresh, lead_i=True) < 0) > 0.8
    assert np.mean(fitted.swap_logits(fresh - 1.5, lead_i=True) > 0) > 0.8


def test_lead_i_is_asked_where_there_is_nothing_else(fitted: Typicality) -> None:
    fresh, nothing = features(20, seed=4), features(0, seed=4)
    assert fitted.report(nothing, nothing) == {"typicality": None, "arm_electrodes_swapped": None}
    turned = fitted.report(nothing, fresh - 1.5)
    assert turned["typicality"] is None
    assert turned["arm_electrodes_swapped"] > 0.5 > fitted.report(nothing, fresh)["arm_electrodes_swapped"]
    assert fitted.report(fresh, fresh - 1.5) == fitted.report(fresh, nothing)


def test_too_few_recordings_are_refused() -> None:
    with pytest.raises(ValueError, match=r"expected more than 8 training features.*use more recordings"):
        fit_typicality("abc", features(8, 0), *(features(9, seed) for seed in range(4)))
    with pytest.raises(ValueError, match=r"expected more than 8.*two or more of each.*\(1, 8\); use more recordings"):
        fit_typicality("abc", *(features(9, seed) for seed in range(4)), features(1, 5))


# The file


def test_the_file_comes_back_as_it_was(fitted: Typicality, tmp_path: Path) -> None:
    path = fitted.save(tmp_path)
    assert path.name == TYPICALITY_FILE
    again = Typicality.load(tmp_path, "abc")
    assert again is not None
    fresh = features(10, seed=5)
    np.testing.assert_array_equal(again.distances(fresh), fitted.distances(fresh))
    assert again.report(fresh, fresh) == fitted.report(fresh, fresh)


def test_no_file_is_no_error(tmp_path: Path) -> None:
    assert Typicality.load(tmp_path, "abc") is None


def spoil_nothing_but(**changes: np.ndarray) -> Any:
    def spoil(path: Path) -> None:
        values = load_file(path) | changes
        save_file({name: value for name, value in values.items() if value.size}, path, metadata={"base": "abc"})

    return spoil


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:200]), "cannot be read"),
        (lambda path: path.write_bytes(b""), "cannot be read"),
        (lambda path: path.write_bytes(b"\xff" * 64), "cannot be read"),
        (spoil_nothing_but(mean=np.zeros(0, np.float32)), "cannot be read"),
        (spoil_nothing_but(mean=np.zeros(5, np.float32)), "do not fit each other"),
        (spoil_nothing_but(quantiles=np.zeros(1, np.float32)), "do not fit each other"),
        (spoil_nothing_but(quantiles=np.full(5, np.nan, np.float32)), "not finite"),
    ],
)
def test_a_damaged_file_is_refused_with_the_way_out(
    fitted: Typicality, tmp_path: Path, spoil: Any, message: str
) -> None:
    spoil(fitted.save(tmp_path))
    with pytest.raises(ValueError, match=rf"{message}.*fit it again with `python -m benchmarks\.refusal --fit`"):
        Typicality.load(tmp_path, "abc")


def test_the_file_of_another_model_is_refused(fitted: Typicality, tmp_path: Path) -> None:
    fitted.save(tmp_path)
    with pytest.raises(ValueError, match="was fitted to the model abc, this one is xyz; delete it, or fit it again"):
        Typicality.load(tmp_path, "xyz")


# Answers


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("hub"), tasks=("age", "sex"))


def test_the_quality_of_a_recording_says_how_typical_it_is(model: Path, tmp_path: Path) -> None:
    many = MultiTask.from_pretrained(model)
    before = quality_of(many, hearts(1, seed=500)[0])
    assert "typicality" not in before

    def look_at(signals: list[np.ndarray], leads: Sequence[str] = LEADS) -> np.ndarray:
        windows = [many.prepare(signal[: len(leads)], 100.0, leads).windows[0] for signal in signals]
        batch = many.extractor.pad(windows, return_tensors="pt")
        with torch.inference_mode():
            encoded = many.encoder(**{name: batch[name] for name in many.extractor.model_input_names})
            return mean_and_max(*encoded.memories()["tokens"]).numpy()

    signals = hearts(60)
    swapped = [swap_arms(signal) for signal in signals]
    lead_i = (look_at(each, ("I",)) for each in (signals, swapped))
    typicality = fit_typicality(many.base, look_at(signals), look_at(swapped), look_at(hearts(30, seed=300)), *lead_i)
    path = typicality.save(model)
    try:
        knowing = MultiTask.from_pretrained(model)
        rng = np.random.default_rng(0)
        heart, noise = hearts(1, seed=500)[0], SPOILED["white noise, 0.2 mV"](np.zeros((12, 1000)), rng)
        of_heart, of_noise = quality_of(knowing, heart), quality_of(knowing, noise)
        assert of_heart["typicality"] > of_noise["typicality"]
        assert 0.0 <= of_heart["arm_electrodes_swapped"] <= 1.0
        assert {k: v for k, v in of_heart.items() if k in before} == before
        windows = many.prepare(heart, 100.0, LEADS).windows
        for name, logits in many.logits(windows).items():
            np.testing.assert_array_equal(knowing.logits(windows)[name], logits)
        assert knowing.answer([knowing.prepare(heart, 100.0, LEADS)])[0].keys() == {"age", "sex"}
    finally:
        path.unlink()


def test_a_file_of_another_model_stops_the_model_from_loading(fitted: Typicality, model: Path) -> None:
    path = fitted.save(model)
    try:
        with pytest.raises(ValueError, match="was fitted to the model abc"):
            MultiTask.from_pretrained(model)
    finally:
        path.unlink()


@pytest.mark.skipif(not (HUB / TYPICALITY_FILE).is_file(), reason=f"hub/model holds no {TYPICALITY_FILE}")
def test_noise_is_less_typical_than_a_heart_for_the_published_model() -> None:
    many = MultiTask.from_pretrained(HUB, [])
    heart = quality_of(many, hearts(1)[0])
    rng = np.random.default_rng(0)
    noises = [name for name in SPOILED if "noise" in name]
    assert len(noises) == 3
    for name in noises:
        assert quality_of(many, SPOILED[name](np.zeros((12, 1000)), rng))["typicality"] < heart["typicality"], name
    assert (HUB / TYPICALITY_FILE).stat().st_size < 1e6


@pytest.mark.skipif(not (HUB / TYPICALITY_FILE).is_file(), reason=f"hub/model holds no {TYPICALITY_FILE}")
@pytest.mark.parametrize("adapters", [None, HUB.parent / "adapters/sex"], ids=["heads", "adapter"])
def test_the_pipeline_warns_of_what_may_be_no_ecg(adapters: Path | None) -> None:
    analyse = pipeline("ecg-analysis", model=str(HUB), adapters=adapters)
    noise = SPOILED["1/f noise as of an EEG, 50 µV"](np.zeros((12, 1000)), np.random.default_rng(0))
    of_heart, of_noise = analyse([hearts(1)[0], noise], sampling_rate=100, lead_names=LEADS)
    assert of_heart["quality"]["typicality"] > of_noise["quality"]["typicality"]
    assert not any("no ECG" in warning for warning in of_heart["quality"]["warnings"])
    assert any("a rare rhythm, noise or no ECG" in warning for warning in of_noise["quality"]["warnings"])


@pytest.mark.skipif(not (HUB / TYPICALITY_FILE).is_file(), reason=f"hub/model holds no {TYPICALITY_FILE}")
def test_a_lead_lost_for_a_while_leaves_what_is_known_of_the_rest() -> None:
    many = MultiTask.from_pretrained(HUB, [])
    signal = hearts(1)[0]
    alone, broken = many.prepare(signal, 100.0, LEADS), signal.copy()
    broken[6] = 0.0
    both = many.prepare(np.concatenate([signal, broken], axis=1), 100.0, LEADS)
    lost = many.prepare(broken, 100.0, LEADS)
    many.answer([alone, both, lost])
    assert both.quality["typicality"] == pytest.approx(alone.quality["typicality"], abs=0.5)
    assert lost.quality["typicality"] is None


@pytest.mark.skipif(not (HUB / TYPICALITY_FILE).is_file(), reason=f"hub/model holds no {TYPICALITY_FILE}")
def test_a_pipeline_of_weights_in_bfloat16_says_how_to_know_what_is_typical(caplog: pytest.LogCaptureFixture) -> None:
    analyse = pipeline("ecg-analysis", model=str(HUB), dtype=torch.bfloat16)
    assert "typicality" not in analyse(hearts(1)[0], sampling_rate=100, lead_names=LEADS)["quality"]
    assert "is left out: its weights came in bfloat16, load them in float32 or float16" in caplog.text
    half = pipeline("ecg-analysis", model=str(HUB), dtype=torch.float16)
    assert half(hearts(1)[0], sampling_rate=100, lead_names=LEADS)["quality"]["typicality"] > 0.0


def test_a_pipeline_of_changed_weights_says_nothing_of_what_is_typical(caplog: pytest.LogCaptureFixture) -> None:
    changed = EcgMoeForTasks.from_pretrained(HUB)
    torch.nn.init.zeros_(changed.ecgmoe.fusion.norm.bias)
    analyse = pipeline("ecg-analysis", model=changed, feature_extractor=EcgMoeFeatureExtractor.from_pretrained(HUB))
    line = analyse(hearts(1)[0], sampling_rate=100, lead_names=LEADS)
    assert "typicality" not in line["quality"]
    assert "how typical recordings are is left out" in caplog.text


@pytest.mark.parametrize(
    ("changes", "warning"),
    [
        ({"typicality": 0.3}, "less typical than 99.7 % of the recordings that the model was checked on: a rare"),
        ({"typicality": 0.0, "arm_electrodes_swapped": 0.99}, "less typical than all the recordings"),
        ({"typicality": None, "arm_electrodes_swapped": 0.95}, "the electrodes of the arms seem to be swapped"),
        (
            {"typicality": None, "arm_electrodes_swapped": 0.95, "leads": ["I"]},
            "the electrodes of the arms seem to be swapped or the recorder to be held the other way round",
        ),
        ({"beats": 1}, "fewer than two beats were found"),
        ({"clipped": 0.12}, "12% of the samples are beyond what the model sees"),
        ({"beat_likeness": 0.21}, "its beats are not like each other: noise or no ECG"),
        ({"missing": 0.5}, "50% of the samples are missing"),
        ({"flat_leads": ["V1", "V2"]}, "flat and left out: V1, V2"),
        ({"windows_refused": 2}, "2 stretches of 10 s could not be used"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_to_know_of_a_recording_is_said_in_words(changes: dict[str, Any], warning: str) -> None:
    quality: dict[str, Any] = {"beats": 12, "clipped": 0.0, "missing": 0.0, "flat_leads": [], "windows_refused": 0}
    quality["leads"] = list(LEADS)
    assert find_warnings(quality | {"typicality": 50.0, "arm_electrodes_swapped": 0.01}) == []
    (found,) = find_warnings(quality | changes)
    assert found.startswith(warning)


def test_warnings_reach_the_table_and_the_csv(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    signal = hearts(1)[0]
    signal[7] = 0.0
    np.savez(tmp_path / "flat.npz", signal=signal, sampling_rate=100, lead_names=np.array(LEADS), unit="mV")
    folder = save_tiny_model(tmp_path / "hub", tasks=("sex",))
    arguments = ["predict", str(tmp_path / "flat.npz"), "--model", str(folder)]
    assert main([*arguments, "--table", "--out", str(tmp_path / "o.csv")]) == 0
    printed = capsys.readouterr()
    assert "beware: flat and left out: V2" in printed.out
    assert "1 of 1 records answered" in printed.err
    assert "1 of them with warnings" in printed.err
    with (tmp_path / "o.csv").open(newline="") as file:
        assert [row["warnings"] for row in csv.DictReader(file)] == ["flat and left out: V2"]


# What is spoiled on purpose


def test_swapped_arms_are_what_the_electrodes_would_measure() -> None:
    right, left, foot, *chest = np.random.default_rng(0).normal(size=(9, 50))

    def leads(right: np.ndarray, left: np.ndarray) -> np.ndarray:
        centre = (right + left + foot) / 3
        limbs = [left - right, foot - right, foot - left]
        augmented = [1.5 * (electrode - centre) for electrode in (right, left, foot)]
        return np.stack([*limbs, *augmented, *(electrode - centre for electrode in chest)])

    np.testing.assert_allclose(swap_arms(leads(right, left)), leads(left, right), atol=1e-12)


def test_the_power_of_pink_noise_falls_as_one_over_the_frequency() -> None:
    noise = pink_noise((200, 2000), np.random.default_rng(0))
    power = (np.abs(np.fft.rfft(noise, axis=1)) ** 2).mean(axis=0)
    frequency = np.arange(1, 900)
    slope = np.polyfit(np.log(frequency), np.log(power[1:900]), 1)[0]
    assert slope == pytest.approx(-1.0, abs=0.05)
    assert noise.std() == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("name", list(SPOILED))
def test_what_is_spoiled_is_still_a_recording_of_twelve_leads(name: str) -> None:
    signal = hearts(1)[0]
    before = signal.copy()
    spoiled = SPOILED[name](signal, np.random.default_rng(0))
    assert spoiled.shape == signal.shape
    assert np.isfinite(spoiled).all()
    np.testing.assert_array_equal(signal, before)
    np.testing.assert_allclose(spoiled[2], spoiled[1] - spoiled[0], atol=1e-3)  # Einthoven's law still holds


def test_the_most_suspicious_are_a_twentieth() -> None:
    score = np.random.default_rng(0).random(1000)
    refused = most_suspicious(score)
    assert refused.sum() == 50
    assert score[refused].min() > score[~refused].max()


def test_the_report_counts_what_is_amiss() -> None:
    sound = {"flat_leads": [], "missing": 0.0, "clipped": 0.0, "period_from": "r_peaks"}
    assert amiss(sound) == 0.0
    for worse in ({"flat_leads": ["I"]}, {"missing": 0.2}, {"clipped": 0.1}, {"period_from": "none"}):
        assert amiss(sound | worse) > 0.0
