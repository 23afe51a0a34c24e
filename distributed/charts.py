"""Line charts as numbers for an inline SVG: paths, ticks and labels. The template draws them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

WIDTH, WIDE, HEIGHT = 280, 520, 180
"""Of charts side by side, and of one alone."""
LEFT, RIGHT, TOP, BOTTOM = 42, 12, 8, 20
MAX_POINTS = 400
"""Points of a line; more cannot be told apart on `WIDTH`."""
NUM_TICKS = 4
MAX_PLACES = 16
"""Up to this length the x axis counts draft tokens: each has a tick."""


@dataclass(frozen=True)
class Line:
    """A line: (x, y) pairs in order of x, NaN where there is no value. `colour` is a number of status.css.

    `look`: "" for a plain line, "broad" for one below others, "dots" to mark its points. `value`: said beside the name;
    None: the last y.
    """

    name: str
    points: Sequence[tuple[float, float]]
    colour: int = 0
    look: str = ""
    value: str | None = None


@dataclass(frozen=True)
class Path:
    """A drawn line: strings of `x,y` pairs, one for each part without a gap; places of its dots; its value."""

    name: str
    colour: int
    look: str
    parts: Sequence[str]
    dots: Sequence[tuple[float, float]]
    value: str


@dataclass(frozen=True)
class Chart:
    """A drawn chart. Ticks are (place, label)."""

    title: str
    x_label: str
    paths: Sequence[Path]
    x_ticks: Sequence[tuple[float, str]]
    y_ticks: Sequence[tuple[float, str]]
    width: int
    height: int = HEIGHT
    left: int = LEFT
    bottom: int = HEIGHT - BOTTOM

    @property
    def right(self) -> int:
        return self.width - RIGHT


def draw(
    title: str, x_label: str, lines: Sequence[Line], *, from_zero: bool = False, width: int = WIDTH
) -> Chart | None:
    """Draw lines in one chart; None if they have no value. `from_zero`: the y axis begins at 0."""
    values = [y for line in lines for _, y in line.points if math.isfinite(y)]
    places = [x for line in lines for x, y in line.points if math.isfinite(y)]
    if not values:
        return None
    y_ticks = find_ticks(0.0 if from_zero else min(values), max(values))
    low, high = y_ticks[0], y_ticks[-1]
    first, last = min(places), max(places)
    x_ticks = [tick for tick in find_ticks(first, last) if first <= tick <= last and tick == int(tick)]
    if last - first <= MAX_PLACES:
        x_ticks = [float(place) for place in range(math.ceil(first), math.floor(last) + 1)]

    def x_of(x: float) -> float:
        return round(LEFT + (x - first) / ((last - first) or 1.0) * (width - LEFT - RIGHT), 1)

    def y_of(y: float) -> float:
        return round(HEIGHT - BOTTOM - (y - low) / ((high - low) or 1.0) * (HEIGHT - TOP - BOTTOM), 1)

    paths = []
    for line in lines:
        drawn = [(x_of(x), y_of(y)) if math.isfinite(y) else None for x, y in _thin(line.points)]
        dots = [place for place in drawn if place] if line.look == "dots" else []
        paths.append(Path(line.name, line.colour, line.look, _join(drawn), dots, _value(line)))
    return Chart(
        title,
        x_label,
        paths,
        [(x_of(tick), label(tick)) for tick in x_ticks],
        [(y_of(t), label(t)) for t in y_ticks],
        width,
    )


def find_ticks(low: float, high: float) -> list[float]:
    """Return round numbers that span [low, high]: steps of 1, 2 or 5 times a power of ten."""
    span = high - low or abs(high) or 1.0
    step = 10.0 ** math.floor(math.log10(span / NUM_TICKS))
    while span / step > NUM_TICKS:
        step *= 2 if span / step / 2 <= NUM_TICKS else 5 if span / step / 5 <= NUM_TICKS else 10
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [number * step for number in range(first, max(last, first + 1) + 1)]


def label(value: float) -> str:
    """Return a short text of a number: `1200`, `0.25`, `2e-05`."""
    if value and abs(value) < 1e-3:
        return f"{value:.2g}"
    return f"{value:.0f}" if abs(value) >= 1000 or value == int(value) else f"{value:.3g}"


def _value(line: Line) -> str:
    finite = [y for _, y in line.points if math.isfinite(y)]
    return line.value if line.value is not None else label(finite[-1]) if finite else ""


def _thin(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    every = max(1, math.ceil(len(points) / MAX_POINTS))
    return [*points[:-1:every], *points[-1:]]


def _join(places: Sequence[tuple[float, float] | None]) -> list[str]:
    """Return the parts between gaps, as SVG's `points`."""
    parts: list[list[str]] = [[]]
    for place in places:
        if place is None:
            parts.append([])
        else:
            parts[-1].append(f"{place[0]:g},{place[1]:g}")
    return [" ".join(part) for part in parts if part]
