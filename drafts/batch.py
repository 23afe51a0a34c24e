"""One training batch: packed documents that do not attend to each other."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Batch:
    """Shapes: token_ids (T,) int64; loss_mask (T,) bool; aux_hidden_states (T, n*H); hidden_states (T, H), pre-norm.

    `lengths` of the documents sum to T. `seeds` has one seed per document for what a draft draws at this step.
    """

    token_ids: torch.Tensor
    loss_mask: torch.Tensor
    aux_hidden_states: torch.Tensor
    hidden_states: torch.Tensor
    lengths: list[int]
    sample_ids: list[str]
    seeds: list[int]
