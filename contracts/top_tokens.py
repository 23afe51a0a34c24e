"""The target's k most likely next tokens and the mass of all others: what a store may hold in place of final states.

Log-probabilities are fp16, which has 11 significant bits (bf16 has 8): a probability is off by at most 0.2% at
exp(-4), by 0.4% at exp(-16).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

SMALLEST = -65504.0
"""The least log-probability that fp16 holds."""
SHORT_VOCABULARY = 1 << 16
"""Ids of smaller vocabularies take 2 bytes in a file, others 4."""


@dataclass(frozen=True)
class TopTokens:
    """Shapes: ids (N, k), the most likely first; log_probs (N, k+1), the last that of all other tokens together."""

    ids: torch.Tensor
    log_probs: torch.Tensor

    @property
    def k(self) -> int:
        return self.ids.shape[1]

    @property
    def nbytes(self) -> int:
        return self.ids.nbytes + self.log_probs.nbytes

    def at(self, rows: torch.Tensor | slice) -> TopTokens:
        """Return those of some rows."""
        return TopTokens(self.ids[rows], self.log_probs[rows])

    def logits(self, vocab_size: int) -> torch.Tensor:
        """Return the log-probabilities as logits `(N, V)` in fp32, -inf for all other tokens."""
        own = self.log_probs[:, :-1].float()
        return own.new_full((len(own), vocab_size), float("-inf")).scatter_(1, self.ids.long(), own)


def id_dtype(vocab_size: int | None) -> torch.dtype:
    """Return the dtype of ids in a file; the larger one for an unknown vocabulary."""
    return torch.uint16 if vocab_size is not None and vocab_size <= SHORT_VOCABULARY else torch.int32


def top_bytes(top_k: int, vocab_size: int | None) -> int:
    """Return the bytes of one position's ids and log-probabilities."""
    return top_k * id_dtype(vocab_size).itemsize + (top_k + 1) * 2
