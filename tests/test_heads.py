"""Heads: what they answer, how products of the embedding are learned, saved, shared and refused."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from test_one_pass import answers_of, batch_of, logits_of
from tiny_model import tiny_model

from modeling_ecgmoe.adapter_card import AdapterCard
from modeling_ecgmoe.adapters import MultiTask, fingerprint
from modeling_ecgmoe.feature_extraction_ecgmoe import EcgMoeFeatureExtractor
from modeling_ecgmoe.heads import FARTHEST, PRODUCTS, Head, head_outputs, head_shapes
from modeling_ecgmoe.lora import lora_model, save_adapter
from modeling_ecgmoe.modeling_ecgmoe import EcgMoeForTasks, task_loss
from modeling_ecgmoe.tasks import TASKS, Task

PAIRS = replace(TASKS["sex"], products=3)


def filled(head: Any, seed: int = 0) -> Any:
    """The head with other numbers than nought everywhere."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for values in head.parameters():
            values.copy_(0.3 * torch.randn(values.shape, generator=generator))
    return head


def test_a_head_is_linear_in_the_embedding_and_in_its_products() -> None:
    head = filled(Head(8, PAIRS))
    embedding = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))
    w = {name: values.detach().double().numpy() for name, values in head.named_parameters()}
    for z, found in zip(embedding.double().numpy(), head(embedding).detach().numpy(), strict=True):
        c = np.clip(w["directions"] @ z + w["offsets"], -FARTHEST, FARTHEST)
        expected = w["weight"] @ z + w["bias"] + w["products"] @ np.array([a * b for a in c for b in c])
        np.testing.assert_allclose(found, expected, atol=1e-5)


def test_what_lies_far_from_the_mean_counts_as_no_farther_than_the_bound() -> None:
    head = filled(Head(8, PAIRS))
    with torch.no_grad():
        head.weight.zero_()
        far, farther = (head(length * torch.ones(1, 8)) for length in (1e4, 1e6))
    torch.testing.assert_close(far, farther)


@pytest.mark.parametrize("task", [PAIRS, TASKS["sex"], TASKS["superclass"]], ids=["products", "linear", "parts"])
def test_the_weights_of_a_head_are_those_that_its_task_asks_for(task: Task) -> None:
    assert {name: tuple(values.shape) for name, values in Head(8, task).named_parameters()} == head_shapes(task, 8)


def test_products_are_nought_at_first_and_gradients_leave_them_there() -> None:
    model = tiny_model(tasks={"sex": PAIRS.to_dict()})
    head: Any = model.heads["head_sex"]
    assert not any(head.get_parameter(name).any() for name in PRODUCTS)
    output = head(torch.randn(4, 32))
    task_loss(PAIRS, output, torch.tensor([[0.0], [1.0], [1.0], [0.0]])).backward()
    assert head.weight.grad.any()
    assert not any(head.get_parameter(name).grad.any() for name in PRODUCTS)


def test_a_head_with_products_is_saved_and_loaded(tmp_path: Path) -> None:
    model = tiny_model()
    model.add_task(PAIRS)
    filled(model.heads["head_sex"])
    model.save_pretrained(tmp_path)
    loaded = EcgMoeForTasks.from_pretrained(tmp_path)
    assert loaded.tasks["sex"] == PAIRS
    batch = batch_of([10.0])
    np.testing.assert_array_equal(logits_of(loaded, batch, "sex"), logits_of(model, batch, "sex"))


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    """A model whose head of the sex has products, and an adapter with others."""
    model = tiny_model()
    model.add_task(PAIRS)
    model.save_pretrained(tmp_path / "model")
    EcgMoeFeatureExtractor().save_pretrained(tmp_path / "model")
    adapted = lora_model(EcgMoeForTasks.from_pretrained(tmp_path / "model"), PAIRS, rank=2)
    filled(adapted.base_model.model.heads["head_sex"].modules_to_save["sex"], seed=3)
    save_adapter(adapted, AdapterCard(PAIRS, fingerprint(model)), tmp_path / "adapter")
    return tmp_path


def test_an_adapter_with_products_answers_among_others_as_peft_does_alone(shared: Path) -> None:
    many = MultiTask.from_pretrained(shared / "model", [])
    many.load(shared / "adapter")
    base = EcgMoeForTasks.from_pretrained(shared / "model")
    batch = batch_of([10.0, 5.0])
    joint = logits_of(base, batch, "sex")
    alone = PeftModel.from_pretrained(base, str(shared / "adapter"), adapter_name="sex")
    answers = answers_of(many, batch)["sex"]
    np.testing.assert_allclose(answers, logits_of(alone, batch, "sex"), atol=1e-5)
    assert np.abs(answers - joint).max() > 1e-2


def test_an_adapter_of_products_alone_still_reads_the_embedding(shared: Path) -> None:
    file = shared / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors["base_model.model.heads.head_sex.weight"].zero_()
    save_file(tensors, file, metadata={"format": "pt"})
    many = MultiTask.from_pretrained(shared / "model", [])
    many.load(shared / "adapter")
    assert list(many.fused()) == ["sex"]
    answers = answers_of(many, batch_of([10.0, 5.0]))["sex"]
    assert answers[0] != answers[1]


@pytest.mark.parametrize("lost", PRODUCTS)
def test_an_adapter_that_lacks_a_part_of_its_head_is_refused(shared: Path, lost: str) -> None:
    file = shared / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    del tensors[f"base_model.model.heads.head_sex.{lost}"]
    save_file(tensors, file, metadata={"format": "pt"})
    many = MultiTask.from_pretrained(shared / "model", [])
    with pytest.raises(ValueError, match=rf"must hold a head of shapes .*'{lost}'.* for task sex"):
        many.load(shared / "adapter")


def test_products_count_in_half_precision_as_in_full() -> None:
    head = filled(Head(8, PAIRS))
    embedding = torch.randn(6, 8, generator=torch.Generator().manual_seed(1))
    weights = {name: values.detach() for name, values in head.named_parameters()}
    half = head_outputs(embedding.half(), {name: values.half() for name, values in weights.items()})
    torch.testing.assert_close(half.float(), head_outputs(embedding, weights), atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"products": -1}, "-1 of a binary task"),
        ({"kind": "regression", "labels": (), "codes": {}, "products": 4}, "4 of a regression task"),
    ],
)
def test_products_that_do_not_fit_are_refused(changes: dict[str, Any], found: str) -> None:
    with pytest.raises(ValueError, match=f"products must be 0 or more, .* found {found}"):
        replace(TASKS["sex"], **changes)


def test_products_travel_with_a_task_that_has_some() -> None:
    assert "products" not in TASKS["sex"].to_dict()
    assert Task.from_dict(PAIRS.to_dict()) == PAIRS
    assert not PAIRS.reads_like(TASKS["sex"])
    assert PAIRS.plain() == TASKS["sex"]
