"""The parts of a transformer layer that drafts share: RMSNorm and the gated MLP.

On CPUs, torch's own are chains of operations that each read and write memory and save tensors for the backward pass;
hand-written gradients are faster. On GPUs, torch's own are used: torch.compile fuses them into one kernel, which it
cannot do with hand-written ones.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional

from drafts import moving
from drafts.threads import on_one_core


class RMSNorm(nn.Module):
    """`x / sqrt(mean(x^2) + eps) * weight` over the last dimension (arXiv 1910.07467), computed in fp32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if moving.is_on_gpu(x):
            return stock_rms_norm(x, self.weight, self.eps)
        normed: torch.Tensor = _RMSNorm.apply(x, self.weight, self.eps)
        return normed


def stock_rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Return torch's RMSNorm, in the dtype of `x`; its kernel computes in fp32."""
    return functional.rms_norm(x, weight.shape, weight.to(x.dtype), eps).to(x.dtype)


class _RMSNorm(torch.autograd.Function):
    """With r = 1/sqrt(mean(x^2) + eps) and g the gradient: dx = r*(g*w - x*r^2*mean(g*w*x)), dw = sum(g*x*r)."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        with on_one_core(x):
            wide = x.float()
            norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
            scale = norm.square_().div_(weight.shape[0]).add_(eps).rsqrt_()
            ctx.save_for_backward(x, weight, scale)
            return (wide * scale).mul_(weight).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[torch.Tensor | None, ...]:
        x, weight, scale = ctx.saved_tensors
        with on_one_core(x):
            normed = x.float() * scale
            gradient = gradients[0].float()
            product = gradient * normed
            grad_weight = product.flatten(0, -2).sum(0)
            # mean(g*w*x*r) as a matrix-vector product saves a pass through memory.
            mean = (product @ weight.float()).div_(weight.shape[0]).unsqueeze(-1)
            grad_x = torch.addcmul(gradient * weight, normed, mean, value=-1).mul_(scale)
            return grad_x.to(x.dtype), grad_weight.to(weight.dtype), None


class GatedMLP(nn.Module):
    """`down_proj(silu(gate_proj(x)) * up_proj(x))`, under the parameter names of Llama and Qwen."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        product: torch.Tensor = self.down_proj(gated(self.gate_proj(x), self.up_proj(x)))
        return product


def gated(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Return `silu(gate) * up`; only gate and up are saved for the backward pass."""
    if moving.is_on_gpu(gate):
        return functional.silu(gate) * up
    product: torch.Tensor = _Gated.apply(gate, up)
    return product


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        return functional.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[torch.Tensor, torch.Tensor]:
        gate, up = ctx.saved_tensors
        grad_up = functional.silu(gate).mul_(gradients[0])
        grad_gate = torch.ops.aten.silu_backward(up * gradients[0], gate)
        return grad_gate, grad_up
