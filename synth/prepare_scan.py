"""Read one source of `synth prepare` once: check every row, and keep what later steps need of the others on disk.

Writes: FOLDER/rows.jsonl (the prompt rows that passed), rows.bin (ROW records), sketches.bin (their sketches, uint16),
        removed.jsonl (the other rows, with the reason), scan.json (counts, names of categories and languages). The
        folder has a temporary name until it is complete, so a killed run repeats at most one source.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from common.files import write_json
from common.minhash import sketch
from common.progress import track
from contracts.overlap import Document, OverlapIndex, read_document
from contracts.prompt_files import Row
from contracts.prompts import PromptRow, read_id, read_text
from synth.language import detect_language
from synth.prepare_sources import Source, read_row
from synth.prompt_length import PromptLength, describe_tools

BATCH_ROWS = 512
ROW = np.dtype(
    [("row", "<i8"), ("end", "<i8"), ("key", "<u8"), ("context", "<u8"), ("category", "<i4"), ("language", "<i4")]
)
"""A row that passed: its number in the source, the end of its line in rows.jsonl, hashes of its whole normalized text
and of what its user does not say (system messages, tools), numbers of its category and language (-1: not asked for)."""


@dataclass(frozen=True)
class Checks:
    """What rows are checked for. `length` None: no limits; `overlaps` None: no evaluation sets."""

    overlaps: OverlapIndex | None
    length: PromptLength | None
    with_languages: bool


@dataclass
class Names:
    """Numbers for the names of categories or languages, in the order of their appearance."""

    numbers: dict[str, int] = field(default_factory=dict)

    def number(self, name: str) -> int:
        return self.numbers.setdefault(name, len(self.numbers))


def scan_source(source: Source, checks: Checks, folder: Path) -> None:
    """Write `folder`, unless a run before this one did."""
    if folder.exists():
        return
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    scan = _Scan(source, checks)
    names = ("rows.jsonl", "rows.bin", "sketches.bin", "removed.jsonl")
    with ExitStack() as stack:
        files = [stack.enter_context((temporary / name).open("wb")) for name in names]
        rows = track(source.rows(), f"prepare {source.name}", "row", total=source.prompts.num_rows)
        for batch in _batches(rows):
            for file, data in zip(files, scan.check(batch), strict=True):
                file.write(data)
        for file in files:
            file.flush()
            os.fsync(file.fileno())
    tables = {"categories": list(scan.categories.numbers), "languages": list(scan.languages.numbers)}
    write_json(temporary / "scan.json", {"counts": scan.counts, **tables})
    temporary.rename(folder)


class _Scan:
    """The state of one scan."""

    def __init__(self, source: Source, checks: Checks) -> None:
        self.counts: Counter[str] = Counter()
        self.categories, self.languages = Names(), Names()
        self._source, self._checks = source, checks
        self._end = 0

    def check(self, rows: Sequence[Row]) -> tuple[bytes, bytes, bytes, bytes]:
        """Return what a batch adds to rows.jsonl, rows.bin, sketches.bin and removed.jsonl."""
        removed: list[bytes] = []
        read: list[tuple[Row, PromptRow, Document]] = []
        for row in rows:
            self.counts["input"] += 1
            try:
                prompt = read_row(row)
            except ValueError as error:
                id_ = read_id(row.value) if isinstance(row.value, dict) else ""
                removed.append(self._remove(row, id_, "unusable", str(error)))
                continue
            if self._checks.length and (reason := self._checks.length.refuse(prompt)):
                removed.append(self._remove(row, prompt.id, "length", reason))
                continue
            read.append((row, prompt, read_document(prompt.messages)))
        documents = [document for _, _, document in read]
        sketches = sketch([document.said for document in documents])
        found = self._checks.overlaps.find(documents, sketches) if self._checks.overlaps else [[] for _ in read]
        lines, records = [], []
        for (row, prompt, document), matches in zip(read, found, strict=True):
            if matches:
                reason = f"{matches[0].kind} of {matches[0].dataset}"
                more = {"match": matches[0].to_json(), **({"matches": len(matches)} if len(matches) > 1 else {})}
                removed.append(self._remove(row, prompt.id, "overlap", reason, more))
                continue
            line, record = self._keep(row, prompt, document)
            lines.append(line)
            records.append(record)
        kept = np.array([not matches for matches in found], bool)
        return b"".join(lines), np.array(records, ROW).tobytes(), sketches[kept].tobytes(), b"".join(removed)

    def _keep(self, row: Row, prompt: PromptRow, document: Document) -> tuple[bytes, tuple[int, ...]]:
        """Return the line and the record of a row that passed."""
        name = self._source.name
        category = prompt.category or self._source.section.category or name
        value: dict[str, Any] = {"id": f"{name}/{prompt.id or row.index}", "category": category, "source": name}
        language = -1
        if self._checks.with_languages:
            text = "\n".join(read_text(message) for message in prompt.messages if message["role"] == "user")
            value["language"] = detect_language(text)
            language = self.languages.number(value["language"])
        value["messages"] = prompt.messages
        if prompt.tools:
            value["tools"] = prompt.tools
        line = write_line(value)
        self._end += len(line)
        tools = describe_tools(prompt.tools)
        key, context = _hash(f"{document.whole}\n{tools}"), _hash(f"{document.context}\n{tools}")
        return line, (row.index, self._end, key, context, self.categories.number(category), language)

    def _remove(self, row: Row, id_: str, step: str, reason: str, more: dict[str, Any] | None = None) -> bytes:
        self.counts[step] += 1
        place = {"source": self._source.name, "row": row.index, "where": row.where, "id": id_}
        return write_line({**place, "step": step, "reason": reason, **(more or {})})


def _batches(rows: Iterator[Row]) -> Iterator[Sequence[Row]]:
    while batch := list(islice(rows, BATCH_ROWS)):
        yield batch


def write_line(value: dict[str, Any]) -> bytes:
    """Return a JSON line, ASCII alone where a string has lone surrogates, which UTF-8 cannot hold."""
    try:
        return orjson.dumps(value, option=orjson.OPT_APPEND_NEWLINE)
    except (TypeError, ValueError):
        return json.dumps(value).encode() + b"\n"


def _hash(text: str) -> int:
    return int.from_bytes(blake2b(text.encode(errors="replace"), digest_size=8).digest(), "little")
