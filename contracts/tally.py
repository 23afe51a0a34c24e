"""Count the rows of a ledger that is being written: each look reads only the lines that were appended.

Only a failed row gets a second line (contracts/ledger.py), so the failed rows are all that must be remembered: a
million finished rows take no memory.
"""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import orjson

from common.watched import Tail
from contracts.ledger import STATUSES
from contracts.shards import shard_of

MAX_REASONS = 100
OTHER_REASONS = "other reasons"
NUMBER = re.compile(r"(?<!HTTP )(?<!\d)\d+")

FailedRows = dict[Any, tuple["LedgerTally", str, str]]
"""Failed rows: their tally, id and reason. Shards of one run share it: a later shard may make a row good."""


class LedgerTally(Tail):
    """Counts of a ledger by status. `num_shards`: also count written rows by their shard, for the next stage.

    `filtered`: reasons of filtered rows, their numbers replaced by `N`, so that equal ones add up.
    """

    def __init__(self, path: Path, failed: FailedRows | None = None, num_shards: int = 0) -> None:
        self.failed: FailedRows = {} if failed is None else failed
        self._num_shards = num_shards
        super().__init__(path)

    @property
    def num_rows(self) -> int:
        return self.counts.total()

    def reset(self) -> None:
        self.counts: Counter[str] = Counter()
        self.filtered: Counter[str] = Counter()
        self.by_shard: Counter[int] = Counter()
        for row in [row for row, (tally, _, _) in self.failed.items() if tally is self]:
            del self.failed[row]

    def take(self, line: bytes) -> None:
        entry = orjson.loads(line)
        status, id_ = entry["status"], entry["id"]
        if status not in STATUSES or not isinstance(id_, str):
            raise ValueError(status)
        row = row_of(entry)
        if row in self.failed:  # a retry: the last line counts
            tally = self.failed.pop(row)[0]
            tally.counts["failed"] -= 1
            if not tally.counts["failed"]:
                del tally.counts["failed"]
        self.counts[status] += 1
        if status == "failed":
            self.failed[row] = (self, id_, str(entry.get("reason", "")))
        elif status == "filtered":
            count_reason(self.filtered, str(entry.get("reason", "")))
        elif self._num_shards:
            self.by_shard[shard_of(id_, self._num_shards)] += 1


def row_of(entry: dict[str, Any]) -> Any:
    """Return what names a row in the ledger of its stage: its place in the input, or its id."""
    return (entry["index"], entry["sample"]) if "index" in entry else entry["id"]


def count_reason(reasons: Counter[str], reason: str) -> str:
    """Count a reason, with its numbers replaced by `N`, and return what it was counted as.

    At most `MAX_REASONS` different ones are kept.
    """
    general = NUMBER.sub("N", reason) or "no reason given"
    if general not in reasons and len(reasons) >= MAX_REASONS:
        general = OTHER_REASONS
    reasons[general] += 1
    return general
