"""The target's distribution at the slots that a draft learns from, computed from stored final states."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from drafts.chunks import chunks
from target.head import TargetHead

Teacher = Callable[[slice], torch.Tensor]
"""A function from a slice of rows to the target's probabilities `(n, V)`."""


@dataclass(frozen=True)
class TeacherRows:
    """The rows of target states that a step's slots learn from, each once; planned on the CPU.

    Shapes: rows (U,), ascending; index (N,), each slot's place among them; `on_host`: the same index, for the host.
    """

    rows: torch.Tensor
    index: torch.Tensor
    on_host: np.ndarray

    @classmethod
    def of_slots(cls, rows: torch.Tensor) -> TeacherRows:
        """Plan for slots that learn from the states `rows (N,)`."""
        distinct, index = rows.unique(return_inverse=True)
        return cls(distinct, index, index.numpy())


def make_teacher(
    head: TargetHead, hidden_states: torch.Tensor, needed: TeacherRows, known: torch.Tensor | None = None
) -> Teacher:
    """Return the target's distribution for each slot, from states `(T, H)` before the final norm.

    Slots next to each other mostly share rows, since blocks and chains overlap: a chunk computes each row once.
    `known (n,)`: the only tokens of the draft; the distribution is the target's given that it chooses one of them.
    """
    if known is not None:  # renormalized probabilities are the softmax of these logits alone
        head = head.of_tokens(known)

    def teacher(part: slice) -> torch.Tensor:
        low, high = int(needed.on_host[part].min()), int(needed.on_host[part].max()) + 1
        q = head.logits(hidden_states[needed.rows[low:high]]).softmax(-1)
        return q.index_select(0, needed.index[part] - low)

    return teacher


@torch.no_grad()
def teacher_argmax(head: TargetHead, hidden_states: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Return the target's greedy token after each of `places`; duplicates are computed once.

    Shapes: hidden_states (T, H) before the final norm, places (N,) -> (N,).
    """
    needed, inverse = places.unique(return_inverse=True)
    parts = chunks(len(needed), head.lm_head.shape[0], device=needed.device)
    found = [head.logits(hidden_states[needed[rows]]).max(-1).indices for rows in parts]
    return torch.cat(found)[inverse]
