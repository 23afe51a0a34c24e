"""Limit the conversations in flight: a fixed number, or as many as the servers keep up with."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from recipe.synth import SynthSection

POLL_INTERVAL_S = 2.0
SPARE_FRACTION = 0.1
"""Allowed waiting requests as a fraction of the running ones, enough to refill every slot that becomes free."""


@dataclass
class Pace:
    """The limit of conversations in flight, set from the servers' gauges between a floor and a ceiling."""

    limit: int
    floor: int
    ceiling: int
    closed: bool = False
    _changed: asyncio.Event = field(default_factory=asyncio.Event, repr=False)

    @classmethod
    def make(cls, settings: SynthSection) -> Pace:
        if settings.concurrency is not None:
            return cls(settings.concurrency, settings.concurrency, settings.concurrency)
        return cls(settings.min_concurrency, settings.min_concurrency, settings.max_concurrency)

    @property
    def fixed(self) -> bool:
        return self.floor == self.ceiling

    def observe(self, in_flight: int, running: float, waiting: float) -> None:
        """Double the limit if it is reached and nothing waits; lower it by the excess of waiting requests."""
        spare = max(2.0, SPARE_FRACTION * running)
        if waiting > spare:
            self._set(min(self.limit, in_flight) - int(waiting - spare))
        elif waiting == 0 and in_flight >= 0.9 * self.limit:
            self._set(self.limit * 2)

    async def admit(self, number: int) -> None:
        """Wait until worker `number` (from 0) is below the limit."""
        while number >= self.limit and not self.closed:
            self._changed.clear()
            await self._changed.wait()

    def close(self) -> None:
        """Admit every worker, since no conversation is left to start."""
        self.closed = True
        self._changed.set()

    def _set(self, limit: int) -> None:
        self.limit = max(self.floor, min(self.ceiling, limit))
        self._changed.set()
