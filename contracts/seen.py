"""Which keys have been seen, millions of them in little memory."""

from __future__ import annotations

import sqlite3

from contracts.files import hash_bytes


class Seen:
    """Keys and the row that had each first, in a temporary database on disk that dies with the process."""

    def __init__(self) -> None:
        self._db = sqlite3.connect("", check_same_thread=False, isolation_level=None)
        self._db.execute("CREATE TABLE seen (key BLOB PRIMARY KEY, row INTEGER) WITHOUT ROWID")
        self._db.execute("BEGIN")  # never committed: nobody reads it after us

    def first_row(self, kind: str, key: str, row: int) -> int:
        """The row that had `key` first; `row` itself if none had."""
        digest = _digest(kind, key)
        if self._db.execute("INSERT OR IGNORE INTO seen VALUES (?, ?)", (digest, row)).rowcount:
            return row
        return int(self._db.execute("SELECT row FROM seen WHERE key = ?", (digest,)).fetchone()[0])

    def has(self, kind: str, key: str) -> bool:
        """Whether a key was entered."""
        return self._db.execute("SELECT 1 FROM seen WHERE key = ?", (_digest(kind, key),)).fetchone() is not None


def _digest(kind: str, key: str) -> bytes:
    return bytes.fromhex(hash_bytes(f"{kind}/{key}".encode())[:32])
