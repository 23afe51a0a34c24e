"""A schedule of draft tokens: how many (K) vLLM drafts by the number of requests that run in a step, the batch size.

The format is vLLM's: `num_speculative_tokens_per_batch_size` of its speculative config, ranges `[first, last, K]` with
both ends included, the first at 1 (vllm/v1/spec_decode/dynamic/utils.py, 0.32). vLLM never drafts more than
`num_speculative_tokens`, and carries the last K on to all larger batch sizes. K = 0 drafts nothing; the draft still
reads every token, to have its KV cache when it drafts again.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

SCHEDULE_KEY = "num_speculative_tokens_per_batch_size"

Schedule = list[list[int]]
"""Ranges `[first, last, K]`, ascending."""


def check_schedule(schedule: Sequence[Any]) -> None:
    """Raise ValueError unless these are ranges that follow each other from 1 on.

    vLLM also takes ranges in any order and with gaps between them; those are easily a mistake.
    """
    expected = 1
    for entry in schedule:
        is_range = isinstance(entry, list) and len(entry) == 3 and all(type(number) is int for number in entry)
        if not is_range or entry[0] != expected or entry[1] < entry[0] or entry[2] < 0:
            raise ValueError(
                f"{entry} in {SCHEDULE_KEY}; expected [{expected}, last batch size, draft tokens]: ranges follow each "
                "other without gaps, from 1 on"
            )
        expected = entry[1] + 1
    if not schedule:
        raise ValueError(f"no range in {SCHEDULE_KEY}; leave it out to draft a fixed number of tokens")


def make_schedule(draft_tokens: Sequence[int], max_batch_size: int) -> Schedule:
    """Merge the numbers of draft tokens at batch sizes 1, 2, ... into ranges; the last one ends at `max_batch_size`."""
    assert 1 <= len(draft_tokens) <= max_batch_size
    schedule: Schedule = []
    first = 1
    for number, group in itertools.groupby(draft_tokens):
        last = first + len(list(group)) - 1
        schedule.append([first, last, number])
        first = last + 1
    schedule[-1][1] = max_batch_size
    return schedule


def draft_tokens_at(schedule: Schedule, batch_size: int) -> int:
    """Return the number of draft tokens at a batch size; beyond the last range, the last range's."""
    return next((k for _, last, k in schedule if batch_size <= last), schedule[-1][2])


def max_draft_tokens(schedule: Schedule, batch_size: int | None = None) -> int:
    """Return the largest number of draft tokens at batch sizes up to `batch_size`; None: at all."""
    return max(k for first, _, k in schedule if batch_size is None or first <= batch_size)
