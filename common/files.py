"""Small file operations that all stages share: atomic writes, locks, checksums, JSON and JSON lines.

Writes: a temporary name first, which is synced and renamed, so that a reader finds a whole file or none.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from common.errors import UserError

UNWRITABLE = {
    errno.EACCES, errno.EEXIST, errno.EISDIR, errno.ENAMETOOLONG, errno.ENOENT, errno.ENOTDIR, errno.EPERM, errno.EROFS,
}  # fmt: skip
"""Errors of a wrong output path. A full disk is none of them: it can happen to any path."""


class UnwritableError(UserError):
    """The user named an output that cannot be created or written."""


@contextmanager
def explain_unwritable(path: Path) -> Iterator[None]:
    """Turn an OSError of creating or writing the output `path` into an UnwritableError."""
    try:
        yield
    except OSError as error:
        if error.errno not in UNWRITABLE:
            raise
        raise UnwritableError(
            path,
            found=f"a path that cannot be written ({(error.strerror or 'refused').lower()}: {error.filename or path})",
            expected="an output that can be created",
            fix="Choose another --output, or change the permissions of this one.",
        ) from None


def write_atomic(path: Path, content: bytes | str) -> None:
    """Write `content` under a temporary name in the same folder, sync it and rename it to `path`.

    The temporary name is always the same, so that the next attempt overwrites what a killed process left.
    Raises UnwritableError when the path cannot be written.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    data = content.encode() if isinstance(content, str) else content
    with explain_unwritable(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(path)


@contextmanager
def replace_file(path: Path) -> Iterator[IO[bytes]]:
    """Open a temporary name of `path` for writing in pieces; sync it and rename it to `path` at the end of the block.

    Raises: see `write_atomic`.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    with explain_unwritable(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = temporary.open("wb")
    with file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically. Raises: see `write_atomic`."""
    write_atomic(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def make_folder(path: Path) -> None:
    """Create an output folder, and try whether files can be written into it. Raises UnwritableError."""
    with explain_unwritable(path):
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass


def lock_file(file: IO[Any], folder: Path, *, wait: bool) -> bool:
    """Lock `file` of `folder` until it is closed. Without `wait`, return False if another process holds the lock.

    Raises UserError if the file system has no locks.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:  # Lustre without -o flock, some NFS mounts
        raise UserError(
            folder,
            found=f"a file system that refuses file locks ({(error.strerror or 'no reason given').lower()})",
            expected="one with flock(2), which keeps a second process out of the folder",
            fix="Mount it with locks (Lustre: -o flock), or choose an --output elsewhere.",
        ) from None
    return True


def read_json(path: Path, what: str) -> Any:
    """Return the value of a JSON file. Raises UserError for a missing or broken one, which it calls `what`."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            path, found="no such file", expected=what, fix="Run the stage before this one, or correct the path."
        ) from None
    except OSError as error:
        raise UserError(path, found=(error.strerror or "no file").lower(), expected=what, fix="Correct it.") from None
    except ValueError as error:
        raise UserError(
            path, found=f"broken JSON ({error})", expected=what, fix="Delete it and run its stage again."
        ) from None


def read_lines(path: Path, what: str) -> Iterator[tuple[int, bytes]]:
    """Yield `(number from 1, line)` without the empty lines. Raises UserError for a missing file, calling it `what`."""
    if not path.is_file():
        raise UserError(path, found="no such file", expected=what, fix="Correct the path, or make the file first.")
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield number, line


def parse_line(line: bytes, where: str, what: str) -> Any:
    """Return the JSON value of a line. Raises UserError for a broken one."""
    try:
        return json.loads(line)
    except ValueError as error:
        raise UserError(where, found=f"broken JSON ({error})", expected=what, fix="Mend or delete this line.") from None


def hash_bytes(data: bytes | memoryview) -> str:
    """Return the sha256 as hex."""
    return hashlib.sha256(data).hexdigest()


def hash_json(value: Any) -> str:
    """Return the sha256 of a value's canonical JSON (sorted keys, no spaces)."""
    return hash_bytes(json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode())


def hash_file(path: Path) -> str:
    """Return the sha256 of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
