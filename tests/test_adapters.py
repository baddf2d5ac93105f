"""Adapters: what may train, what must not change, calibration, and many of them in one pass of the backbone."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from tiny_model import TINY_TASKS, save_tiny_model, tiny_model
from torch import Tensor

from data_builders.synthetic import synthetic_ecg
from modeling_ecgmoe.adapter_card import AdapterCard, best_threshold, calibrate, conformal_half_width, renew_card
from modeling_ecgmoe.adapters import MultiTask, fingerprint
from modeling_ecgmoe.feature_extraction_ecgmoe import EcgMoeFeatureExtractor
from modeling_ecgmoe.leads import LEADS
from modeling_ecgmoe.lora import lora_model, save_adapter
from modeling_ecgmoe.modeling_ecgmoe import EcgMoeForTasks
from modeling_ecgmoe.tasks import TASKS, Task

ARTIFACTS = Path(__file__).resolve().parent / "artifacts"
BLOOD = Task("blood_type", "multi_class", "ABO group", "blood", labels=("A", "B", "AB", "0"))


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model and an adapter for each of its tasks. Do not write into it."""
    folder = tmp_path_factory.mktemp("hub")
    save_tiny_model(folder)
    return folder


@pytest.fixture(scope="module")
def many(hub: Path) -> MultiTask:
    """The model with all its adapters. Do not load into it."""
    return MultiTask.from_pretrained(hub / "model")


@pytest.fixture(scope="module")
def windows() -> list[dict[str, Any]]:
    """Three prepared recordings, the last of one lead."""
    extractor = EcgMoeFeatureExtractor()
    hearts = [{"rate_bpm": 60}, {"rate_bpm": 90, "rhythm": "atrial_fibrillation"}, {"rate_bpm": 120}]
    signals = [
        synthetic_ecg(sampling_rate=250, noise_mv=0.01, seed=i, **kind).ecg.signal for i, kind in enumerate(hearts)
    ]
    return [
        *(extractor.extract(signal, 250, LEADS) for signal in signals[:2]),
        extractor.extract(signals[2][6:7], 250, ["V1"]),
    ]


@pytest.fixture(scope="module")
def batch(windows: list[dict[str, Any]]) -> dict[str, Tensor]:
    features = EcgMoeFeatureExtractor().pad(windows, return_tensors="pt")
    return {name: features[name] for name in EcgMoeFeatureExtractor.model_input_names}


@torch.no_grad()
def logits_of(model: torch.nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return dict(model.eval()(**batch).logits)


def train_a_little(model: PeftModel, task: str, batch: dict[str, Tensor], labels: Tensor) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(5):
        model.train()
        model.base_model.model.ecgmoe.encoder.eval()
        model(**batch, labels={task: labels}, tasks=[task]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


# Training


@pytest.mark.parametrize("task", [TASKS["age"], TASKS["superclass"], BLOOD], ids=lambda task: task.name)
def test_only_the_lora_of_the_fusion_and_the_tasks_head_train(task: Task) -> None:
    trained = [name for name, p in lora_model(tiny_model(), task).named_parameters() if p.requires_grad]
    assert trained
    for name in trained:
        in_fusion = ".ecgmoe.fusion." in name and ".lora_" in name
        in_head = f".heads.head_{task.name}.modules_to_save." in name
        assert in_fusion or in_head, name
    layers = {
        name.split(".lora_")[0].split(".fusion.")[-1].removesuffix("_proj") for name in trained if ".lora_" in name
    }
    asked = {f"pooling.{path}.attention.{part}" for path in ("tokens", "morphology", "rhythm") for part in "qk"}
    assert layers == asked | {f"attention.{part}" for part in ("q", "k", "v", "out")} | {"up", "down", "out"}


def test_training_an_adapter_changes_nothing_but_the_adapter(batch: dict[str, Tensor]) -> None:
    # PEFT freezes the base, and torch multiplies frozen matrices in another order: a frozen model is what to compare.
    model = tiny_model().eval().requires_grad_(False)
    before = logits_of(model, batch)
    with torch.no_grad():
        encoded = model.ecgmoe.encoder(**batch)
    frozen = {name: value.clone() for name, value in model.state_dict().items()}
    wrapped = lora_model(model, TASKS["age"])
    train_a_little(wrapped, "age", batch, torch.tensor([[30.0], [80.0], [50.0]]))

    trained = logits_of(wrapped, batch)
    assert not torch.allclose(trained["age"], before["age"], atol=0.01)
    with wrapped.disable_adapter():
        after = logits_of(wrapped, batch)
    for name, logits in before.items():
        assert torch.equal(after[name], logits), name
    with torch.no_grad():
        again = wrapped.base_model.model.ecgmoe.encoder(**batch)
    for name in ("last_hidden_state", "beat_hidden_state", "rhythm_hidden_state"):
        assert torch.equal(again[name], encoded[name]), name
    restored = wrapped.unload().state_dict()  # PEFT leaves the trained head in place
    moved = [name for name, value in frozen.items() if not torch.equal(restored[name], value)]
    assert moved == ["heads.head_age.weight", "heads.head_age.bias"]


def test_an_untrained_adapter_answers_as_the_base(batch: dict[str, Tensor]) -> None:
    before = logits_of(tiny_model().requires_grad_(False), batch)
    after = logits_of(lora_model(tiny_model(), TASKS["sex"]), batch)
    for name, logits in before.items():
        torch.testing.assert_close(after[name], logits, atol=0, rtol=0)


def test_an_unknown_scope_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="unknown LoRA scope 'head'; known are fusion, all"):
        lora_model(tiny_model(), TASKS["age"], scope="head")


# Saved adapters


def test_what_is_saved_names_neither_this_machine_nor_a_class_path(hub: Path) -> None:
    values = json.loads((hub / "adapters" / "age" / "adapter_config.json").read_text())
    assert values["auto_mapping"] is None
    assert values["base_model_name_or_path"] == "ecg-moe/ecg-moe-base"
    assert values["peft_type"] == "LORA"
    for path in (hub / "adapters").rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            for trace in (str(hub), str(Path.home()), str(Path.cwd())):
                assert trace.encode() not in content, f"{path.name} holds {trace}"


def test_an_adapter_is_small_and_lies_directly_in_its_folder(hub: Path) -> None:
    files = {path.name for path in (hub / "adapters" / "age").iterdir()}
    assert files == {"adapter_config.json", "adapter_model.safetensors", "task.json", "README.md"}


@pytest.mark.parametrize("name", TINY_TASKS)
def test_many_tasks_together_answer_as_peft_does_each(
    hub: Path, many: MultiTask, batch: dict[str, Tensor], windows: list[dict[str, Any]], name: str
) -> None:
    base = EcgMoeForTasks.from_pretrained(hub / "model")
    alone = PeftModel.from_pretrained(base, str(hub / "adapters" / name), adapter_name=name)
    assert set(many.cards) == set(TINY_TASKS)
    np.testing.assert_allclose(many.logits(windows)[name], logits_of(alone, batch)[name].numpy(), atol=1e-5)


def test_all_tasks_take_one_pass_of_the_backbone(many: MultiTask, windows: list[dict[str, Any]]) -> None:
    calls = []
    hook = many.encoder.register_forward_hook(lambda *_: calls.append(1))
    assert set(many.logits(windows)) == set(TINY_TASKS)
    hook.remove()
    assert len(calls) == 1


def test_the_order_of_loading_makes_no_difference(hub: Path, many: MultiTask, windows: list[dict[str, Any]]) -> None:
    backwards = MultiTask.from_pretrained(hub / "model", TINY_TASKS[::-1])
    assert list(backwards.cards) == list(many.cards)[::-1]
    first, second = many.logits(windows), backwards.logits(windows)
    for name, logits in first.items():
        np.testing.assert_allclose(second[name], logits, atol=1e-6)


def test_adapters_change_nothing_in_each_others_answers(
    hub: Path, many: MultiTask, windows: list[dict[str, Any]]
) -> None:
    together, alone = many.logits(windows), MultiTask.from_pretrained(hub / "model", [])
    for name in TINY_TASKS:
        alone.load(hub / "adapters" / name)
        # Products of another size round differently; 1e-5 is what one pass promises.
        np.testing.assert_allclose(alone.logits(windows)[name], together[name], atol=1e-5)
        alone.unload(name)
    assert alone.logits(windows) == {}


def test_an_adapter_can_be_swapped_while_others_stay(hub: Path, windows: list[dict[str, Any]], tmp_path: Path) -> None:
    other = lora_model(tiny_model(), TASKS["sex"])
    torch.nn.init.ones_(other.base_model.model.heads.head_sex.modules_to_save["sex"].bias)
    save_adapter(other, AdapterCard(TASKS["sex"], fingerprint(tiny_model())), tmp_path)
    many = MultiTask.from_pretrained(hub / "model", ["age", "sex"])
    before = many.logits(windows)
    assert many.load(tmp_path) == "sex"
    swapped = many.logits(windows)
    assert not np.allclose(swapped["sex"], before["sex"])
    np.testing.assert_allclose(swapped["age"], before["age"], atol=1e-6)
    many.load(hub / "adapters" / "sex")
    np.testing.assert_allclose(many.logits(windows)["sex"], before["sex"], atol=1e-6)
    many.unload("sex")
    assert list(many.logits(windows)) == ["age"]


def test_loading_adapters_leaves_the_base_as_it_was(hub: Path, many: MultiTask, batch: dict[str, Tensor]) -> None:
    base = EcgMoeForTasks.from_pretrained(hub / "model")
    for name, logits in logits_of(base, batch).items():
        assert torch.equal(logits_of(many.model, batch)[name], logits), name
    assert many.base == fingerprint(base)


def test_an_adapter_of_another_base_is_refused_with_both_fingerprints(hub: Path) -> None:
    model = tiny_model()
    with torch.no_grad():
        model.ecgmoe.fusion.out_proj.bias += 0.1
    many = MultiTask(model, EcgMoeFeatureExtractor())
    found, expected = fingerprint(tiny_model()), fingerprint(model)
    with pytest.raises(
        ValueError,
        match=rf"trained on base {found} \(ecg-moe/ecg-moe-base\), this model is {expected} \(a model in memory\)",
    ):
        many.load(hub / "adapters" / "age")
    assert many.cards == {}


def test_the_fingerprint_sees_backbone_and_architecture_and_not_heads_or_dropout() -> None:
    base = fingerprint(tiny_model())
    same, other = tiny_model(), tiny_model()
    same.add_task(BLOOD)
    same.config.dropout = 0.5
    with torch.no_grad():
        same.heads["head_age"].bias += 1.0
        next(other.ecgmoe.encoder.parameters()).add_(0.01)
    assert fingerprint(same) == base
    assert fingerprint(tiny_model().half()) == base
    assert fingerprint(other) != base
    other = tiny_model()
    other.config.beat_window_s = (-0.3, 0.42)
    assert fingerprint(other) != base


def test_an_adapter_of_the_backbone_too_is_not_taken_for_one_of_the_fusion(tmp_path: Path) -> None:
    model = tiny_model()
    wide = lora_model(model, TASKS["age"], scope="all")
    save_adapter(wide, AdapterCard(TASKS["age"], fingerprint(tiny_model())), tmp_path)
    with pytest.raises(ValueError, match=r"adapts the backbone too.*PeftModel\.from_pretrained"):
        MultiTask(tiny_model(), EcgMoeFeatureExtractor()).load(tmp_path)


def test_a_task_from_a_file_brings_its_own_head(
    hub: Path, windows: list[dict[str, Any]], batch: dict[str, Tensor], tmp_path: Path
) -> None:
    (tmp_path / "blood.json").write_text(json.dumps(BLOOD.to_dict()))
    task = Task.from_json_file(tmp_path / "blood.json")
    model = lora_model(EcgMoeForTasks.from_pretrained(hub / "model"), task)
    train_a_little(model, task.name, batch, torch.eye(4)[:3])
    card = AdapterCard(task, fingerprint(EcgMoeForTasks.from_pretrained(hub / "model")))
    save_adapter(model, card, tmp_path / "adapter")

    many = MultiTask.from_pretrained(hub / "model", ["age", str(tmp_path / "adapter")])
    logits = many.logits(windows)["blood_type"]
    np.testing.assert_allclose(logits, logits_of(model, batch)["blood_type"].numpy(), atol=1e-5)
    answer = many.cards["blood_type"].answer(logits[0], 12)
    assert list(answer["probabilities"]) == ["A", "B", "AB", "0"]
    assert sum(answer["probabilities"].values()) == pytest.approx(1.0, abs=1e-3)
    assert len(answer["labels"]) == 1


@pytest.mark.parametrize(
    ("task", "message"), [("weight", "no adapter 'weight' beside .*; there are age, arrhythmia, rr_interval, sex")]
)
def test_an_adapter_that_is_not_there_is_refused_with_those_that_are(hub: Path, task: str, message: str) -> None:
    with pytest.raises(FileNotFoundError, match=message):
        MultiTask.from_pretrained(hub / "model", [task])


def test_a_folder_that_is_no_adapter_is_refused(hub: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"holds no task\.json; an adapter of `train\.py adapt` has one"):
        MultiTask(tiny_model(), EcgMoeFeatureExtractor()).load(tmp_path)


# Cards and calibration


def test_a_card_comes_back_as_it_was(tmp_path: Path) -> None:
    card = AdapterCard(
        TASKS["superclass"], "abc", "simulated", "synthetic hearts", 1.3, [0.1, 0.2, 0.3, 0.4, 0.5], {}, 0.8, {"x": 1}
    )
    card.save(tmp_path)
    assert AdapterCard.load(tmp_path) == card


@pytest.mark.parametrize("spoil", [{"colour": 1}, {"base": None}])
def test_an_edited_card_is_refused(tmp_path: Path, spoil: dict[str, Any]) -> None:
    AdapterCard(TASKS["age"], "abc").save(tmp_path)
    values = json.loads((tmp_path / "task.json").read_text()) | spoil
    (tmp_path / "task.json").write_text(json.dumps({k: v for k, v in values.items() if v is not None}))
    with pytest.raises(ValueError, match=r"expected task and base, unknown .*; was it edited"):
        AdapterCard.load(tmp_path)


def test_conformal_intervals_cover_what_they_promise() -> None:
    rng = np.random.default_rng(0)
    covered = []
    for _ in range(400):
        # Errors of any distribution, as long as calibration and test come from the same.
        errors = rng.gamma(1.0, 5.0, size=150) * rng.choice([-1, 1], size=150)
        half = conformal_half_width(errors[:99], np.zeros(99), 0.9)
        covered.append((np.abs(errors[99:]) <= half).mean())
    # Split conformal prediction with n = 99 covers exactly 0.9 on average (Lei et al. 2018, theorem 2).
    assert np.mean(covered) == pytest.approx(0.9, abs=4 * np.std(covered) / 20)


def test_too_few_records_for_the_level_give_the_widest_error() -> None:
    assert conformal_half_width(np.array([1.0, 2.0, 3.0]), np.zeros(3), 0.9) == 3.0


@pytest.mark.parametrize(("name", "outputs"), [("superclass", 5), ("sex", 1)])
@pytest.mark.parametrize("scale", [0.5, 1.0, 3.0])
def test_the_temperature_recovers_how_much_logits_exaggerate(name: str, outputs: int, scale: float) -> None:
    rng = np.random.default_rng(0)
    honest = rng.normal(0, 2, size=(8000, outputs))
    truth = (rng.random(honest.shape) < 1 / (1 + np.exp(-honest))).astype(float)
    truth[::7] = np.nan
    card = AdapterCard(TASKS[name], "abc")
    calibrate(card, scale * honest, truth)
    assert card.temperature == pytest.approx(scale, rel=0.1)


def test_the_temperature_of_classes_is_recovered_too() -> None:
    rng = np.random.default_rng(0)
    honest = rng.normal(0, 2, size=(4000, 4))
    truth = np.eye(4)[np.argmax(honest + rng.gumbel(size=honest.shape), axis=1)]
    card = AdapterCard(BLOOD, "abc")
    calibrate(card, 2.0 * honest, truth)
    assert card.temperature == pytest.approx(2.0, rel=0.1)
    assert card.thresholds == []


def test_the_threshold_lies_between_what_it_separates() -> None:
    probabilities = np.concatenate([np.linspace(0.0, 0.3, 20), np.linspace(0.7, 1.0, 20)])
    assert best_threshold(probabilities, np.repeat([0.0, 1.0], 20)) == pytest.approx(0.5, abs=1e-3)


def test_the_threshold_has_the_best_f1_of_all() -> None:
    rng = np.random.default_rng(0)
    truth = (rng.random(300) < 0.2).astype(float)
    probabilities = np.clip(0.3 * truth + rng.normal(0.3, 0.2, 300), 0, 1)

    def f1(threshold: float) -> float:
        given = probabilities >= threshold
        return 2 * (given & (truth == 1)).sum() / (given.sum() + truth.sum())

    assert f1(best_threshold(probabilities, truth)) >= max(f1(t) for t in np.linspace(0, 1, 501)) - 1e-9


@pytest.mark.parametrize("positives", [0, 4, 96, 100])
def test_a_rare_label_keeps_the_threshold_of_one_half(positives: int) -> None:
    truth = (np.arange(100) < positives).astype(float)
    assert best_threshold(np.random.default_rng(0).random(100), truth) == 0.5


def test_without_any_label_nothing_is_calibrated() -> None:
    with pytest.raises(ValueError, match="task age: no validation record has a label"):
        calibrate(AdapterCard(TASKS["age"], "abc"), np.zeros((3, 1)), np.full((3, 1), np.nan))


def test_a_card_without_codes_is_renewed_and_keeps_all_else(tmp_path: Path) -> None:
    old = AdapterCard(
        replace(TASKS["sex"], codes={}), "abc", thresholds=[0.4], metrics={"validation_macro_auroc": 0.9}
    )
    old.save(tmp_path)
    renew_card(tmp_path)
    assert AdapterCard.load(tmp_path) == replace(old, task=TASKS["sex"])
    page = (tmp_path / "README.md").read_text()
    assert "| female |  | 248152002 | 0.40 |" in page
    assert "- macro AUROC: 0.9\n" in page


# Answers


@pytest.mark.parametrize(("num_leads", "half"), [(12, 8.0), (7, 10.0), (6, 10.0), (2, 15.0), (1, 15.0)])
def test_fewer_leads_give_a_wider_interval(num_leads: int, half: float) -> None:
    card = AdapterCard(TASKS["age"], "abc", half_widths={"12": 8.0, "6": 10.0, "1": 15.0})
    answer = card.answer(np.zeros(1), num_leads)
    assert answer == {"value": 60.0, "unit": "years", "interval": [60.0 - half, 60.0 + half], "level": 0.9}


def test_labels_are_given_from_their_own_thresholds() -> None:
    card = AdapterCard(TASKS["superclass"], "abc", temperature=2.0, thresholds=[0.9, 0.2, 0.5, 0.5, 0.5])
    answer = card.answer(2.0 * np.log(np.array([3.0, 1 / 3, 1 / 3, 3.0, 1.0])), 12)
    assert list(answer["probabilities"].values()) == pytest.approx([0.75, 0.25, 0.25, 0.75, 0.5], abs=1e-3)
    assert answer["labels"] == ["MI", "CD", "HYP"]


@pytest.mark.parametrize(("thresholds", "label"), [([], "female"), ([0.8], "male")])
def test_a_binary_answer_is_one_of_two_labels(thresholds: list[float], label: str) -> None:
    answer = AdapterCard(TASKS["sex"], "abc", thresholds=thresholds).answer(np.log([3.0]), 12)
    assert answer == {"labels": [label], "probabilities": {"male": 0.25, "female": 0.75}}


def test_simulated_evidence_is_part_of_the_answer() -> None:
    card = AdapterCard(TASKS["age"], "abc")
    assert "evidence" not in card.answer(np.zeros(1), 12)
    assert replace(card, evidence="simulated").answer(np.zeros(1), 12)["evidence"] == "simulated"


# Recordings


def test_a_bad_stretch_of_a_long_recording_does_not_lose_the_rest(many: MultiTask) -> None:
    signal = synthetic_ecg(sampling_rate=250, duration_s=30, noise_mv=0.01).ecg.signal
    signal[:, 2500:5000] = 0.0
    prepared = many.prepare(signal, 250, LEADS)
    assert prepared.quality["windows"] == 2
    assert many.answer([prepared])[0]["age"]["unit"] == "years"


def test_the_windows_of_a_recording_are_averaged(many: MultiTask) -> None:
    signal = synthetic_ecg(sampling_rate=250, duration_s=20, noise_mv=0.02, rr_variation=0.2).ecg.signal
    halves = [
        many.answer([many.prepare(s, 250, LEADS)])[0]["age"]["value"] for s in (signal[:, :2500], signal[:, 2500:])
    ]
    whole = many.answer([many.prepare(signal, 250, LEADS)])[0]["age"]["value"]
    assert whole == pytest.approx(np.mean(halves), abs=0.02)


def test_the_explanation_speaks_of_every_beat(many: MultiTask) -> None:
    prepared = many.prepare(synthetic_ecg(sampling_rate=250, noise_mv=0.01).ecg.signal, 250, LEADS)
    explanation = many.explain(prepared)
    beats = len(explanation.r_peaks_s)
    assert beats == prepared.quality["beats"]
    assert explanation.input_mv.shape == (12, 1000)
    assert explanation.beat_experts.shape == (beats, 4)
    np.testing.assert_allclose(explanation.beat_experts.sum(axis=1), 1.0, atol=1e-5)
    assert explanation.beat_attention.shape == (beats,)
    assert sum(explanation.family_weights.values()) == pytest.approx(1.0, abs=1e-5)


# Checkpoints that people have


@pytest.fixture(scope="module")
def golden() -> tuple[MultiTask, dict[str, np.ndarray]]:
    """The checkpoint of `make_artifacts.py` as the code of today loads it, and what it answered when it was made."""
    return MultiTask.from_pretrained(ARTIFACTS / "model"), dict(np.load(ARTIFACTS / "expected.npz"))


def test_an_old_feature_extractor_still_makes_the_same_input(
    golden: tuple[MultiTask, dict[str, np.ndarray]],
) -> None:
    many, expected = golden
    signal = expected["signal_uv"].astype(np.float32) / 1000
    features = many.extractor(signal, float(expected["sampling_rate"]), LEADS, return_tensors="np")
    for name in many.extractor.model_input_names:
        np.testing.assert_allclose(features[name], expected[f"features_{name}"], atol=1e-3, err_msg=name)


def test_an_old_checkpoint_and_its_adapter_still_give_the_same_answers(
    golden: tuple[MultiTask, dict[str, np.ndarray]],
) -> None:
    many, expected = golden
    features = {name: torch.from_numpy(expected[f"features_{name}"]) for name in many.extractor.model_input_names}
    with torch.no_grad():
        output = many.model(**features)
        adapted = many.task_logits(output.encoder)
    np.testing.assert_allclose(output.pooler_output, expected["pooler_output"], atol=1e-4)
    np.testing.assert_allclose(adapted["age"], expected["adapter_age"], atol=1e-4)
    for name, logits in output.logits.items():
        np.testing.assert_allclose(logits, expected[f"logits_{name}"], atol=1e-4, err_msg=name)


def test_an_old_checkpoint_keeps_its_fingerprint(golden: tuple[MultiTask, dict[str, np.ndarray]]) -> None:
    # Every published adapter names its base by it.
    many, expected = golden
    assert many.base == str(expected["fingerprint"]) == many.cards["age"].base


def test_an_adapter_may_ask_another_question_under_a_name_of_the_base(
    windows: list[dict[str, Any]], batch: dict[str, Tensor], tmp_path: Path
) -> None:
    model = tiny_model()
    model.save_pretrained(tmp_path / "model")
    EcgMoeFeatureExtractor().save_pretrained(tmp_path / "model")
    decades = replace(TASKS["age"], center=6.0, spread=1.7, unit="decades")
    adapted = lora_model(tiny_model(), decades, rank=2)
    assert adapted.base_model.model.tasks["age"] == decades
    card = AdapterCard(decades, fingerprint(model))
    save_adapter(adapted, card, tmp_path / "adapters" / "age")
    many = MultiTask.from_pretrained(tmp_path / "model")
    np.testing.assert_allclose(many.logits(windows)["age"], logits_of(adapted, batch)["age"].numpy(), atol=1e-5)
    assert many.cards["age"].task.center == 6.0
