"""Speed by number of draft tokens (K) at each concurrency: `speeds` of acceptance.json, as a table and as sentences.

`bench acceptance` computes it (bench/speeds.py); `train export --served` puts it on the model card.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict

MAX_FALL = 0.1
"""Of the time of a step from one K to the next larger one, which does more work; less may come from kernels."""


class Speed(BaseModel):
    """The speed with one number of draft tokens, 0 for no draft.

    `step_ms` is the time of one engine step, `concurrency * acceptance_length / tokens_per_s`: prefills are included.
    `interval`: 95% of `speed_up`, the ratio to no draft; None if one conversation was measured.
    """

    model_config = ConfigDict(frozen=True)

    draft_tokens: int
    measured: bool
    tokens_per_s: float
    acceptance_length: float
    step_ms: float
    speed_up: float
    interval: tuple[float, float] | None


class Speeds(BaseModel):
    """The speeds at one concurrency by number of draft tokens, ascending from 0, and the recommended number."""

    model_config = ConfigDict(frozen=True)

    concurrency: int
    conversations: int
    recommended: int
    speeds: list[Speed]

    @property
    def base(self) -> Speed:
        return self.speeds[0]

    @property
    def largest(self) -> Speed:
        """The speed with the most draft tokens, those that the draft is served with by default."""
        return self.speeds[-1]

    @property
    def best(self) -> Speed:
        return self.at(self.recommended)

    def at(self, draft_tokens: int) -> Speed:
        return next(speed for speed in self.speeds if speed.draft_tokens == draft_tokens)


def make_speed_table(found: Sequence[Speeds]) -> str:
    """Format the speeds (tokens/s) as Markdown, a line per concurrency; `~` marks what was predicted."""
    lines = [
        f"| concurrency | {_titles(found)} | recommended | speed-up [95%] |",
        f"|---:|{'---:|' * len(found[0].speeds)}---|---|",
    ]
    for at in found:
        figures = [f"{'' if speed.measured else '~'}{speed.tokens_per_s:.1f}" for speed in at.speeds]
        gain = f"{at.best.speed_up:.2f}x{_in_brackets(at.best)}" if at.recommended else ""
        lines.append(f"| {at.concurrency} | {' | '.join(figures)} | {_name(at.best)} | {gain} |")
    return "\n".join(lines)


def make_step_table(found: Sequence[Speeds]) -> str:
    """Format milliseconds and accepted tokens of a step as Markdown, a line per concurrency."""
    lines = [f"| step: ms / tokens | {_titles(found)} |", f"|---:|{'---:|' * len(found[0].speeds)}"]
    for at in found:
        figures = [f"{speed.step_ms:.1f} / {speed.acceptance_length:.2f}" for speed in at.speeds]
        lines.append(f"| {at.concurrency} | {' | '.join(figures)} |")
    return "\n".join(lines)


def warn_of_slow_draft(found: Sequence[Speeds]) -> list[str]:
    """Return a sentence for each concurrency at which the draft with the most draft tokens is no faster than none."""
    lines = []
    for at in found:
        base, served = at.base, at.largest
        if served.speed_up >= 1 and (served.interval is None or served.interval[0] > 1):
            continue
        is_slower = served.interval is None or served.interval[1] < 1
        verdict = "this draft slows the target down" if is_slower else "this draft is not measurably faster than none"
        advice = f"Serve it with K = {at.recommended}, or" if at.recommended else "Serve the target"
        lines.append(
            f"With K = {served.draft_tokens} {verdict} at concurrency {at.concurrency}: {served.tokens_per_s:.1f} "
            f"against {base.tokens_per_s:.1f} tokens/s{_in_brackets(served, 'speed-up')}. {advice} without a draft."
        )
    return lines


def warn_of_noise(found: Sequence[Speeds]) -> list[str]:
    """Return a sentence for each two measured K of which the larger has clearly shorter steps.

    Intervals do not show that a machine was slower during a whole load.
    """
    return [
        f"The measurement at concurrency {at.concurrency} is not sound: a step took {less.step_ms:.1f} ms with "
        f"{_name(less)}, and {more.step_ms:.1f} ms with {_name(more)}, which does more work. Something else used the "
        f"machine: measure again, in an empty folder."
        for at in found
        for less, more in itertools.pairwise(speed for speed in at.speeds if speed.measured)
        if more.step_ms < (1 - MAX_FALL) * less.step_ms
    ]


def explain_speeds(found: Sequence[Speeds]) -> str:
    """Return tables, warnings and notes as Markdown."""
    parts = [make_speed_table(found), *warn_of_slow_draft(found), *warn_of_noise(found), make_step_table(found)]
    if any(not speed.measured for at in found for speed in at.speeds):
        parts.append(
            "`~`: predicted from the measured numbers of draft tokens on either side. "
            "`bench acceptance --draft-tokens` measures it."
        )
    elif found[0].speeds[1].draft_tokens > 1:
        parts.append("Smaller K are not predicted: measure a smaller one, too (`bench acceptance --draft-tokens`).")
    return "\n\n".join(parts)


def _titles(found: Sequence[Speeds]) -> str:
    return " | ".join(map(_name, found[0].speeds))


def _name(speed: Speed) -> str:
    return f"K = {speed.draft_tokens}" if speed.draft_tokens else "no draft"


def _in_brackets(speed: Speed, name: str = "") -> str:
    if speed.interval is None:
        return ""
    low, high = speed.interval
    return f" ({name} {low:.2f} to {high:.2f})" if name else f" [{low:.2f}, {high:.2f}]"
