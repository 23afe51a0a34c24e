"""Positions that serving can draft from, and spans of generated tokens."""

from __future__ import annotations

import torch


def anchor_places(loss_mask: torch.Tensor) -> torch.Tensor:
    """Return the positions that serving can draft from: a generated token followed by another. Ascending, (N,)."""
    return (loss_mask[:-1] & loss_mask[1:]).nonzero()[:, 0]


def spans_of(loss_mask: torch.Tensor) -> list[tuple[int, int]]:
    """Return the runs of True as half-open spans."""
    edges = torch.diff(loss_mask.int(), prepend=torch.zeros(1, dtype=torch.int), append=torch.zeros(1, dtype=torch.int))
    starts, ends = (edges == 1).nonzero()[:, 0], (edges == -1).nonzero()[:, 0]
    return list(zip(starts.tolist(), ends.tolist(), strict=True))
