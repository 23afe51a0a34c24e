"""The target's distribution at the slots that a draft learns from: from stored final states, or its top k tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from contracts.top_tokens import SMALLEST, TopTokens
from drafts.chunks import chunks
from target.head import TargetHead


class TopProbabilities(NamedTuple):
    """The target's probabilities of k tokens and, in the last column, of all others; each row sums to 1.

    Shapes: columns (n, k), the tokens' columns of the draft's logits; known (n, k), which tokens the draft has; t
    (n, k+1), 0 for the others. `has_rest` (n,): whether the draft has other tokens.
    """

    columns: torch.Tensor
    known: torch.Tensor
    t: torch.Tensor
    has_rest: torch.Tensor


Probabilities = torch.Tensor | TopProbabilities
"""The target's probabilities of all tokens `(n, V)`, or of the most likely ones."""
Teacher = Callable[[slice], Probabilities]
"""A function from a slice of rows to the target's probabilities."""


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
    head: TargetHead, final: torch.Tensor | TopTokens, needed: TeacherRows, known: torch.Tensor | None = None
) -> Teacher:
    """Return the target's distribution for each slot, from states `(T, H)` before the final norm, or top k tokens.

    Slots next to each other mostly share rows, since blocks and chains overlap: a chunk computes each row once.
    `known (n,)`: the only tokens of the draft; the distribution is the target's given that it chooses one of them.
    Of the top k tokens those that the draft does not have are then left out, and all others count as its own.
    """
    if isinstance(final, TopTokens):
        return _make_top_teacher(final, needed, head.lm_head.shape[0], known)
    if known is not None:  # renormalized probabilities are the softmax of these logits alone
        head = head.of_tokens(known)

    def teacher(part: slice) -> torch.Tensor:
        low, high = int(needed.on_host[part].min()), int(needed.on_host[part].max()) + 1
        q = head.logits(final[needed.rows[low:high]]).softmax(-1)
        return q.index_select(0, needed.index[part] - low)

    return teacher


def _make_top_teacher(top: TopTokens, needed: TeacherRows, vocab_size: int, known: torch.Tensor | None) -> Teacher:
    own: torch.Tensor | None = None
    num_columns = vocab_size
    if known is not None:
        num_columns, places = len(known), torch.arange(len(known), device=known.device)
        own = torch.full((vocab_size,), -1, device=known.device).index_copy(0, known, places)

    def teacher(part: slice) -> TopProbabilities:
        rows = needed.rows.index_select(0, needed.index[part])
        columns = top.ids.index_select(0, rows).long()
        if own is not None:
            columns = own[columns]
        is_known = columns >= 0
        has_rest = is_known.sum(1) < num_columns
        counts = torch.cat([is_known, has_rest[:, None]], dim=1)
        log_t = top.log_probs.index_select(0, rows).float().masked_fill(~counts, 2 * SMALLEST)
        return TopProbabilities(columns.clamp(min=0), is_known, log_t.softmax(-1), has_rest)

    return teacher


@torch.no_grad()
def find_top_tokens(head: TargetHead, hidden_states: torch.Tensor, k: int) -> TopTokens:
    """Return the target's k most likely next tokens; never holds the logits of more rows than a chunk.

    Shapes: hidden_states (N, H) before the final norm. Raises ValueError for k tokens or fewer in the vocabulary.
    """
    vocab_size = head.lm_head.shape[0]
    if k >= vocab_size:
        raise ValueError(f"{k} of {vocab_size} tokens")
    ids, log_probs = [], []
    for part in chunks(len(hidden_states), vocab_size, device=hidden_states.device, parts=8):
        logits = head.logits(hidden_states[part])
        whole = logits.logsumexp(-1, keepdim=True)
        found = logits.topk(k, dim=-1)
        rest = logits.scatter_(1, found.indices, float("-inf")).logsumexp(-1, keepdim=True)
        ids.append(found.indices.to(torch.int32))
        log_probs.append((torch.cat([found.values, rest], dim=1) - whole).clamp(min=SMALLEST).half())
    if not ids:
        return TopTokens(torch.empty(0, k, dtype=torch.int32), torch.empty(0, k + 1, dtype=torch.float16))
    return TopTokens(torch.cat(ids), torch.cat(log_probs))


@torch.no_grad()
def teacher_argmax(head: TargetHead, hidden_states: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Return the target's greedy token after each of `places`; duplicates are computed once.

    Shapes: hidden_states (T, H) before the final norm, places (N,) -> (N,).
    """
    needed, inverse = places.unique(return_inverse=True)
    parts = chunks(len(needed), head.lm_head.shape[0], device=needed.device)
    found = [head.logits(hidden_states[needed[rows]]).max(-1).indices for rows in parts]
    return torch.cat(found)[inverse]
