"""What users of transformers and PEFT do with every model; the auto classes are in test_remote_code."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from test_remote_code import ROOT, python_of, run_python
from tiny_model import save_tiny_model, tiny_model
from torch import Tensor
from transformers import AutoModelForSequenceClassification, Trainer, TrainingArguments

from data_builders.synthetic import synthetic_ecg
from modeling_ecgmoe.adapter_card import BASE_MODEL, AdapterCard
from modeling_ecgmoe.classification_ecgmoe import EcgMoeForSequenceClassification
from modeling_ecgmoe.configuration_ecgmoe import EcgMoeConfig
from modeling_ecgmoe.feature_extraction_ecgmoe import EcgMoeFeatureExtractor
from modeling_ecgmoe.leads import LEADS
from modeling_ecgmoe.lora import lora_model, save_adapter
from modeling_ecgmoe.modeling_ecgmoe import EcgMoeForTasks, EcgMoeModel
from modeling_ecgmoe.tasks import TASKS, Task


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model and three adapters. Do not write into it."""
    folder = tmp_path_factory.mktemp("hub")
    save_tiny_model(folder, ("age", "sex", "superclass"))
    return folder


@pytest.fixture(scope="module")
def batch() -> dict[str, Tensor]:
    signals = [
        synthetic_ecg(sampling_rate=250, noise_mv=0.01, seed=i, rate_bpm=60 + 20 * i).ecg.signal for i in (0, 1)
    ]
    features = EcgMoeFeatureExtractor()(signals, 250, LEADS, return_tensors="pt")
    return {name: features[name] for name in EcgMoeFeatureExtractor.model_input_names}


@torch.no_grad()
def logits_of(model: torch.nn.Module, batch: dict[str, Tensor], task: str) -> Tensor:
    return model.eval()(**batch).logits[task]


# Loading and saving


def test_a_checkpoint_in_shards_comes_back_bit_for_bit(tmp_path: Path, batch: dict[str, Tensor]) -> None:
    model = tiny_model().eval()
    model.save_pretrained(tmp_path, max_shard_size="30KB")
    assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 1
    loaded, info = EcgMoeForTasks.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in loaded.state_dict().items())
    # Where a tensor begins in memory decides how its numbers are added up.
    torch.testing.assert_close(logits_of(loaded, batch, "age"), logits_of(model, batch, "age"), atol=1e-6, rtol=0)


@pytest.mark.parametrize("device_map", ["cpu", "auto"])
def test_a_device_map_places_the_model_and_changes_nothing(
    hub: Path, batch: dict[str, Tensor], device_map: str
) -> None:
    placed = EcgMoeForTasks.from_pretrained(hub / "model", device_map=device_map)
    batch = {name: value.to(placed.device) for name, value in batch.items()}
    tolerance = 1e-6 if placed.device.type == "cpu" else 1e-4
    found, expected = logits_of(placed, batch, "age").cpu(), logits_of(tiny_model(), batch, "age").cpu()
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=0)


def test_modules_that_must_stay_on_one_device_are_there_under_their_names() -> None:
    model = tiny_model()
    found = {type(module).__name__ for module in model.modules()}
    assert set(model._no_split_modules) <= found


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_checkpoint_loaded_in_half_precision_answers_nearly_alike(
    hub: Path, batch: dict[str, Tensor], dtype: torch.dtype
) -> None:
    half = EcgMoeForTasks.from_pretrained(hub / "model", dtype=dtype)
    assert {parameter.dtype for parameter in half.parameters()} == {dtype}
    expected = logits_of(tiny_model(), batch, "superclass")
    # bfloat16 has 8 bits of mantissa, float16 has 11.
    tolerance = 0.1 if dtype == torch.bfloat16 else 0.02
    torch.testing.assert_close(logits_of(half, batch, "superclass").float(), expected, atol=tolerance, rtol=0)


def test_the_configuration_shows_what_differs_from_the_default() -> None:
    shown = tiny_model(expert_size=16).config.to_diff_dict()
    assert shown["expert_size"] == 16
    assert "output_hidden_states" not in shown
    assert EcgMoeConfig.from_dict(shown).to_dict() == tiny_model(expert_size=16).config.to_dict()


# Training and evaluation


def test_dropout_acts_in_training_and_not_in_evaluation(batch: dict[str, Tensor]) -> None:
    model = tiny_model()
    with torch.no_grad():
        trained = [model.train()(**batch).logits["superclass"] for _ in range(2)]
        evaluated = [model.eval()(**batch).logits["superclass"] for _ in range(2)]
    assert not torch.equal(*trained)
    assert torch.equal(*evaluated)


def test_gradient_checkpointing_is_refused_in_words() -> None:
    with pytest.raises(ValueError, match=r"does not support (gradient|activation) checkpointing"):
        tiny_model().activation_checkpointing_enable()


@pytest.mark.parametrize(
    ("problem_type", "labels"),
    [
        ("single_label_classification", torch.tensor([0, 2])),
        ("multi_label_classification", torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]])),
        ("regression", torch.tensor([[1.0, 2.0, 3.0], [0.0, 0.5, 1.0]])),
    ],
)
def test_a_classifier_of_ones_own_starts_from_the_checkpoint_and_learns(
    hub: Path, batch: dict[str, Tensor], problem_type: str, labels: Tensor
) -> None:
    model, info = AutoModelForSequenceClassification.from_pretrained(
        hub / "model", num_labels=3, problem_type=problem_type, output_loading_info=True
    )
    assert type(model) is EcgMoeForSequenceClassification
    assert set(info["missing_keys"]) == {"score.weight", "score.bias"}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(8):
        output = model(**batch, labels=labels)
        assert output.logits.shape == (2, 3)
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(output.loss.item())
    assert losses[-1] < 0.7 * losses[0]


def test_a_classifier_comes_back_with_its_label_names_and_opens_as_an_encoder(
    tmp_path: Path, batch: dict[str, Tensor]
) -> None:
    config = tiny_model().config
    config.id2label, config.label2id = {0: "sinus", 1: "other"}, {"sinus": 0, "other": 1}
    model = EcgMoeForSequenceClassification(config).eval()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert loaded.config.id2label == {0: "sinus", 1: "other"}
    with torch.no_grad():
        torch.testing.assert_close(loaded(**batch).logits, model(**batch).logits, atol=1e-6, rtol=0)
    auto_map = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    assert auto_map["AutoModelForSequenceClassification"] == ("classification_ecgmoe.EcgMoeForSequenceClassification")
    assert {f"{entry.split('.')[0]}.py" for entry in auto_map.values()} <= {p.name for p in tmp_path.glob("*.py")}
    _, info = EcgMoeModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]


def test_the_extractors_output_goes_into_every_model_as_it_is(hub: Path) -> None:
    signal = synthetic_ecg(sampling_rate=250, noise_mv=0.01).ecg.signal
    features = EcgMoeFeatureExtractor()(signal, 250, LEADS, return_tensors="pt")
    inputs = {name: features[name] for name in EcgMoeFeatureExtractor.model_input_names}
    classifier = AutoModelForSequenceClassification.from_pretrained(hub / "model", num_labels=2)
    for model in (tiny_model().ecgmoe, tiny_model(), classifier):
        with torch.no_grad():
            whole, known = model.eval()(**features), model(**inputs)
        first, second = (out["logits"] if "logits" in out else out["pooler_output"] for out in (whole, known))
        torch.testing.assert_close(first, second, atol=0, rtol=0)
        with pytest.raises(TypeError, match=r"forward\(\) has no argument r_peak; leave it out"):
            model(**inputs, r_peak=None)


def test_transformers_trainer_learns_from_the_extractors_output(hub: Path, tmp_path: Path) -> None:
    signal = synthetic_ecg(sampling_rate=250, noise_mv=0.01).ecg.signal
    features = EcgMoeFeatureExtractor()(signal, 250, LEADS, return_tensors="np")
    rows = [{name: value[0] for name, value in features.items()} | {"labels": label} for label in (0, 1)]
    model = AutoModelForSequenceClassification.from_pretrained(hub / "model", num_labels=2)
    arguments = TrainingArguments(str(tmp_path), max_steps=1, report_to="none", save_strategy="no", use_cpu=True)
    trainer = Trainer(model, arguments, train_dataset=rows)
    assert not trainer.model_accepts_loss_kwargs
    assert np.isfinite(trainer.train().training_loss)


def test_a_head_that_no_task_names_is_told(hub: Path) -> None:
    config = EcgMoeConfig.from_pretrained(hub / "model")
    config.tasks = {name: task for name, task in config.tasks.items() if name != "sex"}
    _, info = EcgMoeForTasks.from_pretrained(hub / "model", config=config, output_loading_info=True)
    assert set(info["unexpected_keys"]) == {"heads.head_sex.weight", "heads.head_sex.bias"}
    for kind in (EcgMoeModel, EcgMoeForSequenceClassification):
        assert not kind.from_pretrained(hub / "model", output_loading_info=True)[1]["unexpected_keys"]


# Adapters, through transformers itself


def test_load_adapter_answers_as_peft_does(hub: Path, batch: dict[str, Tensor]) -> None:
    model = EcgMoeForTasks.from_pretrained(hub / "model")
    for task in ("age", "superclass"):
        model.load_adapter(str(hub / "adapters" / task), adapter_name=task)
    for task in ("age", "superclass", "age"):
        model.set_adapter(task)
        assert model.active_adapters() == [task]
        alone = PeftModel.from_pretrained(tiny_model(), str(hub / "adapters" / task), adapter_name=task)
        torch.testing.assert_close(logits_of(model, batch, task), logits_of(alone, batch, task), atol=1e-6, rtol=0)
    base = logits_of(tiny_model(), batch, "superclass")
    model.set_adapter("superclass")
    assert not torch.allclose(logits_of(model, batch, "superclass"), base, atol=1e-3)
    model.disable_adapters()
    torch.testing.assert_close(logits_of(model, batch, "superclass"), base, atol=1e-6, rtol=0)


BLOOD = Task("blood_type", "multi_class", "ABO group", "blood", labels=("A", "B", "AB", "0"))


@pytest.mark.parametrize("name", ["age", "blood_type"])
def test_what_an_adapters_page_says_of_peft_runs(
    hub: Path, batch: dict[str, Tensor], name: str, tmp_path: Path
) -> None:
    task, folder = TASKS.get(name, BLOOD), tmp_path / name
    adapted = lora_model(tiny_model(), task)
    save_adapter(adapted, AdapterCard(task, "abc"), folder)
    code = python_of(folder / "README.md")[-1].replace(f"{BASE_MODEL}-{name}", str(folder))
    code = code.replace(BASE_MODEL, str(hub / "model")).replace(f'hf_hub_download("{folder}", ', f'("{folder}/" + ')
    given = 'import numpy, torch\nfeatures = {k: torch.from_numpy(v) for k, v in numpy.load("batch.npz").items()}\n'
    np.savez(tmp_path / "batch.npz", **{key: value.numpy() for key, value in batch.items()})
    code = f'{given}{code}\nnumpy.save("found.npy", logits.detach().numpy())'
    run_python(code, cwd=tmp_path, isolated=False, PYTHONPATH=str(ROOT), HF_MODULES_CACHE=str(tmp_path / "modules"))
    expected = logits_of(adapted, batch, name)
    np.testing.assert_allclose(np.load(tmp_path / "found.npy"), expected, atol=1e-6)


def test_an_adapter_is_deleted_while_another_stays(hub: Path, batch: dict[str, Tensor]) -> None:
    model = EcgMoeForTasks.from_pretrained(hub / "model")
    for task in ("age", "sex"):
        model.load_adapter(str(hub / "adapters" / task), adapter_name=task)
    model.set_adapter("sex")
    expected = logits_of(model, batch, "sex")
    model.delete_adapter("age")
    torch.testing.assert_close(logits_of(model, batch, "sex"), expected, atol=0, rtol=0)


# In a fresh process: compilation, and PEFT's classes for models that it does not know


COMPILE = """
import sys
import numpy as np, torch
from transformers import AutoModel
import modeling_ecgmoe
from peft import AutoPeftModel, PeftConfig

folder, adapter, out = sys.argv[1:]
batch = {name: torch.from_numpy(value) for name, value in np.load(out + "/batch.npz").items()}
model = AutoModel.from_pretrained(folder).eval()
compiled = torch.compile(model, backend="aot_eager")
with torch.no_grad():
    np.savez(out + "/found.npz", plain=model(**batch).pooler_output, compiled=compiled(**batch).pooler_output)
print(PeftConfig.from_pretrained(adapter).peft_type.value)
"""


def test_a_compiled_model_answers_as_the_plain_one(hub: Path, batch: dict[str, Tensor], tmp_path: Path) -> None:
    np.savez(tmp_path / "batch.npz", **{name: value.numpy() for name, value in batch.items()})
    arguments: list[Any] = [hub / "model", hub / "adapters" / "age", tmp_path]
    out = run_python(COMPILE, *map(str, arguments), cwd=tmp_path, isolated=False, PYTHONPATH=str(ROOT))
    assert out.strip() == "LORA"
    found = np.load(tmp_path / "found.npz")
    np.testing.assert_allclose(found["compiled"], found["plain"], atol=1e-5)
