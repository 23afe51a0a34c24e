"""Claims about measuring: counts agree, the last step ends where the reply does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from bench.acceptance import check_counters
from bench.differences import compare_replies, find_overruns
from bench.replay import compare, make_report
from bench.report import make_table
from bench.requests import Answer, Turn, answers_to_json, kept_steps, read_turns
from common.errors import IncompleteError
from contracts.acceptance import Acceptance
from contracts.conversation import Conversation, Sample


def make_answer(tokens: int, accepted: list[int], id_: str = "a", first: int = 1) -> Answer:
    return Answer(id_, [first, *range(2, tokens + 1)], "stop", accepted, 0.1)


@pytest.mark.parametrize(
    ("tokens", "accepted", "kept"),
    [
        (8, [3, 2], [3, 2]),  # 1 from the prefill, 4, 3: nothing left over
        (7, [3, 2], [3, 2]),  # the bonus token was past the stop
        (6, [3, 2], [3, 1]),  # a draft token was
        (5, [3, 7], [3]),  # a step that began after the end counts for nothing
        (1, [], []),
    ],
)
def test_the_last_step_is_cut_where_the_reply_ends(tokens: int, accepted: list[int], kept: list[int]) -> None:
    assert kept_steps(make_answer(tokens, accepted)) == kept


def make_results(counters: dict[str, float]) -> tuple[list[Turn], dict[str, Any], dict[str, Any]]:
    turns = [Turn("a", "enabled", "x", [0], [1, 2, 3]), Turn("b", "disabled", "x", [0], [1, 2])]
    drafted = [make_answer(3, [1], "a"), make_answer(2, [0], "b", first=9)]
    base = [make_answer(3, [], "a"), make_answer(2, [], "b")]
    identical, differing = compare_replies(turns, {a.id: a.token_ids for a in base}, drafted)
    point = {"seconds": 2.0, "tokens": 5, "greedy_identical": identical, "differing": differing}
    return (
        turns,
        {"points": {"1": {**point, "counters": {}, "answers": answers_to_json(base)}}},
        {"points": {"1": {**point, "counters": counters, "answers": answers_to_json(drafted)}}},
    )


def test_the_figures_come_from_sums_and_a_difference_is_located() -> None:
    turns, baseline, drafted = make_results({"num_drafts": 2.0, "num_accepted_tokens": 1.0})
    report = compare(turns, baseline, drafted, num_draft_tokens=3)
    assert report["acceptance_length"] == 1.5
    assert report["by_mode"]["enabled"]["acceptance_length"] == 2.0
    assert report["tokens_per_s"] == {"1": 2.5}
    assert (report["greedy_identical"], report["greedy_total"]) == (1, 2)
    (found,) = report["differing"]
    assert (found["turn"], found["concurrency"], found["first_token"], found["tokens"]) == ("b", 1, 0, (1, 9))


def test_a_set_has_a_row_for_each_mode_and_number_of_draft_tokens_with_its_interval() -> None:
    turns, baseline, drafted = make_results({"num_drafts": 2.0, "num_accepted_tokens": 1.0})
    turns = [replace(turn, dataset="held_out") for turn in turns]
    report = make_report(turns, baseline, {3: drafted, 1: drafted})
    rows = [
        (row["dataset"], row["thinking_mode"], row["temperature"], row["num_draft_tokens"], row["acceptance_length"])
        for row in report["by_set"]
    ]
    of_set = [("held_out", mode, 0.0, k, length) for k in (1, 3) for mode, length in (("disabled", 1), ("enabled", 2))]
    assert rows == of_set
    assert all(row["interval"] == [row["acceptance_length"]] * 2 and row["n"] == 1 for row in report["by_set"])


def test_a_difference_tells_the_logit_gap_after_the_last_common_token() -> None:
    turn = Turn("a", "", "", prompt=[7, 8], reply=[1, 2, 3])
    asked = []

    def score(prompt: Sequence[int], token_ids: Sequence[int]) -> list[float]:
        asked.append((list(prompt), list(token_ids)))
        return [-0.1, -0.35]

    answer = Answer("a", [1, 5, 3], "stop", [], 0.1)
    assert compare_replies([turn], {"a": [1, 2, 3]}, [answer], score) == (
        0,
        [{"turn": "a", "first_token": 1, "tokens": (2, 5), "logit_gap": 0.25}],
    )
    assert asked == [([7, 8, 1], [2, 5])]
    shorter = Answer("a", [1, 2], "stop", [], 0.1)
    assert compare_replies([turn], {"a": [1, 2, 3]}, [shorter], score)[1][0]["first_token"] is None
    sampled = Turn("a", "", "", prompt=[7], reply=[1], sampling={"temperature": 0.8})
    assert compare_replies([sampled], {"a": [1]}, [answer], score) == (0, [])


@pytest.mark.parametrize(
    ("token_ids", "finish_reason", "wrong"),
    [([1, 2, 9], "stop", False), ([1, 9, 2], "stop", True), ([1, 2], "stop", True), ([1, 9], "length", True),
     ([1, 2], "length", False)],
)  # fmt: skip
def test_a_reply_ends_at_its_stop_token_and_nowhere_else(token_ids: list[int], finish_reason: str, wrong: bool) -> None:
    answer = Answer("a", token_ids, finish_reason, [], 0.1)
    assert find_overruns([answer], {9}) == (["a"] if wrong else [])


def test_counters_that_are_not_the_sum_of_the_requests_are_an_error() -> None:
    turns, baseline, drafted = make_results({"num_drafts": 3.0, "num_accepted_tokens": 1.0})
    with pytest.raises(IncompleteError, match=r"found 3 steps.*delete draft-k3\.json"):
        compare(turns, baseline, drafted, num_draft_tokens=3)
    counted = Acceptance.from_steps([2, 0], 3)
    good = {"num_drafts": 2.0, "num_accepted_tokens": 2.0, "accepted_at_0": 1.0, "accepted_at_1": 1.0}
    check_counters(counted, good, "here")
    with pytest.raises(IncompleteError, match="here: found 2 as accepted_at_1"):
        check_counters(counted, {**good, "accepted_at_1": 2.0}, "here")


def test_every_finished_reply_is_a_turn_with_its_recorded_context() -> None:
    values: dict[str, Any] = {
        "source_id": "", "index": 0, "messages": [], "sampling": {}, "target": {}, "template": "", "usage": {},
        "samples": [Sample(token_ids=[1, 2, 3, 4, 5, 6], loss_spans=[(1, 3), (5, 6)])],
    }  # fmt: skip
    records = [
        Conversation(id="b", finish_reason="stop", **values),
        Conversation(id="a", finish_reason="length", **values),
    ]
    turns = read_turns(records)
    assert [(turn.id, turn.prompt, turn.reply) for turn in turns] == [
        ("b-0-1", [1], [2, 3]),
        ("b-0-5", [1, 2, 3, 4, 5], [6]),
    ]
    turns = read_turns(records, include_cut=True, dataset="x")
    assert [(turn.id, turn.conversation, turn.max_tokens) for turn in turns] == [
        ("a-0-1", "a", None),
        ("a-0-5", "a", 1),
        ("b-0-1", "b", None),
        ("b-0-5", "b", None),
    ]


def test_the_table_shows_both_numbers_and_the_speed_up() -> None:
    figures = {"acceptance_length": 3.5, "per_position": [0.9, 0.8]}
    served = {
        **figures, "by_mode": {"enabled": figures}, "tokens_per_s": {"1": 30.0}, "baseline_tokens_per_s": {"1": 10.0},
        "greedy_identical": 4, "greedy_total": 4,
    }  # fmt: skip
    report = {
        "eval": {**figures, "by_mode": {"enabled": figures}}, "served": served,
        "agreement": {"identical_walks": 2, "walks": 2}, "seconds": {"train": 1.0},
    }  # fmt: skip
    table = make_table(report)
    assert "3.00x" in table
    assert table.count("3.500") == 4
