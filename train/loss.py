"""The block objective: cross-entropy on the tokens that the target generated, near slots weighing more."""

from __future__ import annotations

import torch
from torch.nn import functional


def slot_weights(block_size: int, decay: float) -> torch.Tensor:
    """`w_k = exp(-(k-1)/gamma)` for slots k = 1..B-1; slot 0 is the anchor and has no loss. Shape (B-1,)."""
    return torch.exp(-torch.arange(block_size - 1).float() / decay)


def block_targets(
    token_ids: torch.Tensor, loss_mask: torch.Tensor, anchor_rows: torch.Tensor, block_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """`(labels, valid)`, both (A, B-1): the token each slot must predict, and whether the target generated it.

    A block is cut where its run of generated tokens ends: what lies beyond is another turn's prompt, or nothing.
    Packed samples need no boundary of their own, as each begins with its prompt.
    """
    places = anchor_rows[:, None] + torch.arange(1, block_size)
    inside = places < len(token_ids)
    places = places.clamp(max=len(token_ids) - 1)
    valid = (loss_mask[places] & inside).long().cumprod(dim=1).bool()
    return token_ids[places], valid


def weighted_cross_entropy(
    hidden: torch.Tensor, lm_head: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """`(mean cross-entropy weighted by `weights`, argmax of each row)`.

    Shapes: hidden (N, H), lm_head (V, H), labels (N,), weights (N,).
    """
    logits = functional.linear(hidden, lm_head)
    losses = functional.cross_entropy(logits, labels, reduction="none")
    return (losses * weights).sum() / weights.sum(), logits.detach().argmax(-1)
