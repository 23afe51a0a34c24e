"""Claims about choosing K: exact speeds from counts, no draft if none is faster, and a slow draft is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench.replay import make_report, write_report
from bench.report import make_table
from bench.requests import Answer, Turn, answers_to_json
from bench.speeds import find_speeds, recommend
from bench.track import figures_of_speeds
from contracts.speeds import Speed, Speeds, explain_speeds, make_speed_table, warn_of_noise, warn_of_slow_draft

TOKENS = 11  # of each reply: one of the prefill and ten of steps


def make_point(accepted: list[int], seconds: float, latencies: tuple[float, ...] = (1.0, 1.0)) -> dict[str, Any]:
    """A load of equal replies, each with these accepted tokens by step."""
    answers = [
        Answer(f"{name}-0-1", list(range(TOKENS)), "stop", accepted, latency)
        for name, latency in zip("abcdefgh", latencies, strict=False)
    ]
    counters = {"num_drafts": len(answers) * len(accepted), "num_accepted_tokens": len(answers) * sum(accepted)}
    return {
        "seconds": seconds, "tokens": TOKENS * len(answers), "counters": counters, "answers": answers_to_json(answers),
        "greedy_identical": len(answers), "differing": [],
    }  # fmt: skip


def make_run(accepted: list[int], **seconds: float) -> dict[str, Any]:
    """A server's file: a point for each concurrency, `c8=2.0` for 2 seconds at 8."""
    return {"points": {name[1:]: make_point(accepted, value) for name, value in seconds.items()}}


BASE = make_run([], c1=2.2)  # 22 tokens: 10 tokens/s, 100 ms a step
ONE = make_run([1, 1, 1, 1, 0, 0], c1=1.386)  # length 1 + 4/6; 22 / 1.386 tokens/s: 105 ms a step
THREE = make_run([3, 2, 1, 0], c1=1.1)  # positions .75 .5 .25, length 2.5; 20 tokens/s: 125 ms a step


def test_measured_speeds_are_tokens_by_seconds_and_a_k_between_is_predicted_from_both_sides() -> None:
    (at,) = find_speeds({0: BASE, 1: ONE, 3: THREE})
    assert [(speed.draft_tokens, speed.measured) for speed in at.speeds] == [
        (0, True), (1, True), (2, False), (3, True)
    ]  # fmt: skip
    assert [speed.step_ms for speed in at.speeds] == [100, 105, 115, 125]
    # K = 2 accepts .75 + .5 by the rates at K = 3. At K = 1 these give .75, measured .6667: 8/9 of it. Halfway: 17/18.
    assert at.at(2).acceptance_length == round(1 + 1.25 * 17 / 18, 4)
    assert at.at(2).tokens_per_s == round((1 + 1.25 * 17 / 18) / 0.115, 2) == 18.96
    assert [speed.tokens_per_s for speed in at.speeds] == [10.0, round(22 / 1.386, 2), 18.96, 20.0]
    assert at.recommended == 3
    assert (at.best.speed_up, at.best.interval) == (2.0, (2.0, 2.0))
    assert "| 1 | 10.0 | 15.9 | ~19.0 | 20.0 | K = 3 | 2.00x [2.00, 2.00] |" in make_speed_table([at])
    assert "| 1 | 100.0 / 1.00 | 105.0 / 1.67 | 115.0 / 2.18 | 125.0 / 2.50 |" in explain_speeds([at])


def test_step_time_at_a_concurrency_is_that_of_the_whole_batch() -> None:
    (at,) = find_speeds({0: make_run([], c8=2.2), 3: make_run([3, 2, 1, 0], c8=1.1)})
    assert [speed.step_ms for speed in at.speeds] == [800, 1000]


def test_nothing_is_predicted_below_the_smallest_k_that_was_measured() -> None:
    (at,) = find_speeds({0: BASE, 3: THREE})
    assert [speed.draft_tokens for speed in at.speeds] == [0, 3]
    assert "Smaller K are not predicted" in explain_speeds([at])
    assert "~" not in explain_speeds([at])


def test_a_draft_that_accepts_nothing_is_predicted_and_never_recommended() -> None:
    runs = {0: BASE, 1: make_run([0] * 10, c1=2.75), 3: make_run([0] * 10, c1=3.3)}
    (at,) = find_speeds(runs)
    assert [speed.acceptance_length for speed in at.speeds] == [1, 1, 1, 1]
    assert [speed.step_ms for speed in at.speeds] == [100, 125, 137.5, 150]
    assert at.recommended == 0
    assert at.best.speed_up == 1


def test_one_conversation_has_no_interval() -> None:
    runs = {k: {"points": {"1": make_point(steps, 1.0, (1.0,))}} for k, steps in ((0, []), (3, [3, 2, 1, 0]))}
    (at,) = find_speeds(runs)
    assert [speed.interval for speed in at.speeds] == [None, None]
    assert "[" not in make_speed_table([at]).splitlines()[2]


@pytest.mark.parametrize(
    ("speeds", "drawn", "expected"),
    [
        ([10, 19, 20], [[10, 19, 20], [10, 20, 19]], 1),  # 1 and 3 differ by less than the noise
        ([10, 19, 20], [[10, 19, 20], [10, 19, 21]], 3),
        ([10, 19.7, 20], [[10, 19.7, 20], [10, 19.7, 20]], 1),  # 1.5% is no gain
        ([10, 9, 10.4], [[10, 11, 10.4], [10, 9, 10.4]], 3),  # 1 is a tie with 3, but slower than no draft
        ([10, 9.9, 10.1], [[10, 9.9, 10.1], [10.2, 9.9, 10.1]], 0),  # no measurable gain
        ([10, 9, 8], [[10, 11, 12], [10, 9, 8]], 0),
    ],
)
def test_the_smallest_k_within_the_noise_of_the_best_is_recommended_if_it_beats_no_draft(
    speeds: list[float], drawn: list[list[float]], expected: int
) -> None:
    assert recommend([0, 1, 3], np.array(speeds, float), np.array(drawn, float)) == expected


def test_noise_of_the_replies_makes_the_interval() -> None:
    """Two conversations: twice as fast with the draft, and as fast. Every draw lies between."""
    runs = {
        0: {"points": {"1": make_point([], 2.0, (1.0, 1.0))}},
        3: {"points": {"1": make_point([3, 2, 1, 0], 1.5, (0.5, 1.0))}},
    }
    (at,) = find_speeds(runs)
    assert at.largest.speed_up == round(2 / 1.5, 4)
    assert at.largest.interval == (1.0, 2.0)
    assert at.recommended == 0


def test_a_step_that_takes_less_time_with_more_draft_tokens_is_called_unsound() -> None:
    busy = make_run([1, 1, 1, 1, 0, 0], c1=1.98)  # 150 ms a step, against 125 with K = 3
    (warning,) = warn_of_noise(find_speeds({0: BASE, 1: busy, 3: THREE}))
    assert "at concurrency 1 is not sound: a step took 150.0 ms with K = 1, and 125.0 ms with K = 3" in warning
    assert warning in explain_speeds(find_speeds({0: BASE, 1: busy, 3: THREE}))
    turns = [Turn(f"{name}-0-1", "on", "x", [0], list(range(TOKENS))) for name in "ab"]
    assert warning in make_report(turns, BASE, {1: busy, 3: THREE})["warnings"]
    assert warn_of_noise(find_speeds({0: BASE, 1: ONE, 3: THREE})) == []
    assert warn_of_noise(find_speeds({0: BASE, 1: make_run([1, 1, 1, 1, 0, 0], c1=1.8), 3: THREE})) == []  # 136 ms


def make_speeds(concurrency: int, recommended: int, *speeds: float, interval: tuple[float, float] | None) -> Speeds:
    """Speeds without a draft, at K = 2 (predicted) and at K = 7, with the interval of all gains."""
    return Speeds(
        concurrency=concurrency,
        conversations=9,
        recommended=recommended,
        speeds=[
            Speed(
                draft_tokens=k, measured=k != 2, tokens_per_s=speed, acceptance_length=1.2, step_ms=10.0,
                speed_up=speed / speeds[0], interval=interval,
            )
            for k, speed in zip((0, 2, 7), speeds, strict=True)
        ],
    )  # fmt: skip


def test_a_slow_draft_is_named_with_what_to_serve_instead() -> None:
    slow = make_speeds(8, 2, 121.0, 130.0, 50.0, interval=(0.4, 0.45))
    unclear = make_speeds(4, 0, 60.0, 55.0, 61.0, interval=(0.9, 1.1))
    fast = make_speeds(1, 7, 20.0, 30.0, 40.0, interval=(1.9, 2.1))
    assert warn_of_slow_draft([fast, unclear, slow]) == [
        "With K = 7 this draft is not measurably faster than none at concurrency 4: 61.0 against 60.0 tokens/s "
        "(speed-up 0.90 to 1.10). Serve the target without a draft.",
        "With K = 7 this draft slows the target down at concurrency 8: 50.0 against 121.0 tokens/s "
        "(speed-up 0.40 to 0.45). Serve it with K = 2, or without a draft.",
    ]
    assert warn_of_slow_draft([make_speeds(1, 0, 2.0, 2.0, 1.0, interval=None)]) == [
        "With K = 7 this draft slows the target down at concurrency 1: 1.0 against 2.0 tokens/s. "
        "Serve the target without a draft."
    ]


def test_the_report_the_summary_and_the_page_name_a_slow_draft(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    turns = [Turn(f"{name}-0-1", "on", "x", [0], list(range(TOKENS))) for name in "ab"]
    slow = {1: make_run([0] * 10, c1=2.42, c8=4.4), 3: make_run([3, 2, 1, 0], c1=1.1, c8=4.4)}
    report = make_report(turns, make_run([], c1=2.2, c8=2.2), slow)
    (warning,) = report["warnings"]
    assert warning == (
        "With K = 3 this draft slows the target down at concurrency 8: 5.0 against 10.0 tokens/s "
        "(speed-up 0.50 to 0.50). Serve the target without a draft."
    )
    assert (report["acceptance_length"], report["num_draft_tokens"]) == (2.5, 3)
    assert report["by_draft_tokens"]["1"]["acceptance_length"] == 1.0
    assert (report["greedy_identical"], report["greedy_total"]) == (8, 8)
    tracked = figures_of_speeds(report)
    assert (tracked["k3/all/acceptance_length"], tracked["concurrency8/k3/tokens_per_s"]) == (2.5, 5.0)
    assert "concurrency8/k2/tokens_per_s" not in tracked  # predicted, not measured
    write_report(report, tmp_path)
    written = json.loads((tmp_path / "acceptance.json").read_text())
    assert written["warnings"] == [warning]
    assert [at["recommended"] for at in written["speeds"]] == [3, 0]
    assert warning in (tmp_path / "acceptance.md").read_text()
    assert warning in capsys.readouterr().out
    evaluated = {"acceptance_length": 2.5, "per_position": [0.75, 0.5, 0.25], "by_mode": {}}
    summary = {"eval": evaluated, "served": written, "agreement": {"identical_walks": 2, "walks": 2}, "seconds": {}}
    assert warning in make_table(summary)
