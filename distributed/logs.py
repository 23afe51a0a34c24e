"""The metrics.jsonl of stages, read as it grows: the curves of a training, the last line of a synthesis.

Reads: metrics.jsonl of `train offline` (contracts/draft.py) and of `synth generate`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from common.watched import Tail

MAX_POINTS = 1000


@dataclass(frozen=True)
class Point:
    """A line of a training's metrics; `accuracy` by draft token. `step_s`: seconds of a step."""

    step: int
    loss: float
    learning_rate: float
    accuracy: tuple[float, ...]
    blocks_accepted: float
    tokens_per_s: float
    step_s: float


class Curves(Tail):
    """The curves of a training. Of a long one, every second, fourth, ... line is kept, and the last one.

    `held_out`: (step, predicted acceptance length) of each evaluation during training. `nan_step`: the first step
    whose loss is no number.
    """

    def reset(self) -> None:
        self.held_out: list[tuple[int, float]] = []
        self.nan_step: int | None = None
        self.last: Point | None = None
        self._points: list[Point] = []
        self._every = 1
        self._seen = 0

    def take(self, line: bytes) -> None:
        entry = json.loads(line)
        step = int(entry["step"])
        if "held_out_acceptance" in entry:
            self.held_out.append((step, number(entry["held_out_acceptance"])))
        if "loss" not in entry:
            return
        point = Point(
            step,
            number(entry["loss"]),
            number(entry["learning_rate"]),
            tuple(map(number, entry["accuracy"])),
            number(entry["blocks_accepted"]),
            number(entry["tokens_per_s"]),
            sum(map(number, entry["seconds"].values())) if isinstance(entry.get("seconds"), dict) else 0.0,
        )
        if self.nan_step is None and not math.isfinite(point.loss):
            self.nan_step = step
        self.last = point
        if self._seen % self._every == 0:
            self._points.append(point)
        self._seen += 1
        if len(self._points) > MAX_POINTS:
            self._points = self._points[::2]
            self._every *= 2

    @property
    def points(self) -> Sequence[Point]:
        """The kept points and the last one, by step."""
        if self.last is None or self._points[-1:] == [self.last]:
            return self._points
        return [*self._points, self.last]

    @property
    def num_steps(self) -> int:
        """The last step that was written."""
        evaluated = self.held_out[-1][0] if self.held_out else 0
        return max(evaluated, self.last.step if self.last else 0)


class SynthLog(Tail):
    """The last line of a synthesis's metrics."""

    def reset(self) -> None:
        self.last: dict[str, Any] = {}

    def take(self, line: bytes) -> None:
        entry = json.loads(line)
        for name in ("rows", "rows_expected", "tokens_per_s", "in_flight", "retries"):
            number(entry[name])
        self.last = entry


def number(value: Any) -> float:
    """Return a JSON number as float, NaN and infinities too. Raises TypeError for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(type(value))
    return float(value)
