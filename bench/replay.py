"""Measure a served draft on held-out conversations: acceptance, equality of greedy output, speed by draft tokens (K).

Reads:  held-out conversations (`synth generate`), an exported draft.
Writes: OUTPUT/baseline.json and OUTPUT/draft-k<K>.json (answers, counters, seconds by concurrency; finished files are
        kept), OUTPUT/acceptance.json (the figures; those of acceptance at the largest K), OUTPUT/acceptance.md (the
        recommended K).
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from bench.acceptance_report import make_set_rows
from bench.differences import compare_replies, find_overruns
from bench.draft_tokens import check_draft_tokens, with_draft_tokens
from bench.overlap import explain_overlap, find_overlap, of_walks, read_set
from bench.requests import (
    Served,
    Turn,
    answers_from_json,
    answers_to_json,
    kept_steps,
    read_counters,
    read_turns,
    refuse_min_p,
    score,
    send_all,
)
from bench.speeds import find_speeds
from bench.track import figures_of_speeds, log_results
from common.errors import IncompleteError, UserError
from common.files import hash_file, read_json, write_atomic, write_json
from common.trackers import installed_trackers
from contracts.acceptance import Acceptance
from contracts.conversation import CONVERSATIONS_FILE, check_written_by, read_conversations
from contracts.run import Run
from contracts.speeds import Speeds, explain_speeds, warn_of_noise, warn_of_slow_draft
from recipe.recipe import Recipe
from serve.command import MODEL_NAME, Serving, build_command, draft_inputs, speculation_of
from serve.flags import speculative_overrides
from serve.ranks import watch_ranks
from serve.server import find_port, run_server
from serve.settings import measured_settings
from target.target import Target

NUM_WARMUP = 2


@dataclass(frozen=True)
class Replay:
    """The turns to send, the target, and the run that counts the time."""

    recipe: Recipe
    target: Target
    turns: Sequence[Turn]
    run: Run


def measure(
    recipe: Recipe,
    conversations: Path,
    draft: Path,
    output: Path,
    draft_tokens: Sequence[int] | None = None,
    training: Sequence[Path] = (),
) -> dict[str, Any]:
    """Serve without and with the draft, send every held-out turn, compare, and return the report.

    `draft_tokens` defaults to the draft's own number and 1, between which the speed of others is predicted. `training`:
    what the draft was trained on, to find the held-out conversations that overlap with it.

    Raises UserError for conversations or a draft of another target, IncompleteError if vLLM's counters differ from the
    sum over the requests.
    """
    installed_trackers(recipe.tracking.bench)
    target = Target.here(recipe.target)
    state = check_written_by(conversations, target)
    own = int(speculation_of(recipe, target, draft)["num_speculative_tokens"])
    numbers = check_draft_tokens(draft_tokens or [1, served_draft_tokens(recipe, own)], own, draft)
    turns = read_turns(read_conversations(conversations), dataset=conversations.resolve().name)
    refuse_min_p(conversations, turns)
    if not turns:
        raise UserError(conversations, found="no finished conversation", expected="some", fix="Raise synth.max_tokens.")
    run = _open_run(recipe, target, conversations, draft, output)
    questions = read_set(conversations / CONVERSATIONS_FILE) if training else []
    overlap = find_overlap(questions, training) if training else None
    if run.complete:
        report = dict(read_json(output / "acceptance.json", "a finished benchmark"))
        same_overlap = overlap is None or report.get("overlap", {}).get("training") == overlap.training
        if "by_set" in report and same_overlap and sorted(map(int, report["by_draft_tokens"])) == numbers:
            print(f"bench: {output} is finished, skipped")
            log_results(recipe, run, figures_of_speeds(report))
            return report
        run.reopen()  # this call measures other numbers of draft tokens, or the figures are of an earlier version
    replay = Replay(recipe, target, turns, run)
    baseline = serve_and_send(replay, None, output / "baseline.json")
    runs = {}
    for k in reversed(numbers):
        runs[k] = serve_and_send(
            replace(replay, recipe=with_draft_tokens(recipe, k)), draft, output / f"draft-k{k}.json", baseline=baseline
        )
    report = make_report(turns, baseline, runs, target.end_token_ids)
    report["held_out"] = {"conversations": state["summary"]["input"], "left_out": state["summary"]["truncated"]}
    if overlap:
        origins = {question.id: (question.dataset, question.index) for question in questions}
        report["overlap"] = overlap.report({max(runs): of_walks(report)}, origins)
    write_report(report, output)
    run.finish({"turns": len(turns), "acceptance_length": report["acceptance_length"]})
    log_results(recipe, run, figures_of_speeds(report))
    print(
        f"bench: acceptance length {report['acceptance_length']:.3f}, greedy identical "
        f"{report['greedy_identical']}/{report['greedy_total']}, in {run.seconds:.0f} s -> {output}"
    )
    return report


def _open_run(recipe: Recipe, target: Target, conversations: Path, draft: Path, output: Path) -> Run:
    return Run.open(
        output,
        "bench acceptance",
        settings={
            "bench": recipe.bench.settings(),
            "serve": measured_settings(recipe),
            "max_tokens": recipe.synth.max_tokens,
        },
        inputs={
            "conversations": hash_file(conversations / CONVERSATIONS_FILE),
            "target": target.fingerprint,
            **draft_inputs(recipe, draft),
        },
        recipe_yaml=recipe.to_yaml(),
    )


def served_draft_tokens(recipe: Recipe, own: int) -> int:
    """Return the number of draft tokens that `serve` uses: the recipe's, or the draft's own."""
    return int(speculative_overrides(recipe.serve).get("num_speculative_tokens", own))


def make_report(
    turns: Sequence[Turn],
    baseline: dict[str, Any],
    runs: Mapping[int, dict[str, Any]],
    end_token_ids: Collection[int] = (),
) -> dict[str, Any]:
    """Compute the figures of all `runs`, by number of draft tokens; those at the top level are of the largest.

    Greedy replies count for all numbers of draft tokens. Raises: see `compare`.
    """
    reports = {k: compare(turns, baseline, run, k, end_token_ids) for k, run in sorted(runs.items())}
    speeds = find_speeds({0: baseline, **runs})
    return {
        **reports[max(runs)],
        **{name: sum(report[name] for report in reports.values()) for name in ("greedy_identical", "greedy_total")},
        "differing": [{**found, "draft_tokens": k} for k, report in reports.items() for found in report["differing"]],
        "by_set": [row for report in reports.values() for row in report["by_set"]],
        "by_draft_tokens": {
            str(k): {name: report[name] for name in ("acceptance_length", "per_position", "steps", "tokens_per_s")}
            for k, report in reports.items()
        },
        "speeds": [at.model_dump(mode="json") for at in speeds],
        "warnings": [*warn_of_slow_draft(speeds), *warn_of_noise(speeds)],
    }


def write_report(report: dict[str, Any], output: Path) -> None:
    """Write acceptance.json and acceptance.md, and print the latter."""
    speeds = [Speeds.model_validate(at) for at in report["speeds"]]
    text = f"Tokens/s by number of draft tokens (K), held-out conversations:\n\n{explain_speeds(speeds)}\n"
    if "overlap" in report:
        text += "\n" + "\n".join(explain_overlap(report["overlap"])) + "\n"
    write_json(output / "acceptance.json", report)
    write_atomic(output / "acceptance.md", text)
    print(f"\n{text}")


def serve_and_send(
    replay: Replay,
    draft: Path | None,
    path: Path,
    *,
    concurrency: Sequence[int] | None = None,
    baseline: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Serve with or without `draft`, send the turns and write `path` unless it exists; return its content.

    `concurrency` defaults to the recipe's. Greedy answers are compared with those of `baseline`, the result without a
    draft, while the server runs, since differences need its log-probabilities.
    """
    if path.exists():
        print(f"bench: {path} is there already")
        return dict(read_json(path, "a server's answers"))
    recipe = replay.recipe
    serving = Serving(
        draft=draft,
        purpose="bench",
        extra_args={
            "enable-prefix-caching": False,  # repeated prompts must cost as much as the first time
            **({"per-request-spec-decode-metrics": "detailed"} if draft else {}),
        },
    )
    port = find_port(recipe.serve.host, recipe.serve.port)
    command = build_command(recipe, replay.target, port=port, serving=serving)
    points: dict[str, Any] = {}
    log_path, timeout_s = path.with_suffix(".log"), recipe.serve.startup_timeout_s
    with (
        watch_ranks(command) as ranks,
        run_server(ranks.command, log_path=log_path, startup_timeout_s=timeout_s) as server,
    ):
        served = Served(server.url, MODEL_NAME)
        with ranks.compared():
            asyncio.run(send_all(served, replay.turns[:NUM_WARMUP], concurrency=1, max_tokens=16, title="warm-up"))
        for number in concurrency or recipe.bench.concurrency:
            without = baseline["points"][str(number)]["answers"] if baseline is not None else None
            points[str(number)] = _measure_point(replay, served, number, path.stem, without)
            replay.run.tick()
    result = {"startup_s": round(server.startup_s, 1), "points": points}
    write_json(path, result)
    return result


def _measure_point(
    replay: Replay, server: Served, concurrency: int, name: str, without: Sequence[dict[str, Any]] | None
) -> dict[str, Any]:
    """Send the turns at one concurrency. `without`: the answers without a draft to compare with, if any."""
    num_turns = replay.recipe.bench.num_prompts.get(concurrency, len(replay.turns))
    turns = replay.turns[:num_turns]
    before = read_counters(server.url)
    answers, seconds = asyncio.run(
        send_all(
            server,
            turns,
            concurrency=concurrency,
            max_tokens=replay.recipe.synth.max_tokens,
            title=f"{name} at {concurrency}",
        )
    )
    after = read_counters(server.url)
    point = {
        "seconds": round(seconds, 3),
        "tokens": sum(len(answer.token_ids) for answer in answers),
        "counters": {key: after[key] - before.get(key, 0.0) for key in after},
        "answers": answers_to_json(answers),
    }
    if without is not None:
        expected = {answer.id: answer.token_ids for answer in answers_from_json(without)}
        identical, differing = compare_replies(turns, expected, answers, partial(score, server))
        point |= {"greedy_identical": identical, "differing": differing}
    return point


def compare(
    turns: Sequence[Turn],
    baseline: dict[str, Any],
    drafted: dict[str, Any],
    num_draft_tokens: int,
    end_token_ids: Collection[int] = (),
) -> dict[str, Any]:
    """Compute the figures from two servers' answers to the same turns.

    Acceptance is measured at the concurrency with the most turns. Raises IncompleteError if vLLM's counters are not the
    sum over the requests.
    """
    widest = max(drafted["points"], key=lambda key: len(drafted["points"][key]["answers"]))
    answers = {answer.id: answer for answer in answers_from_json(drafted["points"][widest]["answers"])}
    measured = [turn for turn in turns if turn.id in answers]
    counters = drafted["points"][widest]["counters"]
    raw = {key: _check_counters(point, num_draft_tokens) for key, point in drafted["points"].items()}[widest]
    by_mode: dict[str, list[Acceptance]] = defaultdict(list)
    by_category: dict[str, list[Acceptance]] = defaultdict(list)
    for turn in measured:
        part = Acceptance.from_steps(kept_steps(answers[turn.id]), num_draft_tokens)
        by_mode[turn.thinking_mode].append(part)
        by_category[turn.category].append(part)
    total = Acceptance.pool(part for parts in by_mode.values() for part in parts)
    identical = sum(point["greedy_identical"] for point in drafted["points"].values())
    differing = [
        {**found, "concurrency": int(concurrency)}
        for concurrency, point in drafted["points"].items()
        for found in point["differing"]
    ]
    return {
        **total.summary(),
        "by_mode": {mode: Acceptance.pool(parts).summary() for mode, parts in sorted(by_mode.items())},
        "by_category": {name: Acceptance.pool(parts).summary() for name, parts in sorted(by_category.items())},
        "by_set": make_set_rows(measured, answers, (), num_draft_tokens),
        "turns": len(measured),
        "num_draft_tokens": num_draft_tokens,
        "counters": {"acceptance_length": round(raw.acceptance_length, 4), **counters},
        "tokens_per_s": _speeds(drafted),
        "baseline_tokens_per_s": _speeds(baseline),
        "greedy_identical": identical,
        "greedy_total": identical + len(differing),
        "differing": differing,
        "overruns": find_overruns(list(answers.values()), end_token_ids),
        "walks": [{"turn": turn.id, "accepted": kept_steps(answers[turn.id])} for turn in measured],
    }


def _check_counters(point: dict[str, Any], num_draft_tokens: int) -> Acceptance:
    """Return a point's acceptance. Raises IncompleteError if vLLM's counters are not the sum over the requests."""
    answers = answers_from_json(point["answers"])
    raw = Acceptance.from_steps((a for answer in answers for a in answer.accepted), num_draft_tokens)
    counters = point["counters"]
    if (raw.steps, raw.accepted) != (counters["num_drafts"], counters["num_accepted_tokens"]):
        raise IncompleteError(
            f"vLLM's metrics: found {counters['num_drafts']:.0f} steps and {counters['num_accepted_tokens']:.0f} "
            f"accepted tokens, expected {raw.steps} and {raw.accepted}, the sums over the requests. "
            f"Something else used the server: delete draft-k{num_draft_tokens}.json and run again."
        )
    return raw


def _speeds(result: dict[str, Any]) -> dict[str, float]:
    return {key: round(point["tokens"] / point["seconds"], 1) for key, point in result["points"].items()}
