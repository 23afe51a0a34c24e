"""Grouped dynamic causal convolutions along a block's slots, around a draft layer's sublayers.

With x the sublayer's input, and z what is convolved, x itself (side 0) or the sublayer's output (side 1):
    d_i = kernel_projection(x_i)                                                                for slot i
    y_i[c] = sum_t (base_kernel[side, t, c] + d_i[side, t, group of c]) * z_{i-t}[c]            for channel c
Rows before the block's first slot count as 0.

Source: DFlash2 as vLLM serves it (vllm/model_executor/models/qwen3_dflash2.py). Shapes: A blocks, B slots, H hidden
size, T taps, G groups of H/G channels.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional


class BlockConvolution(nn.Module):
    """The convolutions before and after one sublayer; at first they change nothing."""

    def __init__(self, hidden_size: int, taps: int, group_size: int) -> None:
        super().__init__()
        self.shape = (2, taps, hidden_size // group_size)
        self.base_kernel = nn.Parameter(torch.empty(2, taps, hidden_size))
        self.kernel_projection = nn.Linear(hidden_size, 2 * taps * (hidden_size // group_size), bias=False)
        self.make_identity()

    @torch.no_grad()
    def make_identity(self) -> None:
        """Set the weights with which outputs are inputs."""
        self.base_kernel.zero_()
        self.base_kernel[:, 0] = 1.0
        self.kernel_projection.weight.zero_()

    def before(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the sublayer's convolved input, and what `after` needs. Shapes: (A, B, H) -> same, (A, B, T, G)."""
        found = self.kernel_projection(x).unflatten(-1, self.shape)
        return convolve(x, self.base_kernel[0], found[:, :, 0]), found[:, :, 1]

    def after(self, x: torch.Tensor, dynamic: torch.Tensor) -> torch.Tensor:
        """Return the sublayer's convolved output. Shapes: x (A, B, H), dynamic (A, B, T, G) -> (A, B, H)."""
        return convolve(x, self.base_kernel[1], dynamic)


def convolve(x: torch.Tensor, base: torch.Tensor, dynamic: torch.Tensor) -> torch.Tensor:
    """Convolve along the slots, computed in fp32.

    Shapes: x (A, B, H), base (T, H), dynamic (A, B, T, G) -> (A, B, H).
    """
    groups = dynamic.shape[-1]
    rows, base = x.unflatten(-1, (groups, -1)).float(), base.unflatten(-1, (groups, -1)).float()
    output = (base[0] + dynamic[:, :, 0, :, None].float()) * rows
    for tap in range(1, len(base)):
        earlier = functional.pad(rows[:, :-tap], (0, 0, 0, 0, tap, 0))
        output = output + (base[tap] + dynamic[:, :, tap, :, None].float()) * earlier
    return output.flatten(-2).to(x.dtype)
