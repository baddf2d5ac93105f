"""The backbone of ECG-MoE as a plain torch module: everything that does not depend on the task."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.utils import ModelOutput

from .configuration_ecgmoe import EcgMoeConfig
from .routing import (
    Elements,
    MixtureLayers,
    MorphologyPath,
    RhythmPath,
    Routing,
    load_balancing_loss,
    router_z_loss,
    rr_features,
)
from .temporal import CardiacClock, TemporalFeatures


@dataclass
class EcgMoeEncoderOutput(ModelOutput):
    """What the backbone knows of a batch, the same for every task.

    Args:
        last_hidden_state: tokens (b, s, d), and `token_mask` (b, s).
        pooled_waves: (b, 2 * channels), mean and highest of the stem's output; without a stem None.
        beat_hidden_state: (b, 1 + n, d), the mean beat first, and `beat_mask` (b, 1 + n).
        rhythm_hidden_state: (b, m, d), coarse stretches and then RR intervals, and `rhythm_mask` (b, m).
        family_weights: (b, s, families), what the gate gives each temporal family.
        morphology_router_probs, rhythm_router_probs: one tensor (b, n, e) for each layer of the path.
        period_s: (b,), the heart period the model was told, 0 where unknown.
        aux_loss: the weighted router losses, a scalar; only in training.
    """

    last_hidden_state: Tensor | None = None
    token_mask: Tensor | None = None
    pooled_waves: Tensor | None = None
    beat_hidden_state: Tensor | None = None
    beat_mask: Tensor | None = None
    rhythm_hidden_state: Tensor | None = None
    rhythm_mask: Tensor | None = None
    family_weights: Tensor | None = None
    morphology_router_probs: tuple[Tensor, ...] | None = None
    rhythm_router_probs: tuple[Tensor, ...] | None = None
    period_s: Tensor | None = None
    aux_loss: Tensor | None = None

    def memories(self) -> dict[str, tuple[Tensor, Tensor]]:
        """The states that the fusion reads, with their masks."""
        pairs = {
            "tokens": (self.last_hidden_state, self.token_mask),
            "morphology": (self.beat_hidden_state, self.beat_mask),
            "rhythm": (self.rhythm_hidden_state, self.rhythm_mask),
        }
        return {name: (state, mask) for name, (state, mask) in pairs.items() if state is not None and mask is not None}


class EcgMoeEncoder(nn.Module):
    """The backbone: everything that does not depend on the task."""

    def __init__(self, config: EcgMoeConfig) -> None:
        super().__init__()
        self.config = config
        self.temporal = TemporalFeatures(config)
        self.paths = nn.ModuleDict(
            {name: {"morphology": MorphologyPath, "rhythm": RhythmPath}[name](config) for name in config.paths}
        )
        self.mixture_layers = MixtureLayers()

    def forward(
        self,
        input_values: Tensor,
        lead_mask: Tensor | None = None,
        sample_mask: Tensor | None = None,
        r_peaks: Tensor | None = None,
        rr_intervals_s: Tensor | None = None,
        period_s: Tensor | None = None,
    ) -> EcgMoeEncoderOutput:
        """See `EcgMoeModel.forward`."""
        config, stride, rate = self.config, self.config.token_stride, self.config.sampling_rate
        batch, samples = _checked_shape(input_values, config)
        if sample_mask is None:
            sample_mask = input_values.new_ones(batch, samples, dtype=torch.bool)
        if lead_mask is not None:
            input_values = input_values * lead_mask[:, :, None]
        input_values = input_values * sample_mask[:, None, :]
        input_values = functional.pad(input_values, (0, -samples % stride))
        sample_mask = functional.pad(sample_mask, (0, -samples % stride), value=False)
        token_mask = sample_mask.unflatten(1, (-1, stride)).any(dim=2)
        if r_peaks is None:
            r_peaks = input_values.new_full((batch, 1), -1.0)
        r_peaks = r_peaks.float()
        beat_mask = r_peaks >= 0
        if rr_intervals_s is None:
            following = beat_mask & functional.pad(beat_mask, (1, 0))[:, :-1]
            rr_intervals_s = functional.pad(r_peaks, (1, 0))[:, 1:] - functional.pad(r_peaks, (1, 0))[:, :-1]
            rr_intervals_s = rr_intervals_s / rate * following
        if period_s is None:
            count = (rr_intervals_s > 0).sum(dim=1).clamp(min=1)
            period_s = rr_intervals_s.sum(dim=1) / count
        # With the width of the model's numbers, so that half-precision models run too.
        dtype = self.temporal.norm.weight.dtype
        input_values, period = input_values.to(dtype), period_s.float() * rate
        clock = CardiacClock(r_peaks, period, torch.arange(input_values.shape[2], device=r_peaks.device).float())
        at_tokens = clock.features(rate, slice(stride // 2, None, stride)).to(dtype)

        tokens, family_weights, pooled_waves = self.temporal(input_values, token_mask, sample_mask, clock, at_tokens)
        output = EcgMoeEncoderOutput(
            last_hidden_state=tokens,
            token_mask=token_mask,
            pooled_waves=pooled_waves,
            family_weights=family_weights,
            period_s=period_s,
        )
        elements: dict[str, Elements] = {}
        beats = rr_features(rr_intervals_s.float(), period_s.float(), beat_mask).to(dtype)
        if "morphology" in self.paths:
            at_beats = _clock_at_beats(beats, period_s, beat_mask)
            path = self.paths["morphology"]
            elements["morphology"] = path(input_values, tokens, token_mask, r_peaks, beat_mask, at_beats.to(dtype))
        if "rhythm" in self.paths:
            elements["rhythm"] = self.paths["rhythm"](tokens, token_mask, r_peaks, beat_mask, beats)
        layers = {name: path.layers for name, path in self.paths.items()}
        states, routings = self.mixture_layers(layers, elements)
        probs = {name: tuple(torch.softmax(r.logits, dim=-1) for r in each) for name, each in routings.items()}
        if "morphology" in states:
            output.beat_hidden_state, output.beat_mask = states["morphology"], elements["morphology"].mask
            output.morphology_router_probs = probs["morphology"]
        if "rhythm" in states:
            output.rhythm_hidden_state, output.rhythm_mask = states["rhythm"], elements["rhythm"].mask
            output.rhythm_router_probs = probs["rhythm"]
        if self.training:
            output.aux_loss = self._router_losses(routings, elements)
        return output

    def _router_losses(self, routings: dict[str, list[Routing]], elements: dict[str, Elements]) -> Tensor:
        total = torch.zeros((), device=self.temporal.norm.weight.device)
        for name, layers in routings.items():
            mask = elements[name].mask
            for routing in layers:
                balance = load_balancing_loss(routing.logits, routing.experts, mask)
                total = total + self.config.router_aux_loss_coef * balance
                total = total + self.config.router_z_loss_coef * router_z_loss(routing.logits, mask)
        return total


def _checked_shape(input_values: Tensor, config: EcgMoeConfig) -> tuple[int, int]:
    if input_values.ndim != 3 or input_values.shape[1] != len(config.leads):
        raise ValueError(
            f"`input_values` must have shape (batch, {len(config.leads)} leads, samples), found "
            f"{tuple(input_values.shape)}; EcgMoeFeatureExtractor makes it from any recording"
        )
    return input_values.shape[0], input_values.shape[2]


def _clock_at_beats(beats: Tensor, period_s: Tensor, beat_mask: Tensor) -> Tensor:
    """The clock features of beats, (b, n, CLOCK_FEATURES): phase is 0 there by definition, the rest is their RR."""
    real = beat_mask[..., None].to(beats.dtype)
    period, known = period_s[:, None, None].to(beats.dtype) * real, (beats[..., :1] > 0).to(beats.dtype)
    return torch.cat([beats, period, known, torch.zeros_like(real), real], dim=-1)
