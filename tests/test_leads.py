"""Lead names in every spelling, their order, and the limb leads that follow from others."""

from itertools import combinations

import numpy as np
import pytest

from modeling_ecgmoe.leads import LEADS, arrange_leads, canonical_lead, find_lead

LIMB_LEADS = LEADS[:6]


@pytest.fixture
def limb_signals() -> dict[str, np.ndarray]:
    """Six limb leads from random electrode potentials, by the definitions of Einthoven and Goldberger."""
    right_arm, left_arm, left_leg = np.random.default_rng(0).normal(size=(3, 500))
    return {
        "I": left_arm - right_arm,
        "II": left_leg - right_arm,
        "III": left_leg - left_arm,
        "aVR": right_arm - (left_arm + left_leg) / 2,
        "aVL": left_arm - (right_arm + left_leg) / 2,
        "aVF": left_leg - (right_arm + left_arm) / 2,
    }


@pytest.mark.parametrize("lead", LEADS)
@pytest.mark.parametrize("spelling", ["{}", "Lead {}", "lead_{}", "LEAD-{}", "MDC_ECG_LEAD_{}", "ECG {}", " {} "])
def test_a_recorders_spelling_is_recognised_in_any_case(lead: str, spelling: str) -> None:
    name = spelling.format(lead)
    assert find_lead(name) == find_lead(name.upper()) == find_lead(name.lower()) == lead


@pytest.mark.parametrize(
    ("name", "lead"),
    [("MLII", "II"), ("DI", "I"), ("D2", "II"), ("LIII", "III"), ("C1", "V1"), ("c6", "V6"), ("MV3", "V3")],
)
def test_other_names_of_the_same_lead_are_recognised(name: str, lead: str) -> None:
    assert canonical_lead(name) == lead


NO_LEADS = ("V7", "V10", "V1 R", "Vx", "RESP", "IV", "aV", "", "lead", "ECG", "V", "ECG1", "ECG 2")


@pytest.mark.parametrize("name", NO_LEADS)
def test_what_is_not_one_of_the_twelve_is_not_taken_for_one(name: str) -> None:
    assert find_lead(name) is None


def test_an_unknown_name_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"unknown lead name 'V9'.*I, II, III, aVR.*V6"):
        canonical_lead("V9")


def test_rows_come_out_in_the_canonical_order() -> None:
    signal = np.arange(12.0)[:, None] + np.array([[0.0, 0.5]])
    arranged, used = arrange_leads(signal[::-1], LEADS[::-1])
    np.testing.assert_array_equal(arranged, signal.astype(np.float32))
    assert used == list(LEADS)
    assert arranged.dtype == np.float32


@pytest.mark.parametrize("seed", range(3))
def test_the_order_of_the_leads_makes_no_difference(limb_signals: dict[str, np.ndarray], seed: int) -> None:
    rng = np.random.default_rng(seed)
    names = ["V2", "aVF", "I", "V5"]
    signal = np.stack([limb_signals["aVF"], limb_signals["I"], *rng.normal(size=(2, 500))])
    order = rng.permutation(4)
    first, _ = arrange_leads(signal, names)
    second, _ = arrange_leads(signal[order], [names[i] for i in order])
    np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize("pair", list(combinations(LIMB_LEADS, 2)), ids="+".join)
def test_any_two_limb_leads_give_the_other_four(limb_signals: dict[str, np.ndarray], pair: tuple[str, str]) -> None:
    arranged, used = arrange_leads(np.stack([limb_signals[name] for name in pair]), pair)
    np.testing.assert_allclose(arranged[:6], np.stack(list(limb_signals.values())), atol=1e-5)
    assert used == list(pair)


def test_derived_leads_follow_einthoven_and_goldberger_on_numbers() -> None:
    arranged, _ = arrange_leads(np.array([[1.0], [3.0]]), ["I", "II"])
    np.testing.assert_allclose(arranged[:6, 0], [1.0, 3.0, 2.0, -2.0, -0.5, 2.5], atol=1e-6)


def test_leads_that_were_recorded_are_not_replaced_by_derived_ones() -> None:
    recorded = np.array([[1.0], [3.0], [7.0]])  # III should be 2: a recorder's own noise stays what it is
    arranged, _ = arrange_leads(recorded, ["I", "II", "III"])
    np.testing.assert_array_equal(arranged[:3], recorded)


@pytest.mark.parametrize("names", [["I"], ["V1", "V2"], ["aVR", "V6"]])
def test_one_limb_lead_gives_no_other(names: list[str]) -> None:
    arranged, used = arrange_leads(np.ones((len(names), 4)), names)
    present = [LEADS[i] for i in range(12) if np.isfinite(arranged[i]).all()]
    assert present == used == sorted(names, key=LEADS.index)
    assert np.isnan(arranged).any(axis=1).sum() == 12 - len(names)


def test_missing_samples_stay_missing_in_the_leads_derived_from_them() -> None:
    signal = np.ones((2, 4))
    signal[0, 1] = np.nan
    arranged, _ = arrange_leads(signal, ["I", "aVF"])
    assert np.isnan(arranged[:6, 1]).sum() == 5  # all but aVF itself
    assert np.isfinite(arranged[:6, [0, 2, 3]]).all()


def test_channels_that_are_no_lead_are_left_out() -> None:
    arranged, used = arrange_leads(np.stack([np.zeros(3), np.ones(3)]), ["RESP", "V4"])
    assert used == ["V4"]
    np.testing.assert_array_equal(arranged[LEADS.index("V4")], 1.0)


def test_a_lead_under_two_names_is_refused_with_both() -> None:
    with pytest.raises(ValueError, match="lead II occurs twice, as 'MLII' and as 'Lead II'"):
        arrange_leads(np.zeros((2, 3)), ["MLII", "Lead II"])


def test_names_of_which_none_is_a_lead_are_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"none of the lead names \['abc', 'x'\].*aVR"):
        arrange_leads(np.zeros((2, 3)), ["abc", "x"])


def test_a_lead_without_a_finite_sample_is_refused_by_name() -> None:
    signal = np.stack([np.ones(3), np.full(3, np.nan)])
    with pytest.raises(ValueError, match="lead V2 holds no finite sample; leave it out"):
        arrange_leads(signal, ["V1", "V2"])


@pytest.mark.parametrize("shape", [(500, 2), (2,), (1, 2, 500), (3, 500)])
def test_a_shape_that_does_not_fit_the_names_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"\(leads, samples\) with one of the 2 lead names.*found shape"):
        arrange_leads(np.zeros(shape), ["I", "II"])
