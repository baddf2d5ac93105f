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

from .configuration_ecgmoe import PATHS, EcgMoeConfig
from .encoder import EcgMoeEncoder
from .fusion import Fusion
from .routing import Elements, MixtureLayer, Routing
from .temporal import PeriodFamily, ResidualBlocks, SsmFamily, StateSpace, Stem, stem_masks

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
        if isinstance(family, SsmFamily):
            layers: Any = family.layers
            family.layers = nn.ModuleList(FoldedStateSpace(layer) for layer in layers)
        elif isinstance(family, PeriodFamily):
            family.cycle, family.departure = FoldedConv(family.cycle), FoldedConv(family.departure)  # type: ignore[assignment]
    paths: Any = copied.paths
    # In the order in which the encoder hands over their elements, whatever that of the configuration.
    layers_of = [paths[name].layers for name in PATHS if name in paths]
    copied.mixture_layers = FoldedMixtureLayers(layers_of)  # type: ignore[assignment]
    for path in paths.values():
        path.layers = nn.ModuleList()
    return copied.requires_grad_(False)


class FoldedStem(nn.Module):
    """`Stem` without batch normalisation, on (b, channels, 1, t) with channels last in memory.

    oneDNN convolves that layout without copying it, and takes it in two dimensions only.
    """

    def __init__(self, stem: Stem) -> None:
        super().__init__()
        blocks: Any = stem.blocks
        self.enters: Any = nn.ModuleList(_folded_conv(enter) for enter in stem.enters)
        self.blocks: Any = nn.ModuleList(map(FoldedBlocks, blocks))
        self.room = max(int(conv.padding[1]) for conv in self.modules() if isinstance(conv, nn.Conv2d))

    def forward(self, x: Tensor, token_mask: Tensor) -> Tensor:
        """See `Stem.forward`."""
        if _is_one_on_cpu(x):
            return self._one(x[0].t(), token_mask[0])
        x = _channels_last(x)
        for enter, blocks, mask in zip(self.enters, self.blocks, stem_masks(token_mask, x.dtype), strict=True):
            mask = mask.unsqueeze(2)
            x = blocks(functional.relu_(_convolved(enter, x)).mul_(mask), mask)
        return x.squeeze(2)

    def _one(self, rows: Tensor, token_mask: Tensor) -> Tensor:
        """One recording (t, leads) and its mask (s,) to (1, channels, s)."""
        whole, room = bool(token_mask.all()), self.room
        x = _with_room(rows, room)
        for enter, blocks, steps in zip(self.enters, self.blocks, (8, 4, 2, 1), strict=True):
            padding = None if whole else ~token_mask.repeat_interleave(steps)[:, None]
            x = blocks.one(_rectified(_slid(enter, x, room), padding, room), padding, room)
        return _inside(x, room).t()[None]


class FoldedBlocks(nn.ModuleList):
    """`ResidualBlocks` in the same form."""

    def __init__(self, blocks: ResidualBlocks) -> None:
        super().__init__(nn.ModuleList([_folded_conv(b.first), _folded_conv(b.second)]) for b in blocks)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """x (b, channels, 1, t), mask (b, 1, 1, t)."""
        pairs: Any = self
        for first, second in pairs:
            inner = functional.relu_(_convolved(first, x)).mul_(mask)
            x = functional.relu_(_convolved(second, inner).add_(x)).mul_(mask)
        return x

    def one(self, x: Tensor, padding: Tensor | None, room: int) -> Tensor:
        """The same for one recording, x (room + t + room, channels) and padding (t, 1), None for none."""
        pairs: Any = self
        for first, second in pairs:
            inner = _rectified(_slid(first, x, room), padding, room)
            x = _rectified(_slid(second, inner, room).add_(x), padding, room)
        return x


class FoldedConv(nn.Module):
    """A convolution of (b, channels, t), run like those of the stem."""

    def __init__(self, conv: nn.Conv1d) -> None:
        super().__init__()
        self.around = conv.kernel_size[0] // 2 if conv.padding_mode == "circular" else 0
        assert conv.bias is not None
        self.conv = _wide(conv, conv.weight, conv.bias, 0 if self.around else conv.padding[0])

    def forward(self, x: Tensor) -> Tensor:
        around, room = self.around, int(self.conv.padding[1])
        if _is_one_on_cpu(x):
            rows = x[0].t()
            rows = torch.cat([rows[-around:], rows, rows[:around]]) if around else _with_room(rows, room)
            return _inside(_slid(self.conv, rows, room), room).t()[None]
        if around:
            x = functional.pad(x, (around, around), mode="circular")
        return _convolved(self.conv, _channels_last(x)).squeeze(2)


def _channels_last(x: Tensor) -> Tensor:
    return x.unsqueeze(2).contiguous(memory_format=torch.channels_last)


def _is_one_on_cpu(x: Tensor) -> bool:
    """Whether a convolution is faster as a product with all its windows side by side, which lie so in memory."""
    return x.shape[0] == 1 and x.device.type == "cpu" and not torch.compiler.is_exporting()


def _with_room(rows: Tensor, room: int) -> Tensor:
    """One recording (t, channels) with so many rows of zeros at both ends, where convolutions find their padding."""
    x = rows.new_zeros(rows.shape[0] + 2 * room, rows.shape[1])
    _inside(x, room).copy_(rows)
    return x


def _inside(x: Tensor, room: int) -> Tensor:
    return x[room : x.shape[0] - room]


def _slid(layer: nn.Conv2d, x: Tensor, room: int) -> Tensor:
    """The convolution of one recording (room + t + room, channels), with the same room around what it gives."""
    (_, _, _, kernel), stride, channels = layer.weight.shape, layer.stride[1], x.shape[1]
    padding: Any = layer.padding[1]
    first = room - padding
    count = (x.shape[0] - 2 * first - kernel) // stride + 1
    windows = x.as_strided((count, kernel * channels), (stride * channels, 1), first * channels)
    bias, columns = layer.bias, layer.columns
    out = x.new_zeros(count + 2 * room, layer.out_channels)
    torch.addmm(bias, windows, columns, out=_inside(out, room))  # type: ignore[arg-type]
    return out


def _rectified(x: Tensor, padding: Tensor | None, room: int) -> Tensor:
    """In place; 0 where padding (t, 1) is True."""
    functional.relu_(x)
    if padding is not None:
        _inside(x, room).masked_fill_(padding, 0.0)
    return x


def _convolved(layer: nn.Conv2d, x: Tensor) -> Tensor:
    """The convolution of (b, channels, 1, t), on processors by oneDNN: torch passes it over for few small recordings,
    though it is faster there too."""
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
    return _wide(conv, weight, bias, conv.padding[0])


def _wide(conv: nn.Conv1d, weight: Tensor, bias: Tensor, padding: int | str) -> nn.Conv2d:
    """The convolution of (b, channels, 1, t) with this weight (out, in, k) and bias."""
    wide = nn.Conv2d(
        conv.in_channels, conv.out_channels, (1, conv.kernel_size[0]), (1, conv.stride[0]), (0, int(padding))
    )
    wide.weight = nn.Parameter(weight.detach().unsqueeze(2).contiguous(memory_format=torch.channels_last))
    wide.bias = nn.Parameter(bias.detach())
    wide.register_buffer("columns", weight.detach().transpose(1, 2).flatten(1).contiguous().t())  # (k * in, out)
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


class FoldedMixtureLayers(nn.Module):
    """`MixtureLayers`, for one recording the elements of all paths side by side in one sequence."""

    def __init__(self, layers: Sequence[Any]) -> None:
        super().__init__()
        self.depths: Any = nn.ModuleList(FoldedMixtureLayer(each) for each in zip(*layers, strict=True))

    def forward(
        self, layers: dict[str, nn.ModuleList], elements: dict[str, Elements]
    ) -> tuple[dict[str, Tensor], dict[str, list[Routing]]]:
        """See `MixtureLayers.forward`; `layers` are known from before."""
        states: dict[str, Tensor] = {}
        routings: dict[str, list[Routing]] = {name: [] for name in elements}
        few = next(iter(elements.values())).mask.shape[0] == 1 and not torch.compiler.is_exporting()
        for first, names in enumerate([list(elements)] if few else [[name] for name in elements]):
            counts = [elements[name].mask.shape[1] for name in names]
            hidden = torch.cat([elements[name].hidden for name in names], dim=1)
            unseen = _unseen([elements[name].mask for name in names], hidden.dtype)
            for depth in self.depths:
                hidden, routing = depth(hidden, unseen, first, counts)
                parts = zip(*(each.split(counts, dim=1) for each in routing), strict=True)
                for name, part in zip(names, parts, strict=True):
                    routings[name].append(Routing(*part))
            states |= dict(zip(names, hidden.split(counts, dim=1), strict=True))
        return states, routings


def _unseen(masks: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """What is added to attention scores, so that elements see the real ones of their own path: (b, 1, 1 or n, n)."""
    unseen = ((torch.cat(list(masks), dim=1).to(dtype) - 1.0) * 1e4)[:, None, None, :]
    if len(masks) == 1:
        return unseen
    between = unseen.new_full((unseen.shape[-1], unseen.shape[-1]), -1e4)
    start = 0
    for mask in masks:
        between[start : start + mask.shape[1], start : start + mask.shape[1]] = 0.0
        start += mask.shape[1]
    return unseen + between


class FoldedMixtureLayer(nn.Module):
    """One `MixtureLayer` of each path, with one product for queries, keys and values, and one for all experts and the
    shared one. What normalisations scale and shift is part of the weights that follow them."""

    def __init__(self, layers: Sequence[MixtureLayer]) -> None:
        super().__init__()
        self.heads, self.size = layers[0].attention.heads, layers[0].norm1.normalized_shape
        self.top_k = layers[0].router.top_k
        kept: dict[str, list[tuple[Tensor, Tensor]]] = {"qkv": [], "out": [], "router": [], "gate_up": [], "down": []}
        for layer in layers:
            attention, experts, shared = layer.attention, layer.experts, layer.shared_expert
            parts = (attention.q_proj, attention.k_proj, attention.v_proj)
            biases: list[Tensor] = [
                torch.zeros_like(attention.q_proj.bias) if part.bias is None else part.bias for part in parts
            ]
            kept["qkv"].append(_after(layer.norm1, torch.cat([part.weight for part in parts]), torch.cat(biases)))
            kept["out"].append((attention.out_proj.weight, attention.out_proj.bias))
            kept["router"].append(_after(layer.norm2, layer.router.weight))
            gate_up = torch.cat([experts.gate_up_proj, shared.gate_up_proj.weight[None]])
            # Rows: the gates of all experts, then what they let through.
            kept["gate_up"].append(_after(layer.norm2, gate_up.unflatten(1, (2, -1)).transpose(0, 1).flatten(0, 2)))
            down = torch.cat([experts.down_proj, shared.down_proj.weight[None]])
            kept["down"].append((down.transpose(0, 1).flatten(1), down.new_zeros(down.shape[1])))
        for name, pairs in kept.items():
            self.register_buffer(name, torch.stack([weight.t() for weight, _ in pairs]).detach().contiguous())
            self.register_buffer(f"{name}_bias", torch.stack([bias for _, bias in pairs]).detach())

    def forward(self, hidden: Tensor, unseen: Tensor, first: int, counts: Sequence[int]) -> tuple[Tensor, Routing]:
        """hidden (b, n, d), `counts` of its elements of each path from the `first` on. Returns states and routing."""

        def product(name: str, x: Tensor) -> Tensor:
            weights, biases = getattr(self, name), getattr(self, f"{name}_bias")
            if len(counts) == 1:
                return functional.linear(x, weights[first].t(), biases[first])
            out = x.new_empty(1, x.shape[1], weights.shape[-1])
            rows = zip(x[0].split(counts), out[0].split(counts), weights, biases, strict=True)
            for part, written, weight, bias in rows:
                torch.addmm(bias, part, weight, out=written)
            return out

        query, key, value = (
            product("qkv", functional.layer_norm(hidden, self.size))
            .unflatten(2, (3, self.heads, -1))
            .permute(2, 0, 3, 1, 4)
        )
        mixed = functional.scaled_dot_product_attention(query, key, value, unseen)
        hidden = hidden + product("out", mixed.transpose(1, 2).flatten(2))
        normed = functional.layer_norm(hidden, self.size)
        logits = product("router", normed).float()
        highest, experts = logits.topk(self.top_k, dim=-1)
        weights = torch.softmax(highest, dim=-1)  # what the router's are, divided by their sum
        shares = torch.zeros_like(logits).scatter(-1, experts, weights).to(hidden.dtype)
        shares = functional.pad(shares, (0, 1), value=1.0).unsqueeze(-1)
        gate, through = product("gate_up", normed).chunk(2, dim=-1)
        inner = functional.silu(gate).mul_(through).unflatten(-1, (shares.shape[-2], -1)).mul_(shares)
        return hidden + product("down", inner.flatten(-2)), Routing(logits, weights, experts)


def _after(norm: nn.LayerNorm, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Weight and bias that do to what is only normalised what these do after the norm's own scale and shift."""
    shift = weight @ norm.bias
    return weight * norm.weight, shift if bias is None else shift + bias
