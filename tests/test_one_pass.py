"""The one pass: a folded backbone, stacked adapters as PEFT would run them, and adapters that come and go."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.dataclasses import strict
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_model import TINY_TASKS, save_tiny_model, tiny_model
from torch import Tensor, nn

from benchmarks.xresnet import XResNet1d101
from data_builders.synthetic import synthetic_ecg
from modeling_ecgmoe.adapter_card import AdapterCard
from modeling_ecgmoe.adapters import SIGNAL_KEYS, MultiTask, fingerprint
from modeling_ecgmoe.configuration_ecgmoe import EcgMoeConfig
from modeling_ecgmoe.feature_extraction_ecgmoe import EcgMoeFeatureExtractor
from modeling_ecgmoe.folding import folded
from modeling_ecgmoe.leads import LEADS
from modeling_ecgmoe.lora import LORA_SCOPES, save_adapter
from modeling_ecgmoe.modeling_ecgmoe import EcgMoeForTasks
from modeling_ecgmoe.tasks import TASKS

ROOT = Path(__file__).resolve().parents[1]
PUBLISHED = sorted(path.name for path in (ROOT / "hub/adapters").iterdir())


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model and an adapter for each of its tasks. Do not write into it."""
    folder = tmp_path_factory.mktemp("hub")
    save_tiny_model(folder)
    return folder


@pytest.fixture(scope="module")
def published() -> MultiTask:
    return MultiTask.from_pretrained(ROOT / "hub/model")


def batch_of(durations_s: list[float], leads: tuple[str, ...] = LEADS) -> dict[str, Tensor]:
    """Synthetic recordings of these lengths, padded to the longest, the last one of one lead."""
    extractor = EcgMoeFeatureExtractor()
    windows = []
    for seed, duration_s in enumerate(durations_s):
        signal = synthetic_ecg(
            sampling_rate=100, duration_s=duration_s, rate_bpm=50 + 9 * seed, noise_mv=0.02, seed=seed
        ).ecg.signal
        names = leads if seed < len(durations_s) - 1 else leads[1:2]
        windows.append(extractor.extract(signal[: len(names)], 100, names))
    features = extractor.pad(windows, return_tensors="pt")
    return {name: features[name] for name in SIGNAL_KEYS}


@torch.no_grad()
def logits_of(model: torch.nn.Module, batch: dict[str, Tensor], task: str) -> np.ndarray:
    return model.eval()(**batch, tasks=[task]).logits[task].numpy()


@torch.no_grad()
def answers_of(many: MultiTask, batch: dict[str, Tensor]) -> dict[str, np.ndarray]:
    return {name: logits.numpy() for name, logits in many.task_logits(many.encoder(**batch)).items()}


# The folded backbone


@pytest.mark.parametrize("durations_s", [[10.0], [10.0, 3.37, 7.0], [10.0, 2.5] * 5], ids=["one", "padded", "many"])
def test_the_folded_backbone_is_the_same_function(published: MultiTask, durations_s: list[float]) -> None:
    batch = batch_of(durations_s)
    with torch.no_grad():
        plain, fold = published.model.ecgmoe.encoder(**batch), published.encoder(**batch)
    for name in ("last_hidden_state", "beat_hidden_state", "rhythm_hidden_state", "family_weights"):
        size = plain[name].abs().max()
        torch.testing.assert_close(fold[name] / size, plain[name] / size, atol=1e-5, rtol=0, msg=name)
    for name in ("token_mask", "beat_mask", "rhythm_mask", "period_s"):
        assert torch.equal(fold[name], plain[name]), name


@pytest.mark.parametrize(
    "changes",
    [
        {"families": ("conv",)},
        {"families": ("ssm", "trend")},
        {"paths": ("rhythm",), "period_aware": False},
        {"conv_kernels": (15, 3, 7, 1), "conv_blocks": (2, 0, 1)},
    ],
    ids=str,
)
@pytest.mark.parametrize("records", [slice(None), slice(1, 2)], ids=["two", "the padded one alone"])
def test_every_form_of_the_architecture_folds(changes: dict[str, Any], records: slice) -> None:
    torch.manual_seed(0)
    encoder = tiny_model(**changes).eval().ecgmoe.encoder
    for values in (values for values in encoder.parameters() if values.ndim == 1):
        values.data.add_(0.3 * torch.randn_like(values))  # after training normalisations write on padding
    batch = {name: values[records] for name, values in batch_of([10.0, 4.0]).items()}
    with torch.no_grad():
        torch.testing.assert_close(
            folded(encoder)(**batch).last_hidden_state, encoder(**batch).last_hidden_state, atol=1e-5, rtol=0
        )


def test_folding_leaves_the_model_alone_and_trainable() -> None:
    model = tiny_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    folded(model.ecgmoe.encoder)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())


# Stacked adapters


@pytest.mark.parametrize("task", PUBLISHED)
def test_a_published_adapter_answers_among_the_others_as_peft_does_alone(published: MultiTask, task: str) -> None:
    batch = batch_of([10.0, 6.5])
    base = EcgMoeForTasks.from_pretrained(ROOT / "hub/model")
    alone = PeftModel.from_pretrained(base, str(ROOT / "hub/adapters" / task), adapter_name=task)
    assert len(published.cards) == len(PUBLISHED)
    np.testing.assert_allclose(answers_of(published, batch)[task], logits_of(alone, batch, task), atol=1e-5)


LORA_KINDS: dict[str, dict[str, Any]] = {
    "a higher rank": {"r": 5, "lora_alpha": 3},
    "some layers": {"target_modules": r"ecgmoe\.fusion\.(up_proj|pooling\.tokens\.attention\.q_proj)"},
    "rank-stabilised": {"r": 4, "use_rslora": True},
    "a pattern": {"r": 2, "rank_pattern": {"up_proj": 6}, "alpha_pattern": {"fusion.attention.q_proj": 40}},
    "the widest layer alone": {"target_modules": r"ecgmoe\.fusion\.out_proj"},
    "the values of one path": {"target_modules": r"ecgmoe\.fusion\.pooling\.rhythm\.attention\.v_proj"},
    "everything in the fusion": {"target_modules": r"ecgmoe\.fusion\..*_proj"},
}


@pytest.mark.parametrize("kind", LORA_KINDS)
def test_lora_of_other_ranks_and_layers_answers_as_peft_does(hub: Path, tmp_path: Path, kind: str) -> None:
    adapted = adapted_with(**LORA_KINDS[kind])
    save_adapter(adapted, AdapterCard(TASKS["sex"], fingerprint(tiny_model())), tmp_path)
    many = MultiTask.from_pretrained(hub / "model", ["age"])
    many.load(tmp_path)
    batch = batch_of([10.0, 5.0])
    np.testing.assert_allclose(answers_of(many, batch)["sex"], logits_of(adapted, batch, "sex"), atol=1e-5)


@pytest.mark.parametrize("others", [[], ["age"]], ids=["alone", "beside another"])
def test_an_adapter_whose_head_is_nought_answers_as_peft_does_without_its_fusion(
    hub: Path, tmp_path: Path, others: list[str]
) -> None:
    adapted = adapted_with()
    head: Any = adapted.base_model.model.heads["head_sex"].modules_to_save["sex"]
    torch.nn.init.zeros_(head.weight)
    torch.nn.init.constant_(head.bias, 0.7)
    save_adapter(adapted, AdapterCard(TASKS["sex"], fingerprint(tiny_model())), tmp_path)
    many = MultiTask.from_pretrained(hub / "model", others)
    many.load(tmp_path)
    batch = batch_of([10.0, 5.0])
    np.testing.assert_allclose(answers_of(many, batch)["sex"], logits_of(adapted, batch, "sex"), atol=1e-6)
    assert list(many.fused()) == (others or ["sex"])


def test_adapters_follow_the_model_to_its_device(hub: Path) -> None:
    """Of the devices that are everywhere, `meta` alone refuses to meet the processor's tensors."""
    many = MultiTask.from_pretrained(hub / "model", [])
    many.fusion.to("meta")
    many.load(hub / "adapters" / "age")
    stacked = many.stacked()
    assert {buffer.device.type for buffer in stacked.buffers()} == {"meta"}
    assert many._weights["age"].head["weight"].device.type == "meta"


def adapted_with(**options: Any) -> PeftModel:
    """A tiny model with an adapter of the sex task that changes its answers."""
    config = LoraConfig(**({"target_modules": LORA_SCOPES["fusion"], "modules_to_save": ["head_sex"]} | options))
    adapted = get_peft_model(tiny_model(), config, adapter_name="sex")
    torch.manual_seed(1)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return adapted


@pytest.mark.parametrize("options", [{"use_dora": True}, {"lora_bias": True}, {"bias": "lora_only"}], ids=str)
def test_what_is_more_than_lora_is_refused_and_not_half_applied(
    hub: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    save_adapter(adapted_with(**options), AdapterCard(TASKS["sex"], fingerprint(tiny_model())), tmp_path)
    with pytest.raises(ValueError, match=r"is not plain LoRA \(.*PeftModel\.from_pretrained"):
        MultiTask.from_pretrained(hub / "model", []).load(tmp_path)


def test_an_adapter_without_its_head_is_refused(hub: Path, tmp_path: Path) -> None:
    save_adapter(adapted_with(modules_to_save=None), AdapterCard(TASKS["sex"], fingerprint(tiny_model())), tmp_path)
    with pytest.raises(ValueError, match=r"must hold a head of shapes .*1, 32.* for task sex, found none"):
        MultiTask.from_pretrained(hub / "model", []).load(tmp_path)


def test_an_adapter_without_its_weights_is_refused_by_name(hub: Path, tmp_path: Path) -> None:
    save_adapter(adapted_with(), AdapterCard(TASKS["sex"], fingerprint(tiny_model())), tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks adapter_model\.safetensors"):
        MultiTask.from_pretrained(hub / "model", []).load(tmp_path)


# Adapters that come and go


def test_a_refused_adapter_leaves_the_one_of_its_task_in_place(hub: Path, tmp_path: Path) -> None:
    save_adapter(adapted_with(use_dora=True), AdapterCard(TASKS["sex"], fingerprint(tiny_model())), tmp_path)
    many = MultiTask.from_pretrained(hub / "model", ["age", "sex"])
    batch = batch_of([10.0])
    before, identity = answers_of(many, batch), many.identity()
    with pytest.raises(ValueError, match="not plain LoRA"):
        many.load(tmp_path)
    assert many.identity() == identity
    for name, logits in answers_of(many, batch).items():
        np.testing.assert_array_equal(logits, before[name])


def test_what_is_not_loaded_cannot_be_unloaded(hub: Path) -> None:
    with pytest.raises(ValueError, match="no adapter 'sex' is loaded; there are age"):
        MultiTask.from_pretrained(hub / "model", ["age"]).unload("sex")


@pytest.fixture
def hub_cache(hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The Hub client's cache, offline: the model me/tiny, and me/tiny-sex with a branch main and a tag v2."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    second = tmp_path / "second"
    save_adapter(adapted_with(), AdapterCard(TASKS["sex"], fingerprint(tiny_model())), second)
    versions = {"main": ("a" * 40, hub / "adapters/sex"), "v2": ("b" * 40, second)}
    for repo, refs in {"tiny": {"main": ("c" * 40, hub / "model")}, "tiny-sex": versions}.items():
        for ref, (commit, source) in refs.items():
            folder = tmp_path / f"models--me--{repo}"
            (folder / "refs").mkdir(parents=True, exist_ok=True)
            (folder / "refs" / ref).write_text(commit)
            (folder / "snapshots").mkdir(exist_ok=True)
            (folder / "snapshots" / commit).symlink_to(source, target_is_directory=True)
    return tmp_path


def test_an_id_may_name_a_revision(hub_cache: Path) -> None:
    batch = batch_of([10.0])
    first = MultiTask.from_pretrained("me/tiny", ["sex"])
    second = MultiTask.from_pretrained("me/tiny@main", ["sex@v2"])
    expected = logits_of(adapted_with(), batch, "sex")
    assert not np.allclose(answers_of(first, batch)["sex"], expected, atol=1e-3)
    np.testing.assert_allclose(answers_of(second, batch)["sex"], expected, atol=1e-5)
    assert first.identity()["base"] == second.identity()["base"]
    assert first.identity()["adapters"] != second.identity()["adapters"]
    for source, revision in (("me/tiny-sex@v2", None), ("me/tiny-sex", "v2")):
        first.load(source, revision=revision)
        np.testing.assert_allclose(answers_of(first, batch)["sex"], expected, atol=1e-5)


def test_two_revisions_at_once_are_refused(hub: Path) -> None:
    with pytest.raises(ValueError, match="names revision v2, and revision='v3' was passed"):
        MultiTask.from_pretrained(hub / "model", []).load("me/tiny-sex@v2", revision="v3")


def test_a_folder_of_adapters_stands_for_all_that_lie_in_it(hub: Path, tmp_path: Path) -> None:
    model = shutil.copytree(hub / "model", tmp_path / "model")
    for task in ("age", "sex"):
        shutil.copytree(hub / "adapters" / task, tmp_path / "mine" / task)
    (tmp_path / "mine" / "checkpoint").mkdir()
    assert list(MultiTask.from_pretrained(model, [str(tmp_path / "mine")]).cards) == ["age", "sex"]
    assert list(MultiTask.from_pretrained(model, [str(tmp_path / "mine" / "sex")]).cards) == ["sex"]
    with pytest.raises(FileNotFoundError, match=r"holds no task\.json"):
        MultiTask.from_pretrained(model, [str(tmp_path / "mine" / "checkpoint")])


# The fingerprint


@strict
class NewerConfig(EcgMoeConfig):
    """A configuration of tomorrow, with a field more."""

    new_width: int = 7


def test_a_new_field_at_its_default_keeps_the_fingerprint_and_another_value_does_not() -> None:
    def newer(**values: Any) -> EcgMoeForTasks:
        model = tiny_model()
        model.config = NewerConfig(**model.config.to_dict(), **values)
        return model

    assert fingerprint(newer()) == fingerprint(tiny_model())
    assert fingerprint(newer(new_width=8)) != fingerprint(tiny_model())


def test_published_adapters_name_the_published_model(published: MultiTask) -> None:
    bases = {json.loads((ROOT / "hub/adapters" / name / "task.json").read_text())["base"] for name in PUBLISHED}
    assert bases == {published.base} == {"980b0fc9d5f5c96d"}


@pytest.mark.parametrize("part", ["encoder.temporal.norm.weight", "fusion.out_proj.bias"])
def test_changed_weights_change_the_fingerprint(part: str) -> None:
    other = tiny_model()
    with torch.no_grad():
        other.ecgmoe.get_parameter(part).add_(0.01)
    assert fingerprint(other) != fingerprint(tiny_model())


def test_identity_tells_models_and_adapters_apart(hub: Path, tmp_path: Path) -> None:
    many = MultiTask.from_pretrained(hub / "model")
    assert set(many.identity()["adapters"]) == set(TINY_TASKS)
    assert many.identity() == MultiTask.from_pretrained(hub / "model").identity()
    save_adapter(adapted_with(), AdapterCard(TASKS["sex"], fingerprint(tiny_model())), tmp_path)
    before = many.identity()["adapters"]
    many.load(tmp_path)
    assert [name for name, value in many.identity()["adapters"].items() if value != before[name]] == ["sex"]


def test_the_conventional_network_to_compare_with_folds_too() -> None:
    torch.manual_seed(0)
    net = XResNet1d101({"sex": TASKS["sex"]})
    with torch.no_grad():
        for _ in range(2):
            net(torch.randn(8, 12, 400))  # so that the normalisations have something to do
        net.eval()
        x = torch.randn(2, 12, 1000)
        torch.testing.assert_close(net.folded()(x), net(x), atol=1e-4, rtol=1e-4)
    assert sum(isinstance(part, nn.BatchNorm1d) for part in net.folded().modules()) == 2  # those of the hidden layer


def test_paths_in_another_order_are_folded_with_their_own_weights() -> None:
    encoder = tiny_model(paths=("rhythm", "morphology")).eval().ecgmoe.encoder
    batch = batch_of([10.0])
    with torch.no_grad():
        ours, theirs = folded(encoder)(**batch), encoder(**batch)
    torch.testing.assert_close(ours.rhythm_hidden_state, theirs.rhythm_hidden_state, atol=1e-5, rtol=0)
    torch.testing.assert_close(ours.beat_hidden_state, theirs.beat_hidden_state, atol=1e-5, rtol=0)


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_an_adapter_that_changes_the_base_as_well_is_refused(hub: Path, tmp_path: Path, start: str) -> None:
    adapted = adapted_with(init_lora_weights=start)
    save_adapter(adapted, AdapterCard(TASKS["sex"], fingerprint(tiny_model())), tmp_path)
    with pytest.raises(ValueError, match=f"is not plain LoRA \\(init_lora_weights='{start}'"):
        MultiTask.from_pretrained(hub / "model", []).load(tmp_path)


DAMAGES: dict[str, tuple[str, dict[str, torch.Size | None]]] = {
    "a matrix is missing": ("matrices of", {"fusion.up_proj.lora_B": None}),
    "ranks differ": ("matrices of", {"fusion.up_proj.lora_B": torch.Size([32, 3])}),
    "a vector": ("matrices of", {"fusion.up_proj.lora_A": torch.Size([16])}),
    "no bias": ("'bias': \\(1,\\)}.*, found {'weight': \\(1, 32\\)};", {"head_sex.bias": None}),
    "a bias of three": ("found .*'bias': \\(3,\\)", {"head_sex.bias": torch.Size([3])}),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_an_adapter_whose_numbers_do_not_fit_is_refused_when_it_is_loaded(
    hub: Path, tmp_path: Path, damage: str
) -> None:
    save_adapter(adapted_with(), AdapterCard(TASKS["sex"], fingerprint(tiny_model())), tmp_path)
    message, changes = DAMAGES[damage]
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    for part, shape in changes.items():
        name = next(name for name in tensors if part in name)
        if shape is None:
            del tensors[name]
        else:
            tensors[name] = torch.zeros(shape)
    save_file(tensors, file)
    with pytest.raises(ValueError, match=message):
        MultiTask.from_pretrained(hub / "model", []).load(tmp_path)


def test_a_cut_off_adapter_is_refused(hub: Path, tmp_path: Path) -> None:
    save_adapter(adapted_with(), AdapterCard(TASKS["sex"], fingerprint(tiny_model())), tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match="no whole safetensors file"):
        MultiTask.from_pretrained(hub / "model", []).load(tmp_path)


def test_what_is_typical_is_unknown_where_leads_are_missing(published: MultiTask) -> None:
    signal = synthetic_ecg(sampling_rate=250, duration_s=10, seed=3).ecg.signal
    whole, few = published.prepare(signal, 250, LEADS), published.prepare(signal[:2], 250, LEADS[:2])
    published.answer([whole, few])
    assert 0.0 <= whole.quality["typicality"] <= 100.0
    assert few.quality["typicality"] is few.quality["arm_electrodes_swapped"] is None


def test_a_hand_held_recorder_turned_round_is_noticed(published: MultiTask) -> None:
    lead_i = synthetic_ecg(sampling_rate=250, duration_s=10, seed=3).ecg.signal[:1]
    held, turned = published.prepare(lead_i, 250, ["I"]), published.prepare(-lead_i, 250, ["I"])
    published.answer([held, turned])
    assert held.quality["typicality"] is turned.quality["typicality"] is None
    assert held.quality["arm_electrodes_swapped"] < 0.1 < 0.9 < turned.quality["arm_electrodes_swapped"]
