"""Attention on torch's meta device, where nothing is computed: its shapes, saved tensors and operations.

A kernel that is compiled has no operations that a counter of memory or FLOPs can see, so there are two operations here
that stand for its forward and backward pass.
"""
# ruff: noqa: ARG001 (shapes and operations depend on some of the arguments only)

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula


class Unevaluated(torch.autograd.Function):
    """Stands for attention. Shapes: query (1, heads, rows, D), key and value (1, KV heads, columns, D)."""

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, pairs: int) -> torch.Tensor:
        output, sums = _unevaluated(query, key, value, pairs)
        ctx.save_for_backward(query, key, value, output, sums)
        ctx.pairs = pairs
        return output

    @staticmethod
    def backward(ctx: Any, *_: Any) -> tuple[torch.Tensor | None, ...]:
        query, key, value, *_rest = ctx.saved_tensors
        return *_unevaluated_backward(query, key, value, ctx.pairs), None


@torch.library.custom_op("draftline::unevaluated_attention", mutates_args=())
def _unevaluated(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, pairs: int
) -> tuple[torch.Tensor, torch.Tensor]:
    raise NotImplementedError("has shapes, no values")


@_unevaluated.register_fake
def _(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, pairs: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(query), query.new_empty(query.shape[:-1], dtype=torch.float32)


@torch.library.custom_op("draftline::unevaluated_attention_backward", mutates_args=())
def _unevaluated_backward(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, pairs: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    raise NotImplementedError("has shapes, no values")


@_unevaluated_backward.register_fake
def _(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, pairs: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


@register_flop_formula(torch.ops.draftline.unevaluated_attention)
def _count_forward(query: Sequence[int], key: Any, value: Any, pairs: int, **_: Any) -> int:
    """Two products: scores, and weights with values. Shapes: query (1, heads, rows, D)."""
    return 4 * pairs * query[1] * query[3]


@register_flop_formula(torch.ops.draftline.unevaluated_attention_backward)
def _count_backward(query: Sequence[int], key: Any, value: Any, pairs: int, **_: Any) -> int:
    """Five products: the scores again, and the gradients of weights, values, queries and keys."""
    return 10 * pairs * query[1] * query[3]
