"""Make a schedule of draft tokens: K by batch size, as vLLM drafts with it, and check it under load.

Reads:  held-out conversations (`synth generate`), an exported draft; acceptance by position, if it is given.
Writes: OUTPUT/steps/k<K>.json (a server with a schedule of this K alone: answers, counters, seconds by concurrency),
        OUTPUT/check/<schedule's hash>/<repeat>-<server>.json (the same of the check), OUTPUT/schedule.json,
        schedule.md, report.html and schedule.png. Finished servers are kept.

Steps are measured on servers whose schedule has one K for all batch sizes, K = 0 among them: what a schedule costs
beside the draft tokens is part of it, such as other CUDA graphs, a draft that computes its whole block whatever K is,
or a draft that reads tokens without drafting.

With acceptance from elsewhere, and an engine that can, servers accept draft tokens at random with these rates
(`rejection_sample_method: synthetic`) and replies have their recorded length. Then the draft need not be trained.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from bench.draft_tokens import check_draft_tokens, with_draft_tokens
from bench.replay import Replay, serve_and_send, served_draft_tokens
from bench.requests import Turn, read_turns, refuse_min_p
from bench.schedule_check import (
    NO_DRAFT,
    SCHEDULE,
    Checked,
    check_speeds,
    drafted_per_step,
    fixed_name,
    ignored,
    refuse_slow,
    warn_of_wide,
)
from bench.schedule_choice import Steps, best_fixed, choose_schedule
from bench.schedule_report import write_report
from bench.speeds import find_speeds
from common.errors import UserError
from common.files import hash_file, hash_json
from contracts.acceptance import read_rates
from contracts.conversation import CONVERSATIONS_FILE, check_written_by, read_conversations
from contracts.run import Run
from contracts.schedule import SCHEDULE_KEY, Schedule, make_schedule, max_draft_tokens
from contracts.speeds import Speeds, warn_of_noise
from recipe.recipe import Recipe
from serve.command import Serving, build_command, draft_inputs, speculation_of
from serve.engine import is_cpu_engine
from serve.flags import layer_flags, speculative_overrides, with_speculation
from serve.settings import measured_settings
from target.target import Target

MAX_NUM_SEQS = 1024
"""vLLM's largest default of max-num-seqs (0.32); it cuts a longer range, and carries a shorter one on."""
FEW = 4
"""Conversations per request in flight, below which much of a load runs at smaller batch sizes."""


@dataclass(frozen=True)
class Asked:
    """What to measure. The recipe's bench.concurrency are the batch sizes; a schedule in it is left out.

    `draft_tokens`: None: 1 and the number that is served. `acceptance`: a file of `bench acceptance` or `train eval`;
    None: the draft's own, as it is served. `repeats`: of the check; 0: no check.
    """

    recipe: Recipe
    draft: Path
    conversations: Path
    output: Path
    draft_tokens: list[int] | None = None
    acceptance: Path | None = None
    repeats: int = 3

    @cached_property
    def target(self) -> Target:
        return Target.here(self.recipe.target)

    @cached_property
    def numbers(self) -> list[int]:
        """The K to measure first, ascending, without 0. Raises UserError for one that the draft cannot serve."""
        own = int(speculation_of(self.recipe, self.target, self.draft)["num_speculative_tokens"])
        chosen = self.draft_tokens or [1, served_draft_tokens(self.recipe, own)]
        return check_draft_tokens(chosen, own, self.draft)

    @cached_property
    def rates(self) -> list[float] | None:
        """Acceptance by position from elsewhere, for the largest K to measure."""
        return read_rates(self.acceptance, self.numbers[-1]) if self.acceptance else None

    @property
    def max_batch_size(self) -> int:
        """The batch size at which the schedule ends: the most requests that a server of the recipe runs at once."""
        limits = [layer_flags(self.recipe, purpose).get("max-num-seqs") for purpose in ("bench", "production")]
        return max((int(limit) for limit in limits if limit), default=MAX_NUM_SEQS)

    def with_schedule(self, schedule: Schedule, most: int) -> Recipe:
        """Return the recipe with a schedule of at most `most` draft tokens."""
        return with_speculation(self.recipe, **{"num_speculative_tokens": most, SCHEDULE_KEY: schedule})


def measure_schedule(asked: Asked) -> dict[str, Any]:
    """Measure, choose the schedule, check it, and return the content of schedule.json.

    Raises UserError for a draft or settings that vLLM has no schedules for; IncompleteError if vLLM does not follow
    a schedule, or if the check finds it slower than allowed.
    """
    asked = replace(asked, recipe=with_speculation(asked.recipe, **{SCHEDULE_KEY: None}))
    recipe, output = asked.recipe, asked.output
    check_written_by(asked.conversations, asked.target)
    turns = read_turns(read_conversations(asked.conversations), dataset=asked.conversations.resolve().name)
    refuse_min_p(asked.conversations, turns)
    refuse_setup(asked, len(turns))
    run = _open_run(asked)
    if run.complete:
        run.reopen()  # this call may measure other numbers of draft tokens, or check the schedule more often
    replay = Replay(recipe, asked.target, turns, run)
    choice = measure_and_choose(asked, replay)
    steps, schedule = choice.steps, choice.schedule
    is_checked = asked.repeats and max_draft_tokens(schedule)  # one that never drafts is not worth serving
    checked = check_under_load(asked, replay, schedule, best_fixed(steps)) if is_checked else []
    report = {
        "draft": str(asked.draft),
        "target": str(recipe.target.path),
        "num_speculative_tokens": max(1, max_draft_tokens(schedule)),
        SCHEDULE_KEY: schedule,
        "acceptance": {
            "source": str(asked.acceptance) if asked.acceptance else "served",
            "lengths": {str(k): round(length, 4) for k, length in sorted(steps.lengths.items())},
        },
        "measured": [0, *choice.measured],
        "step_ms": {str(size): {str(k): ms for k, ms in steps.ms[size].items()} for size in steps.batch_sizes},
        "check": [at.model_dump(mode="json") for at in checked],
        "warnings": [
            *(line.replace("with no draft", "with K = 0") for line in warn_of_noise(choice.speeds)),
            *warn_of_setup(asked, len(turns)),
            *warn_of_wide(checked),
        ],
    }
    write_report(report, steps, checked, output)
    run.finish({"schedule": schedule, "passed": not any(at.fixed.is_slower or at.none.is_slower for at in checked)})
    print(f"bench: in {run.seconds:.0f} s -> {output}")
    refuse_slow(checked, output)
    return report


def _open_run(asked: Asked) -> Run:
    recipe = asked.recipe
    return Run.open(
        asked.output,
        "bench schedule",
        settings={
            "bench": recipe.bench.settings(),
            "serve": measured_settings(recipe),
            "max_tokens": recipe.synth.max_tokens,
            "draft_tokens": asked.numbers[-1],  # servers of a smaller K have buffers, and may draft a block, for them
            "rates": asked.rates,
        },
        inputs={
            "conversations": hash_file(asked.conversations / CONVERSATIONS_FILE),
            "target": asked.target.fingerprint,
            **draft_inputs(recipe, asked.draft),
        },
        recipe_yaml=recipe.to_yaml(),
    )


def refuse_setup(asked: Asked, num_turns: int) -> None:
    """Raise UserError, before any server starts, for what cannot be measured or what vLLM has no schedule for."""
    recipe = asked.recipe
    trial = asked.with_schedule(make_schedule([0], asked.max_batch_size), asked.numbers[-1])
    build_command(trial, asked.target, port=1, serving=Serving(draft=asked.draft, purpose="bench"))
    if speculative_overrides(trial.serve).get("enable_adaptive_verification"):
        raise UserError(
            "speculative.enable_adaptive_verification",
            found="true",
            expected="false: it chooses how many draft tokens to verify by itself",
            fix="Remove it, or serve without a schedule.",
        )
    limit = layer_flags(recipe, "bench").get("max-num-seqs")
    for concurrency in recipe.bench.concurrency:
        if limit is not None and concurrency > int(limit):
            raise UserError(
                "bench.concurrency",
                found=str(concurrency),
                expected=f"at most max-num-seqs, {limit}",
                fix="Correct it.",
            )
        count = min(recipe.bench.num_prompts.get(concurrency, num_turns), num_turns)
        if count < concurrency:
            raise UserError(
                asked.conversations,
                found=f"{count} replies for {concurrency} requests in flight",
                expected=f"at least as many, better {FEW} times",
                fix="Generate more held-out conversations, correct bench.num_prompts, or leave this concurrency out.",
            )


@dataclass(frozen=True)
class Choice:
    """A schedule and what it was chosen from. `measured`: the K > 0 of the servers, ascending."""

    measured: list[int]
    speeds: list[Speeds]
    steps: Steps
    schedule: Schedule


def measure_and_choose(asked: Asked, replay: Replay) -> Choice:
    """Measure steps with the asked K and choose a schedule; so again with those that it took from predictions.

    Steps need not be linear in K, since products are computed in tiles of rows. So every K that is chosen, or that is
    predicted to be the fastest at a batch size, has to be measured.
    """
    measured = asked.numbers
    while True:
        speeds = find_speeds(measure_steps(asked, replay, measured))
        steps = Steps.from_speeds(speeds, asked.rates)
        schedule = choose_schedule(steps, asked.max_batch_size)
        predicted = {*(k for *_, k in schedule), *best_fixed(steps)} - {0, *measured}
        if not predicted:
            return Choice(measured, speeds, steps, schedule)
        named = ", ".join(map(str, sorted(predicted)))
        print(f"bench: measures K = {named}, too: predicted to be among the fastest", file=sys.stderr, flush=True)
        measured = sorted({*measured, *predicted})


def measure_steps(asked: Asked, replay: Replay, numbers: Sequence[int]) -> dict[int, dict[str, Any]]:
    """Serve the draft with each K of `numbers` for all batch sizes; return the servers' files by K, 0 among them.

    Raises IncompleteError if a server drafted another number of tokens.
    """
    most = asked.numbers[-1]
    runs = {}
    for k in (*reversed(numbers), 0):
        recipe = asked.with_schedule(make_schedule([k], asked.max_batch_size), most)
        turns = replay.turns
        if asked.rates is not None and not is_cpu_engine():  # its sampler says 'Synthetic acceptance not supported'
            synthetic = {"rejection_sample_method": "synthetic", "synthetic_acceptance_rates": asked.rates}
            recipe, turns = with_speculation(recipe, **synthetic), [_of_recorded_length(turn) for turn in turns]
        path = asked.output / "steps" / f"k{k}.json"
        runs[k] = serve_and_send(replace(replay, recipe=recipe, turns=turns), asked.draft, path)
        for key, point in runs[k]["points"].items():
            if round(drafted_per_step(point)) != k:
                raise ignored(f"{path}, concurrency {key}", drafted_per_step(point), str(k))
    return runs


def _of_recorded_length(turn: Turn) -> Turn:
    """Return a turn whose reply has the recorded one's length: synthetic tokens may be an end token, or never one."""
    return replace(turn, sampling={**turn.sampling, "ignore_eos": True}, max_tokens=len(turn.reply))


def check_under_load(asked: Asked, replay: Replay, schedule: Schedule, fixed: Sequence[int]) -> list[Checked]:
    """Serve the schedule, each fixed K and no draft, `repeats` times in turns, and compare their speeds."""
    folder = asked.output / "check" / hash_json([schedule, list(fixed)])[:8]
    servers: list[tuple[str, Recipe, Path | None]] = [
        (SCHEDULE, asked.with_schedule(schedule, max(1, max_draft_tokens(schedule))), asked.draft),
        *((fixed_name(k), with_draft_tokens(asked.recipe, k), asked.draft) for k in fixed),
        (NO_DRAFT, asked.recipe, None),
    ]
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name, _, _ in servers}
    for repeat in range(1, asked.repeats + 1):
        for name, recipe, draft in servers if repeat % 2 else servers[::-1]:
            path = folder / f"{repeat}-{name.replace(' = ', '').replace(' ', '-').lower()}.json"
            runs[name].append(serve_and_send(replace(replay, recipe=recipe), draft, path))
    return check_speeds(runs, schedule)


def warn_of_setup(asked: Asked, num_turns: int) -> list[str]:
    """Return a sentence for each concurrency with few replies, and for batch sizes that were not measured."""
    lines = []
    for concurrency in asked.recipe.bench.concurrency:
        count = min(asked.recipe.bench.num_prompts.get(concurrency, num_turns), num_turns)
        if concurrency > 1 and count < FEW * concurrency:
            lines.append(
                f"{count} replies at concurrency {concurrency}: much of the load ran at smaller batch sizes. "
                f"{FEW * concurrency} are better."
            )
    largest = max(asked.recipe.bench.concurrency)
    if largest < asked.max_batch_size:
        lines.append(
            f"Batch sizes above {largest} were not measured, and draft as many tokens as {largest}. Measure up to "
            f"max-num-seqs ({asked.max_batch_size}) with --concurrency, or lower max-num-seqs."
        )
    return lines
