"""Claims about the field's formulas: they give published lines back."""

from __future__ import annotations

import pytest

from contracts.acceptance import Acceptance


def test_a_published_total_gives_the_published_rate_and_length() -> None:
    # 90483 of 123000 drafted tokens at K = 3 were published as 73.56% and 3.207 tokens a step.
    steps = 123000 // 3
    threes, ones = divmod(90483, 3)
    acceptance = Acceptance((steps - threes - (ones > 0), int(ones == 1), int(ones == 2), threes))
    assert (acceptance.steps, acceptance.accepted) == (41000, 90483)
    assert round(acceptance.acceptance_rate * 100, 2) == 73.56
    assert round(acceptance.acceptance_length, 3) == 3.207


def test_per_position_shares_sum_to_the_length_minus_one() -> None:
    # GSM8K's published shares .923 .839 .756 belong to a length of 3.518.
    acceptance = Acceptance((77, 84, 83, 756))
    assert acceptance.per_position == pytest.approx([0.923, 0.839, 0.756])
    assert acceptance.acceptance_length == pytest.approx(3.518)


def test_pooling_adds_counters_and_does_not_average_ratios() -> None:
    parts = [Acceptance.from_steps([3, 3, 3], 3), Acceptance.from_steps([0], 3)]
    assert Acceptance.pool(parts).acceptance_length == pytest.approx(1 + 9 / 4)


def test_no_steps_is_one_token_a_step_and_no_crash() -> None:
    assert Acceptance((0, 0)).summary()["acceptance_length"] == 1.0


def test_pooling_nothing_is_an_error_and_not_an_acceptance_length_of_one() -> None:
    with pytest.raises(ValueError, match="no acceptance to pool"):
        Acceptance.pool([])


def test_a_gain_paired_by_conversation_is_seen_where_separate_intervals_overlap() -> None:
    before = [Acceptance.from_steps([n % 7] * 5, 8) for n in range(14)]
    after = [Acceptance.from_steps([n % 7 + 1] + [n % 7] * 4, 8) for n in range(14)]
    assert Acceptance.interval(after)[0] < Acceptance.interval(before)[1]
    assert Acceptance.gain_interval(after, before) == pytest.approx((0.2, 0.2))
    assert Acceptance.gain_interval(before, after) == pytest.approx((-0.2, -0.2))
