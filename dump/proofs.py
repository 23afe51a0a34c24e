"""Which samples of a store are proven already, so that a second `dump verify` reads only what has changed.

File: verified.jsonl in the store. Its first line has the terms of the proof (the target, the final norm, the sources);
each other line is a sample that passed: id, sha256 and modification time (ns) of its file, and the counts that the
proof adds up; without counts, it says that the sample's layers were compared with the target's. With other terms the
file begins anew.

A file with the same size, time and ledger entry counts as unchanged: a defect of the disk below the file system is
found by `dump verify --again` alone.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from common.files import UnwritableError, explain_unwritable, write_atomic
from contracts.store import Store

PROOFS_FILE = "verified.jsonl"
LINES_AT_ONCE = 256
"""Lines that are written together; after a kill, so many samples are proven again."""


class Proofs:
    """The proofs of a store's samples under some terms: those on record, and those that are added."""

    def __init__(self, store: Store, terms: Mapping[str, Any], *, again: bool = False) -> None:
        """Read the store's proofs. `again`: delete them first, or one would outlive the defect that is found now."""
        self._store, self._path = store, store.folder / PROOFS_FILE
        if again:
            with suppress(OSError):  # a read-only store
                self._path.unlink(missing_ok=True)
        self._terms = json.dumps({"terms": terms}, sort_keys=True)
        self._begun, self._torn = False, False
        self._known: dict[tuple[str, bool], dict[str, Any]] = {} if again else self._read()
        self._lines: list[str] = []
        self._is_writable = True
        self._started_ns = time.time_ns()

    def find(self, sample_id: str, entry: Mapping[str, Any]) -> dict[str, Any] | None:
        """Return the counts of a sample that was proven and whose file has not changed since, or None."""
        known = self._find(sample_id, entry, has_counts=True)
        return None if known is None else dict(known["counts"])

    def has_layers(self, sample_id: str, entry: Mapping[str, Any]) -> bool:
        """Return whether a sample's layers were compared and its file has not changed since."""
        return self._find(sample_id, entry, has_counts=False) is not None

    def _find(self, sample_id: str, entry: Mapping[str, Any], *, has_counts: bool) -> dict[str, Any] | None:
        known = self._known.get((sample_id, has_counts))
        if known is None or known["sha256"] != entry["sha256"]:
            return None
        try:
            found = self._store.sample_path(sample_id).stat()
        except OSError:
            return None
        is_same = (found.st_size, found.st_mtime_ns) == (entry["size"], known["mtime_ns"])
        return known if is_same else None

    def add(self, sample_id: str, entry: Mapping[str, Any], counts: Mapping[str, Any] | None) -> None:
        """Record a sample that passed; without `counts`, that its layers were compared.

        A file that was written since the proof began may be another one than was read: it is not recorded.
        """
        mtime_ns = self._store.sample_path(sample_id).stat().st_mtime_ns
        if mtime_ns >= self._started_ns:
            return
        line = {"id": sample_id, "sha256": entry["sha256"], "mtime_ns": mtime_ns}
        self._lines.append(json.dumps(line if counts is None else {**line, "counts": counts}))
        if len(self._lines) >= LINES_AT_ONCE:
            self.flush()

    def flush(self) -> None:
        """Write what was added. If the store is read-only, say so once."""
        text = "".join(f"{line}\n" for line in self._lines)
        self._lines.clear()
        if not text or not self._is_writable:
            return
        try:
            if not self._begun:
                write_atomic(self._path, f"{self._terms}\n{text}")
            else:
                with explain_unwritable(self._path), self._path.open("a", encoding="utf-8") as file:
                    file.write("\n" * self._torn + text)
            self._begun, self._torn = True, False
        except UnwritableError as error:
            self._is_writable = False
            print(f"verify: the proof is not kept: {error}")

    def _read(self) -> dict[tuple[str, bool], dict[str, Any]]:
        """Return the lines by id and whether they have counts; empty if the terms differ."""
        try:
            lines = self._path.read_text(encoding="utf-8").split("\n")
        except OSError:
            return {}
        if lines[0] != self._terms:
            return {}
        self._begun, self._torn = True, bool(lines[-1])
        found = {}
        for line in lines[1:-1]:
            try:
                proof = json.loads(line)
                found[proof["id"], "counts" in proof] = proof
            except (ValueError, TypeError, KeyError):  # torn by a kill
                continue
        return found
