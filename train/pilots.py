"""Train and evaluate a recipe on parts of its data: the pilots from which `train forecast` extrapolates.

Reads:  the store to train on, or finished runs; a store of held-out conversations.
Writes: OUTPUT/pilot-SHARE/{draft, eval.json} for each pilot; OUTPUT/run-NUMBER/eval.json for a finished run.

A pilot on a share f of the samples is the recipe with `train.max_samples` = f * samples, and with f times the steps and
warm-up steps: as many epochs as the whole training, with the same batches, learning rate and schedule.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.files import read_json
from common.stages import run_stage
from contracts.acceptance import Acceptance
from contracts.rolling import is_rolling, open_rolling
from contracts.run import read_run
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
class Work:
    """The recipe, the stores and the output. `load`: the recipe with some more overrides, checked.

    `full`: samples of the whole training, if the store holds only a part of them. `processes`: of each training.
    """

    recipe_path: Path
    overrides: list[str]
    load: Callable[[list[str]], Recipe]
    store: Path
    held_out: Path
    output: Path
    full: int | None = None
    processes: int = 1

    def train(self, more: list[str], folder: Path) -> None:
        """Train with some more overrides, in this process or under torchrun; a finished run is skipped."""
        if self.processes == 1:
            train_offline(self.load(more), self.store, folder)
        else:
            places = ("--store", self.store, "--output", folder)
            run_stage("train", "offline", *self._words(more), *places, processes=self.processes)

    def evaluate(self, run: Path, report: Path) -> dict[str, Any]:
        """Walk the held-out samples with a run's draft, in this process or under torchrun; return the report."""
        if self.processes == 1:
            return evaluate(self.load([]), Evaluation(self.held_out, report, run))
        places = ("--run-folder", run, "--store", self.held_out, "--output", report)
        run_stage("train", "eval", *self._words([]), *places, processes=self.processes)
        return dict(read_json(report, "an evaluation"))

    def _words(self, more: list[str]) -> list[str]:
        sets = [word for override in (*self.overrides, *more) for word in ("--set", override)]
        return ["--recipe", str(self.recipe_path), *sets]


@dataclass(frozen=True)
class Data:
    """The whole training's data. `stored`: samples that it looks at; `samples`: those it trains on, the rest is held
    out or has nothing to draft. `tokens_per_sample`: supervised ones, on average. `here`: how many the store holds.
    """

    stored: int
    samples: float
    tokens_per_sample: float
    here: int

    @property
    def tokens(self) -> float:
        return self.samples * self.tokens_per_sample


@dataclass(frozen=True)
class Pilot:
    """A finished pilot. `tokens`: supervised tokens of its samples, each counted once; `parts`: by held-out sample."""

    name: str
    samples: int
    steps: int
    tokens: float
    seconds: float
    parts: list[Acceptance]
    trained_on: int | None = None

    @property
    def acceptance_length(self) -> float:
        return Acceptance.pool(self.parts).acceptance_length


def pilot_settings(section: TrainSection, samples: int, fraction: float) -> dict[str, int]:
    """Return the keys of `train` that make a pilot of the whole training on `samples` samples."""
    return {
        "max_samples": max(1, round(fraction * samples)),
        "num_steps": max(1, round(fraction * section.num_steps)),
        "warmup_steps": round(fraction * section.warmup_steps),
    }


def measure_data(work: Work) -> Data:
    """Count the samples that the whole training reads, and the supervised tokens of one on average."""
    recipe = work.load([])
    section, max_tokens = recipe.training(), recipe.target.max_model_len
    target = Target.here(recipe.target)
    # A rolling store's index has lengths and masks of all samples, wherever its window is.
    store: AnyStore = (
        open_rolling(work.store, target) if is_rolling(work.store) else open_states(recipe, work.store, target)[0]
    )
    here = len(store.sample_ids())
    chosen = choose_samples(store, max_tokens, section.max_samples, section.held_out_fraction)
    if not chosen.train:
        raise UserError(work.store, found="no sample to train on", expected="some", fix="Give a store that has some.")
    looked_at = min(here, section.max_samples or here)
    stored = work.full or looked_at
    counted = chosen.train[:COUNTED]
    supervised = sum(int(store.read_mask(id_)[:max_tokens].sum()) for id_ in counted) / len(counted)
    return Data(stored, stored * len(chosen.train) / looked_at, supervised, here)


def train_pilots(work: Work, fractions: Sequence[float]) -> tuple[Data, list[Pilot]]:
    """Train a pilot for each share of the data, the smallest first, and evaluate it; finished ones are skipped.

    Raises UserError if the store is a rolling one or lacks the samples of a pilot.
    """
    if is_rolling(work.store):
        raise UserError(
            work.store,
            found="a rolling store",
            expected="a whole one, since each pilot reads its samples in an order of its own",
            fix="Train each pilot on a rolling store with --follow, and give --runs.",
        )
    data, section = measure_data(work), work.load([]).training()
    settings = {fraction: pilot_settings(section, data.stored, fraction) for fraction in sorted(fractions)}
    largest = max(values["max_samples"] for values in settings.values())
    if largest > data.here:
        raise UserError(
            work.store, found=f"{data.here} samples", expected=f"{largest} for the largest pilot", fix="Dump more."
        )
    overrides = {
        f"pilot-{100 * fraction:g}": [f"train.{key}={value}" for key, value in values.items()]
        for fraction, values in settings.items()
    }
    for more in overrides.values():
        work.load(more)  # all are checked before one is trained
    pilots = []
    for number, (name, more) in enumerate(overrides.items(), start=1):
        print(f"forecast: {name}, {number} of {len(overrides)}: {', '.join(more)}")
        work.train(more, work.output / name / "draft")
        pilots.append(_evaluate(work, work.output / name / "draft", work.output / name / "eval.json", data))
    return data, pilots


def read_pilots(work: Work, runs: Sequence[Path]) -> tuple[Data, list[Pilot]]:
    """Evaluate finished trainings as pilots. Raises UserError if they differ in more than data and steps."""
    states = {run: read_run(run, "train offline") for run in runs}
    _refuse_unlike(work.load([]), states)
    data = measure_data(work)
    reports = {run: work.output / f"run-{number}" / "eval.json" for number, run in enumerate(states)}
    return data, sorted((_evaluate(work, *pair, data) for pair in reports.items()), key=lambda pilot: pilot.tokens)


def _evaluate(work: Work, run: Path, report: Path, data: Data) -> Pilot:
    found = work.evaluate(run, report)
    state = read_run(run, "train offline")
    return Pilot(
        name=report.parent.name,
        samples=int(state["summary"]["samples"]),
        steps=int(state["summary"]["steps"]),
        tokens=int(state["summary"]["samples"]) * data.tokens_per_sample,
        seconds=float(state["seconds"]),
        parts=parts_of(found),
        trained_on=found.get("trained_on"),
    )


def parts_of(report: Mapping[str, Any]) -> list[Acceptance]:
    """Return the acceptance of each sample of an evaluation, in the store's order."""
    num_tokens = report["num_draft_tokens"]
    return [
        Acceptance.from_steps([a for reply in walk["accepted"] for a in reply], num_tokens) for walk in report["walks"]
    ]


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
                    fix=f"Pilots may differ in {', '.join(SCALED)} alone: give others, or the recipe of these.",
                )


def _unscaled(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if key not in SCALED}
