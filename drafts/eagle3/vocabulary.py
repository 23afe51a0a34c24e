"""The reduced vocabulary of an EAGLE3 draft: the tokens that the target generates most.

In the weights, as vLLM loads them: d2t (n,) int64, the target's token id minus the draft's; t2d (V,) bool, whether the
draft has the target's token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Vocabulary:
    """The kept tokens (n,), ascending, and the share of the supervised tokens that they cover."""

    kept: torch.Tensor
    coverage: float


def choose_vocabulary(counts: torch.Tensor, size: int) -> Vocabulary:
    """Return the `size` most supervised tokens from their `counts (V,)`; ties go to the lower id."""
    kept = counts.argsort(descending=True, stable=True)[:size].sort().values
    return Vocabulary(kept, float(counts[kept].sum() / counts.sum().clamp(min=1)))


def complete(d2t: torch.Tensor, t2d: torch.Tensor | None, vocab_size: int) -> tuple[torch.Tensor, str]:
    """Return t2d `(V,)` made from `d2t (n,)`, and what is wrong with the two; "" if nothing is."""
    ids, known = torch.arange(len(d2t)) + d2t.long(), torch.zeros(vocab_size, dtype=torch.bool)
    if not bool((ids.diff() > 0).all()) or int(ids[0]) < 0 or int(ids[-1]) >= vocab_size:
        return known, "that gives no ascending token ids of the target"
    known[ids] = True
    wrong = t2d is not None and not torch.equal(t2d.bool(), known)
    return known, "of other tokens than t2d" if wrong else ""
