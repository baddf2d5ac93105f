"""Crops, disturbed recordings and recordings with fewer leads: beats stay where the signal has them."""

import pytest
import torch
from test_few_labels import synthetic_records

from records import crop, disturb, with_fewer_leads


def ramps(batch: int = 4, samples: int = 1000) -> dict[str, torch.Tensor]:
    """Recordings whose samples say where they are, with a beat every 80 samples from 40 on."""
    peaks = torch.arange(40, samples, 80.0).repeat(batch, 1)
    intervals = torch.full_like(peaks, 0.8)
    intervals[:, 0] = 0.0
    return {
        "input_values": torch.arange(samples, dtype=torch.float32).repeat(batch, 12, 1),
        "lead_mask": torch.ones(batch, 12, dtype=torch.bool),
        "sample_mask": torch.ones(batch, samples, dtype=torch.bool),
        "r_peaks": peaks,
        "rr_intervals_s": intervals,
        "period_s": torch.full((batch,), 0.8),
    }


def test_a_crop_takes_its_beats_along() -> None:
    cropped = crop(ramps(), 512, 100)
    assert cropped["input_values"].shape == (4, 12, 512)
    for values, peaks, intervals, period in zip(
        cropped["input_values"], cropped["r_peaks"], cropped["rr_intervals_s"], cropped["period_s"], strict=True
    ):
        start = int(values[0, 0])
        torch.testing.assert_close(values[0], torch.arange(start, start + 512.0))
        true = torch.arange(40, 1000, 80.0)
        inside = true[(true >= start) & (true < start + 512)] - start
        torch.testing.assert_close(peaks[peaks >= 0], inside)
        torch.testing.assert_close(intervals[: len(inside)], torch.tensor([0.0] + [0.8] * (len(inside) - 1)))
        assert (intervals[len(inside) :] == 0).all()
        assert period.item() == pytest.approx(0.8)


def test_crops_start_at_different_moments() -> None:
    torch.manual_seed(0)
    starts = crop(ramps(64), 512, 100)["input_values"][:, 0, 0]
    assert len(starts.unique()) > 32
    assert starts.min() >= 0
    assert starts.max() <= 488


def test_a_recording_shorter_than_the_crop_stays_whole() -> None:
    whole = ramps(samples=400)
    assert crop(whole, 512, 100) is whole


def test_a_crop_of_a_short_recording_lies_within_it() -> None:
    known = torch.zeros(64, 1000, dtype=torch.bool)
    known[:, :300] = True
    signal = {"input_values": torch.randn(64, 12, 1000), "sample_mask": known, "r_peaks": torch.full((64, 1), -1.0)}
    assert crop(signal, 512, 100)["sample_mask"].sum(dim=1).tolist() == [300] * 64
    known[:, :600] = True
    found = crop(signal, 512, 100)["sample_mask"].sum(dim=1)
    assert found.min() == 512


def test_a_crop_without_two_beats_knows_no_period() -> None:
    lonely = ramps() | {"r_peaks": torch.full((4, 1), 500.0), "rr_intervals_s": torch.zeros(4, 1)}
    cropped = crop(lonely, 512, 100)
    assert (cropped["period_s"] == 0).all()
    assert (cropped["rr_intervals_s"] == 0).all()


def test_disturbing_keeps_shapes_masks_and_at_least_one_lead() -> None:
    torch.manual_seed(0)
    signal = ramps(256)
    disturbed = disturb(signal, 100, noise=1.0, lead_dropout=1.0)
    assert disturbed["input_values"].shape == signal["input_values"].shape
    assert disturbed["lead_mask"].any(dim=1).all()
    assert not disturbed["lead_mask"].all()
    assert (disturbed["input_values"][~disturbed["lead_mask"]] == 0).all()
    assert torch.isfinite(disturbed["input_values"]).all()
    assert disturbed["r_peaks"].shape == disturbed["rr_intervals_s"].shape


def test_leads_are_lost_as_recorders_lack_them() -> None:
    torch.manual_seed(0)
    lead_mask = disturb(ramps(1024), 100, noise=0.0, lead_dropout=1.0)["lead_mask"]
    limbs, leads = lead_mask[:, :6].sum(dim=1), lead_mask.sum(dim=1)
    # Two limb leads determine the others, so there are one, six or none of them.
    assert set(limbs.tolist()) == {0, 1, 6}
    assert (leads[limbs == 1] == 1).all()
    alone = lead_mask[leads == 1]
    assert 0.35 < len(alone) / 1024 < 0.5
    assert alone[:, :2].float().sum() > 0.5 * len(alone)  # I and II are what wrist and chest devices record
    assert alone.any(dim=0).all()


def test_the_share_of_records_that_lose_leads_is_kept() -> None:
    torch.manual_seed(0)
    lead_mask = disturb(ramps(1024), 100, noise=0.0, lead_dropout=0.25)["lead_mask"]
    assert 0.18 < (~lead_mask).any(dim=1).float().mean() < 0.28


def test_a_record_whose_only_leads_would_be_lost_keeps_them() -> None:
    torch.manual_seed(0)
    single = ramps(256)
    single["lead_mask"] = torch.zeros_like(single["lead_mask"]).index_fill(1, torch.tensor([7]), True)
    assert torch.equal(disturb(single, 100, lead_dropout=1.0)["lead_mask"], single["lead_mask"])


def test_disturbed_beats_are_near_the_true_ones_and_intervals_follow_them() -> None:
    torch.manual_seed(0)
    signal = ramps(64)
    disturbed = disturb(signal, 100, noise=0.0, lead_dropout=0.0)
    assert disturbed["lead_mask"].all()
    found = disturbed["r_peaks"] >= 0
    assert 0.95 < found.float().sum() / signal["r_peaks"].numel() < 1.0
    away = (disturbed["r_peaks"][..., None] - signal["r_peaks"][:, None]).abs().amin(dim=-1)
    assert away[found].max() < 3.0
    peaks, intervals = disturbed["r_peaks"], disturbed["rr_intervals_s"]
    both = found[:, 1:] & (intervals[:, 1:] > 0)
    torch.testing.assert_close(intervals[:, 1:][both], (torch.diff(peaks, dim=1) / 100)[both])
    assert (intervals[:, 0] == 0).all()


def test_disturbing_twice_gives_two_different_recordings() -> None:
    signal = ramps()
    first, second = disturb(signal, 100), disturb(signal, 100)
    assert not torch.equal(first["input_values"], second["input_values"])
    torch.testing.assert_close(signal["input_values"], ramps()["input_values"])


def test_recordings_with_fewer_leads_are_the_same_otherwise() -> None:
    torch.manual_seed(0)
    records = synthetic_records(40)
    before = records.signal["lead_mask"].clone()
    fewer = with_fewer_leads(records)
    whole, item = records.__getitems__([0, 7, 31]), fewer.__getitems__([0, 7, 31])
    kept = item["signal"]["lead_mask"]
    assert torch.equal(records.signal["lead_mask"], before)
    assert kept.any(dim=1).all()
    assert (fewer.signal["lead_mask"].sum(dim=1) < before.sum(dim=1)).float().mean() > 0.9
    assert not (fewer.signal["lead_mask"] & ~before).any()
    values = whole["signal"]["input_values"]
    assert torch.equal(item["signal"]["input_values"], values * kept[:, :, None])
    assert torch.equal(item["signal"]["r_peaks"], whole["signal"]["r_peaks"])
    assert len(fewer) == len(records)
