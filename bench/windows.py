"""The windows of a watched server: where each ends, how it compares with the draft's card, and what all of them say.

A window ends at the first read by which it has enough drafts and requests. It is compared with the card, and so are the
last `RECENT` windows together, which find a small drift that lasts. Windows that are outside by themselves are left out
of these, so that the report of a drift ends with the drift. Each comparison takes half of the rate of false alarms. So
a window is reported wrongly with at most this rate, if its conversations are independent draws of what the card was
measured on. bench/drift.py has the test.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import reduce
from operator import add
from pathlib import Path
from typing import Any

from bench.card import Card
from bench.counters import CannotSayError, Read
from bench.drift import (
    MIN_REPLIES,
    MIN_WINDOWS,
    Comparison,
    Counts,
    compare,
    effective_conversations,
    spread_between,
    spread_of,
)
from bench.probe import Probe
from common.errors import UserError
from common.files import read_json
from contracts.certificate import AcceptanceRow

RECENT = 24
KEPT = 500
"""Windows that the JSON file keeps."""
AS_CARD, DRIFTED, CANNOT_SAY = "as the card", "drifted", "cannot say"
EXIT_CODES = {AS_CARD: 0, DRIFTED: 1, CANNOT_SAY: CannotSayError.exit_code}


@dataclass(frozen=True)
class Window:
    """Counts between two times (seconds since the epoch), and their comparison with the card; None: not possible yet.

    `recent` compares the last `num_recent` windows together, this one included.
    """

    begin: float
    end: float
    counts: Counts
    comparison: Comparison | None = None
    recent: Comparison | None = None
    num_recent: int = 1

    @property
    def is_outside(self) -> bool:
        return any(found is not None and found.outside for found in (self.comparison, self.recent))

    def to_json(self) -> dict[str, Any]:
        return {
            "begin": self.begin,
            "end": self.end,
            "counts": asdict(self.counts),
            "acceptance_length": round(self.counts.acceptance_length, 4),
            "per_position": [round(share, 4) for share in self.counts.shares],
            "card": self.comparison.to_json() if self.comparison else None,
            "num_recent": self.num_recent,
            "recent": self.recent.to_json() if self.recent else None,
            "outside": self.is_outside,
        }


@dataclass
class Watcher:
    """What was read so far.

    `rate`: of false alarms, for a window. `recent`: counts of the last windows, to be compared together with the next
    one. `past`: windows of earlier runs, as JSON.
    """

    endpoint: str
    card: Card
    rate: float
    min_drafts: int
    requests_per_conversation: float = 1.0
    last: Read | None = None
    first: Read | None = None
    """The first read of the open window, or of its part since a restart."""
    carried: Counts | None = None
    """The part of the open window before `first`."""
    opened: float = 0.0
    recent: list[Counts] = field(default_factory=list)
    windows: list[Window] = field(default_factory=list)
    past: list[dict[str, Any]] = field(default_factory=list)
    probe: Probe | None = None
    why_not: str = "nothing was read yet"
    """Why the window that is open cannot be compared yet."""
    unanswered: str = ""
    """Why the last read failed."""
    notes: list[str] = field(default_factory=list)

    def restore(self, path: Path) -> None:
        """Continue an earlier JSON file. Raises UserError if it is none of a watch of this server."""
        found = read_json(path, "the JSON file of a `bench watch`")
        try:
            endpoint, digest, state, past = found["endpoint"], found["card"]["digest"], found["state"], found["windows"]
            last, first = (Read.from_json(state[name]) if state[name] else None for name in ("last", "first"))
            carried = _counts_from_json(state["carried"]) if state["carried"] else None
            opened, recent = float(state["opened"]), [_counts_from_json(counts) for counts in state["recent"]]
        except (KeyError, TypeError, ValueError):
            endpoint = None
        if endpoint != self.endpoint:
            raise UserError(
                path,
                found="no watch of this server",
                expected=f"the JSON file of a `bench watch` of {self.endpoint}",
                fix="Give --json another name.",
            )
        if digest == self.card.digest:
            self.last, self.first, self.carried, self.opened = last, first, carried, opened
            self.recent, self.past = recent, past
        else:
            self.notes.append("the JSON file is of another card: starting anew")

    def observe(self, read: Read) -> Window | None:
        """Add a read to the open window. Return the window if it has enough to end, else None."""
        self.unanswered = ""
        if self.last is None:
            self._begin(read)
            return None
        if read.restarted_since(self.last):
            self.notes.append("the server has restarted: what it counted after the last read is lost")
            self._carry(read.at_start())
            if len(read.accepted_at) != len(self.last.accepted_at):
                self.carried, self.opened = None, self.last.time
                self._note_draft_tokens(read)
        self.last = read
        found = self._open()
        assert found is not None
        effective = effective_conversations(found, self._rows(found), self.requests_per_conversation)
        self.why_not = ""
        if found.steps < self.min_drafts:
            self.why_not = f"{found.steps} of {self.min_drafts} drafts"
        elif effective < MIN_REPLIES:
            self.why_not = f"worth {effective:.0f} of {MIN_REPLIES} conversations of the card"
        return None if self.why_not else self._end(read, found)

    def skip(self, read: Read) -> None:
        """Leave out what was counted up to this read: requests of our own."""
        self._carry(read)
        if self.carried is None or not self.carried.steps:
            self.carried, self.opened = None, read.time
        self.last = read

    def _open(self) -> Counts | None:
        """Return the counts of the open window up to the last read."""
        if self.last is None or self.first is None:
            return self.carried
        found = self.last.since(self.first)
        return found if self.carried is None else self.carried + found

    def _carry(self, first: Read) -> None:
        """Go on with the open window from another read."""
        self.carried, self.first = self._open(), first

    def _begin(self, read: Read) -> None:
        self._note_draft_tokens(read)
        self.last, self.first, self.carried, self.opened = read, read, None, read.time
        self.why_not = "a window needs two reads"

    def _note_draft_tokens(self, read: Read) -> None:
        note = note_of_draft_tokens(self.card.rows_for(len(read.accepted_at)), len(read.accepted_at))
        self.notes += [note] if note else []

    def _rows(self, counts: Counts) -> list[AcceptanceRow]:
        return self.card.rows_for(len(counts.accepted_at))

    def _end(self, read: Read, found: Counts) -> Window:
        rows = self._rows(found)
        before = [counts for counts in self.recent if len(counts.accepted_at) == len(found.accepted_at)]
        between = spread_between(before)
        comparison, recent = (
            compare(counts, rows, self.rate / 2, between, self.requests_per_conversation)
            for counts in (found, reduce(add, before, found))
        )
        window = Window(self.opened, read.time, found, comparison, recent if before else None, len(before) + 1)
        self.windows.append(window)
        if comparison is None or not comparison.outside:
            self.recent = [*self.recent, found][-RECENT + 1 :]
        self.first, self.carried, self.opened = read, None, read.time
        if comparison is None:
            without = sum(spread_of(row) is None for row in rows)
            self.why_not = (
                f"{without} of the card's {len(rows)} rows have no interval, or are of few conversations: the spread "
                f"between {MIN_WINDOWS} windows is needed, {len(before)} were before this one"
            )
        elif not comparison.tells_drops:
            self.why_not = (
                "no drop can be told: the card's range reaches down to 1, or its figures are of fewer draft tokens"
            )
        return window

    @property
    def tested(self) -> list[Window]:
        """The windows of this run that were compared."""
        return [window for window in self.windows if window.comparison is not None]

    @property
    def verdict(self) -> str:
        """What this run found: `as the card`, `drifted` or `cannot say`."""
        return _find_verdict(self.windows, self.probe)

    @property
    def last_verdict(self) -> str:
        """What the last window says; before the first one, what the requests that were sent say."""
        return _find_verdict(self.windows[-1:], None if self.windows else self.probe)

    def to_json(self) -> dict[str, Any]:
        return {
            "endpoint": self.endpoint,
            "card": {"name": self.card.name, "digest": self.card.digest, "source": self.card.source},
            "false_alarm_rate": self.rate,
            "verdict": self.verdict,
            "why_not": self.unanswered or self.why_not,
            "tested_windows": len(self.tested),
            "requests": self.probe.to_json() if self.probe else None,
            "windows": [*self.past, *(window.to_json() for window in self.windows)][-KEPT:],
            "state": {
                "last": self.last.to_json() if self.last else None,
                "first": self.first.to_json() if self.first else None,
                "carried": asdict(self.carried) if self.carried else None,
                "opened": self.opened,
                "recent": [asdict(counts) for counts in self.recent],
            },
        }


def note_of_draft_tokens(rows: Sequence[AcceptanceRow], num_draft_tokens: int) -> str:
    """Return what to know if the server drafts another number of tokens than the card's rows; "" if it does not."""
    own = rows[0].num_draft_tokens
    if own == num_draft_tokens:
        return ""
    effect = "With fewer draft tokens each is accepted more often, so only a drop is reported"
    if num_draft_tokens > own:
        effect = "With more draft tokens each is accepted less often, so only a rise is reported"
    return (
        f"the server drafts {num_draft_tokens} tokens a step, the card's figures are of {own}: only positions 1 to "
        f"{min(own, num_draft_tokens)} are compared. {effect}. Measure this number with "
        f"`bench acceptance --draft-tokens {num_draft_tokens}` and export again"
    )


def _find_verdict(windows: Sequence[Window], probe: Probe | None) -> str:
    if any(window.is_outside for window in windows) or (probe and probe.outside):
        return DRIFTED
    told = any(window.comparison is not None and window.comparison.tells_drops for window in windows)
    return AS_CARD if told or (probe and probe.is_tested) else CANNOT_SAY


def _counts_from_json(values: dict[str, Any]) -> Counts:
    return Counts(**{**values, "accepted_at": tuple(values["accepted_at"])})
