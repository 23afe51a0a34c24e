"""Call each of MKL's vector functions once, before several threads call them.

Torch computes cos, sqrt, log and similar functions on CPUs with MKL's VML. MKL 2024.2, which torch 2.13 is built with,
chooses a function's kernel at its first call. If several threads make that call at the same time, one of them may get a
kernel of half the precision: cos is then off by up to 1.5e-4. vLLM computes its rotary table once, so all hidden states
of such an engine are off by 5e-5, and the first step of a training is not reproducible.
Source: https://github.com/pytorch/pytorch/issues/188792 (fixed in MKL 2025).
"""

from __future__ import annotations

from functools import cache

import torch

# All functions of VML that libtorch_cpu uses.
FUNCTIONS = (
    "acos", "asin", "atan", "cos", "erf", "erfc", "erfinv", "exp", "log", "log10", "log2", "sin", "sqrt", "tan", "tanh",
    "trunc",
)  # fmt: skip


@cache
def settle_vector_functions() -> None:
    """Make MKL choose its kernels now, in this thread. Call it before the process computes anything on its CPU."""
    for dtype in (torch.float32, torch.float64):
        values = torch.full((8,), 0.5, dtype=dtype, device="cpu")  # few enough for torch to use one thread
        for name in FUNCTIONS:
            getattr(torch, name)(values)
