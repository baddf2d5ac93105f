"""From files to answers: what may not change them, what a file must say, and many files in a row."""

import itertools
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_model import save_tiny_model

from data_builders.synthetic import SyntheticEcg, synthetic_ecg, write_wfdb
from modeling_ecgmoe.adapters import MultiTask
from modeling_ecgmoe.answer_files import show_record
from modeling_ecgmoe.cli import main
from modeling_ecgmoe.commands import load_model
from modeling_ecgmoe.ecg_files import Ecg, EcgFileError, EcgFileWarning, read_ecg
from modeling_ecgmoe.leads import LEADS
from modeling_ecgmoe.prediction import FileFacts, predict_record, predict_records

ROOT = Path(__file__).resolve().parents[1]
HUB_MODEL = ROOT / "hub" / "model"
WriteRecord = Callable[..., tuple[Path, SyntheticEcg]]

needs_bundled_weights = pytest.mark.skipif(
    not list(ROOT.glob("hub/adapters/*/task.json")), reason="hub/ holds no trained adapters yet"
)


@pytest.fixture(scope="session")
def many(tmp_path_factory: pytest.TempPathFactory) -> MultiTask:
    return load_model(str(save_tiny_model(tmp_path_factory.mktemp("hub"))), None)


@pytest.fixture(scope="session")
def bundled() -> MultiTask:
    return load_model(str(HUB_MODEL), None)


def save_npz(path: Path, ecg: Ecg) -> Path:
    np.savez(path, signal=ecg.signal, sampling_rate=ecg.sampling_rate, lead_names=list(ecg.lead_names), unit="mV")
    return path


# Signals in every shape


def test_the_mean_rr_interval_of_a_regular_heart_is_near_the_truth(many: MultiTask, write_record: WriteRecord) -> None:
    # The task starts from the measured interval, and an untrained head moves it by a few milliseconds only.
    path, truth = write_record(rate_bpm=60)
    line, _ = predict_record(many, path)
    assert line["tasks"]["rr_interval"]["value"] == pytest.approx(truth.rr_interval_ms, abs=30)


def test_leads_in_another_order_give_identical_answers(many: MultiTask, tmp_path: Path) -> None:
    ecg = synthetic_ecg(sampling_rate=500, noise_mv=0.01).ecg
    order = np.random.default_rng(1).permutation(len(LEADS))
    shuffled = Ecg(ecg.signal[order], ecg.sampling_rate, tuple(LEADS[i] for i in order))
    first, _ = predict_record(many, write_wfdb(ecg, tmp_path, "ordered"))
    second, _ = predict_record(many, write_wfdb(shuffled, tmp_path, "shuffled"))
    assert second["tasks"] == first["tasks"]
    assert second["leads"] == first["leads"]


def test_a_file_with_leads_i_and_ii_is_answered_and_names_them(many: MultiTask, tmp_path: Path) -> None:
    ecg = synthetic_ecg(sampling_rate=500).ecg
    line, _ = predict_record(many, write_wfdb(Ecg(ecg.signal[:2], ecg.sampling_rate, ("I", "II")), tmp_path, "two"))
    assert line["status"] == "ok"
    assert line["leads"] == ["I", "II"]


def test_a_choice_of_leads_answers_as_a_file_of_these_leads(many: MultiTask, tmp_path: Path) -> None:
    ecg = synthetic_ecg(sampling_rate=250).ecg
    whole = write_wfdb(ecg, tmp_path, "whole")
    two = write_wfdb(Ecg(ecg.signal[[0, 7]], ecg.sampling_rate, ("I", "V2")), tmp_path, "two")
    chosen, _ = predict_record(many, whole, FileFacts(leads=("v2", "Lead I")))
    assert chosen["leads"] == ["I", "V2"]
    assert chosen["tasks"] == predict_record(many, two)[0]["tasks"]


def test_the_caller_names_channels_whose_own_names_say_nothing(many: MultiTask, tmp_path: Path) -> None:
    ecg = synthetic_ecg(sampling_rate=250).ecg
    named = write_wfdb(Ecg(ecg.signal[:2], ecg.sampling_rate, ("I", "II")), tmp_path, "named")
    numbered = write_wfdb(Ecg(ecg.signal[:2], ecg.sampling_rate, ("ECG 8", "ECG 9")), tmp_path, "numbered")
    assert predict_record(many, numbered)[0]["status"] == "error"
    line, _ = predict_record(many, numbered, FileFacts(leads=("I", "II")))
    assert line["tasks"] == predict_record(many, named)[0]["tasks"]


@needs_bundled_weights
def test_what_passes_in_ten_seconds_is_found_in_its_window_though_the_mean_hides_it(
    bundled: MultiTask, tmp_path: Path
) -> None:
    sinus, fibrillation = (
        synthetic_ecg(sampling_rate=250, duration_s=d, rate_bpm=72, rhythm=r, noise_mv=0.01, seed=3).ecg.signal
        for d, r in ((60.0, "sinus"), (10.0, "atrial_fibrillation"))
    )
    burst = sinus.copy()
    burst[:, 30 * 250 : 40 * 250] = fibrillation
    calm, line = (
        predict_record(bundled, write_wfdb(Ecg(signal, 250.0, LEADS), tmp_path, name))[0]
        for signal, name in ((sinus, "calm"), (burst, "burst"))
    )
    answer = line["tasks"]["arrhythmia"]
    assert "AFIB" not in calm["tasks"]["arrhythmia"]["windows"]
    assert "AFIB" not in answer["labels"]
    assert [answer["windows"]["AFIB"][key] for key in ("windows", "of", "start_s")] == [1, 6, 30.0]
    assert answer["windows"]["AFIB"]["highest"] > 0.5 > answer["probabilities"]["AFIB"]
    assert answer["windows"]["SR"]["windows"] == 5
    shown = show_record(line, bundled.cards)
    assert re.search(r"AFIB 0\.\d\d at 30 s, in 1 of 6 windows  atrial fibrillation", shown)
    alone, _ = predict_record(bundled, write_wfdb(Ecg(fibrillation, 250.0, LEADS), tmp_path, "alone"))
    assert "windows" not in alone["tasks"]["arrhythmia"]


def test_leads_that_were_scaled_one_by_one_are_said_so_in_their_line(many: MultiTask, tmp_path: Path) -> None:
    signal = synthetic_ecg(sampling_rate=250).ecg.signal
    alike = signal / np.ptp(signal, axis=1, keepdims=True)
    path = save_npz(tmp_path / "alike.npz", Ecg(alike, 250.0, LEADS))
    with pytest.warns(EcgFileWarning, match=r"alike\.npz: all its leads range over 1 mV"):
        line, _ = predict_record(many, path)
    assert line["quality"]["warnings"][0].startswith("all its leads range over 1 mV: they were scaled one by one")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert main(["predict", str(path), "--model", many.name, "--out", str(tmp_path / "o.jsonl")]) == 0


def test_windows_that_are_refused_are_counted(many: MultiTask, tmp_path: Path) -> None:
    signal = synthetic_ecg(sampling_rate=250, duration_s=30).ecg.signal.copy()
    signal[:, 2500:5000] = 0.0
    line, _ = predict_record(many, write_wfdb(Ecg(signal, 250.0, LEADS), tmp_path, "gap"))
    assert (line["quality"]["windows"], line["quality"]["windows_refused"]) == (2, 1)


def test_a_lead_that_the_file_does_not_have_is_refused_with_those_it_has(many: MultiTask, tmp_path: Path) -> None:
    ecg = synthetic_ecg(sampling_rate=250).ecg
    path = write_wfdb(Ecg(ecg.signal[:2], ecg.sampling_rate, ("I", "II")), tmp_path, "two")
    line, _ = predict_record(many, path, FileFacts(leads=("I", "V3")))
    assert line["error"] == "two: it has no lead V3, its leads are I, II; choose among them"


def test_all_that_a_file_does_not_say_is_asked_for_at_once(many: MultiTask, tmp_path: Path) -> None:
    np.save(tmp_path / "bare.npy", synthetic_ecg().ecg.signal)
    line, _ = predict_record(many, tmp_path / "bare.npy")
    asked = ("sampling_rate (--sampling_rate), in Hz", "unit (--unit): V, mV, uV or nV", "(--leads), 12 in file order")
    assert all(option in line["error"] for option in asked)
    line, _ = predict_record(many, tmp_path / "bare.npy", FileFacts(leads=LEADS))
    assert all(option in line["error"] for option in asked[:2])
    assert "--leads" not in line["error"]


@pytest.mark.parametrize(("step", "rate"), [(0.002, 500), (2, 500), (1, 250), (4, 250)])
def test_a_column_of_times_without_unit_must_not_contradict_the_rate(tmp_path: Path, step: float, rate: int) -> None:
    path = tmp_path / "ecg.csv"
    path.write_text("time,I [mV]\n" + "".join(f"{i * step:g},{np.sin(i):.3f}\n" for i in range(1000)))
    assert read_ecg(path, sampling_rate=rate).sampling_rate == rate
    if step != 1:  # 0, 1, 2... count samples
        with pytest.raises(
            EcgFileError, match=f"rises by {step:g} a sample, and passed was 300 Hz; pass the right rate"
        ):
            read_ecg(path, sampling_rate=300)


def test_an_array_of_samples_by_leads_is_asked_for_the_names_of_its_leads(tmp_path: Path) -> None:
    np.save(tmp_path / "ecg.npy", np.zeros((5000, 12), np.float32))
    with pytest.raises(EcgFileError, match=r"\(--leads\), 12 in file order"):
        read_ecg(tmp_path / "ecg.npy")


@pytest.mark.parametrize("option", ["--sampling_rate", "--unit", "--leads"])
def test_a_fact_that_an_array_lacks_is_asked_for_by_the_name_of_the_option(
    many: MultiTask, tmp_path: Path, option: str
) -> None:
    np.save(tmp_path / "bare.npy", synthetic_ecg(sampling_rate=250).ecg.signal)
    facts = {"--sampling_rate": 250.0, "--unit": "mV", "--leads": LEADS} | {option: None}
    line, _ = predict_record(
        many, tmp_path / "bare.npy", FileFacts(*[facts[o] for o in ("--sampling_rate", "--leads", "--unit")])
    )
    assert f"({option})" in line["error"]


def test_a_long_recording_is_one_line_over_all_its_windows(many: MultiTask, write_record: WriteRecord) -> None:
    path, _ = write_record(duration_s=65, rate_bpm=60)
    line, prepared = predict_record(many, path)
    assert (line["duration_s"], line["quality"]["windows"]) == (65.0, 7)
    assert prepared is not None
    assert line["tasks"]["rr_interval"]["value"] == pytest.approx(1000, abs=30)


@needs_bundled_weights
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_the_same_heart_at_any_sampling_rate_gives_the_same_answers(
    bundled: MultiTask, tmp_path: Path, seed: int
) -> None:
    lines = []
    for rate in (100, 250, 500, 1000):
        ecg = synthetic_ecg(sampling_rate=rate, rate_bpm=60 + 10 * seed, wander_mv=0.03, variation=0.1, seed=seed).ecg
        lines.append(predict_record(bundled, write_wfdb(ecg, tmp_path, f"at_{rate}_hz"))[0])
    ages = [line["tasks"]["age"]["value"] for line in lines]
    assert max(ages) - min(ages) <= 1.0
    for task in ("arrhythmia", "sex", "statements", "superclass"):
        probabilities = np.array([list(line["tasks"][task]["probabilities"].values()) for line in lines])
        assert np.ptp(probabilities, axis=0).max() <= 0.02, task


@needs_bundled_weights
def test_the_bundled_model_tells_the_rhythms_of_the_bundled_examples(bundled: MultiTask) -> None:
    examples = ROOT / "examples"
    sinus, _ = predict_record(bundled, examples / "sinus_75bpm.hea")
    fibrillation, _ = predict_record(bundled, examples / "atrial_fibrillation.hea")
    slow, _ = predict_record(bundled, examples / "bradycardia_45bpm.hea")
    assert sinus["tasks"]["rr_interval"]["value"] == pytest.approx(800, abs=10)
    assert slow["tasks"]["rr_interval"]["value"] == pytest.approx(1333, abs=20)
    afib = [line["tasks"]["arrhythmia"]["probabilities"]["AFIB"] for line in (sinus, fibrillation)]
    assert afib[0] < 0.1 < afib[1]


# Many files


def test_lines_come_in_the_order_of_the_files_whatever_their_lengths(many: MultiTask, tmp_path: Path) -> None:
    durations = [30, 4, 45, 2.5, 10, 61, 3, 10]
    ecgs = [synthetic_ecg(sampling_rate=100, duration_s=duration).ecg for duration in durations]
    paths = [save_npz(tmp_path / f"{9 - i}.npz", ecg) for i, ecg in enumerate(ecgs)]
    lines = list(predict_records(many, paths, batch_size=4))
    assert [line["path"] for line in lines] == list(map(str, paths))
    assert [line["duration_s"] for line in lines] == durations


def numbers_of(line: dict[str, Any]) -> list[float]:
    """Every value and probability of a line."""
    answers = line["tasks"].values()
    return [p for answer in answers for p in answer.get("probabilities", {"value": answer.get("value")}).values()]


def test_a_record_is_answered_alike_alone_and_among_others(many: MultiTask, tmp_path: Path) -> None:
    hearts = ((10, 60), (4, 110), (23, 80), (4, 70), (2.5, 90))
    ecgs = [synthetic_ecg(sampling_rate=100, duration_s=duration, rate_bpm=bpm).ecg for duration, bpm in hearts]
    paths = [save_npz(tmp_path / f"{i}.npz", ecg) for i, ecg in enumerate(ecgs)]
    for together, path in zip(predict_records(many, paths), paths, strict=True):
        alone, _ = predict_record(many, path)
        # Sums in another order may round to the neighbouring hundredth.
        assert numbers_of(together) == pytest.approx(numbers_of(alone), abs=0.011)


def test_reading_ahead_does_not_grow_with_the_number_of_files(many: MultiTask, tmp_path: Path) -> None:
    path = save_npz(tmp_path / "a.npz", synthetic_ecg(sampling_rate=100, duration_s=30).ecg)
    taken = itertools.count()
    endless = (path for _ in taken)
    lines = predict_records(many, endless, batch_size=4)
    for _ in range(20):
        next(lines)
    lines.close()
    # 20 lines are out; 3 windows a record, so at most 2 batches of 4 windows wait beside what the threads hold.
    assert next(taken) <= 20 + 2 * 4 + 4
