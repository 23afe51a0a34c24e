"""Train and evaluate a recipe on parts of a store: the pilots from which `train forecast` extrapolates.

Reads:  the store to train on, or finished runs; a store of held-out conversations.
Writes: OUTPUT/PILOT/{draft, eval.json} for each pilot; OUTPUT/RUN/eval.json for a finished run.

A pilot on a share f of the samples is the recipe with `train.max_samples` = f * samples, and with f times the steps and
warm-up steps: as many epochs as the whole training, with the same batches, learning rate and schedule.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import UserError
from contracts.acceptance import Acceptance
from contracts.run import read_run
from contracts.store import Store
from drafts.order import choose_samples
from recipe.recipe import Recipe
from recipe.train import TrainSection
from target.target import Target
from train.data import AnyStore, open_states
from train.evaluate import Evaluation, evaluate
from train.offline import train_offline

SCALED = ("max_samples", "num_steps", "warmup_steps")
"""Keys of `train` that differ between pilots; all others must be equal."""
COUNTED = 2000
"""Most samples whose supervised tokens are counted; of more, the mean of these is taken."""


@dataclass(frozen=True)
class Pilot:
    """A finished pilot. `tokens`: supervised tokens of its samples, each counted once; `parts`: by held-out sample."""

    name: str
    samples: int
    steps: int
    tokens: float
    seconds: float
    parts: list[Acceptance]
    held_out: list[str]

    @property
    def acceptance_length(self) -> float:
        return Acceptance.pool(self.parts).acceptance_length


@dataclass(frozen=True)
class Data:
    """The whole training's data. `stored`: samples that it looks at; `samples`: those it trains on, the rest is held
    out or has nothing to draft. `tokens_per_sample`: supervised ones, on average.
    """

    stored: int
    samples: int
    tokens_per_sample: float

    @property
    def tokens(self) -> float:
        return self.samples * self.tokens_per_sample


def pilot_settings(section: TrainSection, samples: int, fraction: float) -> dict[str, int]:
    """Return the keys of `train` that make a pilot of the whole training on `samples` samples."""
    return {
        "max_samples": max(1, round(fraction * samples)),
        "num_steps": max(1, round(fraction * section.num_steps)),
        "warmup_steps": round(fraction * section.warmup_steps),
    }


def measure_data(recipe: Recipe, folder: Path) -> Data:
    """Count the samples that the whole training reads, and the supervised tokens of one on average."""
    target = Target.here(recipe.target)
    store, _ = open_states(recipe, folder, target)
    section, max_tokens = recipe.training(), recipe.target.max_model_len
    chosen = choose_samples(store, max_tokens, section.max_samples, section.held_out_fraction)
    if not chosen.train:
        raise UserError(folder, found="no sample to train on", expected="some", fix="Give a store that has some.")
    stored = len(store.sample_ids()[: section.max_samples])
    return Data(stored, len(chosen.train), _mean_supervised(store, chosen.train, max_tokens))


def _mean_supervised(store: AnyStore, ids: Sequence[str], max_tokens: int) -> float:
    counted = ids[:COUNTED]
    return sum(int(store.read_mask(id_)[:max_tokens].sum()) for id_ in counted) / max(1, len(counted))


def train_pilots(
    load: Callable[[list[str]], Recipe], fractions: Sequence[float], stores: tuple[Path, Path], output: Path
) -> tuple[Data, list[Pilot]]:
    """Train a pilot for each share of the data, the smallest first, and evaluate it; finished ones are skipped.

    `load`: the recipe with some overrides, checked. `stores`: to train on, and of held-out conversations.
    """
    whole = load([])
    data = measure_data(whole, stores[0])
    recipes = {}
    for fraction in sorted(fractions):
        settings = pilot_settings(whole.training(), data.stored, fraction)
        recipes[f"pilot-{100 * fraction:06.2f}"] = load([f"train.{key}={value}" for key, value in settings.items()])
    pilots = []
    for number, (name, recipe) in enumerate(recipes.items(), start=1):
        section = recipe.training()
        print(
            f"forecast: {name}%, {number} of {len(recipes)}: {section.max_samples} samples, {section.num_steps} steps"
        )
        folder = output / name
        train_offline(recipe, stores[0], folder / "draft")
        pilots.append(_evaluate(recipe, folder / "draft", stores[1], folder / "eval.json", data))
    return data, pilots


def read_pilots(
    recipe: Recipe, runs: Sequence[Path], stores: tuple[Path, Path], output: Path
) -> tuple[Data, list[Pilot]]:
    """Evaluate finished trainings as pilots. Raises UserError if they differ in more than data and steps."""
    data = measure_data(recipe, stores[0])
    states = {run: read_run(run, "train offline") for run in runs}
    _refuse_unlike(recipe, states)
    names = {run: f"run-{number:02d}-{run.resolve().parent.name}" for number, run in enumerate(runs)}
    pilots = [_evaluate(recipe, run, stores[1], output / names[run] / "eval.json", data) for run in runs]
    return data, sorted(pilots, key=lambda pilot: pilot.tokens)


def _evaluate(recipe: Recipe, run: Path, held_out: Path, report: Path, data: Data) -> Pilot:
    found = evaluate(recipe, Evaluation(held_out, report, run))
    state = read_run(run, "train offline")
    samples = int(state["summary"]["samples"])
    num_tokens = found["num_draft_tokens"]
    parts = [
        Acceptance.from_steps([a for reply in walk["accepted"] for a in reply], num_tokens) for walk in found["walks"]
    ]
    return Pilot(
        name=report.parent.name,
        samples=samples,
        steps=int(state["summary"]["steps"]),
        tokens=samples * data.tokens_per_sample,
        seconds=float(state["seconds"]),
        parts=parts,
        held_out=[walk["sample"] for walk in found["walks"]],
    )


def _refuse_unlike(recipe: Recipe, states: Mapping[Path, dict[str, Any]]) -> None:
    """Raise UserError if a run's settings differ from the recipe's in more than data and steps."""
    wanted = _unscaled(recipe.training().settings())
    for run, state in states.items():
        found = _unscaled(state["settings"]["train"])
        for key in sorted({*wanted, *found}):
            if wanted.get(key) != found.get(key):
                raise UserError(
                    f"{run} (train.{key})",
                    found=str(found.get(key)),
                    expected=f"{wanted.get(key)} as in the recipe",
                    fix=f"Pilots may differ in {', '.join(SCALED)} alone: give others, or the recipe they were run with.",
                )


def _unscaled(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if key not in SCALED}
