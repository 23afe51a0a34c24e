"""Predict the acceptance of drafts that are sampled (vLLM's `draft_sample_method: probabilistic`) on sampled replies.

Rejection sampling accepts a draft token that was drawn from q with probability min(1, p/q), p the target's. The token
it puts out is x with probability p(x), and it is an accepted draft token x with probability min(p(x), q(x)). So, given
that a reply has x at a place, the draft token there was accepted with probability min(1, q(x) / p(x)). A recorded reply
has the target's tokens, and the steps of a server that generates it form a Markov chain over its positions. The
expectation over this chain is computed exactly; nothing is drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Expected:
    """Expected figures of one sample: the number of steps, and of those that accept at least 1, ..., K tokens."""

    steps: float
    at_least: np.ndarray

    @classmethod
    def pool(cls, parts: Sequence[Expected]) -> Expected:
        return cls(sum(part.steps for part in parts), np.sum([part.at_least for part in parts], axis=0))

    @property
    def acceptance_length(self) -> float:
        return 1.0 + float(self.at_least.sum()) / self.steps if self.steps else 1.0

    def summary(self) -> dict[str, Any]:
        """Return the figures of a report."""
        return {
            "acceptance_length": round(self.acceptance_length, 4),
            "per_position": [round(float(count) / max(self.steps, 1e-9), 4) for count in self.at_least],
            "steps": round(self.steps, 2),
        }


def expect_steps(ratios: np.ndarray, spans: Sequence[tuple[int, int]]) -> Expected:
    """Return what is expected of the replies at `spans` of a sample.

    `ratios[t, k]`, (T, K): q / p of token t + 1 + k, drafted as token k of the block after t. The first token of a
    reply comes from the prefill and is the first anchor; a step's tokens end with the reply.
    """
    num_tokens, steps = ratios.shape[1], 0.0
    at_least = np.zeros(num_tokens)
    accepted = np.minimum(1.0, ratios)
    for start, end in spans:
        visits = np.zeros(end - start + num_tokens + 1)  # expected number of steps that begin at each place
        visits[0] = 1.0
        for place in range(start, end - 1):
            chance = visits[place - start]
            steps += chance
            for k in range(min(num_tokens, end - 1 - place)):
                going_on = chance * accepted[place, k]
                visits[place - start + k + 1] += chance - going_on
                at_least[k] += going_on
                chance = going_on
            visits[place - start + min(num_tokens, end - 1 - place) + 1] += chance
    return Expected(steps, at_least)
