"""Mixture of experts: a router that chooses, experts that compute, a layer that joins them, and the two router losses.

Axes: b record, n element of a sequence (beat or coarse token), d channel, e expert.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from .configuration_ecgmoe import EcgMoeConfig
from .temporal import CLOCK_FEATURES, DropPath, SelfAttention, time_features


class Routing(NamedTuple):
    """What a router decided: logits (b, n, e) in float32, weights (b, n, k) that sum to one, experts (b, n, k)."""

    logits: Tensor
    weights: Tensor
    experts: Tensor


class Router(nn.Module):
    """Chooses the k most probable experts of each element, in float32 whatever the model's type."""

    def __init__(self, config: EcgMoeConfig) -> None:
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))

    def forward(self, hidden: Tensor) -> Routing:
        with torch.autocast(hidden.device.type, enabled=False):
            logits = functional.linear(hidden.float(), self.weight.float())
            weights, experts = torch.softmax(logits, dim=-1).topk(self.top_k, dim=-1)
            weights = weights / weights.sum(dim=-1, keepdim=True)
        return Routing(logits, weights, experts)


class Experts(nn.Module):
    """Gated feed-forward experts as 3-D parameters.

    The form here computes all experts for all elements and weighs the chosen ones: with a few small experts this is
    faster on CPUs than sorting elements. `experts_implementation="grouped_mm"` or `"batched_mm"`
    of `from_pretrained` computes the chosen ones only, see modeling_ecgmoe.py.
    """

    def __init__(self, config: EcgMoeConfig) -> None:
        super().__init__()
        self.num_experts = config.num_experts
        self.gate_up_proj = nn.Parameter(torch.empty(config.num_experts, 2 * config.expert_size, config.hidden_size))
        self.down_proj = nn.Parameter(torch.empty(config.num_experts, config.hidden_size, config.expert_size))
        self.act_fn = nn.SiLU()

    def forward(self, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        share = hidden.new_zeros(hidden.shape[0], self.num_experts).scatter(
            1, top_k_index, top_k_weights.to(hidden.dtype)
        )
        gate, up = torch.matmul(hidden, self.gate_up_proj.transpose(1, 2)).chunk(2, dim=-1)
        inner = self.act_fn(gate) * up * share.t().unsqueeze(-1)
        return torch.matmul(inner, self.down_proj.transpose(1, 2)).sum(dim=0)


class SharedExpert(nn.Module):
    """The expert that sees every element."""

    def __init__(self, config: EcgMoeConfig) -> None:
        super().__init__()
        self.gate_up_proj = nn.Linear(config.hidden_size, 2 * config.expert_size, bias=False)
        self.down_proj = nn.Linear(config.expert_size, config.hidden_size, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(hidden).chunk(2, dim=-1)
        return self.down_proj(functional.silu(gate) * up)


class MixtureLayer(nn.Module):
    """Attention among the elements of a path, then routed experts and the shared one; pre-norm residuals."""

    def __init__(self, config: EcgMoeConfig) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(config.hidden_size), nn.LayerNorm(config.hidden_size)
        self.attention = SelfAttention(config.hidden_size, config.num_attention_heads)
        self.router = Router(config)
        self.experts = Experts(config)
        self.shared_expert = SharedExpert(config)
        self.dropout = nn.Dropout(config.dropout)
        self.drop_path = DropPath(config.drop_path)

    def forward(self, hidden: Tensor, mask: Tensor) -> tuple[Tensor, Routing]:
        hidden = hidden + self.drop_path(self.dropout(self.attention(self.norm1(hidden), mask)))
        normed = self.norm2(hidden)
        routing = self.router(normed)
        flat = normed.flatten(0, 1)
        routed = self.experts(flat, routing.experts.flatten(0, 1), routing.weights.flatten(0, 1)).view_as(normed)
        return hidden + self.drop_path(self.dropout(routed + self.shared_expert(normed))), routing


def load_balancing_loss(logits: Tensor, experts: Tensor, mask: Tensor) -> Tensor:
    """How unevenly the experts are used (Fedus et al. 2022, Switch Transformers, eq. 4 to 6, for k choices).

    Args:
        logits: (b, n, e); experts: chosen indices (b, n, k); mask: bool (b, n), False elements do not count.

    Returns:
        A scalar: e * sum_e f_e P_e, f the share of choices and P the mean probability; 1 where balanced, at most e.
    """
    num_experts = logits.shape[-1]
    weight = mask.to(logits.dtype)
    total = weight.sum().clamp(min=1.0)
    probability = (torch.softmax(logits, dim=-1) * weight[..., None]).sum(dim=(0, 1)) / total
    chosen = functional.one_hot(experts, num_experts).to(logits.dtype).mean(dim=2)
    frequency = (chosen * weight[..., None]).sum(dim=(0, 1)) / total
    return num_experts * (frequency * probability).sum()


def router_z_loss(logits: Tensor, mask: Tensor) -> Tensor:
    """Keeps router logits small (Zoph et al. 2022, ST-MoE, eq. 5): the mean squared log-sum-exp of the elements."""
    weight = mask.to(logits.dtype)
    return (torch.logsumexp(logits, dim=-1) ** 2 * weight).sum() / weight.sum().clamp(min=1.0)


class Elements(NamedTuple):
    """States of a path (b, n, d), and which of them are real (b, n)."""

    hidden: Tensor
    mask: Tensor


class MixtureLayers(nn.Module):
    """The mixture layers of all paths, each path for itself.

    It holds no layers: they belong to their paths. `forward` returns each path's last states and the routing of each
    of its layers.
    """

    def forward(
        self, layers: dict[str, nn.ModuleList], elements: dict[str, Elements]
    ) -> tuple[dict[str, Tensor], dict[str, list[Routing]]]:
        states: dict[str, Tensor] = {}
        routings: dict[str, list[Routing]] = {}
        for name, (hidden, mask) in elements.items():
            routings[name] = []
            for layer in layers[name]:
                hidden, routing = layer(hidden, mask)
                routings[name].append(routing)
            states[name] = hidden
        return states, routings


class MorphologyPath(nn.Module):
    """The shape of each beat: a window of the signal around its R peak, the tokens there, and how it departs in time.

    Element 0 stands for the record's mean beat, so that a record without any beat has a state too.
    """

    def __init__(self, config: EcgMoeConfig) -> None:
        super().__init__()
        start_s, end_s = config.beat_window_s
        self.start = round(start_s * config.sampling_rate)
        self.length = round((end_s - start_s) * config.sampling_rate)
        self.stride = config.token_stride
        self.window = nn.Sequential(
            nn.Linear(len(config.leads) * self.length, config.beat_size),
            nn.SiLU(),
            nn.Linear(config.beat_size, config.hidden_size),
        )
        self.token_offsets = range(-1, 3)
        self.token_project = nn.Linear(len(self.token_offsets) * config.hidden_size, config.hidden_size)
        self.clock = nn.Linear(CLOCK_FEATURES, config.hidden_size) if config.period_aware else None
        self.mean_beat = nn.Parameter(torch.empty(config.hidden_size))
        self.norm = nn.LayerNorm(config.hidden_size)
        self.layers = nn.ModuleList(MixtureLayer(config) for _ in range(config.path_layers))

    def forward(
        self,
        x: Tensor,
        tokens: Tensor,
        token_mask: Tensor,
        r_peaks: Tensor,
        beat_mask: Tensor,
        clock_features: Tensor,
    ) -> Elements:
        """x (b, l, t); tokens (b, s, d), token_mask (b, s); r_peaks (b, n) in samples;
        beat_mask (b, n); clock_features (b, n, ...)."""
        windows = self._windows(x, r_peaks).flatten(2)
        share = (beat_mask / beat_mask.sum(dim=1, keepdim=True).clamp(min=1)).to(x.dtype)[:, None]
        mean_window = torch.matmul(share, windows)
        departures = (windows - mean_window) * beat_mask[..., None]
        around = self.token_project(self._tokens_at(tokens, token_mask, r_peaks))
        if self.clock is not None:
            around = around + self.clock(clock_features)
        mean_around = torch.matmul(share, around) + self.mean_beat
        shapes = self.window(torch.cat([mean_window, departures], dim=1))
        hidden = self.norm(shapes + torch.cat([mean_around, around], dim=1))
        return Elements(hidden, functional.pad(beat_mask, (1, 0), value=True))

    def _windows(self, x: Tensor, r_peaks: Tensor) -> Tensor:
        """The signal around each R peak, (b, n, l, length), 0 beyond the ends."""
        padded = functional.pad(x, (self.length, self.length))
        first = r_peaks.round().long().clamp(min=0) + self.start + self.length
        index = first[..., None] + torch.arange(self.length, device=x.device)
        index = index.clamp(max=padded.shape[-1] - 1)
        beats, length = index.shape[1:]
        picked = padded.gather(2, index.flatten(1)[:, None, :].expand(-1, x.shape[1], -1))
        return picked.unflatten(2, (beats, length)).transpose(1, 2)

    def _tokens_at(self, tokens: Tensor, token_mask: Tensor, r_peaks: Tensor) -> Tensor:
        """The tokens before, at and after each R peak side by side, (b, n, offsets * d)."""
        centre = (r_peaks.clamp(min=0) / self.stride).long()
        offsets = torch.arange(self.token_offsets.start, self.token_offsets.stop, device=tokens.device)
        last = (token_mask * torch.arange(tokens.shape[1], device=tokens.device)).amax(dim=1)
        index = torch.minimum((centre[..., None] + offsets).clamp(min=0), last[:, None, None])
        picked = tokens.gather(1, index.flatten(1)[..., None].expand(-1, -1, tokens.shape[-1]))
        return picked.unflatten(1, index.shape[1:]).flatten(2)


class RhythmPath(nn.Module):
    """The order of beats in time: one element for each RR interval, one for each coarse stretch of the recording."""

    def __init__(self, config: EcgMoeConfig) -> None:
        super().__init__()
        self.pool, self.stride, self.sampling_rate = config.rhythm_pool, config.token_stride, config.sampling_rate
        self.size = config.hidden_size
        self.intervals = nn.Sequential(
            nn.Linear(RR_FEATURES, config.hidden_size), nn.SiLU(), nn.Linear(config.hidden_size, config.hidden_size)
        )
        self.coarse = nn.Linear(2 * config.hidden_size, config.hidden_size)
        self.kind = nn.Parameter(torch.empty(2, config.hidden_size))
        self.period_aware = config.period_aware
        self.norm = nn.LayerNorm(config.hidden_size)
        self.layers = nn.ModuleList(MixtureLayer(config) for _ in range(config.path_layers))

    def forward(
        self, tokens: Tensor, token_mask: Tensor, r_peaks: Tensor, beat_mask: Tensor, rr_features: Tensor
    ) -> Elements:
        """tokens (b, s, d); r_peaks (b, n) in samples; rr_features (b, n, `RR_FEATURES`)."""
        coarse, mask = self._coarse(tokens, token_mask)
        hidden = self.coarse(coarse) + self.kind[0]
        at_s = torch.arange(coarse.shape[1], device=tokens.device) * (self.pool * self.stride / self.sampling_rate)
        at_s = at_s.expand(coarse.shape[0], -1)
        if self.period_aware:
            intervals = self.intervals(rr_features) + self.kind[1]
            hidden, mask = torch.cat([hidden, intervals], dim=1), torch.cat([mask, beat_mask], dim=1)
            at_s = torch.cat([at_s, r_peaks / self.sampling_rate], dim=1)
        hidden = hidden + time_features(at_s, self.size).to(hidden.dtype)
        return Elements(self.norm(hidden), mask)

    def _coarse(self, tokens: Tensor, token_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and maximum of the real tokens of each stretch, (b, stretches, 2 d), and which stretches have any."""
        if extra := -tokens.shape[1] % self.pool:
            tokens, token_mask = functional.pad(tokens, (0, 0, 0, extra)), functional.pad(token_mask, (0, extra))
        tokens, mask = tokens.unflatten(1, (-1, self.pool)), token_mask.unflatten(1, (-1, self.pool))
        seen = mask.any(dim=2)
        count = mask.sum(dim=2).clamp(min=1)[..., None]
        mean = (tokens * mask[..., None]).sum(dim=2) / count
        highest = tokens.masked_fill(~mask[..., None], -1e4).amax(dim=2) * seen[..., None]
        return torch.cat([mean, highest], dim=-1), seen


RR_FEATURES = 6


def rr_features(rr_intervals_s: Tensor, period_s: Tensor, beat_mask: Tensor) -> Tensor:
    """What the rhythm path is told of each beat, (b, n, `RR_FEATURES`).

    The interval before and after in seconds, both against the record's mean, their difference, and whether both are
    known.
    """
    after = functional.pad(rr_intervals_s, (0, 1))[:, 1:] * beat_mask
    intervals = torch.stack([rr_intervals_s, after], dim=-1)
    mean, known = period_s[:, None, None].clamp(min=0.05), intervals > 0
    ratios = (intervals / mean - 1.0) * known
    both = known.all(dim=-1, keepdim=True).to(intervals.dtype)
    change = torch.diff(intervals) / mean * both
    features = torch.cat([intervals, 3 * ratios, 3 * change, both], dim=-1)
    return features.clamp(-6.0, 6.0) * beat_mask[..., None]
