"""The DFlash draft: block diffusion over the target's captured features, in plain torch.

A block starts at an anchor, a token that is known, and fills the slots after it with the mask token. All slots are
predicted at once. What the draft knows of the text before the anchor comes from the target's captured layers: their
concatenation is projected once (`fc`, `hidden_norm`) and injected into every draft layer as keys and values.

Source: DFlash as z-lab publishes it and vLLM serves it (vllm/model_executor/models/qwen3_dflash.py). Parameter names
are those of the exported checkpoint. Layout of one block, block_size B, anchor at position p:
    queries [token p, mask x (B-1)] at positions p..p+B-1; slot k predicts the token at p+k;
    keys: context strictly before p, and the whole own block in both directions.

Shapes: T tokens of the packed samples, A anchors, B block size, H hidden size, n captured layers, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import nn
from torch.nn import functional
from transformers import Qwen3Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from contracts.draft import DraftConfig

# Anchors are sorted and taken in groups, each against the prefix of its last anchor: few wasted keys, few calls.
ANCHORS_A_GROUP = 16


class Rope(nn.Module):
    """Rotary embedding with or without YaRN, as transformers computes it; tables for all positions."""

    cos: torch.Tensor
    sin: torch.Tensor

    def __init__(self, config: DraftConfig) -> None:
        super().__init__()
        parameters = rope_parameters(config)
        kind = parameters["rope_type"]
        qwen = Qwen3Config(
            head_dim=config.head_dim,
            max_position_embeddings=config.max_position_embeddings,
            rope_parameters=parameters,
        )
        if kind == "default":
            exponents = torch.arange(0, config.head_dim, 2).float() / config.head_dim
            inverse_frequencies, scale = config.rope_theta**-exponents, 1.0
        else:
            inverse_frequencies, scale = ROPE_INIT_FUNCTIONS[kind](qwen, torch.device("cpu"))
        # A block that starts at the last position reaches block_size - 1 further.
        positions = torch.arange(config.max_position_embeddings + config.block_size).float()
        angles = torch.outer(positions, inverse_frequencies)
        angles = torch.cat([angles, angles], dim=-1)
        self.register_buffer("cos", angles.cos() * scale, persistent=False)
        self.register_buffer("sin", angles.sin() * scale, persistent=False)

    def forward(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Rotate `x (N, heads, D)` at `positions (N,)`."""
        cos, sin = self.cos[positions][:, None], self.sin[positions][:, None]
        first, second = x.chunk(2, dim=-1)
        return x * cos + torch.cat([-second, first], dim=-1) * sin


def rope_parameters(config: DraftConfig) -> dict[str, str | float | int]:
    """The draft's rope in transformers' schema (`rope_parameters`, once `rope_scaling`)."""
    if config.yarn is None:
        return {"rope_type": "default", "rope_theta": config.rope_theta}
    return {
        "rope_type": "yarn",
        "rope_theta": config.rope_theta,
        "factor": config.yarn.factor,
        "original_max_position_embeddings": config.yarn.original_max_position_embeddings,
    }


@dataclass(frozen=True)
class Group:
    """Blocks of one sample that attend together: rows of the queries and of the context, and who may see what."""

    queries: slice
    context: slice
    mask: torch.Tensor


@dataclass(frozen=True)
class Blocks:
    """The blocks of several samples packed one after another; made once a step, used by every layer.

    Shapes: anchor_rows (A,) rows of the anchors in the packed tokens; query_positions (A*B,) and
    context_positions (T,) positions inside each sample.
    """

    anchor_rows: torch.Tensor
    query_positions: torch.Tensor
    context_positions: torch.Tensor
    groups: list[Group]


def plan_blocks(lengths: Sequence[int], anchors: Sequence[torch.Tensor], block_size: int) -> Blocks:
    """Lay out blocks at `anchors[i]` (ascending positions) of each sample i, `lengths[i]` tokens long."""
    offsets = [0, *accumulate(lengths)]
    groups, row = [], 0
    for offset, positions in zip(offsets, anchors, strict=False):
        for members in positions.split(ANCHORS_A_GROUP):
            prefix, size = int(members[-1]), len(members) * block_size
            groups.append(
                Group(slice(row, row + size), slice(offset, offset + prefix), _group_mask(members, prefix, block_size))
            )
            row += size
    positions = torch.cat(list(anchors))
    return Blocks(
        anchor_rows=torch.cat([offset + part for offset, part in zip(offsets, anchors, strict=False)]),
        query_positions=(positions[:, None] + torch.arange(block_size)).flatten(),
        context_positions=torch.cat([torch.arange(length) for length in lengths]),
        groups=groups,
    )


def _group_mask(anchors: torch.Tensor, prefix: int, block_size: int) -> torch.Tensor:
    """True where a query of the group may look: context before its anchor, and its own block. `(G*B, prefix + G*B)`."""
    owner = torch.arange(len(anchors)).repeat_interleave(block_size)
    sees_context = torch.arange(prefix)[None] < anchors[owner][:, None]
    return torch.cat([sees_context, owner[:, None] == owner[None]], dim=1)


class Attention(nn.Module):
    """Block queries over context keys and the block's own."""

    def __init__(self, config: DraftConfig, rope: Rope) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = (
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
        )
        hidden, size = config.hidden_size, config.head_dim
        self.q_proj = nn.Linear(hidden, self.heads * size, bias=False)
        self.k_proj = nn.Linear(hidden, self.kv_heads * size, bias=False)
        self.v_proj = nn.Linear(hidden, self.kv_heads * size, bias=False)
        self.o_proj = nn.Linear(self.heads * size, hidden, bias=False)
        self.q_norm = nn.RMSNorm(size, eps=config.rms_norm_eps)
        self.k_norm = nn.RMSNorm(size, eps=config.rms_norm_eps)
        self._rope = (rope,)  # in a tuple: shared by all layers, registered by none of them

    def forward(self, x: torch.Tensor, context: torch.Tensor, blocks: Blocks) -> torch.Tensor:
        """Shapes: x (A, B, H), context (C, H) -> (A, B, H)."""
        flat = x.flatten(0, 1)
        (rope,) = self._rope
        query = rope(self.q_norm(self.q_proj(flat).unflatten(-1, (self.heads, -1))), blocks.query_positions)
        block_key = rope(self.k_norm(self.k_proj(flat).unflatten(-1, (self.kv_heads, -1))), blocks.query_positions)
        block_value = self.v_proj(flat).unflatten(-1, (self.kv_heads, -1))
        context_key = self.k_norm(self.k_proj(context).unflatten(-1, (self.kv_heads, -1)))
        context_key = rope(context_key, blocks.context_positions)
        context_value = self.v_proj(context).unflatten(-1, (self.kv_heads, -1))

        outputs = []
        for group in blocks.groups:
            key = torch.cat([context_key[group.context], block_key[group.queries]]).transpose(0, 1)[None]
            value = torch.cat([context_value[group.context], block_value[group.queries]]).transpose(0, 1)[None]
            output = functional.scaled_dot_product_attention(
                query[group.queries].transpose(0, 1)[None], key, value, attn_mask=group.mask, enable_gqa=True
            )
            outputs.append(output[0].transpose(0, 1).flatten(1))
        return self.o_proj(torch.cat(outputs)).unflatten(0, x.shape[:2])


class Layer(nn.Module):
    """One draft layer: attention and a gated MLP, each behind its norm."""

    def __init__(self, config: DraftConfig, rope: Rope) -> None:
        super().__init__()
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self.self_attn = Attention(config, rope)
        self.mlp = nn.ModuleDict(
            {
                "gate_proj": nn.Linear(hidden, config.intermediate_size, bias=False),
                "up_proj": nn.Linear(hidden, config.intermediate_size, bias=False),
                "down_proj": nn.Linear(config.intermediate_size, hidden, bias=False),
            }
        )
        self.input_layernorm = nn.RMSNorm(hidden, eps=eps)
        self.post_attention_layernorm = nn.RMSNorm(hidden, eps=eps)

    def forward(self, x: torch.Tensor, context: torch.Tensor, blocks: Blocks) -> torch.Tensor:
        x = x + self.self_attn(self.input_layernorm(x), context, blocks)
        y = self.post_attention_layernorm(x)
        return x + self.mlp["down_proj"](functional.silu(self.mlp["gate_proj"](y)) * self.mlp["up_proj"](y))


class DFlash(nn.Module):
    """The draft without embedding and lm_head, which are the target's."""

    def __init__(self, config: DraftConfig) -> None:
        super().__init__()
        self.config = config
        hidden = config.hidden_size
        rope = Rope(config)
        self.fc = nn.Linear(len(config.layer_ids) * hidden, hidden, bias=False)
        self.hidden_norm = nn.RMSNorm(hidden, eps=config.rms_norm_eps)
        self.layers = nn.ModuleList(Layer(config, rope) for _ in range(config.num_layers))
        self.norm = nn.RMSNorm(hidden, eps=config.rms_norm_eps)
        self.rope = rope

    def forward(
        self, token_ids: torch.Tensor, aux_hidden_states: torch.Tensor, blocks: Blocks, embedding: torch.Tensor
    ) -> torch.Tensor:
        """Hidden states of all slots but the anchor's, final norm applied; times lm_head they are the draft's logits.

        Shapes: token_ids (T,), aux_hidden_states (T, n*H), embedding (V, H) -> (A, B-1, H).
        """
        context = self.hidden_norm(self.fc(aux_hidden_states))
        slots = torch.full((len(blocks.anchor_rows), self.config.block_size), self.config.mask_token_id)
        slots[:, 0] = token_ids[blocks.anchor_rows]
        x = functional.embedding(slots, embedding)
        for layer in self.layers:
            x = layer(x, context, blocks)
        hidden: torch.Tensor = self.norm(x[:, 1:])
        return hidden


def init_weights(model: DFlash, seed: int) -> None:
    """Normal with standard deviation 0.02 for matrices, ones for norms; the same for a seed on every machine."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.02, generator=generator)
            else:
                parameter.fill_(1.0)
