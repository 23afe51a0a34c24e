"""Claims about the test of drift: wrong no more often than it says, finds a real drop, knows when not to say."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from bench.drift import (
    MIN_CONVERSATIONS,
    MIN_WINDOWS,
    Comparison,
    Counts,
    compare,
    compare_parts,
    effective_conversations,
    spread_between,
    spread_of,
    t_quantile,
    t_tail,
)
from contracts.acceptance import Acceptance
from contracts.certificate import AcceptanceRow, make_row

K = 5
RATE = 0.05


def draw(rng: np.random.Generator, requests: int, mean: float = 0.7, steps: float = 24.0) -> np.ndarray:
    """Histograms of accepted tokens of clustered requests, (requests, K + 1).

    Each request has its own chance that a draft token is accepted, from a beta distribution; lengths are exponential.
    The design effect is about 3, as on the tiny recipe.
    """
    chances = rng.beta(6 * mean, 6 * (1 - mean), size=requests)
    lengths = np.maximum(1, rng.exponential(steps, size=requests).astype(int))
    at_least = np.append(chances[:, None] ** np.arange(K + 1), np.zeros((requests, 1)), axis=1)
    exactly = at_least[:, :-1] - at_least[:, 1:]
    return rng.multinomial(lengths, exactly)


def interval_of(parts: np.ndarray) -> tuple[float, float]:
    """What resampling the conversations gives, by its limit: a test compares the two."""
    accepted, steps = parts @ np.arange(K + 1), parts.sum(axis=1)
    mean = accepted.sum() / steps.sum()
    half = 1.96 * math.sqrt(((accepted - mean * steps) ** 2).sum()) / steps.sum()
    return 1 + mean - half, 1 + mean + half


def row_of(parts: np.ndarray, mode: str = "", **changes: Any) -> AcceptanceRow:
    """The card's row of such conversations, as `train export` makes it."""
    values = {"thinking_mode": mode, "temperature": 0.0, "interval": interval_of(parts), "n": len(parts)}
    row = make_row("held_out", K, {**values, "histogram": parts.sum(axis=0).tolist()})
    return row.model_copy(update=changes)


def counts_of(parts: np.ndarray) -> Counts:
    return Counts(
        int(parts.sum()), tuple(parts[:, ::-1].cumsum(axis=1)[:, ::-1].sum(axis=0)[1:].tolist()), len(parts), 0
    )


def found(counts: Counts, *rows: AcceptanceRow, rate: float = RATE) -> Comparison:
    comparison = compare(counts, rows, rate, None)
    assert comparison is not None
    return comparison


def test_the_interval_of_these_tests_is_that_of_the_card() -> None:
    parts = draw(np.random.default_rng(0), 100)
    low, high = Acceptance.interval([Acceptance(tuple(part)) for part in parts.tolist()])
    assert interval_of(parts) == pytest.approx((low, high), abs=0.1 * (high - low))


@pytest.mark.parametrize("requests", [40, 300])
@pytest.mark.parametrize("conversations", [32, 100])
def test_windows_of_the_cards_own_requests_are_outside_no_more_often_than_stated(
    conversations: int, requests: int
) -> None:
    rng = np.random.default_rng(conversations + requests)
    rows = [row_of(draw(rng, conversations)) for _ in range(200)]
    wrong = sum(bool(found(counts_of(draw(rng, requests)), row).outside) for row in rows)
    assert wrong <= 200 * RATE


def test_without_the_design_effect_the_same_windows_would_be_outside_far_more_often() -> None:
    rng = np.random.default_rng(1)
    wrong = 0
    for _ in range(100):
        row = row_of(draw(rng, 100))
        independent = (row.acceptance_length - 0.001, row.acceptance_length + 0.001)
        wrong += bool(found(counts_of(draw(rng, 300)), row.model_copy(update={"interval": independent})).outside)
    assert wrong > 2 * 100 * RATE


def test_a_real_drop_is_found_each_time_and_named_below() -> None:
    rng = np.random.default_rng(2)
    row = row_of(draw(rng, 200))
    windows = [found(counts_of(draw(rng, 300, mean=0.5)), row, rate=0.001) for _ in range(50)]
    assert all(window.length.side == "below" for window in windows)
    assert all(0 in dict(window.outside) for window in windows)


def test_another_shape_of_the_same_length_is_found_by_position() -> None:
    rng = np.random.default_rng(3)
    row = row_of(draw(rng, 200))
    mean = row.acceptance_length - 1
    steps = 20_000
    all_or_nothing = Counts(steps, (round(steps * mean / K),) * K, 800, 0)
    outside = dict(found(all_or_nothing, row, rate=0.001).outside)
    assert 0 not in outside
    assert (outside[1].side, outside[K].side) == ("below", "above")


def test_a_mix_of_the_cards_modes_is_as_the_card_in_any_shares_and_outside_of_each_mode_alone() -> None:
    rng = np.random.default_rng(4)
    low, high = (row_of(draw(rng, 200, mean=mean), mode) for mean, mode in ((0.4, "disabled"), (0.8, "enabled")))
    mixed = counts_of(np.concatenate([draw(rng, 300, mean=0.4), draw(rng, 300, mean=0.8)]))
    assert not found(mixed, low, high, rate=0.001).outside
    assert found(mixed, low, rate=0.001).length.side == "above"
    assert found(mixed, high, rate=0.001).length.side == "below"


def test_few_long_requests_count_as_few() -> None:
    rng = np.random.default_rng(5)
    row = row_of(draw(rng, 100, steps=20))
    counts = counts_of(draw(rng, 100, steps=20))
    few = Counts(counts.steps, counts.accepted_at, requests=10, beyond=0)
    assert effective_conversations(few, [row]) == pytest.approx(10)
    assert effective_conversations(counts, [row]) == pytest.approx(100, rel=0.5)
    assert found(few, row).length.low < found(counts, row).length.low


def test_requests_of_one_conversation_count_as_one() -> None:
    rng = np.random.default_rng(13)
    rows = [row_of(draw(rng, 100)) for _ in range(300)]
    windows = []
    for _ in rows:
        # Each conversation has 10 requests of the card's lengths that accept alike.
        chances = np.repeat(rng.beta(4.2, 1.8, size=40), 10)
        at_least = np.append(chances[:, None] ** np.arange(K + 1), np.zeros((400, 1)), axis=1)
        lengths = np.maximum(1, rng.exponential(24, size=400).astype(int))
        windows.append(counts_of(rng.multinomial(lengths, at_least[:, :-1] - at_least[:, 1:])))

    def wrong(requests_per_conversation: float) -> int:
        pairs = zip(windows, rows, strict=True)
        comparisons = (compare(counts, [row], RATE, None, requests_per_conversation) for counts, row in pairs)
        return sum(found is not None and bool(found.outside) for found in comparisons)

    assert wrong(10) <= len(rows) * RATE
    assert wrong(1) > 2 * len(rows) * RATE
    assert effective_conversations(windows[0], [rows[0]], 10) <= 40


def test_small_windows_against_a_large_card_are_outside_no_more_often_than_stated() -> None:
    rng = np.random.default_rng(14)
    rows = [row_of(draw(rng, 400, mean=0.2)) for _ in range(30)]
    windows = [counts_of(draw(rng, 40, mean=0.2)) for _ in range(2000)]
    wrong = sum(bool(found(window, rows[n % 30], rate=0.002).outside) for n, window in enumerate(windows))
    assert wrong <= len(windows) * 0.002


def test_a_schedule_leaves_position_1_for_drops_and_nothing_for_rises() -> None:
    rng = np.random.default_rng(15)
    row = row_of(draw(rng, 200))
    low, same, high = (counts_of(draw(rng, 500, mean=mean)) for mean in (0.4, 0.7, 0.9))

    def scheduled(counts: Counts) -> Comparison:
        """As if all steps had drafted one token, of a server that can draft K."""
        accepted_at = (counts.accepted_at[0], *(0,) * (K - 1))
        return found(Counts(counts.steps, accepted_at, counts.requests, 0, counts.steps), row, rate=0.001)

    assert [len(scheduled(counts).positions) for counts in (low, same, high)] == [1, 1, 1]
    assert [scheduled(counts).length.side for counts in (low, same, high)] == ["below", "", ""]


def test_tokens_beyond_the_ends_of_replies_are_no_rise() -> None:
    rng = np.random.default_rng(6)
    row = row_of(draw(rng, 200))
    steps, share = 20_000, (row.acceptance_length - 1) * 1.3 / K
    counts = Counts(steps, (round(steps * share),) * K, 2000, beyond=0)
    assert found(counts, row).length.side == "above"
    ends = Counts(counts.steps, counts.accepted_at, counts.requests, beyond=20_000)
    assert found(ends, row).length.side == ""
    assert found(Counts(counts.steps, counts.accepted_at), row).length.side == ""


def test_another_number_of_draft_tokens_compares_the_shared_positions() -> None:
    rng = np.random.default_rng(7)
    row = row_of(draw(rng, 100))
    counts = counts_of(draw(rng, 300))
    fewer = Counts(counts.steps, counts.accepted_at[:2], counts.requests, 0)
    comparison = found(fewer, row)
    assert len(comparison.positions) == 2
    assert comparison.length.value == pytest.approx(1 + sum(counts.shares[:2]))
    assert not comparison.outside
    more = Counts(counts.steps, (*counts.accepted_at, 0, 0), counts.requests, 0)
    assert len(found(more, row).positions) == K
    assert found(more, row).length.value == pytest.approx(counts.acceptance_length)


def test_with_fewer_draft_tokens_only_a_drop_is_reported_and_with_more_only_a_rise() -> None:
    rng = np.random.default_rng(12)
    row = row_of(draw(rng, 200))
    low, high = (counts_of(draw(rng, 500, mean=mean)) for mean in (0.4, 0.9))

    def sides(counts: Counts, accepted_at: tuple[int, ...]) -> set[str]:
        comparison = found(Counts(counts.steps, accepted_at, counts.requests, 0), row)
        return {tested.side for _, tested in comparison.outside}

    assert (sides(low, low.accepted_at), sides(high, high.accepted_at)) == ({"below"}, {"above"})
    assert (sides(low, low.accepted_at[:2]), sides(high, high.accepted_at[:2])) == ({"below"}, set())
    assert (sides(low, (*low.accepted_at, 0)), sides(high, (*high.accepted_at, 0))) == (set(), {"above"})
    assert not found(Counts(low.steps, (*low.accepted_at, 0), low.requests, 0), row).tells_drops


def test_a_card_without_interval_is_compared_by_the_spread_between_windows_once_there_are_enough() -> None:
    rng = np.random.default_rng(8)
    row = row_of(draw(rng, 400), interval=None)
    few = row_of(draw(rng, MIN_CONVERSATIONS - 1))
    windows = [counts_of(draw(rng, 100)) for _ in range(20)]
    assert spread_of(row) is None
    assert spread_of(few) is None
    assert spread_between(windows[: MIN_WINDOWS - 1]) is None
    assert compare(windows[0], [row], RATE, None) is None
    between = spread_between(windows)
    comparison, drop = (compare(c, [row], 0.001, between) for c in (windows[0], counts_of(draw(rng, 400, mean=0.5))))
    assert comparison is not None
    assert drop is not None
    assert (comparison.outside, drop.length.side) == ([], "below")


def test_the_spread_between_windows_is_that_between_their_requests() -> None:
    rng = np.random.default_rng(9)
    between = spread_between([counts_of(draw(rng, 100)) for _ in range(200)])
    of_card = spread_of(row_of(draw(rng, 1000)))
    assert between is not None
    assert of_card is not None
    assert between.phi == pytest.approx(of_card.phi, rel=0.25)


def test_a_position_that_hardly_any_step_accepts_is_not_tested() -> None:
    rng = np.random.default_rng(10)
    positions = found(counts_of(draw(rng, 60, mean=0.2)), row_of(draw(rng, 60, mean=0.2))).positions
    assert positions[0] is not None
    assert positions[-1] is None


def test_conversations_that_were_sent_are_compared_by_their_own_spread() -> None:
    rng = np.random.default_rng(11)

    def parts(requests: int, mean: float) -> list[Acceptance]:
        return [Acceptance(tuple(part)) for part in draw(rng, requests, mean=mean).tolist()]

    row = row_of(draw(rng, 100))
    wrong = 0
    for _ in range(200):
        same = compare_parts(parts(40, 0.7), [row_of(draw(rng, 40))], RATE, (K, K))
        assert same is not None
        wrong += bool(same.side)
    assert wrong <= 200 * RATE
    other = compare_parts(parts(64, 0.45), [row], 0.001, (K, K))
    assert other is not None
    assert other.side == "below"
    assert compare_parts(parts(MIN_CONVERSATIONS - 1, 0.45), [row], 0.001, (K, K)) is None


def test_quantiles_of_students_t_are_those_of_the_tables() -> None:
    for degrees, quantile in ((1, 63.656741), (2, 9.924843), (9, 3.249836), (30, 2.749996)):
        assert t_quantile(0.01, degrees) == pytest.approx(quantile, abs=1e-5)
    assert t_tail(1.96, 10**6) == pytest.approx(math.erfc(1.96 / math.sqrt(2)), rel=0.02)
