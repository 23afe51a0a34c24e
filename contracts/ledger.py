"""The ledger: one JSON line per input row, written after the row's output is durable.

A row without a line has not been done. After a crash, a torn last line is cut off and its row is done again. No row is
lost or done twice.

Format: `{"id": ..., "status": "done|truncated|filtered|failed", "reason": ..., ...}`; each stage adds its own keys
(size, checksum, end offset, tokens). The last line of an id wins: retrying a failed row appends a line.

`Ledger` and `read_entries` only read; only `LedgerWriter` opens the file for writing.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from common.errors import IncompleteError, UserError

STATUSES = ("done", "truncated", "filtered", "failed")


class LedgerWriter:
    """The ledger file of a writing process: read once from the start, then appended to.

    The lock of `contracts.run` ensures a single writer.
    """

    def __init__(self, path: Path) -> None:
        """Open `path`, creating it if needed."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._file = path.open("a+b")

    def read(self) -> Iterator[dict[str, Any]]:
        """Yield every entry in order, then cut off a torn last line. Exhaust it before appending."""
        good_end = 0
        for entry, good_end in _read_lines(self.path):  # noqa: B007 (needed after the loop)
            yield entry
        self._file.truncate(good_end)

    def append(self, entries: Iterable[Mapping[str, Any]]) -> None:
        """Append lines and sync them together. Raises ValueError for an unknown status."""
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
    """Yield every complete entry in order. Another process may be appending to the ledger."""
    return (entry for entry, _ in _read_lines(path))


def _read_lines(path: Path) -> Iterator[tuple[dict[str, Any], int]]:
    """Yield each entry with the offset at which its line ends."""
    end = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                break  # torn by a crash, or being written
            end += len(line)
            yield parse_entry(line, f"{path}:{number}"), end


def parse_entry(line: bytes, where: str) -> dict[str, Any]:
    """Parse one line. Raises UserError if it is not a ledger entry."""
    try:
        entry: dict[str, Any] = json.loads(line)
        if entry["status"] in STATUSES and isinstance(entry["id"], str):
            return entry
    except (ValueError, TypeError, KeyError):
        pass
    raise UserError(
        where,
        found="a line that is not a ledger entry",
        expected='{"id": ..., "status": ...}',
        fix="Restore the file from a copy, or delete the stage's output and run it again.",
    )


class Ledger:
    """A ledger read into memory: the last entry of each id. Never opens the file for writing."""

    def __init__(self, path: Path) -> None:
        """Read `path`. Raises UserError if it does not exist or a line is not an entry."""
        if not path.is_file():
            raise UserError(path, found="no such file", expected="a ledger", fix="Run the stage that writes it first.")
        self.entries: dict[str, dict[str, Any]] = {entry["id"]: entry for entry in read_entries(path)}

    def ids(self, *statuses: str) -> list[str]:
        """Return the ids whose last status is one of `statuses`, in order of first appearance."""
        return [id_ for id_, entry in self.entries.items() if entry["status"] in statuses]

    def counts(self) -> dict[str, int]:
        """Return the number of rows by last status; every status is present."""
        found = Counter(entry["status"] for entry in self.entries.values())
        return {status: found.get(status, 0) for status in STATUSES}


def check_counts(where: Path, counts: Mapping[str, int], num_input: int) -> None:
    """Raise IncompleteError unless the ledger's counts add up to the number of input rows."""
    found = sum(counts.values())
    if found != num_input:
        raise IncompleteError(
            f"{where}: found {found} rows in the ledger ({dict(counts)}), expected {num_input} as in the input. "
            "Run the same command again to finish the rest."
        )
