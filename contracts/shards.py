"""Shards of a stage's run: FOLDER/shards/<i>-of-<n>/, each written by one process.

A conversation's id decides its shard, so it has the same shard in every stage, on every machine and for every order of
the input. A run may continue with another shard count: rows that earlier shards finished stay valid.

All shards of one count are a generation. Each run.json records its generation's number (key `generation`); the largest
one was worked on last. Unlike file times, the number survives copying.
"""

from __future__ import annotations

import fcntl
import re
from pathlib import Path

from common.errors import UserError
from common.files import read_json

SHARD_NAME = re.compile(r"(\d{5,})-of-(\d{5,})")


def shard_of(conversation_id: str, count: int) -> int:
    """Return a conversation's shard, in [0, count). Its id is 32 hex digits of a content hash."""
    return int(conversation_id, 16) % count


def shard_folder(folder: Path, number: int, count: int) -> Path:
    """Return the folder that shard `number` of `count` writes."""
    return folder / "shards" / f"{number:05d}-of-{count:05d}"


def folders_by_count(folder: Path) -> dict[int, list[Path]]:
    """Return the existing shard folders in order, by shard count; the latest generation comes last."""
    found: dict[int, list[Path]] = {}
    for path in sorted((folder / "shards").glob("*-of-*")):
        if (match := SHARD_NAME.fullmatch(path.name)) and (path / "run.json").exists():
            found.setdefault(int(match.group(2)), []).append(path)
    generations = {count: max(map(_read_generation, paths)) for count, paths in found.items()}
    return dict(sorted(found.items(), key=lambda item: (generations[item[0]], item[0])))


def next_generation(folder: Path) -> int | None:
    """Return the generation of a shard's `folder` if work on it begins now; None if it is not a shard.

    It is that of the other shards of the same count, unless shards of another count were worked on since.
    """
    match = SHARD_NAME.fullmatch(folder.name)
    if match is None or folder.parent.name != "shards":
        return None
    found = folders_by_count(folder.parent.parent)
    own = max(map(_read_generation, found.pop(int(match.group(2)), [])), default=0)
    others = max((_read_generation(path) for paths in found.values() for path in paths), default=0)
    return own if own > others else others + 1


def folders_of_others(folder: Path, count: int) -> list[Path]:
    """Return the folders of all shard counts but `count`.

    Raises UserError while a process works on one of them: rows would be done twice.
    """
    others = [path for other, paths in folders_by_count(folder).items() if other != count for path in paths]
    for path in others:
        if is_at_work(path):
            raise UserError(
                path,
                found="a process at work on a shard of another number",
                expected=f"none besides those of {count} shards",
                fix="Stop it, or go on with its number of shards.",
            )
    return others


def is_at_work(folder: Path) -> bool:
    """Return whether a process holds a run's lock. The folder may be read-only."""
    path = folder / "run.lock"
    if not path.exists():
        return False
    with path.open("rb") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)  # over NFS an exclusive lock needs a file open for writing
        except BlockingIOError:
            return True
        except OSError:  # a file system without locks: nothing can be said, and Run.open refuses it
            return False
    return False


def _read_generation(folder: Path) -> int:
    return int(read_json(folder / "run.json", "a shard's state").get("generation", 0))
