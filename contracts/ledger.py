"""The ledger: one JSON line per input row, written last, so that a row is either accounted for or not begun.

A stage first makes a row's output durable and then appends its line here. After a crash a torn last line is cut off,
and every row without a line is done again; nothing is lost and nothing is doubled.

Format: `{"id": ..., "status": "done|truncated|filtered|failed", "reason": ..., ...}`; other keys belong to the stage
(size, checksum, end offset, tokens). The last line of an id wins, so a retried failure simply adds a line.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from contracts.errors import IncompleteError, UserError

STATUSES = ("done", "truncated", "filtered", "failed")


class LedgerFile:
    """The file alone: read once from the start, then appended to by one process (`contracts.run` guards the folder)."""

    def __init__(self, path: Path) -> None:
        """Open `path`, creating it if needed."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._file = path.open("a+b")

    def read(self) -> Iterator[dict[str, Any]]:
        """Yield every entry in order, then cut off a torn last line. Read to the end before appending."""
        good_end = 0
        for entry, good_end in _read_lines(self.path):  # noqa: B007 (needed after the loop)
            yield entry
        self._file.truncate(good_end)

    def append(self, entries: Iterable[Mapping[str, Any]]) -> None:
        """Add lines and sync them together. Raises ValueError for an unknown status."""
        lines = []
        for entry in entries:
            if entry["status"] not in STATUSES:
                raise ValueError(f"status {entry['status']!r} is none of {STATUSES}")
            lines.append(json.dumps(entry, ensure_ascii=False).encode() + b"\n")
        self._file.write(b"".join(lines))
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def read_entries(path: Path) -> Iterator[dict[str, Any]]:
    """Yield every whole entry of a ledger that another process may be writing."""
    return (entry for entry, _ in _read_lines(path))


def _read_lines(path: Path) -> Iterator[tuple[dict[str, Any], int]]:
    """Entries, each with the offset of its line's end."""
    end = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                break  # torn by a crash (the row it spoke of is done again), or being written
            end += len(line)
            yield parse_entry(line, f"{path}:{number}"), end


def parse_entry(line: bytes, where: str) -> dict[str, Any]:
    """One line of a ledger. Raises UserError when it is none."""
    try:
        entry: dict[str, Any] = json.loads(line)
        if entry["status"] in STATUSES and isinstance(entry["id"], str):
            return entry
    except (ValueError, TypeError, KeyError):
        pass
    raise UserError(
        where,
        found="a line that is no ledger entry",
        expected='{"id": ..., "status": ...}',
        fix="Restore the file from a copy, or delete the stage's output and run it again.",
    )


class Ledger:
    """A ledger whose entries are held in memory, by id."""

    def __init__(self, path: Path) -> None:
        """Open `path`, creating it if needed, cut off a torn last line and load what is there."""
        self._file = LedgerFile(path)
        self.entries: dict[str, dict[str, Any]] = {entry["id"]: entry for entry in self._file.read()}

    def append(self, id_: str, status: str, reason: str = "", **fields: Any) -> None:
        """Add and sync one line. Raises ValueError for an unknown status."""
        entry = {"id": id_, "status": status, **({"reason": reason} if reason else {}), **fields}
        self._file.append([entry])
        self.entries[id_] = entry

    def __contains__(self, id_: str) -> bool:
        return id_ in self.entries

    def ids(self, *statuses: str) -> list[str]:
        """Ids whose last status is one of `statuses`, in ledger order."""
        return [id_ for id_, entry in self.entries.items() if entry["status"] in statuses]

    def counts(self) -> dict[str, int]:
        """How many rows ended in each status; every status is present."""
        found = Counter(entry["status"] for entry in self.entries.values())
        return {status: found.get(status, 0) for status in STATUSES}

    def total(self, field: str) -> int:
        """Sum of a numeric field over all rows."""
        return sum(entry.get(field, 0) for entry in self.entries.values())

    def close(self) -> None:
        self._file.close()


def check_counts(where: Path, counts: Mapping[str, int], num_input: int) -> None:
    """Raise IncompleteError unless the ledger's counts add up to the number of input rows."""
    found = sum(counts.values())
    if found != num_input:
        raise IncompleteError(
            f"{where}: found {found} rows in the ledger ({dict(counts)}), expected {num_input} as in the input. "
            "Run the same command again to finish the rest."
        )
