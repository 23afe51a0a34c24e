"""The check before a long training run: overfit a few samples, serve the draft, and see that vLLM accepts what training
predicts. Minutes, where a wrong layer or norm would otherwise cost days.

Reads:  a store, the conversations it was dumped from.
Writes: OUTPUT/{draft,eval.json,export}, the stages' own; served.json, what the server answered; gate.json, both rates.

Stages are run as commands. A draft that was overfitted guesses nearly everything, so that whatever differs between
training and serving shows at once: the gate fails when the draft did not learn its samples, or when served and
predicted acceptance differ, and says where to look.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.explain import explain_config
from bench.replay import Replay, kept_steps, serve_and_send
from bench.requests import answers_from_json, read_turns
from common.errors import IncompleteError, UserError
from common.files import hash_file, read_json, write_json
from contracts.acceptance import Acceptance
from contracts.conversation import read_conversations
from contracts.draft import DraftRun
from contracts.run import Run
from contracts.store import Store, open_store
from drafts.published import read_config
from recipe.recipe import Recipe
from serve.settings import measured_settings
from target.target import Target

MAX_DIFFERENCE = 0.02
MIN_LENGTH = 2.0


def gate(
    recipe: Recipe, recipe_args: Sequence[str], store_folder: Path, output: Path, num_samples: int, num_steps: int
) -> dict[str, Any]:
    """Train, evaluate, export and serve; the report. `recipe_args` are the flags that gave `recipe`.

    Raises IncompleteError with the likely cause when the gate does not open, UserError when the store's conversations
    are not where they were.
    """
    target = Target.here(recipe.target)
    store, manifest = open_store(store_folder, target)
    conversations = Path(manifest.conversations_folder)
    if not (conversations / "run.json").exists():
        raise UserError(
            conversations,
            found="no conversations",
            expected="those that the store was dumped from",
            fix="Put them back.",
        )
    draft, export, evaluation = output / "draft", output / "export", output / "eval.json"
    more = ["--set", f"train.max_samples={num_samples}", "--set", f"train.num_steps={num_steps}"]
    _run("offline", *recipe_args, *more, "--store", str(store_folder), "--output", str(draft))
    _run("eval", *recipe_args, "--run", str(draft), "--store", str(store_folder), "--output", str(evaluation),
         "--samples", str(num_samples))  # fmt: skip
    _run("export", *recipe_args, "--run", str(draft), "--output", str(export))

    predicted_walks = {walk["sample"]: walk["accepted"] for walk in read_json(evaluation, "an evaluation")["walks"]}
    turns = [t for t in read_turns(read_conversations(conversations)) if t.id.rpartition("-")[0] in predicted_walks]
    if not turns:
        raise UserError(
            store_folder,
            found="no greedy reply that ended",
            expected="some",
            fix="Raise synth.max_tokens, or --samples.",
        )
    run = Run.open(
        output,
        "bench gate",
        settings={"samples": num_samples, "steps": num_steps, "serve": measured_settings(recipe)},
        inputs={"target": target.fingerprint, "store": store.checksum, "draft": hash_file(export / "config.json")},
        recipe_yaml=recipe.to_yaml(),
    )
    served = serve_and_send(Replay(recipe, target, turns, run), export, output / "served.json", concurrency=[8])
    answers = {answer.id: answer for answer in answers_from_json(served["points"]["8"]["answers"])}
    num_draft_tokens = read_config(DraftRun(draft)).num_draft_tokens
    steps = [kept_steps(answers[turn.id]) for turn in turns]
    whole = {turn.id.rpartition("-")[0] for turn in turns}
    predicted = Acceptance.from_steps(
        (a for sample, replies in predicted_walks.items() if sample in whole for reply in replies for a in reply),
        num_draft_tokens,
    )
    found = Acceptance.from_steps((a for reply in steps for a in reply), num_draft_tokens)
    report = {"predicted": predicted.summary(), "served": found.summary(), "samples": len(whole), "turns": len(turns)}
    write_json(output / "gate.json", report)
    print(f"{'position':>20}" + "".join(f"{place:>8}" for place in range(1, num_draft_tokens + 1)))
    for name, figures in (("predicted", predicted), ("served", found)):
        print(f"{name:>10}{figures.acceptance_length:>10.3f}" + "".join(f"{x:>8.3f}" for x in figures.per_position))
    difference = found.acceptance_length / predicted.acceptance_length - 1
    if predicted.acceptance_length < MIN_LENGTH:
        raise IncompleteError(
            f"{draft}: found a predicted acceptance length of {predicted.acceptance_length:.2f} on the very samples it "
            f"was trained on, expected at least {MIN_LENGTH:g}. Raise --steps; run `dump verify` on the store; look at "
            f"{draft / 'curves.png'}."
        )
    if abs(difference) > MAX_DIFFERENCE:
        cause = explain(export, DraftRun(draft), store, target, predicted, found)
        raise IncompleteError(
            f"{output}: found {found.acceptance_length:.3f} tokens a step served, expected "
            f"{predicted.acceptance_length:.3f} as training predicts ({difference:+.1%}). {cause}"
        )
    run.finish(report)
    print(f"gate: open; served {difference:+.2%} from predicted over {len(turns)} replies -> {output}")
    return report


def explain(
    export: Path, draft: DraftRun, store: Store, target: Target, predicted: Acceptance, found: Acceptance
) -> str:
    """The likely cause of a difference: what the served config has otherwise than training, or what the rates say."""
    if cause := explain_config(export, draft, store, target):
        return cause
    if found.per_position[0] < 0.8 * predicted.per_position[0]:
        return (
            "Already the first position differs though the export's config is as trained: the engine's layers or their "
            "norm are not the store's. Run `bench parity`, which names the first thing that differs."
        )
    return "The later positions differ: look at rope and at the mask token's embedding; `bench parity` compares them."


def _run(*words: str) -> None:
    result = subprocess.run([str(Path(sys.executable).with_name("train")), *words], check=False)
    if result.returncode:
        raise IncompleteError(f"`train {words[0]}` ended with exit code {result.returncode}: its message is above.")
