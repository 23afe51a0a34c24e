"""Small file operations that every stage shares: atomic writes, checksums, JSON lines.

Writes: only ever a temporary name that is synced and renamed, so that a reader sees a whole file or none.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from contracts.errors import UserError


def write_atomic(path: Path, content: bytes | str) -> None:
    """Write `content` under a temporary name in the same folder, sync it and rename it to `path`.

    The name is the same each time: what a killed process left is overwritten when its work is done again.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    data = content.encode() if isinstance(content, str) else content
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    write_atomic(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def read_json(path: Path, what: str) -> Any:
    """Parse a JSON file; a missing or broken one is a UserError that calls it `what`."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            path, found="no such file", expected=what, fix="Run the stage before this one, or correct the path."
        ) from None
    except ValueError as error:
        raise UserError(
            path, found=f"broken JSON ({error})", expected=what, fix="Delete it and run its stage again."
        ) from None


def read_jsonl(path: Path, what: str) -> Iterator[tuple[int, Any]]:
    """Yield `(line number from 1, value)`; a broken line is a UserError that names it."""
    for number, line in read_lines(path, what):
        yield number, parse_line(line, f"{path}:{number}", what)


def read_lines(path: Path, what: str) -> Iterator[tuple[int, bytes]]:
    """Yield `(number from 1, line)`, without empty ones. Raises UserError for a missing file, calling it `what`."""
    if not path.is_file():
        raise UserError(path, found="no such file", expected=what, fix="Correct the path, or make the file first.")
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield number, line


def parse_line(line: bytes, where: str, what: str) -> Any:
    """The JSON of a line; a broken one is a UserError."""
    try:
        return json.loads(line)
    except ValueError as error:
        raise UserError(where, found=f"broken JSON ({error})", expected=what, fix="Mend or delete this line.") from None


def hash_bytes(data: bytes | memoryview) -> str:
    """sha256 as hex."""
    return hashlib.sha256(data).hexdigest()


def hash_json(value: Any) -> str:
    """sha256 of a value's canonical JSON (sorted keys, no spaces)."""
    return hash_bytes(json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode())


def hash_file(path: Path) -> str:
    """sha256 of a file's bytes, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
