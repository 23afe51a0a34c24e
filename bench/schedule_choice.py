"""Choose the number of draft tokens (K) for each batch size from measured step times and acceptance.

A step at batch size b with K draft tokens takes T(b, K) and gives each request L(K) tokens, so a token takes
T(b, K) / L(K). T is measured at some batch sizes, the concurrencies of the load, and interpolated linearly between
them; below the smallest and above the largest, theirs is taken.

The smallest K is chosen whose token takes at most 2% longer than with the fastest one (`bench.speeds.MARGIN`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from bench.speeds import MARGIN, Array
from contracts.schedule import Schedule, make_schedule
from contracts.speeds import Speeds


@dataclass(frozen=True)
class Steps:
    """`ms[c][k]`: milliseconds of a step at batch size c with K = k. `lengths[k]`: tokens of a request in a step."""

    ms: Mapping[int, Mapping[int, float]]
    lengths: Mapping[int, float]

    @classmethod
    def from_speeds(cls, found: Sequence[Speeds], rates: Sequence[float] | None) -> Steps:
        """Build from the speeds at each concurrency, where K = 0 is a server that drafts nothing.

        `rates`: acceptance by position, from elsewhere; None: that of the load with the most conversations.
        """
        widest = max(found, key=lambda at: (at.conversations, at.concurrency))
        numbers = [speed.draft_tokens for speed in widest.speeds]
        own = {speed.draft_tokens: speed.acceptance_length for speed in widest.speeds}
        lengths = own if rates is None else {k: 1.0 + sum(rates[:k]) for k in numbers}
        return cls({at.concurrency: {k: at.at(k).step_ms for k in numbers} for at in found}, lengths)

    @property
    def numbers(self) -> list[int]:
        """The K that were measured or lie between two that were, ascending."""
        return sorted(self.lengths)

    @property
    def batch_sizes(self) -> list[int]:
        """The batch sizes that were measured, ascending."""
        return sorted(self.ms)

    def token_ms(self, batch_sizes: Sequence[int]) -> Array:
        """Return the milliseconds that a token of a request takes. Shapes: (B,) -> (B, number of K)."""
        measured = self.batch_sizes
        return np.stack(
            [
                np.interp(batch_sizes, measured, [self.ms[size][k] for size in measured]) / self.lengths[k]
                for k in self.numbers
            ],
            axis=1,
        )

    def tokens_per_s(self, batch_size: int) -> dict[int, float]:
        """Return the tokens/s of all requests at a batch size by K."""
        (times,) = self.token_ms([batch_size])
        return {k: 1000 * batch_size / float(ms) for k, ms in zip(self.numbers, times, strict=True)}


def choose_schedule(steps: Steps, max_batch_size: int) -> Schedule:
    """Return the schedule for batch sizes up to `max_batch_size`, or up to the largest measured one."""
    largest = steps.batch_sizes[-1]
    times = steps.token_ms(range(1, largest + 1))
    is_fast = times <= (1 + MARGIN) * times.min(axis=1, keepdims=True)
    chosen = [steps.numbers[int(row.argmax())] for row in is_fast]  # argmax: the first that is true
    return make_schedule(chosen, max(largest, max_batch_size))


def best_fixed(steps: Steps) -> list[int]:
    """Return the fixed numbers of draft tokens worth comparing with: the fastest K > 0 at each measured batch size."""
    chosen = set()
    for size in steps.batch_sizes:
        speeds = steps.tokens_per_s(size)
        chosen.add(max((k for k in speeds if k), key=lambda k: speeds[k]))
    return sorted(chosen)
