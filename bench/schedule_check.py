"""Check a schedule of draft tokens under load, against fixed numbers of draft tokens (K) and no draft.

Each repeat starts all servers one after another, in turns from the first to the last and back, so that a machine that
becomes slower meets all of them. A ratio of speeds is the geometric mean over the repeats of the ratio within one
repeat; its interval is Student's on the logarithms of these ratios.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict

from bench.speeds import MARGIN
from common.errors import IncompleteError
from contracts.schedule import Schedule, max_draft_tokens

NO_DRAFT_MARGIN = 0.03
"""How much slower than no draft a schedule may be."""
WIDE = 0.05
"""Loss that a check must be able to exclude, or it says little."""
QUANTILES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""Student's t at 97.5%, for 1, 2, ... degrees of freedom: the command repeats 10 times at most."""

SCHEDULE, NO_DRAFT = "schedule", "no draft"


def fixed_name(draft_tokens: int) -> str:
    """Return the name of the server with a fixed number of draft tokens."""
    return f"K = {draft_tokens}"


class Ratio(BaseModel):
    """Speed of the schedule over that of another server. `allowed`: the smallest ratio that passes."""

    model_config = ConfigDict(frozen=True)

    other: str
    ratio: float
    interval: tuple[float, float]
    allowed: float

    @property
    def is_slower(self) -> bool:
        """Whether the schedule is measurably slower than allowed."""
        return self.interval[1] < self.allowed

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.ratio:.3f} [{low:.3f}, {high:.3f}]"


class Checked(BaseModel):
    """A concurrency of the check.

    `tokens_per_s`: means over the repeats, by server. `drafted`: draft tokens that the schedule's server proposed per
    step and request that it drafted for. `fixed`: against the fastest fixed K.
    """

    model_config = ConfigDict(frozen=True)

    concurrency: int
    tokens_per_s: dict[str, float]
    drafted: float
    fixed: Ratio
    none: Ratio


def compare_speeds(other: str, ours: Sequence[float], theirs: Sequence[float], margin: float) -> Ratio:
    """Return the ratio of our speeds over theirs, which were measured in the same repeats (two at least)."""
    logs = [math.log(mine / yours) for mine, yours in zip(ours, theirs, strict=True)]
    mean = statistics.fmean(logs)
    half = QUANTILES[len(logs) - 2] * statistics.stdev(logs) / math.sqrt(len(logs))
    edges = (round(math.exp(mean - half), 4), round(math.exp(mean + half), 4))
    return Ratio(other=other, ratio=round(math.exp(mean), 4), interval=edges, allowed=1 - margin)


def check_speeds(runs: Mapping[str, Sequence[Mapping[str, Any]]], schedule: Schedule) -> list[Checked]:
    """Return the check at each concurrency. `runs`: by server, its files of bench/replay.py, one a repeat.

    Raises IncompleteError if the schedule's server drafted more tokens than the schedule says.
    """
    fixed = [name for name in runs if name not in (SCHEDULE, NO_DRAFT)]
    found = []
    for key in runs[SCHEDULE][0]["points"]:
        concurrency = int(key)
        speeds = {
            name: [run["points"][key]["tokens"] / run["points"][key]["seconds"] for run in repeats]
            for name, repeats in runs.items()
        }
        means = {name: statistics.geometric_mean(values) for name, values in speeds.items()}
        best = max(fixed, key=lambda name: means[name])
        most, points = max_draft_tokens(schedule, concurrency), [run["points"][key] for run in runs[SCHEDULE]]
        drafted = statistics.fmean(map(drafted_per_step, points))
        if drafted > most + 0.01:
            raise ignored(f"concurrency {concurrency}", drafted, f"at most {most}")
        found.append(
            Checked(
                concurrency=concurrency,
                tokens_per_s={name: round(mean, 2) for name, mean in means.items()},
                drafted=round(drafted, 3),
                fixed=compare_speeds(best, speeds[SCHEDULE], speeds[best], MARGIN),
                none=compare_speeds(NO_DRAFT, speeds[SCHEDULE], speeds[NO_DRAFT], NO_DRAFT_MARGIN),
            )
        )
    return found


def drafted_per_step(point: Mapping[str, Any]) -> float:
    """Return the tokens that vLLM drafted per step and request that it drafted for; 0 if it never did."""
    counters = point["counters"]
    return float(counters["num_draft_tokens"] / counters["num_drafts"]) if counters["num_drafts"] else 0.0


def ignored(where: str, drafted: float, expected: str) -> IncompleteError:
    """Return the error for a server that does not follow its schedule."""
    return IncompleteError(
        f"{where}: found {drafted:.2f} draft tokens a step in vLLM's metrics, expected {expected}: vLLM does not "
        "follow the schedule, or something else used the server. Read the server's log."
    )


def refuse_slow(found: Sequence[Checked], where: object) -> None:
    """Raise IncompleteError, with every concurrency, if the schedule is measurably slower than allowed."""
    slow = [
        f"{ratio} of the speed with {ratio.other} at concurrency {at.concurrency} ({ratio.ratio - 1:+.1%})"
        for at in found
        for ratio in (at.fixed, at.none)
        if ratio.is_slower
    ]
    if slow:
        raise IncompleteError(
            f"{where}: found the schedule at {'; '.join(slow)}, expected at least {1 - MARGIN:g} of the fastest fixed "
            f"K and {1 - NO_DRAFT_MARGIN:g} of no draft. Measure more numbers (--draft-tokens) and concurrencies on an "
            "idle machine, or serve what is faster."
        )


def warn_of_wide(found: Sequence[Checked]) -> list[str]:
    """Return a sentence for each ratio that passes although its interval reaches to a loss of over 5%."""
    return [
        f"At concurrency {at.concurrency} the schedule may be up to {1 - ratio.interval[0]:.0%} slower than "
        f"{ratio.other} ({ratio}): the repeats differ that much. Raise --repeats, or use an idle machine."
        for at in found
        for ratio in (at.fixed, at.none)
        if not ratio.is_slower and ratio.interval[0] < 1 - WIDE
    ]
