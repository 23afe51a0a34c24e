"""Rotary position embedding with or without YaRN, as transformers computes it (and vLLM serves it)."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from drafts import moving
from drafts.method import TransformerConfig
from drafts.rope_parameters import rope_parameters
from drafts.threads import on_one_core

CPU = torch.device("cpu")
Tables = tuple[torch.Tensor, torch.Tensor]
"""Cosines and sines at some positions, (..., 1, D) both: the same for all heads."""


class Rope(nn.Module):
    """Tables for the positions of a step, computed once and used by every layer. Positions have no upper limit."""

    inverse_frequencies: torch.Tensor

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        parameters = rope_parameters(config)
        kind = parameters["rope_type"]
        if kind == "default":
            exponents = torch.arange(0, config.head_dim, 2).float() / config.head_dim
            inverse_frequencies, self.scale = config.rope_theta**-exponents, 1.0
        else:
            # 30 MiB that plain rope does without. The config of a model, such as Qwen3's, would take 290.
            from transformers.configuration_utils import PretrainedConfig
            from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

            shape = PretrainedConfig(
                hidden_size=config.hidden_size,
                num_attention_heads=config.num_attention_heads,
                head_dim=config.head_dim,
                max_position_embeddings=config.max_position_embeddings,
                rope_parameters=parameters,
            )
            with CPU:  # transformers fails under another default device
                inverse_frequencies, self.scale = ROPE_INIT_FUNCTIONS[kind](shape, CPU)
        self.register_buffer("inverse_frequencies", inverse_frequencies, persistent=False)

    def at(self, positions: torch.Tensor) -> Tables:
        """Return the tables at `positions (...)`: two of (..., 1, D)."""
        angles = positions[..., None, None].float() * self.inverse_frequencies
        angles = torch.cat([angles, angles], dim=-1)
        return angles.cos() * self.scale, angles.sin() * self.scale


def rotate(x: torch.Tensor, tables: Tables) -> torch.Tensor:
    """Rotate `x (..., heads, D)` by tables for its positions."""
    if moving.is_on_gpu(x):
        cos, sin = (table.to(x.dtype) for table in tables)
        first, second = x.chunk(2, dim=-1)
        return x * cos + torch.cat([-second, first], dim=-1) * sin
    rotated: torch.Tensor = _Rotate.apply(x, *tables)
    return rotated


class _Rotate(torch.autograd.Function):
    """Halves (a, b) become (a*cos - b*sin, b*cos + a*sin). Written out: the gradient is the same with -sin."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        return _turn(x, cos, sin, 1)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[torch.Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return _turn(gradients[0], cos, sin, -1), None, None


def _turn(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, sign: int) -> torch.Tensor:
    half = x.shape[-1] // 2
    with on_one_core(x):
        result = x * cos.to(x.dtype)
        sin = sin[..., :half].to(x.dtype)
        result[..., :half].addcmul_(x[..., half:], sin, value=-sign)
        result[..., half:].addcmul_(x[..., :half], sin, value=sign)
    return result
