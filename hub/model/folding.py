"""The backbone as inference runs it: the same function, rewritten once after training so that it costs less.

Batch normalisations disappear into the convolutions before them, the residual network keeps its channels last in
memory, experts are computed side by side, and what the state-space layers compute from weights alone is kept. Nothing
here is saved or trained.
"""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.fusion import fuse_conv_bn_weights

from .configuration_ecgmoe import EcgMoeConfig
from .encoder import EcgMoeEncoder
from .fusion import Fusion
from .routing import MixtureLayer, Routing
from .temporal import ConvFamily, ResidualBlocks, SsmFamily, StateSpace, Stem

WEIGHTS_FILE = "model.safetensors"


class Backbone(nn.Module):
    """Encoder and fusion of a checkpoint, without heads and without what transformers adds to a model."""

    def __init__(self, config: EcgMoeConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder, self.fusion = EcgMoeEncoder(config), Fusion(config)

    @classmethod
    def load(cls, folder: Path) -> "Backbone":
        """Read the weights of a model, in float32.

        Raises:
            FileNotFoundError: they do not lie in one file.
            RuntimeError: they do not fit the configuration.
        """
        file = folder / WEIGHTS_FILE
        if not file.is_file():
            raise FileNotFoundError(f"{folder} holds no {WEIGHTS_FILE}")
        with torch.device("meta"):
            backbone = cls(EcgMoeConfig.from_pretrained(folder))
        named = {name.removeprefix("ecgmoe."): value for name, value in load_file(file).items()}
        weights = {name: value for name, value in named.items() if name.split(".")[0] in ("encoder", "fusion")}
        backbone.load_state_dict(weights, assign=True)
        return backbone.float().eval()

    @classmethod
    def of(cls, model: Any) -> "Backbone":
        """That of a model in memory, with its weights themselves.

        Made anew, since the parts of a model from the Hub may be of other copies of these classes.
        """
        with torch.device("meta"):
            backbone = cls(model.config)
        backbone.load_state_dict(model.ecgmoe.state_dict(), assign=True)
        return backbone.eval()


def folded(encoder: EcgMoeEncoder) -> EcgMoeEncoder:
    """A copy for inference alone, equal to 1e-5; later changes to the weights of `encoder` do not reach it."""
    copied = copy.deepcopy(encoder).eval().requires_grad_(False)
    temporal: Any = copied.temporal
    if temporal.stem is not None:
        temporal.stem = FoldedStem(temporal.stem)
    for family in temporal.families.values():
        if isinstance(family, ConvFamily):
            family.blocks = FoldedBlocks(family.blocks)  # type: ignore[assignment]
        elif isinstance(family, SsmFamily):
            layers: Any = family.layers
            family.layers = nn.ModuleList(FoldedStateSpace(layer) for layer in layers)
    paths: Any = copied.paths
    for path in paths.values():
        path.layers = nn.ModuleList(FoldedMixtureLayer(layer) for layer in path.layers)
    return copied.requires_grad_(False)


def _linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], device=weight.device, dtype=weight.dtype)
    with torch.no_grad():
        layer.weight.copy_(weight)
        layer.bias.copy_(bias)
    return layer


class FoldedStem(nn.Module):
    """`Stem` without batch normalisation, on (b, channels, 1, t) with channels last in memory.

    oneDNN convolves that layout without copying it, and takes it in two dimensions only.
    """

    def __init__(self, stem: Stem) -> None:
        super().__init__()
        blocks: Any = stem.blocks
        self.enters: Any = nn.ModuleList(_folded_conv(enter) for enter in stem.enters)
        self.blocks: Any = nn.ModuleList(map(FoldedBlocks, blocks))

    def forward(self, x: Tensor, masks: Sequence[Tensor]) -> Tensor:
        """See `Stem.forward`."""
        x = _channels_last(x)
        for enter, blocks, mask in zip(self.enters, self.blocks, masks, strict=True):
            mask = mask.unsqueeze(2)
            x = blocks.wide(functional.relu_(_convolved(enter, x)).mul_(mask), mask)
        return x.squeeze(2)


class FoldedBlocks(nn.ModuleList):
    """`ResidualBlocks` in the same form."""

    def __init__(self, blocks: ResidualBlocks) -> None:
        super().__init__(nn.ModuleList([_folded_conv(b.first), _folded_conv(b.second)]) for b in blocks)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """See `ResidualBlocks.forward`."""
        return self.wide(_channels_last(x), mask.unsqueeze(2)).squeeze(2)

    def wide(self, x: Tensor, mask: Tensor) -> Tensor:
        """x (b, channels, 1, t), mask (b, 1, 1, t)."""
        pairs: Any = self
        for first, second in pairs:
            inner = functional.relu_(_convolved(first, x)).mul_(mask)
            x = functional.relu_(_convolved(second, inner).add_(x)).mul_(mask)
        return x


def _channels_last(x: Tensor) -> Tensor:
    return x.unsqueeze(2).contiguous(memory_format=torch.channels_last)


def _convolved(layer: nn.Conv2d, x: Tensor) -> Tensor:
    """The convolution by oneDNN, which torch passes over for one small recording though it is faster there too."""
    if x.device.type != "cpu" or not torch.backends.mkldnn.is_available() or torch.compiler.is_exporting():
        return layer(x)
    padding: Any = layer.padding
    return torch.mkldnn_convolution(x, layer.weight, layer.bias, padding, layer.stride, layer.dilation, layer.groups)


def _folded_conv(layer: Any) -> nn.Conv2d:
    """The convolution that does what convolution and batch normalisation of a `ConvNorm` do in evaluation."""
    conv, norm = layer[0], layer[1]
    weight, bias = fuse_conv_bn_weights(
        conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
    )
    wide = nn.Conv2d(
        conv.in_channels, conv.out_channels, (1, conv.kernel_size[0]), (1, conv.stride[0]), (0, conv.padding[0])
    )
    wide.weight = nn.Parameter(weight.detach().unsqueeze(2).contiguous(memory_format=torch.channels_last))
    wide.bias = nn.Parameter(bias.detach())
    return wide


class FoldedStateSpace(nn.Module):
    """`StateSpace` that computes its kernel once for each length.

    Few records are convolved through their Fourier transform. Of many the convolution is a product with one matrix for
    each channel, (d, s, s), which then is read from memory once for all of them.
    """

    many = 8

    def __init__(self, layer: StateSpace) -> None:
        super().__init__()
        self.layer = layer
        self._spectra: dict[int, Tensor] = {}
        self._matrix: tuple[int, Tensor] | None = None  # of the last length alone: it holds millions of numbers

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """See `StateSpace.forward`."""
        layer, length = self.layer, x.shape[1]
        if x.shape[0] < self.many:
            if length not in self._spectra:
                self._spectra[length] = layer.spectrum(length)
            return layer.mixed(x, layer.convolved(x, mask, self._spectra[length]))
        kept = self._matrix
        if kept is None or kept[0] != length:
            self._matrix = kept = length, _toeplitz(layer, length)
        u = (layer.norm(x) * mask.transpose(1, 2)).permute(2, 0, 1).contiguous().float()
        return layer.mixed(x, torch.bmm(u, kept[1]).permute(1, 2, 0).contiguous())


def _toeplitz(layer: StateSpace, length: int) -> Tensor:
    """(d, s, s): what each moment gives to each later or earlier one, the skip connection included."""
    moments = torch.arange(length, device=layer.skip.device)
    lags = (moments[None, :] - moments[:, None]) % (2 * length)
    return layer.kernel(length).float()[:, lags] + torch.diag_embed(layer.skip[:, None].expand(-1, length))


class FoldedMixtureLayer(nn.Module):
    """`MixtureLayer` with one product for queries, keys and values, and one for all experts and the shared one."""

    def __init__(self, layer: MixtureLayer) -> None:
        super().__init__()
        self.norm1, self.norm2, self.router = layer.norm1, layer.norm2, layer.router
        attention, experts, shared = layer.attention, layer.experts, layer.shared_expert
        self.heads, self.out_proj = attention.heads, attention.out_proj
        parts = (attention.q_proj, attention.k_proj, attention.v_proj)
        weights: list[Tensor] = [part.weight for part in parts]
        biases: list[Tensor] = [
            torch.zeros_like(attention.q_proj.bias) if part.bias is None else part.bias for part in parts
        ]
        self.qkv = _linear(torch.cat(weights), torch.cat(biases))
        gate_up = torch.cat([experts.gate_up_proj, shared.gate_up_proj.weight[None]])
        down = torch.cat([experts.down_proj, shared.down_proj.weight[None]])
        # Rows: the gates of all experts, then what they let through.
        self.gate_up = nn.Parameter(gate_up.unflatten(1, (2, -1)).transpose(0, 1).flatten(0, 2).clone())
        self.down = nn.Parameter(down.transpose(0, 1).flatten(1).clone())

    def forward(self, hidden: Tensor, mask: Tensor) -> tuple[Tensor, Routing]:
        """See `MixtureLayer.forward`."""
        query, key, value = self.qkv(self.norm1(hidden)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        unseen = ((mask.to(hidden.dtype) - 1.0) * 1e4)[:, None, None, :]
        mixed = functional.scaled_dot_product_attention(query, key, value, unseen)
        hidden = hidden + self.out_proj(mixed.transpose(1, 2).flatten(-2))
        normed = self.norm2(hidden)
        routing = self.router(normed)
        shares = torch.zeros_like(routing.logits).scatter(-1, routing.experts, routing.weights).to(hidden.dtype)
        shares = functional.pad(shares, (0, 1), value=1.0).unsqueeze(-1)
        gate, through = functional.linear(normed, self.gate_up).chunk(2, dim=-1)
        inner = functional.silu(gate).mul_(through).unflatten(-1, (shares.shape[-2], -1)).mul_(shares)
        return hidden + functional.linear(inner.flatten(-2), self.down), routing
