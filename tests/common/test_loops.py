"""Claims about loops: found with their period and length, and nothing else taken for one."""

from __future__ import annotations

import random

import pytest

from common.loops import find_loop

RANDOM = random.Random(0)
TEXT = [RANDOM.randrange(2, 5000) for _ in range(3000)]


@pytest.mark.parametrize("period", [1, 2, 7, 40, 300])
def test_a_loop_is_found_with_its_period_and_length(period: int) -> None:
    loop = TEXT[:period] * 5 if period >= 40 else (TEXT[:period] * 200)[:200]
    ids = [*TEXT[1000:1500], *loop, *TEXT[2000:2100]]
    assert find_loop(ids, 128) == (period, len(loop))
    assert find_loop([*TEXT[1000:1500], *loop], 128) == (period, len(loop))


@pytest.mark.parametrize(
    "ids",
    [
        TEXT,
        [*TEXT[:500], *[7] * 127, *TEXT[500:900]],  # a long line of dashes
        TEXT[:400] * 3,  # an answer that quotes itself twice
        [*TEXT[:30]] * 4,  # four times, but short
        [],
        [5],
    ],
)
def test_what_repeats_too_little_is_no_loop(ids: list[int]) -> None:
    assert find_loop(ids, 128) is None


def test_the_longest_of_several_loops_is_told() -> None:
    ids = [*[3] * 150, *TEXT[:50], *[4, 5] * 100]
    assert find_loop(ids, 128) == (2, 200)


def test_it_is_what_comparing_every_token_with_the_one_a_period_before_finds() -> None:
    for seed in range(30):
        rng = random.Random(seed)
        period = rng.randrange(1, 60)
        motif = [rng.randrange(3) for _ in range(period)]
        ids = [rng.randrange(1000) for _ in range(rng.randrange(100))] + (motif * 300)[: rng.randrange(256, 300)]
        found = find_loop(ids, 128)
        assert found is not None
        found_period, tokens = found
        equal = sum(a == b for a, b in zip(ids[found_period:], ids, strict=False))
        assert equal >= tokens - found_period
