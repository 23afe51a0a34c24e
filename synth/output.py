"""Write a run's records and ledger in a thread, and load them on a resume.

Writes: conversations.jsonl, one record per line in order of completion, and ledger.jsonl, one line per sample of each
        row. A ledger line has the end offset of its record. Bytes after the last such offset are records whose ledger
        lines were lost in a crash: they are cut off, and their rows done again. rejects.jsonl has the filtered rows.

The thread writes and syncs all waiting records, then writes and syncs their ledger lines: two syncs for many records.
"""

from __future__ import annotations

import json
import os
import queue
import threading
from collections import Counter
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import UserError
from contracts.conversation import CONVERSATIONS_FILE, Conversation
from contracts.ledger import STATUSES, LedgerWriter, read_entries
from synth.prompts import Prompt, Reject

REJECTS_FILE = "rejects.jsonl"
LEDGER_FILE = "ledger.jsonl"
FLAGS = ("loop", "stopped", "rendered")
"""Marks of a ledger line, counted in addition to the statuses."""

Item = tuple[dict[str, Any], Conversation | None]


class Output:
    """The records and the ledger of one folder. Memory: one byte per place (row * samples per row + sample).

    `done`: finished conversations by thinking mode and category; `num_unlabelled`: those whose line has neither.
    """

    def __init__(self, folder: Path, num_rows: int, samples_per_row: int) -> None:
        """Load the ledger. Raises UserError for lost records."""
        self.folder = folder
        self.counts: Counter[str] = Counter()
        self.flags: Counter[str] = Counter()
        self.tokens = 0
        self.done: Counter[tuple[str, str]] = Counter()
        self.done_tokens = 0
        self.num_unlabelled = 0
        self._samples_per_row = samples_per_row
        self._status = bytearray(num_rows * samples_per_row)  # 0: open; else 1 + index in STATUSES
        self._ledger = LedgerWriter(folder / LEDGER_FILE)
        committed = 0
        for entry in self._ledger.read():
            self._account(entry)
            committed = max(committed, entry.get("end", 0))
        self._file = (folder / CONVERSATIONS_FILE).open("ab")
        if self._file.tell() < committed:
            raise UserError(
                folder / CONVERSATIONS_FILE,
                found=f"{self._file.tell()} bytes",
                expected=f"at least {committed} as in the ledger",
                fix="Restore the file from a copy, or delete this folder to start over.",
            )
        self._file.truncate(committed)
        self._end = committed
        self._error: Exception | None = None
        self._queue: queue.SimpleQueue[Item | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._write_all, name="output", daemon=True)
        self._thread.start()

    def status(self, index: int, sample: int = 0) -> str:
        """Return the status of a row's sample, "" if it is open."""
        code = self._status[index * self._samples_per_row + sample]
        return STATUSES[code - 1] if code else ""

    def places_with(self, statuses: Collection[str]) -> np.ndarray:
        """Return which places `(places,)` have one of these statuses."""
        codes = [1 + STATUSES.index(status) for status in statuses]
        return np.isin(np.frombuffer(bytes(self._status), dtype=np.uint8), codes)

    def add(self, conversation: Conversation) -> None:
        """Add a conversation. It is durable once the thread has synced its ledger line."""
        has_ended = conversation.finish_reason == "stop"
        reason = conversation.stopped if has_ended else "a reply reached max_tokens"
        entry: dict[str, Any] = {
            "id": conversation.id,
            "status": "done" if has_ended else "truncated",
            **({"reason": reason} if reason else {}),
            "index": conversation.index,
            "sample": conversation.sample,
            **({"source": conversation.source_id} if conversation.source_id != conversation.id else {}),
            "tokens": conversation.usage["completion_tokens"],
            "mode": conversation.thinking_mode,
            "category": conversation.category,
        }
        entry |= {flag: True for flag in FLAGS if getattr(conversation, flag)}
        self._put(entry, conversation)

    def add_failure(self, prompt: Prompt, status: str, reason: str) -> None:
        """Add a prompt without a conversation: failed or filtered."""
        entry: dict[str, Any] = {"id": prompt.id, "status": status, "reason": reason, "index": prompt.index}
        source = {"source": prompt.source_id} if prompt.source_id != prompt.id else {}
        self._put({**entry, "sample": prompt.sample, **source}, None)

    def add_reject(self, reject: Reject) -> None:
        """Add a sample of an unusable row."""
        entry = {"id": f"row-{reject.index:07d}-{reject.sample}", "status": "filtered", "reason": reject.reason}
        self._put({**entry, "index": reject.index, "sample": reject.sample, "where": reject.where}, None)

    def close(self) -> None:
        """Write all waiting records, then rejects.jsonl. Raises UserError if the disk refuses."""
        self._queue.put(None)
        self._thread.join()
        self._file.close()
        self._ledger.close()
        self._raise_error()
        write_rejects(self.folder)

    def _put(self, entry: dict[str, Any], conversation: Conversation | None) -> None:
        self._raise_error()
        self._account(entry)
        self._queue.put((entry, conversation))

    def _account(self, entry: dict[str, Any]) -> None:
        place = entry["index"] * self._samples_per_row + entry["sample"]
        if self._status[place]:  # a retry: the last line wins
            self.counts[STATUSES[self._status[place] - 1]] -= 1
        self._status[place] = 1 + STATUSES.index(entry["status"])
        self.counts[entry["status"]] += 1
        self.flags.update(flag for flag in FLAGS if entry.get(flag))
        self.tokens += entry.get("tokens", 0)
        if entry["status"] == "done":
            self.done_tokens += entry.get("tokens", 0)
            self.done[entry.get("mode", ""), entry.get("category", "")] += 1
            self.num_unlabelled += "mode" not in entry

    def _raise_error(self) -> None:
        if isinstance(self._error, OSError):
            raise UserError(
                self.folder,
                found=self._error.strerror or str(self._error),
                expected="a disk that takes the output",
                fix="Make room and run the same command again: what was finished is kept.",
            ) from self._error
        if self._error is not None:
            raise self._error

    def _write_all(self) -> None:
        try:
            is_open = True
            while is_open:
                batch = [self._queue.get()]
                while not self._queue.empty():
                    batch.append(self._queue.get())
                is_open = batch[-1] is not None
                self._write([item for item in batch if item is not None])
        except Exception as error:  # raised again by the next add() and by close()
            self._error = error

    def _write(self, batch: list[Item]) -> None:
        for entry, conversation in batch:
            if conversation is not None:
                unused = {"conversations" if conversation.conversations is None else "messages"}
                line = conversation.model_dump_json(exclude=unused).encode() + b"\n"
                self._file.write(line)
                self._end += len(line)
                entry["size"], entry["end"] = len(line), self._end
        self._file.flush()
        os.fsync(self._file.fileno())
        self._ledger.append(entry for entry, _ in batch)


def write_rejects(folder: Path) -> None:
    """Write rejects.jsonl, one line per filtered row with its reason."""
    temporary = folder / f".{REJECTS_FILE}.tmp"
    with temporary.open("w") as file:
        for entry in read_entries(folder / LEDGER_FILE):
            if entry["status"] == "filtered" and entry["sample"] == 0:
                told = {key: entry[key] for key in ("index", "where", "id", "reason") if key in entry}
                file.write(json.dumps(told, ensure_ascii=False) + "\n")
    temporary.rename(folder / REJECTS_FILE)
