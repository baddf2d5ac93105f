"""Hierarchical fusion: elements of each path to a few states, states of all paths to one embedding of the record.

The only part of the network that LoRA adapters change, so everything before it is computed once for all tasks.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from .configuration_ecgmoe import EcgMoeConfig
from .encoder import EcgMoeEncoderOutput
from .temporal import STEM_FAMILIES, Attention, DropPath, SelfAttention, mean_and_max

# The linear layers that a task's LoRA adapts. Of the first level that is what its queries ask for, which inference
# folds into constants; its values stay the same for all tasks, so that they are computed once.
LORA_TARGETS = r"pooling\.\w+\.attention\.[qk]_proj|attention\.([qkv]|out)_proj|up_proj|down_proj|out_proj"


class QueryPooling(nn.Module):
    """Learned queries that gather what they look for from the elements of one path.

    `forward` returns (b, queries, d) and each element's attention (b, n), the mean over queries and heads.
    """

    def __init__(self, config: EcgMoeConfig) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.empty(config.num_queries, config.hidden_size))
        self.norm = nn.LayerNorm(config.hidden_size)
        self.attention = Attention(config.hidden_size, config.num_attention_heads)

    def forward(self, memory: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        queries = self.queries.expand(memory.shape[0], -1, -1)
        pooled, weights = self.attention(queries, self.norm(memory), mask)
        return queries + pooled, weights.mean(dim=(1, 2))


class Fusion(nn.Module):
    """Level 1 pools tokens, beats and rhythm with learned queries; level 2 lets the pooled states speak to each other;
    level 3 writes the record's embedding from them and, past all experts, from what the stem saw, as a plain residual
    network would: what the paths learn can only add to that."""

    def __init__(self, config: EcgMoeConfig) -> None:
        super().__init__()
        size = config.hidden_size
        self.pooling = nn.ModuleDict({name: QueryPooling(config) for name in ("tokens", *config.paths)})
        self.pooled_proj = nn.Linear(2 * size, size)
        self.norm1, self.norm2 = nn.LayerNorm(size), nn.LayerNorm(size)
        self.attention = SelfAttention(size, config.num_attention_heads)
        self.up_proj, self.down_proj = nn.Linear(size, config.fusion_size), nn.Linear(config.fusion_size, size)
        num_states = config.num_queries * (1 + len(config.paths)) + 1
        passing = 2 * (config.conv_channels[3] if STEM_FAMILIES & set(config.families) else size)
        self.out_proj = nn.Linear(num_states * size + passing, config.record_size)
        self.norm = nn.LayerNorm(config.record_size)
        self.dropout = nn.Dropout(config.dropout)
        self.drop_memory = DropPath(config.memory_dropout)

    def forward(self, encoded: EcgMoeEncoderOutput) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the record's embedding (b, record_size) and the attention on each path's elements."""
        memories = encoded.memories()
        states, weights = [], {}
        for name, pooling in self.pooling.items():
            pooled, weights[name] = pooling(*memories[name])
            states.append(self.drop_memory(pooled))
        extent = mean_and_max(*memories["tokens"])
        states.append(self.pooled_proj(extent)[:, None])
        hidden = torch.cat(states, dim=1)
        hidden = hidden + self.dropout(self.attention(self.norm1(hidden), None))
        hidden = hidden + self.dropout(self.down_proj(functional.silu(self.up_proj(self.norm2(hidden)))))
        passing = extent if encoded.pooled_waves is None else encoded.pooled_waves
        return self.norm(self.out_proj(torch.cat([hidden.flatten(1), passing], dim=1))), weights
