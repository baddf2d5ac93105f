"""Temporal features: families that look at the same signal side by side and give tokens on one grid.

Axes: b record, l lead, t sample, s token, n beat, p phase bin, d channel.

| family | looks for | after |
|---|---|---|
| conv | local waves, as the residual network sees them | He et al. 2016 |
| ssm | long memory, by bidirectional diagonal state spaces | S4D, Gu et al. 2022 |
| patch | relations between any two moments, by a transformer | PatchTST, Nie et al. 2023 |
| trend | slow drift against fast residual | DLinear, Zeng et al. 2023 |
| period | the record's mean heart cycle, and what departs from it | TimesNet's folding, Wu et al. 2023, on beats |

The first three share a residual network, the stem, which reads the waves once for all of them; the others read the
signal itself. The configuration names those that a model has; by default conv, ssm and period.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from .configuration_ecgmoe import EcgMoeConfig


class CardiacClock:
    """Where in its heart cycle each moment lies.

    Args:
        r_peaks: float (b, n) in samples, negative where there are no more beats.
        period: float (b,) in samples, the record's own mean RR interval, 0 where unknown.
        times: float (moments,) in samples, ascending.

    Attributes:
        phase: (b, moments) in [0, 1): 0 at an R peak. Before the first and after the last beat the mean period goes
            on; without any beat the period runs from the first sample.
        rr: (b, moments), the length in samples of the cycle that holds the moment, 0 where unknown.
        since: (b, moments), samples since the last R peak; known: (b,), False where phase means nothing.
    """

    def __init__(self, r_peaks: Tensor, period: Tensor, times: Tensor) -> None:
        far = 1e6
        peaks = torch.where(r_peaks >= 0, r_peaks, far).contiguous()
        following = functional.pad(peaks, (0, 1), value=far)[:, 1:]
        first, mean = peaks[:, :1], period[:, None]
        # For each count of beats so far: where the cycle began (any whole number of cycles away), and how long it is.
        anchors = torch.cat([torch.where(first < far, first, 0.0), peaks], dim=1)
        cycles = torch.cat([mean, torch.where(following < far, following - peaks, mean)], dim=1)
        at = torch.searchsorted(peaks, times.expand(peaks.shape[0], -1).contiguous(), right=True)
        known = mean > 0
        self.known, self.period = known[:, 0], period
        self.rr = cycles.gather(1, at) * known
        safe = self.rr.clamp(min=1.0)
        self.since = torch.remainder(times - anchors.gather(1, at), safe) * known
        self.phase = self.since / safe

    def features(self, sampling_rate: int, moments: slice = slice(None)) -> Tensor:
        """What a token is told of its heart cycle: (b, moments, `CLOCK_FEATURES`)."""
        rr, since, phase = self.rr[:, moments], self.since[:, moments], self.phase[:, moments]
        known = self.known[:, None].to(phase.dtype)
        angles = 2 * math.pi * phase[..., None] * torch.arange(1.0, 4.0, device=phase.device)
        change = (rr / self.period[:, None].clamp(min=1.0) - 1.0).clamp(-1.0, 2.0)
        pace = torch.stack([rr / sampling_rate, since / sampling_rate, change, known.expand_as(rr)], dim=-1)
        return torch.cat([torch.sin(angles), torch.cos(angles), pace], dim=-1) * known[..., None]


CLOCK_FEATURES = 10


class ConvNorm(nn.Sequential):
    """Convolution, batch normalisation and, unless it ends a residual branch, a rectifier."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1, rectify: bool = True) -> None:
        layers: list[nn.Module] = [
            nn.Conv1d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False),
            nn.BatchNorm1d(outputs),
        ]
        super().__init__(*layers, *([nn.ReLU()] if rectify else []))


class DropPath(nn.Module):
    """Leave out a residual branch for some records of a batch (stochastic depth, Huang et al. 2016)."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.rate == 0.0:
            return x
        shape = (x.shape[0],) + (1,) * (x.ndim - 1)
        return x * (torch.rand(shape, device=x.device) >= self.rate) / (1.0 - self.rate)


class ResidualBlock(nn.Module):
    """Two convolutions and a shortcut."""

    def __init__(self, channels: int, kernel: int, drop_path: float) -> None:
        super().__init__()
        self.first = ConvNorm(channels, channels, kernel)
        self.second = ConvNorm(channels, channels, kernel, rectify=False)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, mask: Tensor | float = 1.0) -> Tensor:
        return torch.relu(x + self.drop_path(self.second(self.first(x) * mask)))


class ResidualBlocks(nn.ModuleList):
    """Residual blocks of one width and rate."""

    def __init__(self, channels: int, kernel: int, blocks: int, drop_path: float) -> None:
        super().__init__(ResidualBlock(channels, kernel, drop_path) for _ in range(blocks))

    def forward(self, x: Tensor, mask: Tensor | float = 1.0) -> Tensor:
        for block in self:
            x = block(x, mask) * mask
        return x


class Stem(nn.Module):
    """Four convolutions that halve the rate each, with residual blocks after all but the first: (b, l, t) to
    (b, channels, t / 16)."""

    def __init__(self, config: EcgMoeConfig) -> None:
        super().__init__()
        widths, kernels = config.conv_channels, config.conv_kernels
        inputs = (len(config.leads), *widths[:3])
        self.enters = nn.ModuleList(ConvNorm(*size, stride=2) for size in zip(inputs, widths, kernels, strict=True))
        sizes = zip(widths, kernels, (0, *config.conv_blocks), strict=True)
        self.blocks = nn.ModuleList(ResidualBlocks(*size, config.drop_path) for size in sizes)

    def forward(self, x: Tensor, token_mask: Tensor | None = None) -> Tensor:
        """token_mask: (b, s), False on padding: what normalisation writes there must not reach the signal through the
        next convolution."""
        masks = (1.0,) * 4 if token_mask is None else stem_masks(token_mask, x.dtype)
        for enter, blocks, mask in zip(self.enters, self.blocks, masks, strict=True):
            x = blocks(enter(x) * mask, mask)
        return x


def stem_masks(token_mask: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Which steps are real at the stem's four rates, (b, 1, steps) for each."""
    real = token_mask[:, None, :].to(dtype)
    return *(real.repeat_interleave(each, dim=2) for each in (8, 4, 2)), real


def mean_and_max(states: Tensor, mask: Tensor) -> Tensor:
    """(b, s, d) to (b, 2 d) over the states whose mask (b, s) is True."""
    share = (mask / mask.sum(dim=1, keepdim=True).clamp(min=1)).to(states.dtype)
    mean = torch.matmul(share[:, None], states)[:, 0]
    return torch.cat([mean, states.masked_fill(~mask[..., None], -1e4).amax(dim=1)], dim=-1)


class ConvFamily(nn.Module):
    """What the stem sees, moment by moment: (b, s, channels) to (b, s, d)."""

    def __init__(self, config: EcgMoeConfig) -> None:
        super().__init__()
        self.project = nn.Linear(config.conv_channels[3], config.hidden_size)

    def forward(self, waves: Tensor, token_mask: Tensor) -> Tensor:
        return self.project(waves)


class StateSpace(nn.Module):
    """A bidirectional diagonal state-space layer (S4D-Lin, Gu et al. 2022, eq. 3 and section 4) as one convolution.

    The kernel of channel d at lag t is 2 Re sum_n C_dn exp(t dt_d A_dn); lags to the past and to the future have
    coefficients of their own.
    """

    def __init__(self, channels: int, states: int) -> None:
        super().__init__()
        self.channels, self.states = channels, states
        self.log_step = nn.Parameter(torch.empty(channels))
        self.log_decay = nn.Parameter(torch.empty(channels, states))
        self.frequency = nn.Parameter(torch.empty(channels, states))
        self.weight = nn.Parameter(torch.empty(2, channels, states, 2))
        self.skip = nn.Parameter(torch.empty(channels))
        self.norm = nn.LayerNorm(channels)
        self.mix = nn.Linear(channels, 2 * channels)

    def kernel(self, length: int) -> Tensor:
        """The two-sided kernel (d, 2 * length): lags 0 to length - 1, then -length to -1."""
        step = self.log_step.exp()[:, None]
        decay, angle = -self.log_decay.exp() * step, self.frequency * step
        lags = torch.arange(length, device=step.device, dtype=step.dtype)
        envelope = torch.exp(decay[..., None] * lags)
        turn = angle[..., None] * lags
        real, imaginary = self.weight[..., 0, None], self.weight[..., 1, None]
        past, future = (envelope * (real * torch.cos(turn) - imaginary * torch.sin(turn))).sum(dim=2) * 2.0 * step
        return torch.cat([past, future.flip(-1)], dim=-1)

    def spectrum(self, length: int) -> Tensor:
        """The kernel's Fourier transform, (d, length + 1), with what goes past it, the same at every frequency."""
        return torch.fft.rfft(self.kernel(length).float()) + self.skip[:, None]

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """x (b, s, d); mask (b, 1, s), 0 on padding."""
        return self.mixed(x, self.convolved(x, mask, self.spectrum(x.shape[1])))

    def convolved(self, x: Tensor, mask: Tensor, spectrum: Tensor) -> Tensor:
        """The sequence through the kernel of this spectrum, (b, s, d)."""
        length = x.shape[1]
        u = self.norm(x).transpose(1, 2).float() * mask
        y = torch.fft.irfft(torch.fft.rfft(u, n=2 * length) * spectrum, n=2 * length)
        return y[..., :length].transpose(1, 2)

    def mixed(self, x: Tensor, y: Tensor) -> Tensor:
        """The residual that y (b, s, d), mixed over its channels and gated, makes with x."""
        value, gate = self.mix(functional.silu(y).to(x.dtype)).chunk(2, dim=-1)
        return x + value * torch.sigmoid(gate)


class SsmFamily(nn.Module):
    """State-space layers on what the stem sees: (b, s, channels) to (b, s, d)."""

    def __init__(self, config: EcgMoeConfig) -> None:
        super().__init__()
        self.embed = nn.Linear(config.conv_channels[3], config.ssm_channels)
        self.layers = nn.ModuleList(
            StateSpace(config.ssm_channels, config.ssm_states) for _ in range(config.ssm_layers)
        )
        self.project = nn.Linear(config.ssm_channels, config.hidden_size)

    def forward(self, waves: Tensor, token_mask: Tensor) -> Tensor:
        hidden = self.embed(waves)
        for layer in self.layers:
            hidden = layer(hidden, token_mask[:, None, :].float())
        return self.project(hidden)


class Attention(nn.Module):
    """Multi-head attention of (b, q, d) over (b, k, d)."""

    def __init__(self, size: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(size, size)
        self.k_proj = nn.Linear(size, size, bias=False)
        self.v_proj = nn.Linear(size, size)
        self.out_proj = nn.Linear(size, size)

    def forward(self, x: Tensor, memory: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """mask: bool (b, k), True where the memory may be seen, at least once a record. Returns (b, q, d) and the
        weights (b, heads, q, k)."""
        query, key, value = (
            projection(states).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for projection, states in ((self.q_proj, x), (self.k_proj, memory), (self.v_proj, memory))
        )
        scores = torch.matmul(query * query.shape[-1] ** -0.5, key.transpose(2, 3))
        if mask is not None:
            scores = scores.masked_fill(~mask[:, None, None, :], -1e4)
        weights = torch.softmax(scores, dim=-1)
        return self.out_proj(torch.matmul(weights, value).transpose(1, 2).flatten(-2)), weights


class SelfAttention(Attention):
    """The same among the elements of one sequence (b, n, d), for those who do not ask for the weights."""

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:  # type: ignore[override]
        """mask: bool (b, n), True where an element may be seen, *optional*. Returns (b, n, d)."""
        query, key, value = (
            projection(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        # Not minus infinity: a record without any element stays finite.
        unseen = None if mask is None else ((mask.to(x.dtype) - 1.0) * 1e4)[:, None, None, :]
        mixed = functional.scaled_dot_product_attention(query, key, value, unseen)
        return self.out_proj(mixed.transpose(1, 2).flatten(-2))


def time_features(seconds: Tensor, size: int) -> Tensor:
    """Sines and cosines of a time in seconds, periods from 0.16 to 20 s: (..., size)."""
    rates = torch.logspace(math.log10(1 / 20), math.log10(1 / 0.16), size // 2, device=seconds.device)
    angle = 2 * math.pi * seconds[..., None] * rates
    return torch.cat([torch.sin(angle), torch.cos(angle)], dim=-1)


class PatchLayer(nn.Module):
    """A pre-norm transformer layer."""

    def __init__(self, size: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(size), nn.LayerNorm(size)
        self.attention = SelfAttention(size, heads)
        self.up_proj, self.down_proj = nn.Linear(size, 2 * size), nn.Linear(2 * size, size)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x), mask)
        return x + self.down_proj(functional.silu(self.up_proj(self.norm2(x))))


class PatchFamily(nn.Module):
    """A transformer on what the stem sees: (b, s, channels) to (b, s, d)."""

    def __init__(self, config: EcgMoeConfig) -> None:
        super().__init__()
        size = config.patch_channels
        self.token_s = config.token_stride / config.sampling_rate
        self.embed = nn.Linear(config.conv_channels[3], size)
        self.layers = nn.ModuleList(PatchLayer(size, config.num_attention_heads) for _ in range(config.patch_layers))
        self.project = nn.Linear(size, config.hidden_size)

    def forward(self, waves: Tensor, token_mask: Tensor) -> Tensor:
        hidden = self.embed(waves)
        seconds = torch.arange(token_mask.shape[1], device=waves.device) * self.token_s
        hidden = hidden + time_features(seconds, hidden.shape[-1]).to(hidden.dtype)
        for layer in self.layers:
            hidden = layer(hidden, token_mask)
        return self.project(hidden)


class TrendFamily(nn.Module):
    """Each patch told apart into a moving average and the rest, each read by its own linear layer (DLinear)."""

    def __init__(self, config: EcgMoeConfig) -> None:
        super().__init__()
        self.stride = config.token_stride
        self.window = 2 * (round(config.trend_window_s * config.sampling_rate / self.stride) // 2) + 1
        leads = len(config.leads)
        self.trend = nn.Linear(leads, config.hidden_size)
        self.residual = nn.Linear(leads * self.stride, 64)
        self.project = nn.Linear(64, config.hidden_size)

    def forward(self, x: Tensor, token_mask: Tensor) -> Tensor:
        patches = x.unflatten(2, (token_mask.shape[1], self.stride))
        known = token_mask[:, None, :].to(x.dtype)
        total, count = (
            functional.avg_pool1d(of, self.window, 1, self.window // 2) for of in (patches.mean(dim=3) * known, known)
        )
        trend = total / count.clamp(min=1e-3)
        residual = (patches - trend[..., None]).transpose(1, 2).flatten(2)
        return self.trend(trend.transpose(1, 2)) + self.project(torch.relu(self.residual(residual)))


class LeadConv(nn.Conv1d):
    """A convolution of the leads, on CPUs in single precision even where all else runs in bfloat16.

    With twelve channels and an even kernel, oneDNN 3.12 (torch 2.13) gives numbers that have nothing to do with the
    input in bfloat16 on processors with AMX, without a word.
    """

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu" or (x.dtype != torch.bfloat16 and not torch.is_autocast_enabled("cpu")):
            return super().forward(x)
        bias = None if self.bias is None else self.bias.float()
        with torch.autocast("cpu", enabled=False):
            return self._conv_forward(x.float(), self.weight.float(), bias).to(self.weight.dtype)


class PeriodFamily(nn.Module):
    """The record folded on its own beats: the mean cycle read around the clock, and what departs from it in place."""

    def __init__(self, config: EcgMoeConfig) -> None:
        super().__init__()
        self.bins, self.stride = config.phase_bins, config.token_stride
        leads = len(config.leads)
        self.cycle = nn.Conv1d(leads, 64, 7, padding=3, padding_mode="circular")
        self.cycle_project = nn.Linear(64, config.hidden_size)
        self.departure = LeadConv(leads, 64, 2 * self.stride, self.stride, padding=self.stride // 2)
        self.project = nn.Linear(64, config.hidden_size)

    def forward(self, x: Tensor, token_mask: Tensor, clock: CardiacClock, sample_mask: Tensor) -> Tensor:
        batch, leads, num_tokens = x.shape[0], x.shape[1], token_mask.shape[1]
        at = (clock.phase * self.bins).long().clamp(max=self.bins - 1)
        index = at[:, None, :].expand(-1, leads, -1)
        total = x.new_zeros(batch, leads, self.bins).scatter_add(2, index, x)
        count = x.new_zeros(batch, self.bins).scatter_add(1, at, sample_mask.to(x.dtype))
        mean_cycle = total / count.clamp(min=1.0)[:, None, :]
        departure = (x - mean_cycle.gather(2, index)) * (clock.known[:, None, None] & sample_mask[:, None, :])
        around = torch.relu(self.cycle(mean_cycle)).transpose(1, 2)
        token_at = at[:, self.stride // 2 :: self.stride][:, :num_tokens, None].expand(-1, -1, around.shape[-1])
        here = torch.relu(self.departure(departure)[..., :num_tokens]).transpose(1, 2)
        known = clock.known[:, None, None].to(x.dtype)
        return self.cycle_project(around.gather(1, token_at)) * known + self.project(here)


STEM_FAMILIES = {"conv", "ssm", "patch"}


class TemporalFeatures(nn.Module):
    """All families, and a gate for each that opens and closes with the token.

    The gates do not compete: in a softmax over the families the shallow ones, which learn first, starve the deep ones.
    `forward` returns tokens (b, s, d), each family's share of the gates (b, s, families), and the mean and the highest
    of what the stem sees (b, 2 channels), None for a model without a stem.
    """

    def __init__(self, config: EcgMoeConfig) -> None:
        super().__init__()
        known = {
            "conv": ConvFamily,
            "ssm": SsmFamily,
            "patch": PatchFamily,
            "trend": TrendFamily,
            "period": PeriodFamily,
        }
        self.families = nn.ModuleDict({name: known[name](config) for name in config.families})
        self.stem = Stem(config) if STEM_FAMILIES & set(config.families) else None
        self.norms = nn.ModuleDict({name: nn.LayerNorm(config.hidden_size) for name in config.families})
        self.gate_weight = nn.Parameter(torch.empty(len(config.families), config.hidden_size))
        self.gate_bias = nn.Parameter(torch.empty(len(config.families)))
        self.clock = nn.Linear(CLOCK_FEATURES, config.hidden_size) if config.period_aware else None
        self.norm = nn.LayerNorm(config.hidden_size)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self, x: Tensor, token_mask: Tensor, sample_mask: Tensor, clock: CardiacClock, clock_features: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        more = {"period": (clock, sample_mask)}
        waves = x if self.stem is None else self.stem(x, token_mask).transpose(1, 2)
        pooled_waves = None if self.stem is None else mean_and_max(waves, token_mask)
        read = {name: waves if name in STEM_FAMILIES else x for name in self.families}
        seen = [
            self.norms[name](family(read[name], token_mask, *more.get(name, ())))
            for name, family in self.families.items()
        ]
        scores = torch.stack([torch.matmul(of, weight) for of, weight in zip(seen, self.gate_weight, strict=True)], -1)
        gates = (2.0 / len(seen)) * torch.sigmoid(scores + self.gate_bias)
        tokens = seen[0] * gates[..., :1]
        for index in range(1, len(seen)):
            tokens = torch.addcmul(tokens, seen[index], gates[..., index : index + 1])
        if self.clock is not None:
            tokens = tokens + self.clock(clock_features)
        return self.dropout(self.norm(tokens)), gates / gates.sum(dim=-1, keepdim=True), pooled_waves
