"""The backbone as inference runs it: the same function, rewritten once after training so that it costs less.

Batch normalisations disappear into the convolutions before them, the residual network keeps its channels last in
memory, and what the state-space layers compute from weights alone is kept. Nothing here is saved or trained.
"""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.fusion import fuse_conv_bn_weights

from .modeling_ecgmoe import EcgMoeEncoder
from .temporal import ConvFamily, ConvNorm, ResidualTrunk, SsmFamily, StateSpace


def folded(encoder: EcgMoeEncoder) -> EcgMoeEncoder:
    """A copy for inference alone, equal to 1e-5; later changes to the weights of `encoder` do not reach it."""
    copied = copy.deepcopy(encoder).eval().requires_grad_(False)
    for family in copied.temporal.families.values():
        if isinstance(family, ConvFamily):
            family.trunk = FoldedTrunk(family.trunk)
        elif isinstance(family, SsmFamily):
            for layer in family.layers:
                layer.__class__ = FoldedStateSpace
    return copied


class FoldedTrunk(nn.Module):
    """`ResidualTrunk` without batch normalisation, on (b, channels, 1, t) with channels last in memory.

    oneDNN convolves that layout without copying it, and takes it in two dimensions only.
    """

    def __init__(self, trunk: ResidualTrunk) -> None:
        super().__init__()
        self.enters = nn.ModuleList(_folded_conv(stage[0]) for stage in trunk.stages)
        self.blocks = nn.ModuleList(
            nn.ModuleList(
                nn.ModuleList([_folded_conv(block.first), _folded_conv(block.second)]) for block in list(stage)[1:]
            )
            for stage in trunk.stages
        )

    def forward(self, x: Tensor, masks: Sequence[Tensor | float]) -> tuple[Tensor, Tensor]:
        """See `ResidualTrunk.forward`."""
        states = []
        x = x.unsqueeze(2).contiguous(memory_format=torch.channels_last)
        for enter, blocks, mask in zip(self.enters, self.blocks, masks, strict=True):
            mask = mask.unsqueeze(2) if isinstance(mask, Tensor) else mask
            x = _masked(functional.relu_(enter(x)), mask)
            for first, second in blocks:
                inner = _masked(functional.relu_(first(x)), mask)
                x = _masked(functional.relu_(second(inner).add_(x)), mask)
            states.append(x.squeeze(2))
        return states[-2], states[-1]


def _masked(x: Tensor, mask: Tensor | float) -> Tensor:
    return x.mul_(mask) if isinstance(mask, Tensor) else x


def _folded_conv(layer: ConvNorm) -> nn.Conv2d:
    """The convolution that does what convolution and batch normalisation of `layer` do in evaluation."""
    conv, norm = layer[0], layer[1]
    weight, bias = fuse_conv_bn_weights(
        conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
    )
    wide = nn.Conv2d(
        conv.in_channels,
        conv.out_channels,
        (1, conv.kernel_size[0]),
        (1, conv.stride[0]),
        (0, conv.padding[0]),
    ).requires_grad_(False)
    wide.weight.copy_(weight.unsqueeze(2))
    wide.bias.copy_(bias)
    return wide.to(weight.dtype, memory_format=torch.channels_last)


class FoldedStateSpace(StateSpace):
    """`StateSpace` that keeps the spectrum of its kernel for each length."""

    def spectrum(self, length: int) -> Tensor:
        kept = self.__dict__.setdefault("_spectra", {})
        if length not in kept:
            kept[length] = super().spectrum(length)
        return kept[length]
