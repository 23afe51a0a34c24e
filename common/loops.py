"""Find replies that repeat themselves."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

WINDOW = 8
MIN_REPEATS = 4
MAX_CANDIDATES = 8
# Odd multipliers of a polynomial hash; products wrap at 64 bits.
MULTIPLIERS = np.array([pow(0x9E3779B97F4A7C15, k, 1 << 64) for k in range(1, WINDOW + 1)], dtype=np.uint64)


def find_loop(token_ids: Sequence[int], min_tokens: int) -> tuple[int, int] | None:
    """Return `(period, tokens)` of the longest loop, or None.

    A loop is a run of at least `min_tokens` tokens and `MIN_REPEATS` periods in which each token equals the one a
    period before. Candidate periods are the most common distances between equal windows of 8 tokens. O(n log n).
    """
    if len(token_ids) < max(min_tokens, WINDOW + 1):
        return None
    ids = np.asarray(token_ids, dtype=np.uint64)
    hashes = (np.lib.stride_tricks.sliding_window_view(ids, WINDOW) * MULTIPLIERS).sum(axis=1, dtype=np.uint64)
    order = np.argsort(hashes, kind="stable")
    distances = np.diff(order)[hashes[order][1:] == hashes[order][:-1]]
    periods, counts = np.unique(distances, return_counts=True)
    best: tuple[int, int] | None = None
    for period in sorted(periods[np.argsort(-counts, kind="stable")[:MAX_CANDIDATES]].tolist()):
        differs = np.flatnonzero(ids[period:] != ids[:-period])
        equal = int(np.diff(differs, prepend=-1, append=len(ids) - period).max()) - 1
        tokens = equal + period
        if tokens >= max(min_tokens, MIN_REPEATS * period) and (best is None or tokens > best[1]):
            best = (period, tokens)
    return best
