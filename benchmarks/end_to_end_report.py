"""The figures of benchmarks/end_to_end.py: stages, acceptance over time, time to equal acceptance, and their tables.

Imports nothing but the standard library.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

GIB, MIB = 2**30, 2**20
ORDER = ("generate", "prepare", "extract", "train", "export")
"""The names of stages, as they follow each other."""


@dataclass(frozen=True)
class Stage:
    """A stage that ran in one piece.

    `started`: seconds of the epoch. `memory`: peak of the processes' resident bytes. `disk`: peak bytes of the side's
    folder.
    """

    name: str
    started: float
    seconds: float
    memory: int
    disk: int


@dataclass(frozen=True)
class Point:
    """A checkpoint: its step, the seconds from the first prompt to its export, its served acceptance length."""

    step: int
    seconds: float
    acceptance: float


@dataclass(frozen=True)
class Reached:
    """The seconds at which a curve reaches a level; `at_most`: its first checkpoint is beyond the level already."""

    seconds: float
    at_most: bool = False


@dataclass(frozen=True)
class Side:
    """A side's stages in order, and its checkpoints by step."""

    stages: Sequence[Stage]
    points: Sequence[Point]

    @property
    def best(self) -> float:
        """The largest acceptance length of a checkpoint."""
        return max(point.acceptance for point in self.points)


def reach(points: Sequence[Point], level: float) -> Reached:
    """Return when a curve first reaches `level`, on straight lines between checkpoints in the order of their seconds.

    Raises ValueError if it never does.
    """
    ordered = sorted(points, key=lambda point: point.seconds)
    if ordered and ordered[0].acceptance >= level:
        return Reached(ordered[0].seconds, at_most=ordered[0].acceptance > level)
    for before, after in pairwise(ordered):
        if after.acceptance >= level:
            share = (level - before.acceptance) / (after.acceptance - before.acceptance)
            return Reached(before.seconds + share * (after.seconds - before.seconds))
    raise ValueError(f"no checkpoint reaches an acceptance length of {level:.3f}")


def compare_times(ours: Side, peer: Side) -> dict[str, float | bool]:
    """Return the highest acceptance length that both sides reach, the seconds of each, and the peer's over ours.

    The level is the best checkpoint of the weaker side, so both curves reach it.
    """
    level = min(ours.best, peer.best)
    first, second = reach(ours.points, level), reach(peer.points, level)
    return {
        "acceptance_length": level,
        "ours_s": first.seconds,
        "ours_at_most": first.at_most,
        "peer_s": second.seconds,
        "peer_at_most": second.at_most,
        "ratio": second.seconds / first.seconds,
    }


def explain_times(found: Mapping[str, float | bool], names: tuple[str, str], aim: float) -> str:
    """Return the comparison as a sentence; figures that are bounds are marked so."""
    ours, peer = (("at most " if found[f"{side}_at_most"] else "") for side in ("ours", "peer"))
    bound = "at least " if ours else "at most " if peer else ""
    return (
        f"Time to an acceptance length of {found['acceptance_length']:.3f}: {names[0]} {ours}{found['ours_s']:.0f} s, "
        f"{names[1]} {peer}{found['peer_s']:.0f} s, ratio {bound}{found['ratio']:.2f} (aim: {aim:g})."
    )


def make_stage_table(sides: Mapping[str, Side]) -> str:
    """Return seconds, peak memory and peak disk of each stage as a markdown table; a side may lack a stage."""
    names = sorted({stage.name for side in sides.values() for stage in side.stages}, key=ORDER.index)
    found = {label: {stage.name: stage for stage in side.stages} for label, side in sides.items()}
    columns = [f"{label}: {what}" for label in sides for what in ("seconds", "peak memory", "peak disk")]
    lines = [f"| stage | {' | '.join(columns)} |", "|---|" + "---:|" * len(columns)]
    for name in names:
        cells = [cell for label in sides for cell in _cells(found[label].get(name))]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    totals = []
    for side in sides.values():
        total = Stage("", 0.0, sum(s.seconds for s in side.stages), _most(side, "memory"), _most(side, "disk"))
        totals += _cells(total)
    return "\n".join([*lines, f"| **all** | {' | '.join(totals)} |"])


def _most(side: Side, what: str) -> int:
    return max(int(getattr(stage, what)) for stage in side.stages)


def _cells(stage: Stage | None) -> list[str]:
    if stage is None:
        return ["", "", ""]
    return [f"{stage.seconds:.0f}", f"{stage.memory / GIB:.2f} GiB", f"{stage.disk / MIB:.0f} MiB"]


def make_curve_table(sides: Mapping[str, Side]) -> str:
    """Return the checkpoints of both sides as a markdown table."""
    lines = ["| side | step | seconds since the first prompt | acceptance length |", "|---|---:|---:|---:|"]
    for label, side in sides.items():
        lines += [f"| {label} | {at.step} | {at.seconds:.0f} | {at.acceptance:.3f} |" for at in side.points]
    return "\n".join(lines)


def spread(items: Sequence[int], number: int) -> list[int]:
    """Return up to `number` items at equal distances, the last one always among them."""
    if len(items) <= number:
        return list(items)
    return [items[round((i + 1) * len(items) / number) - 1] for i in range(number)]


def fit_steps(budget_s: float, pilots: Sequence[tuple[int, float]]) -> int:
    """Return the steps that fit into seconds of training, by the seconds of two pilots `(steps, seconds)`.

    Raises ValueError if the longer pilot was not slower, or if fewer steps than its own fit.
    """
    (few, short), (many, long) = sorted(pilots)
    per_step = (long - short) / (many - few)
    if per_step <= 0:
        raise ValueError(f"{many} steps took {long:.1f} s, {few} steps {short:.1f} s: other work disturbs this machine")
    steps = many + int((budget_s - long) / per_step)
    if steps < many:
        raise ValueError(f"{budget_s:.0f} s of training have room for {steps} steps, expected at least {many}")
    return steps
