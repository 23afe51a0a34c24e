"""Read files that other processes are writing, again and again: each time only what is new.

A missing file is no error. What cannot be read is kept as text in `problem`, for a reader that must go on.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


class Tail:
    """A file of lines that grows. A subclass takes each line once, in `take`.

    Lines are taken when they end with a newline: a torn or half-written last line waits. If the file was replaced or
    cut, reading begins again after `reset`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.problem = ""
        self.num_lines = 0
        self._inode, self._end = -1, 0
        self.reset()

    def take(self, line: bytes) -> None:
        """Use the next line, number `num_lines` from 1. Raises ValueError, KeyError or TypeError for a broken one."""
        raise NotImplementedError

    def reset(self) -> None:
        """Forget all lines."""
        raise NotImplementedError

    def update(self) -> None:
        """Take the lines that were appended since the last call."""
        try:
            with self.path.open("rb") as file:
                found = os.fstat(file.fileno())
                if found.st_ino != self._inode or found.st_size < self._end:
                    self._restart(found.st_ino)
                if found.st_size == self._end:
                    return
                file.seek(self._end)
                for line in file:
                    if not line.endswith(b"\n"):
                        break
                    self._end += len(line)
                    self.num_lines += 1
                    self._try(line)
        except FileNotFoundError:
            self._restart(-1)
        except OSError as error:
            self.problem = f"cannot be read ({(error.strerror or 'refused').lower()})"

    def _restart(self, inode: int) -> None:
        self._inode, self._end, self.num_lines, self.problem = inode, 0, 0, ""
        self.reset()

    def _try(self, line: bytes) -> None:
        try:
            self.take(line)
        except (ValueError, KeyError, TypeError, ArithmeticError, RecursionError):
            self.problem = self.problem or f"line {self.num_lines} is broken"


class JsonFile:
    """A file with one JSON object, parsed again only when it has changed.

    `value` is {} without a file. After a broken version, the last good one stays.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.problem = ""
        self.value: dict[str, Any] = {}
        self.exists = False
        self._seen: tuple[int, int, int] | None = None

    def update(self) -> None:
        """Read the file if it is another than at the last call."""
        try:
            found = self.path.stat()
            seen = (found.st_ino, found.st_size, found.st_mtime_ns)
            self.exists = True
            if seen == self._seen:
                return
            value = json.loads(self.path.read_bytes())
        except FileNotFoundError:
            self.exists, self.value, self.problem, self._seen = False, {}, "", None
            return
        except OSError as error:
            self.problem = f"cannot be read ({(error.strerror or 'refused').lower()})"
            return
        except (ValueError, RecursionError) as error:
            self.problem, self._seen = f"broken JSON ({error})", seen
            return
        self._seen = seen
        if isinstance(value, dict):
            self.value, self.problem = value, ""
        else:
            self.problem = "no JSON object"
