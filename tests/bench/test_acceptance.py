"""Claims about measuring: counters are read and summed right, the last step ends where the reply does."""

from __future__ import annotations

from typing import Any

import pytest

from bench.acceptance import compare, compare_greedy, kept_steps
from bench.report import make_table
from bench.requests import Answer, Turn, answers_to_json, parse_counters, read_turns
from contracts.conversation import Conversation, Sample
from contracts.errors import IncompleteError

METRICS = """
# HELP vllm:spec_decode_num_drafts_total Number of spec decoding drafts.
# TYPE vllm:spec_decode_num_drafts_total counter
vllm:spec_decode_num_drafts_total{engine="0",model_name="target"} 10.0
vllm:spec_decode_num_drafts_total{engine="1",model_name="target"} 5.0
# TYPE vllm:spec_decode_num_draft_tokens_total counter
vllm:spec_decode_num_draft_tokens_total{engine="0",model_name="target"} 45.0
# TYPE vllm:spec_decode_num_accepted_tokens_total counter
vllm:spec_decode_num_accepted_tokens_total{engine="0",model_name="target"} 20.0
# TYPE vllm:spec_decode_num_accepted_tokens_per_pos_total counter
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",model_name="target",position="0"} 9.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="1",model_name="target",position="0"} 3.0
"""


def make_answer(tokens: int, accepted: list[int], id_: str = "a", first: int = 1) -> Answer:
    return Answer(id_, [first, *range(2, tokens + 1)], "stop", accepted, 0.1)


def test_counters_are_summed_over_engines() -> None:
    counters = parse_counters(METRICS)
    assert counters["num_drafts"] == 15
    assert counters["num_draft_tokens"] == 45
    assert counters["num_accepted_tokens"] == 20
    assert counters["accepted_at_0"] == 12


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
    point = {"seconds": 2.0, "tokens": 5}
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
    assert report["differing"] == [{"turn": "b", "concurrency": 1, "first_token": 0, "recorded_is": "the baseline"}]
    assert compare_greedy(turns, baseline, baseline) == (2, [])


def test_counters_that_are_not_the_sum_of_the_requests_are_an_error() -> None:
    turns, baseline, drafted = make_results({"num_drafts": 3.0, "num_accepted_tokens": 1.0})
    with pytest.raises(IncompleteError, match="found 3 steps"):
        compare(turns, baseline, drafted, num_draft_tokens=3)


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
