"""Many adapters as one: their weights as PEFT saved them, and the fusion of all of them in one batched call.

    y = sum over the adapter's LoRA layers of  x W + (alpha / r) x A B          (Hu et al. 2022, equation 3)

The learned queries of the fusion's first level do not depend on the recording. What they ask of it is therefore a
constant of each adapter, and so keys need not be computed: q (W k) = (q W) k. The values of a query are mixed before
they are projected, sum_n a_n (V x_n + v) = V (sum_n a_n x_n) + v, since attention weights sum to one. Both are exact.
"""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor, nn
from torch.nn import functional

from .encoder import EcgMoeEncoderOutput
from .fusion import Fusion, QueryPooling
from .heads import head_shapes
from .tasks import Task
from .temporal import mean_and_max

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
_LORA = re.compile(r"base_model\.model\.(.+)\.lora_(A|B)\.weight")
_FUSION = "ecgmoe.fusion."
# What changes the mathematics of LoRA beyond the equation above, as PEFT names it.
_OTHER_METHODS = ("use_dora", "lora_bias", "use_qalora", "use_bdlora", "target_parameters", "trainable_token_indices")


@dataclass
class AdapterWeights:
    """The weights of an adapter.

    Args:
        lora: layer of the fusion to its matrices A (r, inputs) and B (outputs, r), B times alpha / r.
        head: its weights, see `heads.head_shapes`.
        size: how many numbers the adapter's file holds, and `hash`, a short hash of that file.
        reads_embedding: whether the head looks at the fusion's embedding at all.
    """

    lora: dict[str, tuple[Tensor, Tensor]]
    head: dict[str, Tensor]
    size: int
    hash: str
    reads_embedding: bool

    @classmethod
    def load(cls, folder: Path, task: Task, fusion: Fusion) -> "AdapterWeights":
        """Read an adapter in PEFT's format.

        Raises:
            FileNotFoundError: a file of the adapter is missing.
            ValueError: it is another method than LoRA, adapts more than the fusion, or does not fit it.
        """
        missing = [name for name in (CONFIG_FILE, WEIGHTS_FILE) if not (folder / name).is_file()]
        if missing:
            raise FileNotFoundError(f"the adapter {folder} lacks {' and '.join(missing)}; save it again with PEFT")
        config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        other = [f"{name}={config[name]!r}" for name in _OTHER_METHODS if config.get(name)]
        other += [
            f"{name}={config.get(name)!r}" for name, want in (("peft_type", "LORA"),) if config.get(name) != want
        ]
        start = config.get("init_lora_weights", True)
        if isinstance(start, str) and start != "gaussian":  # PiSSA, OLoRA and others change the base's weights too
            other.append(f"init_lora_weights={start!r}")
        other += [f"bias={config['bias']!r}"] if config.get("bias", "none") != "none" else []
        if other:
            raise ValueError(
                f"the adapter {folder} is not plain LoRA ({', '.join(other)}); use it alone, through "
                "PeftModel.from_pretrained"
            )
        content = (folder / WEIGHTS_FILE).read_bytes()
        try:
            tensors = {name: value.float() for name, value in load(content).items()}
        except SafetensorError as error:
            raise ValueError(
                f"{folder / WEIGHTS_FILE} is no whole safetensors file ({error}); copy it again"
            ) from error
        size = sum(value.numel() for value in tensors.values())
        prefix = f"base_model.model.heads.head_{task.name}."
        head = {name.removeprefix(prefix): tensors.pop(name) for name in list(tensors) if name.startswith(prefix)}
        width = fusion.norm.normalized_shape[0]
        expected, shapes = head_shapes(task, width), {name: tuple(value.shape) for name, value in head.items()}
        if shapes != expected:
            raise ValueError(
                f"the adapter {folder} must hold a head of shapes {expected} for task {task.name}, found "
                f"{shapes or 'none'}; train it again"
            )
        lora: dict[str, dict[str, Tensor]] = {}
        for name, value in tensors.items():
            match = _LORA.fullmatch(name)
            if match is None or not match[1].startswith(_FUSION):
                raise ValueError(
                    f"the adapter {folder} adapts the backbone too ({name}), so it cannot share one pass of it with "
                    "others; use it alone, through PeftModel.from_pretrained"
                )
            scale = _scale(config, match[1], value.shape[0]) if match[2] == "A" else 1.0
            lora.setdefault(match[1].removeprefix(_FUSION), {})[match[2]] = value * scale
        layers = dict(fusion.named_modules())
        for name, matrices in lora.items():
            layer = layers.get(name)
            if not isinstance(layer, nn.Linear):
                raise ValueError(f"the adapter {folder} adapts {name}, which this model lacks; load the one it is of")
            shapes = {side: tuple(matrix.shape) for side, matrix in sorted(matrices.items())}
            rank = shapes.get("A", (0,))[0]
            if shapes != {"A": (rank, layer.in_features), "B": (layer.out_features, rank)}:
                raise ValueError(
                    f"the adapter {folder} has matrices of {shapes} for {name}, expected A of (rank, "
                    f"{layer.in_features}) and B of ({layer.out_features}, rank); load the model it was made for"
                )
        device = next(fusion.parameters()).device
        pairs = {name: (matrices["A"].to(device), matrices["B"].to(device)) for name, matrices in lora.items()}
        own = {name: value.to(device) for name, value in head.items()}
        return cls(
            pairs,
            own,
            size,
            hashlib.sha256(content).hexdigest()[:16],
            any(bool(head[name].any()) for name in ("weight", "products") if name in head),
        )

    def weight_of(self, name: str, base: Tensor) -> Tensor:
        """The weight of a layer with the adapter merged in."""
        if name not in self.lora:
            return base
        a, b = self.lora[name]
        return base + b @ a


def _scale(config: dict[str, Any], name: str, rank: int) -> float:
    """alpha / r of a layer, or alpha / sqrt(r) (Kalajdzievski 2023, rsLoRA)."""
    patterns = config.get("alpha_pattern") or {}
    alpha = next((v for key, v in patterns.items() if re.fullmatch(rf"(.*\.)?({key})", name)), config["lora_alpha"])
    return alpha / (rank**0.5 if config.get("use_rslora") else rank)


class StackedFusion(nn.Module):
    """The fusion of all adapters at once. Axes: a adapter, b record, p path, q query, h head, n element, d channel.

    What no adapter changes of the first level's values is computed by one product for all of them; where one does,
    each has its own (g, the groups: 1 or a).

    `forward` returns the embeddings (a, b, record_size) that each adapter's own fusion would give.
    """

    def __init__(self, fusion: Fusion, adapters: Sequence[AdapterWeights]) -> None:
        super().__init__()
        self.paths = list(fusion.pooling)
        self.heads = fusion.attention.heads
        num_queries, size = fusion.get_parameter(f"pooling.{self.paths[0]}.queries").shape
        self.shape = (len(adapters), len(self.paths), num_queries, size)
        parts = ("v_proj", "out_proj")
        on_values = {f"pooling.{path}.attention.{part}" for path in self.paths for part in parts}
        self.groups = len(adapters) if any(on_values & one.lora.keys() for one in adapters) else 1

        def merged(name: str, of: Sequence[AdapterWeights] = adapters) -> tuple[Tensor, Tensor]:
            """Weights (a, out, in) and bias (out,) of a layer, 0 where it has none."""
            layer = fusion.get_submodule(name)
            assert isinstance(layer, nn.Linear)
            weights = torch.stack([one.weight_of(name, layer.weight) for one in of])
            return weights, weights.new_zeros(layer.out_features) if layer.bias is None else layer.bias

        kept: dict[str, Tensor] = {}
        values, value_bias, mixes, mix_bias = [], [], [], []
        for path in self.paths:
            pooling, prefix = fusion.pooling[path], f"pooling.{path}.attention."
            assert isinstance(pooling, QueryPooling)
            (query, query_bias), (key, _) = merged(f"{prefix}q_proj"), merged(f"{prefix}k_proj")
            queries = (pooling.queries @ query.transpose(1, 2) + query_bias).unflatten(2, (self.heads, -1))
            queries = queries * queries.shape[-1] ** -0.5
            kept[f"asked_{path}"] = torch.einsum(
                "aqhc,ahcd->ahqd", queries, key.unflatten(1, (self.heads, -1))
            ).flatten(0, 2)
            (value, bias), (mix, bias_of_mix) = (merged(f"{prefix}{part}", adapters[: self.groups]) for part in parts)
            values.append(value.unflatten(1, (self.heads, -1)).transpose(2, 3).flatten(0, 1))
            value_bias.append(bias.view(self.heads, 1, -1).repeat(self.groups, 1, 1))
            mixes.append(mix.transpose(1, 2))
            # What is added to what a query has found: the bias, and the query itself.
            mix_bias.append((bias_of_mix + pooling.queries).expand(self.groups, -1, -1))
            kept[f"norm_{path}_weight"], kept[f"norm_{path}_bias"] = pooling.norm.weight, pooling.norm.bias
        kept |= {
            "value": torch.cat(values),
            "value_bias": torch.cat(value_bias),
            "mix": torch.cat(mixes),
            "mix_bias": torch.cat(mix_bias),
        }
        # Merged: a low rank beside the shared weight costs more passes over memory than it saves.
        layers = {
            "pooled": ["pooled_proj"],
            "qkv": ["attention.q_proj", "attention.k_proj", "attention.v_proj"],
            "attended": ["attention.out_proj"],
            "up": ["up_proj"],
            "down": ["down_proj"],
        }
        for name, names in layers.items():
            touched = any(one.lora.keys() & set(names) for one in adapters)
            joined = [merged(each, adapters if touched else adapters[:1]) for each in names]
            kept[name] = torch.cat([weights for weights, _ in joined], dim=1).transpose(1, 2)
            kept[f"{name}_bias"] = torch.cat([added for _, added in joined])
        kept |= _apart(fusion, adapters, size * (len(self.paths) * num_queries + 1))
        for name in ("norm1", "norm2", "norm"):
            kept[f"{name}_weight"] = fusion.get_parameter(f"{name}.weight")
            kept[f"{name}_bias"] = fusion.get_parameter(f"{name}.bias")
        for name, tensor in kept.items():
            self.register_buffer(name, tensor.detach().clone().contiguous(), persistent=False)

    if TYPE_CHECKING:
        # Buffers are tensors; torch's own annotation says that they might be modules as well.
        def __getattr__(self, name: str) -> Any: ...

    def forward(self, encoded: EcgMoeEncoderOutput) -> Tensor:
        """See `Fusion.forward`."""
        memories = encoded.memories()
        num_adapters, num_paths, num_queries, size = self.shape
        tokens, mask = memories["tokens"]
        batch = tokens.shape[0]
        found = torch.stack([self._pooled(path, *memories[path]) for path in self.paths])
        # (p, b, a * h * q, d) to (p * g * h, a / g * b * q, d)
        rows = num_adapters // self.groups * batch * num_queries
        found = found.view(num_paths, batch, self.groups, -1, self.heads, num_queries, size)
        found = found.permute(0, 2, 4, 3, 1, 5, 6)
        found = torch.baddbmm(self.value_bias, found.reshape(-1, rows, size), self.value)
        found = found.view(-1, self.heads, rows, size // self.heads).transpose(1, 2).flatten(2)
        found = torch.bmm(found, self.mix).view(num_paths * self.groups, -1, num_queries, size)
        found = found + self.mix_bias[:, None]
        found = found.view(num_paths, num_adapters, batch, num_queries, size).permute(1, 2, 0, 3, 4).flatten(2, 3)
        extent = mean_and_max(tokens, mask)
        pooled = self._merged("pooled", extent[None]).expand(num_adapters, -1, -1)
        hidden = torch.cat([found, pooled.unsqueeze(2)], dim=2).flatten(1, 2)
        num_states = hidden.shape[1] // batch

        normed = functional.layer_norm(hidden, (size,), self.norm1_weight, self.norm1_bias)
        query, key, value = (
            self._merged("qkv", normed)
            .view(num_adapters * batch, num_states, 3, self.heads, -1)
            .permute(2, 0, 3, 1, 4)
        )
        mixed = functional.scaled_dot_product_attention(query, key, value).transpose(1, 2).reshape_as(hidden)
        hidden = hidden + self._merged("attended", mixed)
        normed = functional.layer_norm(hidden, (size,), self.norm2_weight, self.norm2_bias)
        inner = functional.silu(self._merged("up", normed))
        hidden = hidden + self._merged("down", inner)
        passing = extent if encoded.pooled_waves is None else encoded.pooled_waves
        out = self._written(hidden.view(num_adapters, batch, -1), passing)
        return functional.layer_norm(out, out.shape[-1:], self.norm_weight, self.norm_bias)

    def _merged(self, name: str, x: Tensor) -> Tensor:
        """x (a, rows, inputs), or (1, rows, inputs) for all adapters, through a layer with their LoRA in it."""
        weight = getattr(self, name)
        groups, _, outputs = weight.shape
        rows = x.expand(groups, -1, -1) if x.shape[0] == 1 else x.reshape(groups, -1, x.shape[2])
        return torch.baddbmm(getattr(self, f"{name}_bias"), rows, weight).view(max(groups, x.shape[0]), -1, outputs)

    def _written(self, states: Tensor, passing: Tensor) -> Tensor:
        """The last layer of states (a, b, inputs) and of what is the same for all adapters, (b, inputs).

        Its weight is the largest, and few rows meet it: shared weight and low rank stay apart.
        """
        num_adapters, rank, outputs = self.out_b.shape
        same = functional.linear(passing, self.out_passing, self.out_bias)
        same, low = same.split([outputs, num_adapters * rank], dim=1)
        low = torch.baddbmm(low.unflatten(1, (num_adapters, rank)).transpose(0, 1), states, self.out_a)
        return torch.baddbmm(functional.linear(states, self.out) + same, low, self.out_b)

    def _pooled(self, path: str, memory: Tensor, mask: Tensor) -> Tensor:
        """What each adapter's queries gather from a path, before values are projected: (b, a * h * q, d)."""
        normed = functional.layer_norm(
            memory, memory.shape[-1:], getattr(self, f"norm_{path}_weight"), getattr(self, f"norm_{path}_bias")
        )
        scores = torch.matmul(getattr(self, f"asked_{path}"), normed.transpose(1, 2))
        scores = scores.masked_fill(~mask[:, None, :], -1e4)
        return torch.bmm(torch.softmax(scores, dim=-1), normed)


def _apart(fusion: Fusion, adapters: Sequence[AdapterWeights], num_states: int) -> dict[str, Tensor]:
    """The last layer, whose first `num_states` inputs differ between adapters: `out` (outputs, states) of them,
    `out_passing` (outputs + a r, rest) of the others, the adapters' A below the weight, `out_bias` with zeros for
    these, `out_a` (a, states, r) and `out_b` (a, r, outputs), r up to the highest rank."""
    layer = fusion.out_proj
    pairs = [one.lora.get("out_proj") for one in adapters]
    rank = max((pair[0].shape[0] for pair in pairs if pair is not None), default=1)
    down = layer.weight.new_zeros(len(pairs), rank, layer.in_features)
    up = layer.weight.new_zeros(len(pairs), rank, layer.out_features)
    for index, pair in enumerate(pairs):
        if pair is not None:
            a, b = pair
            down[index, : a.shape[0]], up[index, : a.shape[0]] = a, b.t()
    passing = torch.cat([layer.weight[:, num_states:], down[:, :, num_states:].flatten(0, 1)])
    return {
        "out": layer.weight[:, :num_states],
        "out_passing": passing,
        "out_bias": functional.pad(layer.bias, (0, len(passing) - layer.out_features)),
        "out_a": down[:, :, :num_states].transpose(1, 2),
        "out_b": up,
    }
