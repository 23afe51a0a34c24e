"""Check a recipe before a long training run: overfit a few samples, serve the draft, compare predicted with served.

It takes minutes, and finds a wrong layer or norm that would cost days of training.

Reads:  a store, the conversations it was dumped from.
Writes: OUTPUT/{draft,eval.json,export} (the stages' own files), served.json (the server's answers), gate.json (both
        rates).

An overfitted draft predicts nearly every token, so any difference between training and serving shows. The gate fails if
the draft did not learn its samples, or if served and predicted acceptance differ, and names the likely cause.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from bench.explain import explain_config
from bench.replay import Replay, serve_and_send
from bench.requests import Turn, answers_from_json, kept_steps, read_turns
from common.errors import IncompleteError, UserError
from common.files import hash_file, read_json, write_json
from common.stages import run_stage
from contracts.acceptance import Acceptance
from contracts.conversation import read_conversations
from contracts.draft import DraftRun
from contracts.run import Run
from contracts.schedule import SCHEDULE_KEY
from contracts.store import Store, open_store
from drafts.published import read_config
from recipe.recipe import Recipe
from serve.flags import with_speculation
from serve.settings import measured_settings
from target.target import Target

MAX_DIFFERENCE = 0.02
MIN_LENGTH = 2.0


@dataclass(frozen=True)
class Gate:
    """Inputs and folders of the gate. `recipe_args`: the flags that `recipe` was loaded from.

    `processes`: those that train and evaluate, one for each GPU.
    """

    recipe: Recipe
    recipe_args: Sequence[str]
    store_folder: Path
    output: Path
    num_samples: int
    num_steps: int
    processes: int = 1

    @cached_property
    def target(self) -> Target:
        return Target.here(self.recipe.target)

    @property
    def store(self) -> Store:
        return Store(self.store_folder)

    @property
    def draft(self) -> DraftRun:
        return DraftRun(self.output / "draft")

    @property
    def export(self) -> Path:
        return self.output / "export"

    @property
    def evaluation(self) -> Path:
        return self.output / "eval.json"


def gate(work: Gate) -> dict[str, Any]:
    """Train, evaluate, export and serve a draft; return the report.

    Raises IncompleteError with the likely cause if the gate fails, UserError if the store's conversations are no longer
    in their folder.
    """
    recipe, target, output = work.recipe, work.target, work.output
    store, manifest = open_store(work.store_folder, target)
    conversations = Path(manifest.conversations_folder)
    if not (conversations / "run.json").exists():
        raise UserError(
            conversations,
            found="no conversations",
            expected="those that the store was dumped from",
            fix="Put them back.",
        )
    _train(work)
    walks = {walk["sample"]: walk["accepted"] for walk in read_json(work.evaluation, "an evaluation")["walks"]}
    turns = [t for t in read_turns(read_conversations(conversations)) if _sample_of(t) in walks]
    if not turns:
        raise UserError(
            store.folder,
            found="no greedy reply that ended",
            expected="some",
            fix="Raise synth.max_tokens, or --samples.",
        )
    run = Run.open(
        output,
        "bench gate",
        settings={"samples": work.num_samples, "steps": work.num_steps, "serve": measured_settings(recipe)},
        inputs={"target": target.fingerprint, "store": store.checksum, "draft": hash_file(work.export / "config.json")},
        recipe_yaml=recipe.to_yaml(),
    )
    fixed = with_speculation(recipe, **{SCHEDULE_KEY: None})  # all K positions are compared
    served = serve_and_send(Replay(fixed, target, turns, run), work.export, output / "served.json", concurrency=[8])
    answers = {answer.id: answer for answer in answers_from_json(served["points"]["8"]["answers"])}
    num_draft_tokens = read_config(work.draft).num_draft_tokens
    whole = {_sample_of(turn) for turn in turns}
    replies = (reply for sample, replies in walks.items() if sample in whole for reply in replies)
    predicted = Acceptance.from_steps((a for reply in replies for a in reply), num_draft_tokens)
    found = Acceptance.from_steps((a for turn in turns for a in kept_steps(answers[turn.id])), num_draft_tokens)
    report = {"predicted": predicted.summary(), "served": found.summary(), "samples": len(whole), "turns": len(turns)}
    write_json(output / "gate.json", report)
    difference = _judge(work, predicted, found)
    run.finish(report)
    print(f"gate: open; served {difference:+.2%} from predicted over {len(turns)} replies -> {output}")
    return report


def _sample_of(turn: Turn) -> str:
    """Return the id of a turn's sample in the store."""
    return turn.id.rpartition("-")[0]


def _train(work: Gate) -> None:
    """Train a draft on the store's first samples, evaluate it on the same ones, and export it."""
    recipe, draft, store = work.recipe_args, work.draft.folder, work.store.folder
    more = ("--set", f"train.max_samples={work.num_samples}", "--set", f"train.num_steps={work.num_steps}")
    alone = ("--set", "tracking.train=[tensorboard]")  # a check, no training to compare others with
    words = (*recipe, *more, *alone, "--store", store, "--output", draft)
    run_stage("train", "offline", *words, processes=work.processes)
    places = ("--run-folder", draft, "--store", store, "--output", work.evaluation)
    run_stage("train", "eval", *recipe, *places, "--samples", work.num_samples, processes=work.processes)
    run_stage("train", "export", *recipe, "--run", draft, "--output", work.export)


def _judge(work: Gate, predicted: Acceptance, found: Acceptance) -> float:
    """Print both rates by position; return the relative difference of the served length.

    Raises IncompleteError if the draft learned too little, or if the two differ too much.
    """
    num_draft_tokens = len(predicted.per_position)
    print(f"{'position':>20}" + "".join(f"{place:>8}" for place in range(1, num_draft_tokens + 1)))
    for name, figures in (("predicted", predicted), ("served", found)):
        print(f"{name:>10}{figures.acceptance_length:>10.3f}" + "".join(f"{x:>8.3f}" for x in figures.per_position))
    difference = found.acceptance_length / predicted.acceptance_length - 1
    if predicted.acceptance_length < MIN_LENGTH:
        raise IncompleteError(
            f"{work.draft.folder}: found a predicted acceptance length of {predicted.acceptance_length:.2f} on "
            f"the very samples it was trained on, expected at least {MIN_LENGTH:g}. Raise --steps; run `dump verify` "
            f"on the store; look at {work.draft.folder / 'curves.png'}."
        )
    if abs(difference) > MAX_DIFFERENCE:
        cause = explain(work.export, work.draft, work.store, predicted, found)
        raise IncompleteError(
            f"{work.output}: found {found.acceptance_length:.3f} tokens per step served, expected "
            f"{predicted.acceptance_length:.3f} as training predicts ({difference:+.1%}). {cause}"
        )
    return difference


def explain(export: Path, draft: DraftRun, store: Store, predicted: Acceptance, found: Acceptance) -> str:
    """Return the likely cause of a difference, from the export's config, else from the rates by position."""
    if cause := explain_config(export, draft, store):
        return cause
    if found.per_position[0] < 0.8 * predicted.per_position[0]:
        return (
            "The first position already differs, although the export's config is as trained: the engine's layers or "
            "their norm are not the store's. Run `bench parity`, which names the first difference."
        )
    return "The later positions differ: check rope and the mask token's embedding; `bench parity` compares them."
