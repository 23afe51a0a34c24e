"""Figures of a plan, each with its source: measured, stated or estimated."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

Kind = Literal["measured", "stated", "estimated"]
KINDS: tuple[Kind, ...] = ("measured", "stated", "estimated")
"""From the most to the least certain."""


@dataclass(frozen=True)
class Figure:
    """A value, what it rests on, and its formula or source. It is as certain as the least certain of its inputs."""

    value: float
    kind: Kind
    how: str

    def to_json(self) -> dict[str, Any]:
        return {"value": self.value, "kind": self.kind, "how": self.how}


def least_certain(kinds: Iterable[Kind]) -> Kind:
    """Return the least certain of some kinds."""
    return max(kinds, key=KINDS.index)


def total(figures: Iterable[Figure], how: str) -> Figure:
    """Return the sum of figures."""
    parts = list(figures)
    return Figure(sum(part.value for part in parts), least_certain(part.kind for part in parts), how)
