"""Measure a draft's acceptance on prompt sets: by category, thinking mode, temperature and number of draft tokens.

Reads:  prompt sets (contracts/evaluation_sets.py), an exported draft, and what it was trained on.
Writes: OUTPUT/prompts (the rows), OUTPUT/conversations/<set>-<mode> (`synth generate`: the replies without a draft),
        OUTPUT/k<K>/<group>.json (all replies with the draft, and vLLM's counters for the group),
        OUTPUT/acceptance.json (the figures), acceptance.md (the tables), golden_al.yaml, acceptance_by_k.png.

The target first generates all conversations without a draft. Then each reply is generated again with the draft, from
the recorded context as token ids. So every number of draft tokens has the same prompts, and greedy replies can be
compared with those without a draft. With --endpoint nothing is compared, since that server always drafts. Finished work
is kept: conversations by row, the rest by group (a set, a mode and a temperature).
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from bench.acceptance_report import summarize, write_report
from bench.datasets import write_prompts
from bench.differences import compare_replies
from bench.draft_tokens import check_draft_tokens, with_draft_tokens
from bench.overlap import by_conversation, find_overlap, read_set
from bench.replay import NUM_WARMUP
from bench.requests import (
    Answer,
    Served,
    Turn,
    answers_to_json,
    ask_model,
    read_counters,
    read_turns,
    refuse_min_p,
    score,
    send_all,
)
from bench.track import figures_of_prompts, log_results
from common.errors import IncompleteError, UserError
from common.files import hash_file, hash_json, read_json, write_json
from common.stages import run_stage
from common.trackers import installed_trackers
from contracts.acceptance import Acceptance
from contracts.conversation import read_conversations
from contracts.run import Run
from recipe.recipe import Recipe
from serve.command import MODEL_NAME, Serving, build_command, draft_inputs, speculation_of
from serve.ranks import Ranks, watch_ranks
from serve.server import find_port, run_server
from serve.settings import measured_settings
from target.target import Target

OVERRIDDEN = ("thinking_modes", "temperature", "num_samples", "supervise_end")
"""Keys of `synth` that `write_conversations` overrides."""


@dataclass(frozen=True)
class Matrix:
    """The measurements: prompt sets by name or file, modes, temperatures, draft tokens (None: the draft's)."""

    prompts: list[str]
    modes: list[str]
    temperatures: list[float]
    draft_tokens: list[int] | None = None
    limit: int | None = None
    endpoint: str | None = None
    """URL of a running server with the draft, used for all requests. None: servers are started."""
    training: list[Path] = field(default_factory=list)
    """What the draft was trained on, to find the questions that overlap with it."""


@dataclass
class Group:
    """The turns of one set, mode and temperature."""

    name: str
    turns: list[Turn]


def measure(recipe: Recipe, recipe_args: Sequence[str], draft: Path, matrix: Matrix, output: Path) -> dict[str, Any]:
    """Measure the matrix and return the report. `recipe_args`: the flags that `recipe` was loaded from.

    Raises UserError for wrong prompts or a draft of another target, IncompleteError if a stage fails or vLLM's counters
    differ from the sum over the requests.
    """
    installed_trackers(recipe.tracking.bench)
    target = Target.here(recipe.target)
    draft_tokens = _choose_draft_tokens(recipe, target, draft, matrix)
    sets = [write_prompts(text, output / "prompts", matrix.limit) for text in matrix.prompts]
    if len({path.stem for path in sets}) < len(sets):
        raise UserError("--prompts", found="a name twice", expected="one for each set", fix="Give NAME=FILE.")
    run = _open_run(recipe, target, draft, matrix, sets, output)
    write_conversations(recipe, recipe_args, target, sets, matrix, output)
    groups = read_groups(sets, matrix, output)
    if run.complete:
        run.reopen()  # this call may measure other numbers of draft tokens
    results = {}
    for k in draft_tokens:
        folder = output / f"k{k}"
        todo = [group for group in groups if not (folder / f"{group.name}.json").exists()]
        if todo:
            with _serve(recipe, target, draft, k, matrix.endpoint, folder / "server.log") as (server, ranks):
                with ranks.compared() if ranks else nullcontext():
                    asyncio.run(_send(server, todo[0].turns[:NUM_WARMUP], recipe, 1, "warm-up"))
                for group in todo:
                    found = serve_group(recipe, server, group, k, compare=not matrix.endpoint)
                    write_json(folder / f"{group.name}.json", found)
                    run.tick()
        results[k] = [dict(read_json(folder / f"{group.name}.json", "a group's replies")) for group in groups]
    turns = [turn for group in groups for turn in group.turns]
    report = {
        "draft": str(draft),
        "target": str(recipe.target.path),
        **summarize(turns, results, target.end_token_ids, recipe.synth.min_loop_tokens),
    }
    if matrix.training:
        overlap = find_overlap([question for path in sets for question in read_set(path)], matrix.training)
        of_conversation = _origins(sets, matrix, output)
        report["overlap"] = overlap.report(
            {k: by_conversation(turns, groups, recipe.synth.min_loop_tokens) for k, groups in results.items()},
            of_conversation,
        )
    write_report(report, output)
    run.finish({"acceptance_length": report["pooled"][str(draft_tokens[-1])]["acceptance_length"]})
    log_results(recipe, run, figures_of_prompts(report))
    print(f"bench: {len(turns)} replies at K = {draft_tokens} in {run.seconds:.0f} s -> {output}")
    return report


def _choose_draft_tokens(recipe: Recipe, target: Target, draft: Path, matrix: Matrix) -> list[int]:
    """Return the numbers of draft tokens, ascending. Raises UserError for a number that cannot be served."""
    own = int(speculation_of(recipe, target, draft)["num_speculative_tokens"])
    chosen = check_draft_tokens(matrix.draft_tokens or [own], own, draft)
    if matrix.endpoint and matrix.draft_tokens and len(chosen) > 1:
        raise UserError(
            "--draft-tokens",
            found=str(chosen),
            expected=f"the one number that {matrix.endpoint} drafts",
            fix="Omit --endpoint: then a server is started for each.",
        )
    return chosen


def _open_run(recipe: Recipe, target: Target, draft: Path, matrix: Matrix, sets: Sequence[Path], output: Path) -> Run:
    return Run.open(
        output,
        "bench acceptance",
        settings={
            "serve": measured_settings(recipe),
            "synth": {key: value for key, value in recipe.synth.settings().items() if key not in OVERRIDDEN},
            "modes": matrix.modes,
            "temperatures": matrix.temperatures,
            "endpoint": bool(matrix.endpoint),
        },
        inputs={
            "prompts": hash_json([hash_file(path) for path in sets]),
            "target": target.fingerprint,
            **draft_inputs(recipe, draft),
        },
        recipe_yaml=recipe.to_yaml(),
    )


def write_conversations(
    recipe: Recipe, recipe_args: Sequence[str], target: Target, sets: Sequence[Path], matrix: Matrix, output: Path
) -> None:
    """Generate conversations for each set and mode, without a draft unless --endpoint has one."""
    todo = []
    for path in sets:
        for mode in matrix.modes:
            folder = output / "conversations" / f"{path.stem}-{mode or 'plain'}"
            state = folder / "run.json"
            if not (state.exists() and read_json(state, "a run")["complete"]):
                todo.append((path, mode, folder))
    if not todo:
        return
    with _serve(recipe, target, None, None, matrix.endpoint, output / "conversations.log") as (server, _):
        for path, mode, folder in todo:
            how = "by the running server" if matrix.endpoint else "without a draft"
            print(f"bench: {path.stem}, thinking {mode or 'unset'}, {how}", flush=True)
            words = [
                "generate", *recipe_args, "--prompts", str(path), "--output", str(folder), "--thinking-modes", mode,
                "--endpoint", f"{server.url}/v1", "--set", f"synth.temperature={matrix.temperatures}",
                "--set", "synth.supervise_end=true", "--set", "synth.num_samples=1",
            ]  # fmt: skip
            run_stage("synth", *words)


def read_groups(sets: Sequence[Path], matrix: Matrix, output: Path) -> list[Group]:
    """Read the recorded turns by set, mode and temperature. Raises UserError if there are none."""
    groups = []
    for path in sets:
        for mode in matrix.modes:
            folder = output / "conversations" / f"{path.stem}-{mode or 'plain'}"
            turns = read_turns(read_conversations(folder), include_cut=True, dataset=path.stem)
            for temperature in matrix.temperatures:
                members = [turn for turn in turns if turn.temperature == temperature]
                if members:
                    refuse_min_p(folder, members)
                    groups.append(Group(f"{path.stem}-{mode or 'plain'}-t{temperature:g}", members))
    if not groups:
        raise UserError(output, found="no reply in any set", expected="some", fix="Look at the conversations' rejects.")
    return groups


def _origins(sets: Sequence[Path], matrix: Matrix, output: Path) -> dict[str, tuple[str, int]]:
    """Return the set and the row of each conversation by its id."""
    folders = [
        (path.stem, output / "conversations" / f"{path.stem}-{mode or 'plain'}")
        for path in sets
        for mode in matrix.modes
    ]
    return {found.id: (name, found.index) for name, folder in folders for found in read_conversations(folder)}


def serve_group(
    recipe: Recipe, server: Served, group: Group, num_draft_tokens: int, *, compare: bool
) -> dict[str, Any]:
    """Send one group; return its answers, the change of vLLM's counters, and differing greedy replies.

    Greedy replies are compared only if `compare`. Raises UserError if the server drafts another number of tokens,
    IncompleteError if it returns counts per request and the counters are not their sum.
    """
    before = read_counters(server.url)
    at_once = max(recipe.bench.concurrency)
    title = f"K = {num_draft_tokens}, {group.name}"
    answers, seconds = asyncio.run(_send(server, group.turns, recipe, at_once, title))
    after = read_counters(server.url)
    counters = {key: after[key] - before.get(key, 0.0) for key in after}
    positions = sum(key.startswith("accepted_at_") for key in counters)  # vLLM has a counter for each draft token
    if positions != num_draft_tokens:
        raise UserError(
            server.url,
            found=f"a server that drafts {positions} tokens a step",
            expected=str(num_draft_tokens),
            fix="Name its number with --draft-tokens.",
        )
    counted = Acceptance.from_steps((a for answer in answers for a in answer.accepted), num_draft_tokens)
    per_request = counted.steps > 0 or not counters["num_drafts"]
    if per_request:
        check_counters(counted, counters, group.name)
    recorded = {turn.id: turn.reply for turn in group.turns}
    scorer = partial(score, server)
    identical, differing = compare_replies(group.turns, recorded, answers, scorer) if compare else (0, [])
    return {
        "dataset": group.turns[0].dataset,
        "thinking_mode": group.turns[0].thinking_mode,
        "temperature": group.turns[0].temperature,
        "per_request": per_request,
        "seconds": round(seconds, 3),
        "counters": counters,
        "compared": compare,
        "greedy_identical": identical,
        "differing": differing,
        "answers": answers_to_json(answers),
    }


def check_counters(counted: Acceptance, counters: dict[str, float], where: str) -> None:
    """Raise IncompleteError if a counter of vLLM, also by position, is not the sum over the requests."""
    found = {key: int(value) for key, value in counters.items() if value}
    at = [sum(counted.histogram[i + 1 :]) for i in range(len(counted.histogram) - 1)]
    expected = {
        "num_drafts": counted.steps,
        "num_accepted_tokens": counted.accepted,
        **{f"accepted_at_{i}": count for i, count in enumerate(at)},
    }
    for key, value in expected.items():
        if found.get(key, 0) != value:
            raise IncompleteError(
                f"{where}: found {found.get(key, 0)} as {key} in vLLM's metrics, expected {value}, the requests' sum. "
                "Something else used the server: run again."
            )


async def _send(
    server: Served, turns: Sequence[Turn], recipe: Recipe, concurrency: int, title: str
) -> tuple[list[Answer], float]:
    return await send_all(
        server,
        turns,
        concurrency=concurrency,
        max_tokens=recipe.synth.max_tokens,
        title=title,
        max_model_len=recipe.target.max_model_len,
    )


@contextmanager
def _serve(
    recipe: Recipe,
    target: Target,
    draft: Path | None,
    num_draft_tokens: int | None,
    endpoint: str | None,
    log_path: Path,
) -> Iterator[tuple[Served, Ranks | None]]:
    """Serve during the block, or use the server at `endpoint`, whose ranks cannot be compared."""
    if endpoint:
        yield Served(endpoint.rstrip("/").removesuffix("/v1"), ask_model(endpoint)), None
        return
    if num_draft_tokens is not None:
        recipe = with_draft_tokens(recipe, num_draft_tokens)
    serving = Serving(
        draft=draft,
        purpose="bench" if draft else "synth",
        extra_args={"per-request-spec-decode-metrics": "detailed"} if draft else {},
    )
    port = find_port(recipe.serve.host, recipe.serve.port)
    command = build_command(recipe, target, port=port, serving=serving)
    timeout_s = recipe.serve.startup_timeout_s
    with (
        watch_ranks(command) as ranks,
        run_server(ranks.command, log_path=log_path, startup_timeout_s=timeout_s) as server,
    ):
        yield Served(server.url, MODEL_NAME), ranks
