"""One training batch: packed documents that do not attend to each other."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch

from contracts.sample_file import decode_states
from contracts.top_tokens import TopTokens


@dataclass(frozen=True)
class Batch:
    """Shapes: token_ids (T,) int64; loss_mask (T,) bool; aux_hidden_states (T, n*H); hidden_states (T, H), pre-norm.

    `lengths` of the documents sum to T. `seeds` has one seed per document for what a draft draws at this step.
    `hidden_states` is (T, 0) where the objective needs none. `scales`: of states that are still in fp8, by their name.
    `top`: the target's most likely next tokens (N = T), in place of `hidden_states`; only rows before generated tokens
    have values.
    """

    token_ids: torch.Tensor
    loss_mask: torch.Tensor
    aux_hidden_states: torch.Tensor
    hidden_states: torch.Tensor
    lengths: list[int]
    sample_ids: list[str]
    seeds: list[int]
    scales: dict[str, torch.Tensor] = field(default_factory=dict)
    top: TopTokens | None = None

    @property
    def final(self) -> torch.Tensor | TopTokens:
        """What the target's distributions follow from."""
        return self.hidden_states if self.top is None else self.top

    def decoded(self) -> Batch:
        """Return the batch with bf16 states in place of fp8 ones; on a GPU after the copy, which is then shorter."""
        decoded: dict[str, Any] = {
            name: decode_states(getattr(self, name), scale) for name, scale in self.scales.items()
        }
        return replace(self, scales={}, **decoded)
