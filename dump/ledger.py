"""The ledger of a dump in progress: its samples and counts."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Container, Iterable
from pathlib import Path
from typing import Any

from common.errors import IncompleteError
from common.seen import Seen
from contracts.ledger import STATUSES, LedgerWriter


class DumpLedger:
    """Appends entries and counts them; may be used from several threads.

    `max_failed`: the number of failed samples above which the run stops. `tokens` and `bytes` are totals of the stored
    samples.
    """

    def __init__(self, path: Path) -> None:
        """Open `path` and count its entries."""
        self.path = path
        self.tokens = self.bytes = 0
        self.max_failed = float("inf")
        self._statuses: Counter[str] = Counter()
        self._failed: dict[str, str] = {}  # id -> reason
        self._to_retry: set[str] = set()
        self._file = LedgerWriter(path)
        self._seen = Seen()
        self._lock = threading.Lock()
        for entry in self._file.read():
            self._count(entry)

    @property
    def counts(self) -> dict[str, int]:
        """Number of samples by their last status; every status is present."""
        return {status: self._statuses[status] for status in STATUSES}

    @property
    def num_finished(self) -> int:
        """Number of samples that have an entry and are not to be retried."""
        return self._statuses.total() - len(self._to_retry)

    def has(self, sample_id: str) -> bool:
        """Return whether a sample has an entry and is not to be retried."""
        with self._lock:
            return sample_id not in self._to_retry and self._seen.has("sample", sample_id)

    def retry_failed(self, done_elsewhere: Container[str] = frozenset()) -> None:
        """Treat failed samples as not done yet, as `retry` does."""
        self.retry(sample_id for sample_id in self._failed if sample_id not in done_elsewhere)

    def retry(self, sample_ids: Iterable[str]) -> None:
        """Treat these of the failed samples as not done yet. Their entries stay valid until a new one follows."""
        self._to_retry = self._failed.keys() & set(sample_ids)

    def add(self, entry: dict[str, Any]) -> None:
        """Append and sync one entry. Call it after the sample itself is durable."""
        with self._lock:
            self._file.append([entry])
            self._count(entry)

    def refuse_failures(self, at_least: int = 0) -> None:
        """Raise IncompleteError if more than `max_failed` samples failed, and no fewer than `at_least`.

        Samples still to be retried do not count.
        """
        with self._lock:
            num_failed = self._statuses["failed"] - len(self._to_retry)
            if num_failed <= self.max_failed or num_failed < at_least:
                return
            first = next((reason for id_, reason in self._failed.items() if id_ not in self._to_retry), "")
        raise IncompleteError(
            f"{self.path}: found {num_failed} samples rejected (the first: {first}), expected at most "
            f"{self.max_failed:g} (dump.max_reject_fraction). Look at the engine, then run again with --retry-failed."
        )

    def close(self) -> None:
        self._file.close()

    def _count(self, entry: dict[str, Any]) -> None:
        if entry["id"] in self._failed:  # a retry: the last entry counts
            self._statuses["failed"] -= 1
            del self._failed[entry["id"]]
            self._to_retry.discard(entry["id"])
        self._seen.first_row("sample", entry["id"], 0)
        self._statuses[entry["status"]] += 1
        self.tokens += entry.get("tokens", 0)
        self.bytes += entry.get("size", 0)
        if entry["status"] == "failed":
            self._failed[entry["id"]] = entry["reason"]
