"""Remember millions of keys in little memory."""

from __future__ import annotations

import sqlite3

from common.files import hash_bytes


class Seen:
    """Keys and the first row of each, in a temporary database on disk that is deleted with the process."""

    def __init__(self) -> None:
        self._db = sqlite3.connect("", check_same_thread=False, isolation_level=None)
        self._db.execute("CREATE TABLE seen (key BLOB PRIMARY KEY, row INTEGER) WITHOUT ROWID")
        self._db.execute("BEGIN")  # never committed: no other process reads it

    def first_row(self, kind: str, key: str, row: int) -> int:
        """Return the first row with `key`, which is `row` itself if the key is new."""
        digest = _digest(kind, key)
        if self._db.execute("INSERT OR IGNORE INTO seen VALUES (?, ?)", (digest, row)).rowcount:
            return row
        return int(self._db.execute("SELECT row FROM seen WHERE key = ?", (digest,)).fetchone()[0])

    def has(self, kind: str, key: str) -> bool:
        """Return whether a key was entered."""
        return self._db.execute("SELECT 1 FROM seen WHERE key = ?", (_digest(kind, key),)).fetchone() is not None


def _digest(kind: str, key: str) -> bytes:
    return bytes.fromhex(hash_bytes(f"{kind}/{key}".encode())[:32])
