"""MKL's vector functions, each called once before threads share them.

Torch computes cos, sqrt, log and their like on CPUs with MKL's VML. MKL 2024.2, which torch 2.13 is built with, chooses
a function's kernel at its first call. Where several threads make that call at once, one of them may get a kernel of
half the precision for its part: cos is then up to 1.5e-4 off. vLLM computes its rotary table once, so that all hidden
states of an engine are 5e-5 off for as long as it runs; a training's first step is not the first step of another run.
Source: https://github.com/pytorch/pytorch/issues/188792 (gone with MKL 2025).
"""

from __future__ import annotations

from functools import cache

import torch

# All that libtorch_cpu takes from VML.
FUNCTIONS = (
    "acos", "asin", "atan", "cos", "erf", "erfc", "erfinv", "exp", "log", "log10", "log2", "sin", "sqrt", "tan", "tanh",
    "trunc",
)  # fmt: skip


@cache
def settle_vector_functions() -> None:
    """Have MKL choose its kernels now, in this thread alone: once a process, before anything is computed on its CPU."""
    for dtype in (torch.float32, torch.float64):
        values = torch.full((8,), 0.5, dtype=dtype, device="cpu")  # so few that torch does not share them out
        for name in FUNCTIONS:
            getattr(torch, name)(values)
