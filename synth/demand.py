"""What a run still needs: quotas of finished conversations, and a budget of generated tokens.

Rows are begun in the order of the input. A row is begun only if its quotas have room for it beside the conversations
in flight, so a quota is never exceeded. If one of those does not end well, a row that was left out takes its place.
Nothing is begun once the finished conversations hold the budget; what is in flight then ends and is kept. Rows that are
not needed get no ledger line; they are counted as `unreached`, and a larger budget or quota reaches them.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from common.errors import UserError
from recipe.synth import SynthSection
from synth.output import LEDGER_FILE, Output
from synth.prompts import Prompt

OTHERS = "*"
Quotas = Mapping[str, Mapping[str, int]]
"""Most finished conversations by dimension (`thinking_mode`, `category`) and value; OTHERS: all values not listed."""
Key = tuple[str, str]
"""A dimension, and one of its values or OTHERS."""


def limits_of(quotas: Quotas, shard: tuple[int, int] | None) -> dict[Key, int]:
    """Return the quotas of a shard; those of all shards add up to the whole."""
    return {(kind, value): divide(limit, shard) for kind, limits in quotas.items() for value, limit in limits.items()}


def divide(number: int, shard: tuple[int, int] | None) -> int:
    """Return the part of shard (i, n) of a number; the parts add up to it."""
    index, count = shard or (0, 1)
    return number * (index + 1) // count - number * index // count


def keys_of(quotas: Quotas, mode: str, category: str) -> list[Key]:
    """Return the quotas that count a conversation."""
    keys = []
    for kind, value in (("thinking_mode", mode), ("category", category)):
        limits = quotas.get(kind, {})
        if value in limits or OTHERS in limits:
            keys.append((kind, value if value in limits else OTHERS))
    return keys


def count_obtained(quotas: Quotas, done: Mapping[tuple[str, str], int]) -> Counter[Key]:
    """Return the finished conversations that each quota counts, from those by mode and category."""
    found: Counter[Key] = Counter()
    for (mode, category), number in done.items():
        for key in keys_of(quotas, mode, category):
            found[key] += number
    return found


class Demand:
    """The quotas and the budget of one shard, against what its output has and what is in flight."""

    def __init__(self, section: SynthSection, shard: tuple[int, int] | None, out: Output) -> None:
        """Raises UserError for a ledger without modes and categories, which quotas need."""
        self._section, self._out = section, out
        self._quotas: dict[str, dict[str, int]] = dict(section.quotas.items())
        self._limits = limits_of(self._quotas, shard)
        self._budget = None if section.until_tokens is None else divide(section.until_tokens, shard)
        self._done = count_obtained(self._quotas, out.done)
        self._in_flight: Counter[Key] = Counter()
        self._num_in_flight = 0
        self._has_freed = False
        self._changed = asyncio.Event()
        if self._limits and out.num_unlabelled:
            raise UserError(
                out.folder / LEDGER_FILE,
                found=f"{out.num_unlabelled} lines without mode and category, of an earlier version",
                expected="both, which synth.quotas counts",
                fix="Remove synth.quotas, or choose another --output.",
            )

    @property
    def is_set(self) -> bool:
        return bool(self._limits) or self._budget is not None

    def settings(self) -> dict[str, Any]:
        """Return what was asked for, of all shards together."""
        return {"until_tokens": self._section.until_tokens, "quotas": self._quotas}

    @property
    def is_met(self) -> bool:
        """Whether no row of the input can be needed, whatever its mode and category."""
        if self._budget is not None and self._out.done_tokens >= self._budget:
            return True
        return any(self._is_full(kind, Counter()) for kind in self._quotas)

    def _is_full(self, kind: str, in_flight: Counter[Key]) -> bool:
        """Return whether every value of a dimension is limited and has no room beside `in_flight`."""
        limits = self._quotas[kind]
        modes = set(self._section.modes_in_turn) or {""}
        if OTHERS not in limits and not (kind == "thinking_mode" and modes <= set(limits)):
            return False
        return all(self._done[kind, value] + in_flight[kind, value] >= self._limits[kind, value] for value in limits)

    def begin(self, prompt: Prompt) -> bool:
        """Count a prompt as in flight and return True; return False if its quotas have no room."""
        keys = keys_of(self._quotas, prompt.thinking_mode, prompt.category)
        if any(self._done[key] + self._in_flight[key] >= self._limits[key] for key in keys):
            return False
        self._in_flight.update(keys)
        self._num_in_flight += 1
        return True

    def end(self, prompt: Prompt, *, done: bool) -> None:
        """Count a prompt as no longer in flight; `done`: its conversation is finished and in the output."""
        keys = keys_of(self._quotas, prompt.thinking_mode, prompt.category)
        self._in_flight.subtract(keys)
        self._num_in_flight -= 1
        if done:
            self._done.update(keys)
        else:
            self._has_freed |= bool(keys)
        self._changed.set()

    async def wait_for_room(self, is_over: Callable[[], bool]) -> None:
        """Wait while what is in flight fills a whole dimension: until it has ended, no row can be needed."""
        while self._num_in_flight and not is_over() and any(self._is_full(k, self._in_flight) for k in self._quotas):
            self._changed.clear()
            await self._changed.wait()

    async def has_freed(self, is_over: Callable[[], bool]) -> bool:
        """Wait for what is in flight, and return True once for conversations that left room by not ending well."""
        while self._num_in_flight and not self._has_freed and not is_over():
            self._changed.clear()
            await self._changed.wait()
        freed, self._has_freed = self._has_freed, False
        return freed and not is_over()

    def describe_short(self) -> str:
        """Return the quotas that are not filled, in words; "" if there are none."""
        return ", ".join(
            f"{value or 'unset'} {self._done[kind, value]} of {limit}"
            for (kind, value), limit in self._limits.items()
            if self._done[kind, value] < limit and value != OTHERS
        )
