"""The reduced vocabulary of an EAGLE3 draft: the tokens that the target generates most.

In the weights, as vLLM loads them: d2t (n,) int64, what to add to a draft's token id to get the target's; t2d (V,)
bool, which of the target's tokens the draft knows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Vocabulary:
    """The tokens that are kept, ascending (n,), and the share of the supervised tokens that they cover."""

    kept: torch.Tensor
    coverage: float


def choose_vocabulary(counts: torch.Tensor, size: int) -> Vocabulary:
    """The `size` tokens that are supervised most often; ties go to the lower id. `counts` (V,): how often each is."""
    kept = counts.argsort(descending=True, stable=True)[:size].sort().values
    return Vocabulary(kept, float(counts[kept].sum() / counts.sum().clamp(min=1)))
