"""The fusion: what the stem saw reaches the embedding whatever the paths make of it."""

import pytest
import torch
from tiny_model import tiny_model
from torch import Tensor

from data_builders.synthetic import synthetic_ecg
from modeling_ecgmoe.feature_extraction_ecgmoe import EcgMoeFeatureExtractor
from modeling_ecgmoe.leads import LEADS
from modeling_ecgmoe.modeling_ecgmoe import EcgMoeForTasks


@pytest.fixture(scope="module")
def model() -> EcgMoeForTasks:
    return tiny_model().eval()


@pytest.fixture(scope="module")
def batch() -> dict[str, Tensor]:
    """Three hearts of 10, 6 and 3 s."""
    extractor = EcgMoeFeatureExtractor()
    signals = [
        synthetic_ecg(sampling_rate=250, duration_s=s, rate_bpm=60 + 5 * s, seed=s).ecg.signal for s in (10, 6, 3)
    ]
    features = extractor(signals, sampling_rate=250, lead_names=LEADS, return_tensors="pt")
    return {name: features[name] for name in extractor.model_input_names}


@torch.no_grad()
def test_what_the_stem_saw_passes_by_all_paths(model: EcgMoeForTasks, batch: dict[str, Tensor]) -> None:
    encoded = model.ecgmoe.encoder(**batch)
    assert encoded.pooled_waves.shape == (3, 2 * model.config.conv_channels[-1])
    before = model.ecgmoe(encoder_output=encoded).pooler_output
    encoded.pooled_waves = encoded.pooled_waves + torch.randn_like(encoded.pooled_waves)
    after = model.ecgmoe(encoder_output=encoded).pooler_output
    assert (after - before).abs().amax(dim=1).min() > 1e-3


@torch.no_grad()
def test_padding_is_not_pooled(model: EcgMoeForTasks, batch: dict[str, Tensor]) -> None:
    together = model.ecgmoe.encoder(**batch).pooled_waves
    short = {name: value[2:] for name, value in batch.items()}
    short["input_values"], short["sample_mask"] = short["input_values"][..., :300], short["sample_mask"][:, :300]
    alone = model.ecgmoe.encoder(**short).pooled_waves
    torch.testing.assert_close(together[2:], alone, atol=1e-5, rtol=0)


@torch.no_grad()
def test_without_a_stem_the_tokens_take_its_place(batch: dict[str, Tensor]) -> None:
    output = tiny_model(families=("trend", "period")).eval().ecgmoe(**batch)
    assert output.encoder.pooled_waves is None
    assert torch.isfinite(output.pooler_output).all()
    assert output.pooler_output.shape == (3, 32)


def test_a_path_left_out_in_training_changes_the_embedding_and_none_is_left_out_after(
    batch: dict[str, Tensor],
) -> None:
    model = tiny_model(memory_dropout=0.5, dropout=0.0, drop_path=0.0)
    with torch.no_grad():
        encoded = model.eval().ecgmoe.encoder(**batch)
        fusion = model.ecgmoe.fusion
        torch.testing.assert_close(fusion(encoded)[0], fusion(encoded)[0])
        torch.manual_seed(0)
        fusion.train()
        assert not torch.allclose(fusion(encoded)[0], fusion(encoded)[0])
