"""Measure a served draft on held-out prompts: acceptance, speed with and without it, equal greedy output.

Reads:  held-out conversations (`synth generate`), an exported draft.
Writes: OUTPUT/baseline.json and OUTPUT/draft.json (every answer, counters, seconds by concurrency; a finished one is
        kept), OUTPUT/acceptance.json (the figures).
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Collection, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from bench.lossless import compare_replies, find_overruns
from bench.requests import Answer, Turn, answers_from_json, answers_to_json, read_counters, read_turns, score, send_all
from contracts.acceptance import Acceptance
from contracts.conversation import CONVERSATIONS_FILE, check_written_by, read_conversations
from contracts.errors import IncompleteError, UserError
from contracts.files import hash_file, read_json, write_json
from contracts.recipe import Recipe
from contracts.run import Run
from contracts.target import Target
from serve.command import MODEL_NAME, build_command, fingerprint_draft, speculation_of
from serve.server import find_port, run_server

NUM_WARMUP = 2


def measure(recipe: Recipe, conversations: Path, draft: Path, output: Path) -> dict[str, Any]:
    """Serve without and with the draft, send every held-out turn, and compare; the report.

    Raises UserError for conversations or a draft of another target, IncompleteError when counts do not agree.
    """
    target = Target.read(recipe.target.path)
    state = check_written_by(conversations, target)
    num_draft_tokens = int(speculation_of(recipe, target, draft)["num_speculative_tokens"])
    turns = read_turns(read_conversations(conversations))
    if not turns:
        raise UserError(conversations, found="no finished conversation", expected="some", fix="Raise synth.max_tokens.")
    run = Run.open(
        output,
        "bench acceptance",
        settings={
            "bench": recipe.bench.settings(),
            "serve": recipe.serve.settings(),
            "max_tokens": recipe.synth.max_tokens,
        },
        inputs={
            "conversations": hash_file(conversations / CONVERSATIONS_FILE),
            "target": target.fingerprint,
            "draft": fingerprint_draft(recipe, draft),
        },
        recipe_yaml=recipe.to_yaml(),
    )
    if run.complete:
        print(f"bench: {output} is finished, skipped")
        return dict(read_json(output / "acceptance.json", "a finished benchmark"))
    baseline = serve_and_send(recipe, target, None, turns, output / "baseline.json", run)
    drafted = serve_and_send(recipe, target, draft, turns, output / "draft.json", run, baseline=baseline)
    report = compare(turns, baseline, drafted, num_draft_tokens, target.end_token_ids)
    report["held_out"] = {"conversations": state["summary"]["input"], "left_out": state["summary"]["truncated"]}
    write_json(output / "acceptance.json", report)
    run.finish({"turns": len(turns), "acceptance_length": report["acceptance_length"]})
    print(
        f"bench: acceptance length {report['acceptance_length']:.3f}, greedy identical "
        f"{report['greedy_identical']}/{report['greedy_total']}, in {run.seconds:.0f} s -> {output}"
    )
    return report


def serve_and_send(
    recipe: Recipe,
    target: Target,
    draft: Path | None,
    turns: Sequence[Turn],
    path: Path,
    run: Run,
    concurrency: Sequence[int] | None = None,
    baseline: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """One server's answers at every concurrency (default: the recipe's), from `path` if it is there already.

    Greedy ones are compared with those of `baseline`, another server's result, while the server can be asked why.
    """
    name = path.stem
    if path.exists():
        print(f"bench: {path} is there already")
        return dict(read_json(path, "a server's answers"))
    command = build_command(
        recipe,
        target,
        port=find_port(recipe.serve.host, recipe.serve.port),
        draft=draft,
        purpose="bench",
        extra_args={
            "enable-prefix-caching": False,  # a second pass over the same prompts must cost what the first did
            **({"per-request-spec-decode-metrics": "detailed"} if draft else {}),
        },
    )
    log_path = path.with_suffix(".log")
    points: dict[str, Any] = {}
    timeout_s = recipe.serve.startup_timeout_s
    with run_server(command, log_path=log_path, startup_timeout_s=timeout_s) as server:
        url, max_tokens = f"{server.url}/v1", recipe.synth.max_tokens
        asyncio.run(send_all(url, MODEL_NAME, turns[:NUM_WARMUP], concurrency=1, max_tokens=16, title="warm-up"))
        for at_once in concurrency or recipe.bench.concurrency:
            chosen = turns[: recipe.bench.num_prompts.get(at_once, len(turns))]
            before = read_counters(server.url)
            answers, seconds = asyncio.run(
                send_all(
                    url,
                    MODEL_NAME,
                    chosen,
                    concurrency=at_once,
                    max_tokens=max_tokens,
                    title=f"{name} at {at_once}",
                )
            )
            after = read_counters(server.url)
            points[str(at_once)] = {
                "seconds": round(seconds, 3),
                "tokens": sum(len(answer.token_ids) for answer in answers),
                "counters": {key: after[key] - before.get(key, 0.0) for key in after},
                "answers": answers_to_json(answers),
            }
            if baseline is not None:
                without = {a.id: a.token_ids for a in answers_from_json(baseline["points"][str(at_once)]["answers"])}
                identical, differing = compare_replies(chosen, without, answers, partial(score, url, MODEL_NAME))
                points[str(at_once)] |= {"greedy_identical": identical, "differing": differing}
            run.tick()
    result = {"startup_s": round(server.startup_s, 1), "points": points}
    write_json(path, result)
    return result


def compare(
    turns: Sequence[Turn],
    baseline: dict[str, Any],
    drafted: dict[str, Any],
    num_draft_tokens: int,
    end_token_ids: Collection[int] = (),
) -> dict[str, Any]:
    """The figures of two servers' answers to the same turns.

    Acceptance is that of the largest set of turns. Raises IncompleteError when vLLM's counters and the sum of the
    per-request counts differ.
    """
    widest = max(drafted["points"], key=lambda key: len(drafted["points"][key]["answers"]))
    answers = {answer.id: answer for answer in answers_from_json(drafted["points"][widest]["answers"])}
    measured = [turn for turn in turns if turn.id in answers]
    counters = drafted["points"][widest]["counters"]
    raw = Acceptance.from_steps((a for answer in answers.values() for a in answer.accepted), num_draft_tokens)
    if (raw.steps, raw.accepted) != (counters["num_drafts"], counters["num_accepted_tokens"]):
        raise IncompleteError(
            f"vLLM's metrics: found {counters['num_drafts']:.0f} steps and {counters['num_accepted_tokens']:.0f} "
            f"accepted tokens, expected {raw.steps} and {raw.accepted} as the requests sum up. "
            "Something else used the server: delete draft.json and run again."
        )
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


def kept_steps(answer: Answer) -> list[int]:
    """Accepted tokens of each step, the last step cut where the reply ends.

    vLLM's counters count all that the last step verified; tokens beyond the stop token or max_tokens reach nobody.
    """
    left = len(answer.token_ids) - 1  # the prefill gave the first token
    kept = []
    for accepted in answer.accepted:
        if left <= 0:
            break
        kept.append(min(accepted, left))
        left -= accepted + 1
    return kept


def _speeds(result: dict[str, Any]) -> dict[str, float]:
    return {key: round(point["tokens"] / point["seconds"], 1) for key, point in result["points"].items()}
