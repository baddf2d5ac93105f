"""From recordings to the model's input: units, rates, leads, beats, and what is refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_builders.synthetic import synthetic_ecg
from modeling_ecgmoe.feature_extraction_ecgmoe import EcgMoeFeatureExtractor
from modeling_ecgmoe.leads import LEADS

RATES = (100, 250, 257, 360, 500, 1000)


@pytest.fixture
def extractor() -> EcgMoeFeatureExtractor:
    return EcgMoeFeatureExtractor()


def ecg(sampling_rate: float = 250, **heart: Any) -> np.ndarray:
    return synthetic_ecg(sampling_rate=sampling_rate, **{"noise_mv": 0.005, **heart}).ecg.signal


def tone(frequency_hz: float, sampling_rate: float, duration_s: float = 10.0, leads: int = 12) -> np.ndarray:
    """A tone of 1 mV in every lead."""
    time_s = np.arange(round(duration_s * sampling_rate)) / sampling_rate
    return np.tile(np.cos(2 * np.pi * frequency_hz * time_s), (leads, 1)).astype(np.float32)


def slow_heart(sampling_rate: float) -> np.ndarray:
    """Beats without anything above 40 Hz, so that every rate sees all there is; (12, samples), 10 s at 75 bpm."""
    time_s = np.arange(round(10 * sampling_rate)) / sampling_rate
    beats = np.exp(-0.5 * ((time_s[:, None] - np.arange(0.4, 10, 0.8)) / 0.02) ** 2).sum(axis=1)
    waves = np.exp(-0.5 * ((time_s[:, None] - np.arange(0.65, 10, 0.8)) / 0.06) ** 2).sum(axis=1)
    return (np.linspace(0.4, 1.5, 12)[:, None] * beats + np.linspace(0.3, -0.1, 12)[:, None] * waves).astype(
        np.float32
    )


def in_mv(features: Any, extractor: EcgMoeFeatureExtractor) -> np.ndarray:
    return np.asarray(features["input_values"])[0] * extractor.scale_mv


# Shapes and batches


@pytest.mark.parametrize("start", [57, 58, 101, 144])
def test_no_r_peak_is_written_like_padding_where_a_recording_begins_on_a_beat(
    extractor: EcgMoeFeatureExtractor, start: int
) -> None:
    signal = ecg(sampling_rate=100, rate_bpm=140, duration_s=8, rhythm="paced")[:, start:]
    features = extractor(signal, sampling_rate=100, lead_names=LEADS, return_tensors="np")
    assert features["r_peaks"].shape[1] >= 12
    assert (features["r_peaks"] >= 0).all()


def test_a_recording_becomes_a_batch_of_one(extractor: EcgMoeFeatureExtractor) -> None:
    features = extractor(ecg(rate_bpm=60), sampling_rate=250, lead_names=LEADS, return_tensors="np")
    shapes = {name: features[name].shape for name in extractor.model_input_names}
    assert shapes == {
        "input_values": (1, 12, 1000), "lead_mask": (1, 12), "sample_mask": (1, 1000), "r_peaks": (1, 10),
        "rr_intervals_s": (1, 10), "period_s": (1,),
    }  # fmt: skip
    assert features["input_values"].dtype == np.float32
    assert features["lead_mask"].all()
    assert features["sample_mask"].all()


def test_tensors_are_what_the_arrays_are(extractor: EcgMoeFeatureExtractor) -> None:
    signal = ecg()
    arrays = extractor(signal, 250, LEADS, return_tensors="np")
    tensors = extractor(signal, 250, LEADS, return_tensors="pt")
    for name in extractor.model_input_names:
        assert isinstance(tensors[name], torch.Tensor)
        np.testing.assert_array_equal(tensors[name].numpy(), arrays[name])


def test_a_list_of_recordings_is_the_same_as_one_array(extractor: EcgMoeFeatureExtractor) -> None:
    signals = np.stack([ecg(seed=1, variation=0.1), ecg(seed=2, variation=0.1)])
    from_array = extractor(signals, 250, LEADS, return_tensors="np")
    from_list = extractor(list(signals), [250, 250], [LEADS, LEADS], return_tensors="np")
    for name in extractor.model_input_names:
        np.testing.assert_array_equal(from_array[name], from_list[name])


def test_a_recording_is_the_same_alone_and_in_a_batch(extractor: EcgMoeFeatureExtractor) -> None:
    signals, rates = [ecg(500, rate_bpm=110), ecg(250, rate_bpm=50)[:, :1500]], [500, 250]
    batch = extractor(signals, rates, LEADS, return_tensors="np")
    assert batch["input_values"].shape == (2, 12, 1000)
    for row, (signal, rate) in enumerate(zip(signals, rates, strict=True)):
        alone = extractor(signal, rate, LEADS, return_tensors="np")
        length, beats = alone["input_values"].shape[2], alone["r_peaks"].shape[1]
        np.testing.assert_array_equal(batch["input_values"][row, :, :length], alone["input_values"][0])
        np.testing.assert_array_equal(batch["r_peaks"][row, :beats], alone["r_peaks"][0])
        np.testing.assert_array_equal(batch["rr_intervals_s"][row, :beats], alone["rr_intervals_s"][0])
        assert batch["quality"][row] == alone["quality"][0]


def test_padding_is_zero_masked_and_without_beats(extractor: EcgMoeFeatureExtractor) -> None:
    batch = extractor([ecg(rate_bpm=120), ecg(rate_bpm=40)[:, :1250]], 250, LEADS, return_tensors="np")
    assert (batch["input_values"][1, :, 500:] == 0).all()
    assert batch["sample_mask"].sum(axis=1).tolist() == [1000, 500]
    assert batch["r_peaks"].shape == (2, 20)
    assert (batch["r_peaks"][1, 4:] == -1).all()
    assert (batch["rr_intervals_s"][1, 4:] == 0).all()


def test_settings_and_input_survive_saving(tmp_path: Path) -> None:
    changed = EcgMoeFeatureExtractor(window_s=8.0, high_pass_hz=(0.3, 0.6), clip_mv=2.0, max_beats=7)
    changed.save_pretrained(tmp_path)
    loaded = EcgMoeFeatureExtractor.from_pretrained(tmp_path)
    assert {**loaded.to_dict(), "auto_map": None} == {**changed.to_dict(), "auto_map": None}
    signal = ecg(rate_bpm=90)
    first, second = (e(signal, 250, LEADS, return_tensors="np") for e in (changed, loaded))
    for name in changed.model_input_names:
        np.testing.assert_array_equal(first[name], second[name])


# Leads


def test_leads_in_another_order_give_identical_input(extractor: EcgMoeFeatureExtractor) -> None:
    signal, order = ecg(), np.random.default_rng(0).permutation(12)
    first = extractor(signal, 250, LEADS, return_tensors="np")
    second = extractor(signal[order], 250, [LEADS[i].lower() for i in order], return_tensors="np")
    for name in extractor.model_input_names:
        np.testing.assert_array_equal(first[name], second[name])
    assert second["quality"][0]["leads"] == list(LEADS)


def test_leads_i_and_ii_bring_all_limb_leads(extractor: EcgMoeFeatureExtractor) -> None:
    signal = ecg(noise_mv=0.0)
    whole = extractor(signal, 250, LEADS, return_tensors="np")
    two = extractor(signal[:2], 250, LEADS[:2], return_tensors="np")
    assert two["lead_mask"][0].tolist() == [True] * 6 + [False] * 6
    assert two["quality"][0]["leads"] == ["I", "II"]
    np.testing.assert_allclose(two["input_values"][0, :6], whole["input_values"][0, :6], atol=1e-4)
    assert (two["input_values"][0, 6:] == 0).all()


def test_a_flat_lead_among_twelve_is_masked_and_reported(extractor: EcgMoeFeatureExtractor) -> None:
    features = extractor(ecg(flat_leads=["V3"], noise_mv=0.0) + 0.7, 250, LEADS, return_tensors="np")
    assert [LEADS[i] for i in np.flatnonzero(~features["lead_mask"][0])] == ["V3"]
    assert features["quality"][0]["flat_leads"] == ["V3"]
    assert "V3" not in features["quality"][0]["leads"]
    assert (features["input_values"][0, LEADS.index("V3")] == 0).all()
    assert features["sample_mask"].all()


# Amplitude and rate


@pytest.mark.parametrize("rate", RATES)
def test_a_tone_in_the_pass_band_keeps_its_millivolts_and_its_phase(
    extractor: EcgMoeFeatureExtractor, rate: float
) -> None:
    features = extractor(tone(5, rate), rate, LEADS, return_tensors="np")
    expected = tone(5, 100)
    np.testing.assert_allclose(in_mv(features, extractor)[:, 100:-100], expected[:, 100:-100], atol=0.01)


@pytest.mark.parametrize("frequency_hz", [60, 95, 105, 110, 150, 240])
def test_a_tone_above_the_output_does_not_come_back_as_another(
    extractor: EcgMoeFeatureExtractor, frequency_hz: float
) -> None:
    features = extractor(tone(frequency_hz, 500), 500, LEADS, return_tensors="np")
    # At the ends, where the mirrored tone has a kink, something of it lies in the pass band.
    assert np.abs(in_mv(features, extractor)[:, 50:-50]).max() < 0.01


def test_the_same_heart_at_any_rate_gives_the_same_input(extractor: EcgMoeFeatureExtractor) -> None:
    reference = in_mv(extractor(slow_heart(2000), 2000, LEADS, return_tensors="np"), extractor)
    for rate in RATES:
        found = in_mv(extractor(slow_heart(rate), rate, LEADS, return_tensors="np"), extractor)
        assert found.shape == reference.shape
        np.testing.assert_allclose(found, reference, atol=0.005, err_msg=f"{rate} Hz")


def test_the_same_heart_at_any_rate_has_the_same_beats(extractor: EcgMoeFeatureExtractor) -> None:
    for rate in RATES:
        features = extractor(slow_heart(rate), rate, LEADS, return_tensors="np")
        np.testing.assert_allclose(features["r_peaks"][0], np.arange(40, 1000, 80), atol=0.2, err_msg=f"{rate} Hz")
        np.testing.assert_allclose(features["rr_intervals_s"][0, 1:], 0.8, atol=0.002)
        assert features["rr_intervals_s"][0, 0] == 0
        assert features["period_s"][0] == pytest.approx(0.8, abs=0.0005)


def test_an_offset_of_the_baseline_changes_nothing(extractor: EcgMoeFeatureExtractor) -> None:
    signal = ecg()
    first, second = (extractor(s, 250, LEADS, return_tensors="np") for s in (signal, signal + 3.0))
    np.testing.assert_allclose(first["input_values"], second["input_values"], atol=1e-3)
    np.testing.assert_allclose(first["r_peaks"], second["r_peaks"], atol=0.01)


def test_amplitudes_beyond_the_clip_are_cut_and_counted(extractor: EcgMoeFeatureExtractor) -> None:
    features = extractor(6.5 * tone(4.7, 250), 250, LEADS, return_tensors="np")
    assert np.abs(in_mv(features, extractor)).max() == pytest.approx(extractor.clip_mv)
    # A cosine of 6.5 mV is beyond 5 mV for 2 / pi * arccos(5 / 6.5) of its time.
    assert features["quality"][0]["clipped"] == pytest.approx(2 / np.pi * np.arccos(5 / 6.5), abs=0.02)


# Missing samples


def test_a_gap_in_one_lead_is_zero_and_the_rest_is_untouched(extractor: EcgMoeFeatureExtractor) -> None:
    signal = slow_heart(250)
    gappy = signal.copy()
    gappy[7, 1000:1250] = np.nan  # V2 between 4 and 5 s
    whole, found = (extractor(s, 250, LEADS, return_tensors="np") for s in (signal, gappy))
    assert (found["input_values"][0, 7, 401:499] == 0).all()
    assert found["lead_mask"].all()
    assert found["sample_mask"].all()
    assert found["quality"][0]["missing"] == pytest.approx(0.1 / 12, abs=1e-3)
    others = [i for i in range(12) if i != 7]
    np.testing.assert_allclose(found["input_values"][0, others], whole["input_values"][0, others], atol=1e-5)
    np.testing.assert_allclose(found["input_values"][0, 7, 600:], whole["input_values"][0, 7, 600:], atol=0.4)


def test_a_gap_in_all_leads_is_not_known(extractor: EcgMoeFeatureExtractor) -> None:
    signal = slow_heart(250)
    signal[:, 1000:1250] = np.nan
    features = extractor(signal, 250, LEADS, return_tensors="np")
    assert not features["sample_mask"][0, 401:499].any()
    assert features["sample_mask"][0].sum() == pytest.approx(900, abs=2)
    assert np.isfinite(features["input_values"]).all()


def test_infinite_samples_count_as_missing(extractor: EcgMoeFeatureExtractor) -> None:
    signal = slow_heart(250)
    signal[3, 500:510] = np.inf
    features = extractor(signal, 250, LEADS, return_tensors="np")
    assert np.isfinite(features["input_values"]).all()
    assert features["quality"][0]["missing"] > 0


def test_a_flat_limb_lead_derives_no_others(extractor: EcgMoeFeatureExtractor) -> None:
    signal = ecg(noise_mv=0.01)[:2].copy()
    signal[0] = 0.2
    features = extractor(signal, 250, ["I", "II"], return_tensors="np")
    assert [LEADS[i] for i in np.flatnonzero(features["lead_mask"][0])] == ["II"]
    assert features["quality"][0]["leads"] == ["II"]
    assert features["quality"][0]["flat_leads"] == ["I"]


# Beats and period


def test_the_period_of_a_single_beat_is_unknown(extractor: EcgMoeFeatureExtractor) -> None:
    time_s = np.arange(1000) / 100
    beat = np.exp(-0.5 * ((time_s - 5.0) / 0.02) ** 2)
    features = extractor(np.outer(np.linspace(0.5, 1.5, 12), beat), 100, LEADS, return_tensors="np")
    np.testing.assert_allclose(features["r_peaks"], [[500.0]], atol=0.1)
    np.testing.assert_array_equal(features["rr_intervals_s"], [[0.0]])
    assert features["period_s"][0] == 0
    assert features["quality"][0] | {"leads": []} == {
        "leads": [], "flat_leads": [], "beats": 1, "period_from": "none", "beat_likeness": None, "clipped": 0.0,
        "missing": 0.0,
    }  # fmt: skip


def test_no_more_beats_than_the_model_has_room_for(extractor: EcgMoeFeatureExtractor) -> None:
    few = EcgMoeFeatureExtractor(max_beats=5)(ecg(rate_bpm=90), 250, LEADS, return_tensors="np")
    all_of_them = extractor(ecg(rate_bpm=90), 250, LEADS, return_tensors="np")
    np.testing.assert_array_equal(few["r_peaks"][0], all_of_them["r_peaks"][0, :5])


# Long recordings


@pytest.mark.parametrize(
    ("duration_s", "starts_s"), [(7, [0]), (10, [0]), (20, [0, 10]), (35, [0, 10, 20, 25]), (30.5, [0, 10, 20])]
)
def test_windows_cover_a_long_recording(
    extractor: EcgMoeFeatureExtractor, duration_s: float, starts_s: list[float]
) -> None:
    samples = round(duration_s * 250)
    windows = extractor.windows(np.arange(samples)[None], 250)
    assert [window[0, 0] / 250 for window in windows] == starts_s
    covered = np.unique(np.concatenate([window[0] for window in windows]))
    assert samples - len(covered) < extractor.min_duration_s * 250


def test_a_longer_recording_is_cut_to_its_first_window(extractor: EcgMoeFeatureExtractor) -> None:
    signal = ecg(duration_s=14)
    whole = extractor(signal, 250, LEADS, return_tensors="np")
    first = extractor(signal[:, :2500], 250, LEADS, return_tensors="np")
    np.testing.assert_array_equal(whole["input_values"], first["input_values"])


# What is refused


@pytest.mark.parametrize("given", [{"sampling_rate": 250}, {"lead_names": LEADS}, {}])
def test_a_signal_without_rate_or_names_is_refused(extractor: EcgMoeFeatureExtractor, given: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"`sampling_rate` \(Hz\) and `lead_names` must be given with the signal"):
        extractor(ecg(), **given)


@pytest.mark.parametrize("rate", [0, -100, 5, 49.9, 20_000, float("nan"), float("inf")])
def test_an_absurd_rate_is_refused_with_the_plausible_ones(extractor: EcgMoeFeatureExtractor, rate: float) -> None:
    with pytest.raises(ValueError, match=r"sampling rate of .* Hz is not plausible.*50 to 10000 Hz, pass the right"):
        extractor(ecg(), rate, LEADS)


@pytest.mark.parametrize("samples", [0, 1, 125])
def test_too_short_a_recording_is_refused_with_its_length(extractor: EcgMoeFeatureExtractor, samples: int) -> None:
    with pytest.raises(
        ValueError, match=rf"{samples / 250:.2f} s long \({samples} samples at 250 Hz\), shorter.* 2 s"
    ):
        extractor(ecg()[:, :samples], 250, LEADS)


@pytest.mark.parametrize(("factor", "unit"), [(1000.0, "uV"), (0.001, "V")])
@pytest.mark.parametrize("rows", [slice(None), slice(1, 2)], ids=["twelve leads", "one lead"])
def test_another_unit_than_millivolts_is_refused(
    extractor: EcgMoeFeatureExtractor, factor: float, unit: str, rows: slice
) -> None:
    heart = slow_heart(250)[rows]
    assert extractor(heart, 250, LEADS[rows])["quality"][0]["clipped"] == 0.0
    message = rf"standard deviation is .* mV, .*is the signal in {unit}\? Pass it in mV"
    with pytest.raises(ValueError, match=f"{message}|all leads are flat .*is the gain right"):
        extractor(heart * factor, 250, LEADS[rows])


def test_one_lead_without_its_axis_is_refused_with_the_way_out(extractor: EcgMoeFeatureExtractor) -> None:
    with pytest.raises(ValueError, match=r"found \(2500,\); pass one lead as signal\[None\]"):
        extractor(slow_heart(250)[1], 250, ["II"])


@pytest.mark.parametrize("level_mv", [0.0, 1.7])
def test_a_flat_line_is_refused(extractor: EcgMoeFeatureExtractor, level_mv: float) -> None:
    with pytest.raises(ValueError, match=r"all leads are flat \(I, V1\); is an electrode connected"):
        extractor(np.full((2, 2500), level_mv), 250, ["I", "V1"])


def test_a_lead_of_nothing_but_nan_is_left_out_and_named_as_a_flat_one_is(extractor: EcgMoeFeatureExtractor) -> None:
    broken, flat = ecg(), ecg()
    broken[10], flat[10] = np.nan, 0.7
    found, expected = (extractor(signal, 250, LEADS, return_tensors="np") for signal in (broken, flat))
    assert found["quality"][0]["flat_leads"] == ["V5"]
    assert not found["lead_mask"][0, 10]
    np.testing.assert_array_equal(found["input_values"], expected["input_values"])
    with pytest.raises(ValueError, match="lead I holds no finite sample; leave it out"):
        extractor(np.full((12, 2500), np.nan), 250, LEADS)


def test_samples_by_leads_is_refused_by_its_shape_and_not_as_too_short(extractor: EcgMoeFeatureExtractor) -> None:
    with pytest.raises(ValueError, match=r"with 12 leads, found \(2500, 12\); transpose it"):
        extractor(ecg().T, 250, LEADS)


def test_unknown_lead_names_are_refused_with_the_known_ones(extractor: EcgMoeFeatureExtractor) -> None:
    with pytest.raises(ValueError, match=r"none of the lead names \['a', 'b'\].*I, II, III, aVR"):
        extractor(ecg()[:2], 250, ["a", "b"])


def test_a_signal_with_its_axes_swapped_is_refused_with_the_question(extractor: EcgMoeFeatureExtractor) -> None:
    with pytest.raises(ValueError, match=r"found shape .*Is it \(samples, leads\)\?"):
        extractor(np.tile(ecg().T, (1, 50)), 250, LEADS)


@pytest.mark.parametrize(
    ("rates", "names", "message"),
    [([250], LEADS, "2 signals but 1 sampling_rate"), (250, [LEADS] * 3, "2 signals but 3 lead_names")],
)
def test_a_batch_needs_a_rate_and_names_for_all_or_for_each(
    extractor: EcgMoeFeatureExtractor, rates: Any, names: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=f"{message}; pass one for all, or one for each"):
        extractor([ecg(), ecg()], rates, names)


def test_no_interval_spans_a_gap_in_which_a_beat_may_be(extractor: EcgMoeFeatureExtractor) -> None:
    signal = ecg(rate_bpm=80)
    signal[:, 1000:1400] = np.nan  # 1.6 s of 10
    features = extractor(signal, sampling_rate=250, lead_names=LEADS, return_tensors="np")
    assert features["period_s"][0] == pytest.approx(0.75, abs=0.01)
    assert features["rr_intervals_s"].max() < 0.8


@pytest.mark.parametrize("duration_s", [12.0, 13.0, 25.0, 32.0])
def test_beats_of_overlapping_windows_count_once(extractor: EcgMoeFeatureExtractor, duration_s: float) -> None:
    prepared = extractor.prepare(ecg(rate_bpm=60, duration_s=duration_s), 250, LEADS)
    assert prepared.quality["beats"] == pytest.approx(duration_s, abs=2)


def test_leads_are_those_of_any_window(extractor: EcgMoeFeatureExtractor) -> None:
    signal = ecg(duration_s=30)
    signal[6:, : 10 * 250] = 0.0
    assert extractor.prepare(signal, 250, LEADS).leads == list(LEADS)
