"""Find replies that fell into a loop."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

WINDOW = 8
MIN_REPEATS = 4
# Odd multipliers of a polynomial hash; products wrap at 64 bits.
MULTIPLIERS = np.array([pow(0x9E3779B97F4A7C15, k, 1 << 64) for k in range(1, WINDOW + 1)], dtype=np.uint64)


def find_loop(token_ids: Sequence[int], min_tokens: int) -> tuple[int, int] | None:
    """`(period, tokens)` of the longest stretch of tokens that repeats itself, or None where there is no loop.

    A loop is a stretch of at least `min_tokens` tokens and `MIN_REPEATS` periods in which every token is the same as
    the one a period before. Found by the distance of each window of 8 tokens to its last occurrence, which stays the
    same throughout a loop; O(n log n).
    """
    if len(token_ids) < max(min_tokens, WINDOW + 1):
        return None
    ids = np.asarray(token_ids, dtype=np.uint64)
    hashes = (np.lib.stride_tricks.sliding_window_view(ids, WINDOW) * MULTIPLIERS).sum(axis=1, dtype=np.uint64)
    order = np.argsort(hashes, kind="stable")
    again = hashes[order][1:] == hashes[order][:-1]
    distances = np.zeros(len(hashes), dtype=np.int64)
    distances[order[1:][again]] = np.diff(order)[again]
    starts = np.flatnonzero(np.diff(distances, prepend=-1))
    periods = distances[starts]
    stretches = np.diff(starts, append=len(distances)) + WINDOW - 1 + periods
    stretches[(periods == 0) | (stretches < np.maximum(min_tokens, MIN_REPEATS * periods))] = 0
    best = int(stretches.argmax())
    return (int(periods[best]), int(stretches[best])) if stretches[best] else None
