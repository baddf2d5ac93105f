"""The network: what its parts compute, what must not change its answers, and that a checkpoint comes back whole."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub.errors import StrictDataclassFieldValidationError
from tiny_model import tiny_model
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoFeatureExtractor, AutoModel, AutoModelForTimeSeriesPrediction

from data_builders.synthetic import synthetic_ecg
from modeling_ecgmoe.configuration_ecgmoe import FAMILIES, PATHS, EcgMoeConfig
from modeling_ecgmoe.feature_extraction_ecgmoe import EcgMoeFeatureExtractor
from modeling_ecgmoe.heads import CORRECTION_SHARE, read_head
from modeling_ecgmoe.leads import LEADS
from modeling_ecgmoe.modeling_ecgmoe import EcgMoeForTasks, EcgMoeModel, task_loss
from modeling_ecgmoe.routing import MixtureLayer, Router, load_balancing_loss, router_z_loss, rr_features
from modeling_ecgmoe.tasks import TASKS, Task
from modeling_ecgmoe.temporal import CardiacClock

HEARTS: tuple[dict[str, Any], ...] = (
    {"rate_bpm": 75},
    {"rate_bpm": 100, "rhythm": "atrial_fibrillation"},
    {"rate_bpm": 50, "rhythm": "paced"},
    {"rate_bpm": 70, "premature_every": 4},
)
SIGNAL_KEYS = EcgMoeFeatureExtractor.model_input_names


def features_of(*signals: np.ndarray) -> dict[str, Tensor]:
    """The model's input for recordings at 250 Hz."""
    features = EcgMoeFeatureExtractor()(list(signals), sampling_rate=250, lead_names=LEADS, return_tensors="pt")
    return {name: features[name] for name in SIGNAL_KEYS}


def heart(**kind: Any) -> np.ndarray:
    return synthetic_ecg(sampling_rate=250, noise_mv=0.01, variation=0.1, **kind).ecg.signal


def labels_for(tasks: dict[str, Task], records: int) -> dict[str, Tensor]:
    rng = np.random.default_rng(0)
    return {
        name: torch.tensor(
            rng.uniform(40, 900, (records, 1))
            if task.kind == "regression"
            else rng.integers(0, 2, (records, task.num_outputs)),
            dtype=torch.float32,
        )
        for name, task in tasks.items()
    }


def small_config(**changes: Any) -> EcgMoeConfig:
    return EcgMoeConfig(**{**tiny_model().config.to_diff_dict(), **changes})


@pytest.fixture(scope="module")
def model() -> EcgMoeForTasks:
    return tiny_model().eval()


@pytest.fixture(scope="module")
def batch() -> dict[str, Tensor]:
    """Four kinds of hearts."""
    return features_of(*(heart(seed=i, **kind) for i, kind in enumerate(HEARTS)))


@pytest.fixture(scope="module")
def published() -> EcgMoeForTasks:
    """The default configuration, untrained."""
    torch.manual_seed(0)
    return EcgMoeForTasks(EcgMoeConfig()).eval()


# Size and gradients


def test_the_default_model_keeps_to_its_budget(published: EcgMoeForTasks) -> None:
    assert sum(parameter.numel() for parameter in published.parameters()) <= 8e6
    features = features_of(heart(rate_bpm=100))
    with FlopCounterMode(display=False) as counter:
        published(**features)
    assert 1e7 < counter.get_total_flops() <= 0.6e9


def test_every_parameter_gets_a_gradient(batch: dict[str, Tensor]) -> None:
    model = tiny_model().train()
    labels = labels_for(model.tasks, 4)
    model(**batch, labels=labels).loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert [name for name, gradient in gradients.items() if gradient is None] == []
    assert [name for name, g in gradients.items() if g is not None and g.abs().max() < 1e-8] == []
    assert all(torch.isfinite(g).all() for g in gradients.values() if g is not None)


def test_every_expert_is_reached_and_taught() -> None:
    layer = MixtureLayer(small_config()).train()
    tiny_model()._init_weights(layer.router)
    tiny_model()._init_weights(layer.experts)
    hidden, routing = layer(torch.randn(4, 50, 16), torch.ones(4, 50, dtype=torch.bool))
    hidden.square().sum().backward()
    assert set(routing.experts.flatten().tolist()) == {0, 1, 2, 3}
    for parameter in layer.experts.parameters():
        assert (parameter.grad.abs().amax(dim=(1, 2)) > 0).all()
    assert (layer.router.weight.grad.abs().amax(dim=1) > 0).all()


@pytest.mark.parametrize(
    "parts",
    [*({"families": [name]} for name in FAMILIES), *({"paths": [name]} for name in PATHS), {"period_aware": False},
     {"families": ["period", "conv"], "paths": ["rhythm"]}, {"num_experts": 1, "num_experts_per_tok": 1},
     {"path_layers": 2, "patch_layers": 2, "num_experts_per_tok": 4}],
    ids=str,
)  # fmt: skip
def test_every_choice_of_parts_runs_and_learns(batch: dict[str, Tensor], parts: dict[str, Any]) -> None:
    model = EcgMoeForTasks(small_config(**parts)).train()
    output = model(**batch, labels=labels_for(model.tasks, 4), output_attentions=True)
    output.loss.backward()
    assert torch.isfinite(output.loss)
    assert set(output.attentions) == {"tokens", *model.config.paths}
    assert output.encoder.family_weights.shape[2] == len(model.config.families)


# What must not change the answers


@torch.no_grad()
def answers(model: EcgMoeForTasks, features: dict[str, Tensor]) -> Tensor:
    output = model(**features)
    return torch.cat([output.pooler_output, *output.logits.values()], dim=1)


def test_a_record_is_answered_alike_alone_and_in_a_batch(model: EcgMoeForTasks) -> None:
    signals = [heart(rate_bpm=55), heart(rate_bpm=130, seed=1)]
    together = answers(model, features_of(*signals))
    alone = torch.cat([answers(model, features_of(signal)) for signal in signals])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)


def test_records_of_other_lengths_in_the_batch_change_nothing(model: EcgMoeForTasks) -> None:
    signals = [heart(rate_bpm=55), heart(rate_bpm=130, seed=1)[:, :1500], heart(seed=2)[:, :777]]
    together = answers(model, features_of(*signals))
    alone = torch.cat([answers(model, features_of(signal)) for signal in signals])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize("extra", [1, 8, 100])
def test_padding_changes_nothing(model: EcgMoeForTasks, extra: int) -> None:
    features = features_of(heart()[:, :1500])
    padded = dict(features)
    padded["input_values"] = torch.nn.functional.pad(features["input_values"], (0, extra), value=7.0)
    padded["sample_mask"] = torch.nn.functional.pad(features["sample_mask"], (0, extra), value=False)
    padded["r_peaks"] = torch.nn.functional.pad(features["r_peaks"], (0, 5), value=-1.0)
    padded["rr_intervals_s"] = torch.nn.functional.pad(features["rr_intervals_s"], (0, 5), value=0.0)
    torch.testing.assert_close(answers(model, padded), answers(model, features), atol=1e-5, rtol=0)


def test_what_a_masked_lead_holds_changes_nothing(model: EcgMoeForTasks, batch: dict[str, Tensor]) -> None:
    mask = batch["lead_mask"].clone()
    mask[:, 7] = False
    spoilt = batch["input_values"].clone()
    spoilt[:, 7] = 100.0
    first = answers(model, batch | {"lead_mask": mask})
    second = answers(model, batch | {"lead_mask": mask, "input_values": spoilt})
    torch.testing.assert_close(second, first, atol=0, rtol=0)


def test_intervals_and_period_follow_from_the_peaks(model: EcgMoeForTasks, batch: dict[str, Tensor]) -> None:
    given = {name: batch[name] for name in ("input_values", "lead_mask", "sample_mask", "r_peaks")}
    torch.testing.assert_close(answers(model, given), answers(model, batch), atol=1e-4, rtol=0)


def test_the_encoders_output_can_be_used_again(model: EcgMoeForTasks, batch: dict[str, Tensor]) -> None:
    with torch.no_grad():
        encoded = model.ecgmoe.encoder(**batch)
        again = model(encoder_output=encoded, tasks=["age"])
    assert list(again.logits) == ["age"]
    torch.testing.assert_close(again.pooler_output, model(**batch).pooler_output, atol=0, rtol=0)


@pytest.mark.parametrize("implementation", ["batched_mm", "grouped_mm"])
def test_experts_answer_alike_however_they_are_computed(batch: dict[str, Tensor], implementation: str) -> None:
    model = tiny_model().eval()
    dense = answers(model, batch)
    model.set_experts_implementation(implementation)
    assert model.config._experts_implementation == implementation
    torch.testing.assert_close(answers(model, batch), dense, atol=1e-5, rtol=0)


# Extreme hearts


def extreme_hearts() -> dict[str, dict[str, Tensor]]:
    signal = torch.randn(1, 12, 1000, generator=torch.Generator().manual_seed(0))

    def beating(peaks: list[float]) -> dict[str, Tensor]:
        return {"input_values": signal, "r_peaks": torch.tensor([peaks])}

    irregular = np.cumsum(np.random.default_rng(0).uniform(25, 150, 12)).tolist()
    return {
        "flat": {"input_values": torch.zeros(1, 12, 1000)},
        "nothing known": {"input_values": signal, "sample_mask": torch.zeros(1, 1000, dtype=torch.bool)},
        "no lead": {"input_values": signal, "lead_mask": torch.zeros(1, 12, dtype=torch.bool)},
        "no beat": {"input_values": signal},
        "no beat but a period": {"input_values": signal, "period_s": torch.tensor([0.8])},
        "one beat": beating([400.0]),
        "20 bpm": beating([100.0, 400.0, 700.0]),
        "300 bpm": beating([float(i) for i in range(10, 1000, 20)]),
        "irregular": beating(irregular),
        "beats at both ends": beating([0.0, 999.0]),
        "huge": {"input_values": 1000 * signal, "r_peaks": torch.tensor([[100.0, 200.0]])},
        "two samples": {"input_values": signal[..., :2]},
    }


@pytest.mark.parametrize("name", extreme_hearts())
def test_an_extreme_heart_gives_a_finite_answer_and_gradient(name: str) -> None:
    features = extreme_hearts()[name]
    model = tiny_model()
    assert torch.isfinite(answers(model.eval(), features)).all()
    twice = {key: torch.cat([value, value]) for key, value in features.items()}
    model.train()(**twice, labels=labels_for(model.tasks, 2)).loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_answers_nearly_alike(batch: dict[str, Tensor], dtype: torch.dtype) -> None:
    single = answers(tiny_model().eval(), batch)
    half = answers(tiny_model().eval().to(dtype), batch)
    assert half.dtype == dtype
    torch.testing.assert_close(half.float(), single, atol=0.15, rtol=0.05)
    with torch.autocast("cpu", dtype):
        torch.testing.assert_close(answers(tiny_model().eval(), batch).float(), single, atol=0.15, rtol=0.05)


def test_a_signal_of_the_wrong_shape_is_refused_with_the_right_one(model: EcgMoeForTasks) -> None:
    with pytest.raises(ValueError, match=r"\(batch, 12 leads, samples\), found \(1, 1000, 12\); EcgMoeFeatureExtract"):
        model(torch.zeros(1, 1000, 12))
    with pytest.raises(ValueError, match="pass `input_values`, or an `encoder_output`"):
        model()


def test_a_head_that_is_not_there_is_refused_with_those_that_are(
    model: EcgMoeForTasks, batch: dict[str, Tensor]
) -> None:
    with pytest.raises(ValueError, match="no head for potassium; this model has age, arrhythmia"):
        model(**batch, tasks=["age", "potassium"])


# Routing


def test_the_balancing_loss_is_one_where_all_experts_are_used_alike() -> None:
    logits = torch.zeros(2, 6, 4)
    experts = torch.tensor([[0, 1], [2, 3]]).repeat(6, 1).reshape(2, 6, 2)
    assert load_balancing_loss(logits, experts, torch.ones(2, 6, dtype=torch.bool)).item() == pytest.approx(1.0)


def test_the_balancing_loss_is_the_number_of_experts_where_one_takes_all() -> None:
    logits = torch.zeros(1, 5, 4)
    logits[..., 2] = 50.0
    experts = torch.full((1, 5, 1), 2)
    assert load_balancing_loss(logits, experts, torch.ones(1, 5, dtype=torch.bool)).item() == pytest.approx(4.0)


@pytest.mark.parametrize("loss", ["balance", "z"])
def test_router_losses_do_not_see_padding(loss: str) -> None:
    logits, experts = torch.randn(1, 6, 4), torch.randint(0, 4, (1, 6, 2))
    mask = torch.tensor([[True] * 4 + [False] * 2])

    def value(logits: Tensor, experts: Tensor, mask: Tensor) -> Tensor:
        return load_balancing_loss(logits, experts, mask) if loss == "balance" else router_z_loss(logits, mask)

    cut = value(logits[:, :4], experts[:, :4], mask[:, :4])
    torch.testing.assert_close(value(logits, experts, mask), cut)
    assert not torch.isclose(value(logits, experts, torch.ones_like(mask)), cut)


def test_the_z_loss_of_level_logits_is_the_square_of_the_logarithm_of_their_number() -> None:
    mask = torch.ones(1, 3, dtype=torch.bool)
    assert router_z_loss(torch.zeros(1, 3, 4), mask).item() == pytest.approx(math.log(4) ** 2)


def test_the_router_chooses_the_most_probable_experts_and_shares_one_among_them() -> None:
    router = Router(small_config(num_experts=4, num_experts_per_tok=2, hidden_size=16))
    torch.nn.init.eye_(router.weight)
    hidden = torch.zeros(1, 4, 16)
    hidden[0, :, :4] = torch.tensor([[3.0, 2, 1, 0], [0, 3, 2, 1], [1, 0, 3, 2], [2, 1, 0, 3]])
    routing = router(hidden)
    assert routing.experts[0].tolist() == [[0, 1], [1, 2], [2, 3], [3, 0]]
    torch.testing.assert_close(routing.weights.sum(dim=-1), torch.ones(1, 4))
    share = math.e / (math.e + 1)  # logits one apart
    torch.testing.assert_close(routing.weights[0, 0], torch.tensor([share, 1 - share]))


def test_router_probabilities_of_every_layer_sum_to_one(model: EcgMoeForTasks, batch: dict[str, Tensor]) -> None:
    with torch.no_grad():
        encoded = model(**batch).encoder
    for probabilities in (*encoded.morphology_router_probs, *encoded.rhythm_router_probs):
        torch.testing.assert_close(probabilities.sum(dim=-1), torch.ones(probabilities.shape[:2]))
    torch.testing.assert_close(encoded.family_weights.sum(dim=-1), torch.ones(encoded.family_weights.shape[:2]))


# The heart's clock


def test_phase_is_zero_at_a_beat_and_half_midway() -> None:
    peaks = torch.tensor([[100.0, 180.0, 280.0]])
    times = torch.tensor([100.0, 140.0, 180.0, 230.0, 255.0])
    clock = CardiacClock(peaks, torch.tensor([90.0]), times)
    torch.testing.assert_close(clock.phase, torch.tensor([[0.0, 0.5, 0.0, 0.5, 0.75]]))
    torch.testing.assert_close(clock.rr, torch.tensor([[80.0, 80.0, 100.0, 100.0, 100.0]]))
    torch.testing.assert_close(clock.since, torch.tensor([[0.0, 40.0, 0.0, 50.0, 75.0]]))


def test_the_mean_period_goes_on_before_the_first_and_after_the_last_beat() -> None:
    clock = CardiacClock(torch.tensor([[100.0, 200.0, -1.0]]), torch.tensor([80.0]), torch.tensor([80.0, 20.0, 220.0]))
    torch.testing.assert_close(clock.phase, torch.tensor([[0.75, 0.0, 0.25]]))
    torch.testing.assert_close(clock.rr, torch.full((1, 3), 80.0))


def test_without_a_period_the_clock_stands_still() -> None:
    period = torch.zeros(1)
    clock = CardiacClock(torch.tensor([[-1.0]]), period, torch.arange(5.0))
    assert not clock.known.any()
    assert (clock.phase == 0).all()
    assert (clock.features(100) == 0).all()


def test_the_rhythm_path_is_told_intervals_ratios_and_change() -> None:
    intervals = torch.tensor([[0.0, 1.0, 0.6, 0.0]])
    told = rr_features(intervals, torch.tensor([0.8]), torch.tensor([[True, True, True, False]]))
    expected = torch.tensor([1.0, 0.6, 3 * 0.25, 3 * -0.25, 3 * -0.5, 1.0])
    torch.testing.assert_close(told[0, 1], expected)
    assert told[0, 0].tolist() == pytest.approx([0.0, 1.0, 0.0, 0.75, 0.0, 0.0])
    assert (told[0, 3] == 0).all()


# Losses


def test_a_regression_one_spread_away_costs_its_distance_less_half_the_knee() -> None:
    age = TASKS["age"]
    loss = task_loss(age, torch.zeros(1, 1), torch.tensor([[age.center + age.spread]]))
    assert loss.item() == pytest.approx(1.0 - 0.05)


def test_even_odds_cost_the_logarithm_of_the_choices() -> None:
    assert task_loss(TASKS["sex"], torch.zeros(1, 1), torch.ones(1, 1)).item() == pytest.approx(math.log(2))
    three = Task("three", "multi_class", "", "three", labels=("a", "b", "c"))
    assert task_loss(three, torch.zeros(1, 3), torch.tensor([[0.0, 1.0, 0.0]])).item() == pytest.approx(math.log(3))


@pytest.mark.parametrize("name", ["age", "sex", "superclass"])
def test_what_is_not_known_costs_and_teaches_nothing(name: str) -> None:
    task = TASKS[name]
    logits = torch.randn(3, task.num_outputs, requires_grad=True)
    labels = torch.ones(3, task.num_outputs)
    labels[1] = torch.nan
    loss = task_loss(task, logits, labels)
    loss.backward()
    torch.testing.assert_close(loss, task_loss(task, logits[[0, 2]], labels[[0, 2]]))
    assert (logits.grad[1] == 0).all()
    assert task_loss(task, logits, torch.full_like(labels, torch.nan)).item() == 0.0


@pytest.mark.parametrize("shape", [(4,), (1, 1), (4, 2)])
def test_labels_that_would_broadcast_are_refused_with_both_shapes(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"task age: logits \(4, 1\) and labels .* must agree"):
        task_loss(TASKS["age"], torch.zeros(4, 1), torch.zeros(shape))


def test_a_regression_with_a_prior_starts_from_the_measurement() -> None:
    rr, logits = TASKS["rr_interval"], torch.tensor([[0.0], [1.0], [0.5]])
    with_prior = read_head(logits, rr, torch.tensor([1.05, 1.05, 0.0]))
    expected = [1.0, 1.0 + CORRECTION_SHARE, 0.5]  # (1050 - 850) / 200, a correction, and nothing measured
    torch.testing.assert_close(with_prior[:, 0], torch.tensor(expected))
    assert read_head(logits, TASKS["age"], torch.ones(3)) is logits


# Configuration


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 20}, "hidden_size=20 must be a multiple of 2 .* num_attention_heads=8"),
        ({"patch_channels": 12}, "patch_channels=12 must be a multiple"),
        ({"num_experts_per_tok": 5}, "num_experts_per_tok=5 must lie between 1 and num_experts=4"),
        ({"num_experts_per_tok": 0}, "num_experts_per_tok=0"),
        ({"families": ["conv", "wavelet"]}, r"families must be one or more of conv, ssm.*found \['conv', 'wavelet'\]"),
        ({"paths": []}, r"paths must be one or more of morphology, rhythm.*found \[\]"),
        ({"paths": ["rhythm", "rhythm"]}, "each once"),
        ({"token_stride": 4}, "token_stride must be 16.*found 4"),
        ({"beat_window_s": (0.1, 0.4)}, r"beat_window_s must span the R peak, found \(0.1, 0.4\)"),
        ({"tasks": {"age": TASKS["sex"].to_dict()}}, "key 'age' holds task 'sex'"),
    ],
)
def test_a_configuration_that_contradicts_itself_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EcgMoeConfig(**changes)


@pytest.mark.parametrize("changes", [{"hidden_size": "128"}, {"dropout": "none"}, {"period_aware": 1}])
def test_a_field_of_the_wrong_type_is_refused_by_name(changes: dict[str, Any]) -> None:
    with pytest.raises(StrictDataclassFieldValidationError, match=f"field '{next(iter(changes))}'"):
        EcgMoeConfig(**changes)


def test_every_editable_field_is_a_field() -> None:
    assert set(EcgMoeConfig.editable_fields()) < set(EcgMoeConfig().to_dict())


# Heads, saving, loading


def test_a_new_task_gets_a_head_of_its_size(batch: dict[str, Tensor]) -> None:
    model = tiny_model().eval()
    before = answers(model, batch)
    model.add_task(Task("blood_type", "multi_class", "", "blood", labels=("A", "B", "AB", "0")))
    with torch.no_grad():
        output = model(**batch)
    assert output.logits["blood_type"].shape == (4, 4)
    assert model.config.task("blood_type").labels == ("A", "B", "AB", "0")
    torch.testing.assert_close(answers(model, batch)[:, : before.shape[1]], before, atol=0, rtol=0)


def test_freezing_the_base_leaves_the_heads_to_train() -> None:
    model = tiny_model()
    model.freeze_base_model()
    assert {name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad} == {"heads"}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, EcgMoeForTasks]:
    """A checkpoint in which every number differs from what initialisation gives, and the model it was saved from."""
    folder = tmp_path_factory.mktemp("saved")
    model = tiny_model().eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for value in model.state_dict().values():
            if value.is_floating_point():
                value.add_(0.01 * torch.rand(value.shape, generator=generator))
    model.save_pretrained(folder)
    EcgMoeFeatureExtractor(min_duration_s=3.0).save_pretrained(folder)
    return folder, model


def test_all_parameters_and_buffers_come_back_bit_for_bit(saved: tuple[Path, EcgMoeForTasks]) -> None:
    folder, model = saved
    loaded, info = EcgMoeForTasks.from_pretrained(folder, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    expected = dict(model.named_parameters()) | dict(model.named_buffers())
    found = dict(loaded.named_parameters()) | dict(loaded.named_buffers())
    assert set(found) == set(expected)
    assert [name for name, value in found.items() if not torch.equal(value, expected[name])] == []


def test_a_loaded_model_answers_bit_for_bit_as_the_saved_one(
    saved: tuple[Path, EcgMoeForTasks], batch: dict[str, Tensor]
) -> None:
    folder, model = saved
    loaded = EcgMoeForTasks.from_pretrained(folder)
    assert not loaded.training
    torch.testing.assert_close(answers(loaded, batch), answers(model, batch), atol=0, rtol=0)


def test_the_configuration_comes_back_as_it_was(saved: tuple[Path, EcgMoeForTasks]) -> None:
    folder, model = saved
    fields = EcgMoeConfig.__annotations__
    loaded, expected = EcgMoeConfig.from_pretrained(folder).to_dict(), model.config.to_dict()
    assert {name: list(v) if isinstance(v := loaded[name], tuple) else v for name in fields} == {
        name: list(v) if isinstance(v := expected[name], tuple) else v for name in fields
    }


def test_the_auto_classes_open_a_checkpoint_with_heads(
    saved: tuple[Path, EcgMoeForTasks], batch: dict[str, Tensor]
) -> None:
    folder, model = saved
    assert type(AutoConfig.from_pretrained(folder)) is EcgMoeConfig
    encoder, info = AutoModel.from_pretrained(folder, output_loading_info=True)
    assert type(encoder) is EcgMoeModel
    assert not info["missing_keys"]
    extractor = AutoFeatureExtractor.from_pretrained(folder)
    assert type(extractor) is EcgMoeFeatureExtractor
    assert extractor.min_duration_s == 3.0
    with torch.no_grad():
        found = encoder(**batch).pooler_output
        torch.testing.assert_close(found, model(**batch).pooler_output, atol=0, rtol=0)


def test_an_auto_class_opens_the_heads_too(saved: tuple[Path, EcgMoeForTasks]) -> None:
    assert type(AutoModelForTimeSeriesPrediction.from_pretrained(saved[0])) is EcgMoeForTasks
