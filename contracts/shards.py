"""Shards of a stage's run: FOLDER/shards/<i>-of-<n>/, each written by one process.

A conversation belongs to the same shard in every stage, on every machine and whatever the order of the input, as its id
decides. A run may go on with another number of shards: what those of the number before have finished stays theirs, and
counts.
"""

from __future__ import annotations

import fcntl
import re
from pathlib import Path

from contracts.errors import UserError

SHARD_NAME = re.compile(r"(\d{5,})-of-(\d{5,})")


def shard_of(conversation_id: str, count: int) -> int:
    """Which of `count` shards a conversation belongs to. Its id is 32 hex digits of a hash of its content."""
    return int(conversation_id, 16) % count


def shard_folder(folder: Path, number: int, count: int) -> Path:
    """Where shard `number` of `count` writes."""
    return folder / "shards" / f"{number:05d}-of-{count:05d}"


def folders_by_count(folder: Path) -> dict[int, list[Path]]:
    """The shard folders that are there, in order, by the number of shards they belong to; the latest number last."""
    found: dict[int, list[Path]] = {}
    for path in sorted((folder / "shards").glob("*-of-*")):
        if (match := SHARD_NAME.fullmatch(path.name)) and (path / "run.json").exists():
            found.setdefault(int(match.group(2)), []).append(path)
    latest = {count: max((path / "run.json").stat().st_mtime for path in paths) for count, paths in found.items()}
    return dict(sorted(found.items(), key=lambda item: latest[item[0]]))


def folders_of_others(folder: Path, count: int) -> list[Path]:
    """Folders of other numbers of shards than `count`.

    Raises UserError while one of them is being written: its rows would be done twice.
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
    """Whether a process holds the run in a folder."""
    path = folder / "run.lock"
    if not path.exists():
        return False
    with path.open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return True
    return False
