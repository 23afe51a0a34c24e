"""Where the samples of a rolling store are: the protocol, and the folder on a disk that all processes share.

A sample's name is its place in the trainer's order (`place_key`), or the id of a held-out sample. In place of a sample
whose capture failed there is the reason.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from common.files import write_atomic
from common.tensor_file import Buffer
from contracts.sample_file import StoredSample, read_sample_file, write_sample_file

PLACE = re.compile(r"[0-9]{12}")
HELD_OUT = re.compile(r"[0-9a-f]{32}-[0-9]+")
PLACES_IN_FOLDER = 1000


class GoneError(Exception):
    """A sample that was there a moment ago: the process that lent its memory has ended."""


class Shelf(Protocol):
    """Holds samples by name. Threads may use it at the same time."""

    @property
    def in_memory(self) -> bool:
        """Whether samples vanish with the process that wrote them."""
        ...

    def find(self, names: Sequence[str]) -> set[str]:
        """Return those names whose samples, or reasons, are there."""
        ...

    def find_places(self, window: range) -> set[int]:
        """Return the places in `window` whose samples, or reasons, are there; of files, also all others."""
        ...

    def delete_before(self, place: int) -> None:
        """Delete what processes that have ended left before a place."""
        ...

    def has_failed(self, name: str) -> bool:
        """Return whether there is a reason instead of a sample."""
        ...

    def write(
        self, name: str, sample: StoredSample, dtype: str | None, buffer: Buffer, *, final_states: bool
    ) -> dict[str, Any]:
        """Write a sample, which is seen once it is whole; return its `{size, sha256}`. See `fill_sample`."""
        ...

    def write_failure(self, name: str, reason: str) -> None:
        """Leave the reason of a failed capture."""
        ...

    def read(self, name: str, *, final_states: bool, decode: bool) -> StoredSample:
        """Read a sample; see `read_sample_file`. Raises GoneError."""
        ...

    def delete(self, name: str) -> None:
        """Delete a sample or reason, if it is there."""
        ...

    def read_note(self, name: str) -> bytes | None:
        """Return a small message, or None if there is none."""
        ...

    def write_note(self, name: str, content: bytes) -> None:
        """Leave a small message in place of the last one."""
        ...

    def publish(self, folder: Path, names: Sequence[str]) -> None:
        """Give processes of other nodes these files of `folder`."""
        ...

    def tidy(self) -> None:
        """Remove what is empty."""
        ...


def place_key(place: int) -> str:
    """Return the name of the sample at a place."""
    return f"{place:012d}"


def sample_path(folder: Path, name: str) -> Path:
    """Return a sample's path. Raises ValueError for a malformed name, which could point outside the folder."""
    if PLACE.fullmatch(name):
        return folder / "places" / f"{int(name) // PLACES_IN_FOLDER:06d}" / f"{name}.safetensors"
    if HELD_OUT.fullmatch(name):
        return folder / "samples" / name[:2] / f"{name}.safetensors"
    raise ValueError(f"name {name!r} is neither a place nor a sample's id")


class FolderShelf:
    """Samples as files."""

    in_memory = False

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def find(self, names: Sequence[str]) -> set[str]:
        return {name for name in names if self._path(name).exists() or self._reason(name).exists()}

    def find_places(self, window: range) -> set[int]:
        """See `Shelf`; also delete what killed writers of such places left."""
        found = set()
        for path in (self._folder / "places").glob("*/*"):
            if path.suffix == ".tmp":
                place = path.name[1:13]
                if PLACE.fullmatch(place) and (int(place) - window.start) % window.step == 0:
                    path.unlink(missing_ok=True)  # not that of another process, which may be writing it
            elif PLACE.fullmatch(path.stem):
                found.add(int(path.stem))
        return found

    def delete_before(self, place: int) -> None:
        for path in (self._folder / "places").glob("*/*"):
            if PLACE.fullmatch(path.stem) and int(path.stem) < place:
                path.unlink(missing_ok=True)

    def has_failed(self, name: str) -> bool:
        return self._reason(name).exists()

    def write(
        self, name: str, sample: StoredSample, dtype: str | None, buffer: Buffer, *, final_states: bool
    ) -> dict[str, Any]:
        return write_sample_file(self._path(name), sample, dtype, buffer, final_states=final_states)

    def write_failure(self, name: str, reason: str) -> None:
        write_atomic(self._reason(name), reason)

    def read(self, name: str, *, final_states: bool, decode: bool) -> StoredSample:
        return read_sample_file(self._path(name), final_states=final_states, decode=decode)

    def delete(self, name: str) -> None:
        self._path(name).unlink(missing_ok=True)
        self._reason(name).unlink(missing_ok=True)

    def read_note(self, name: str) -> bytes | None:
        path = self._folder / name
        return path.read_bytes() if path.exists() else None

    def write_note(self, name: str, content: bytes) -> None:
        write_atomic(self._folder / name, content)

    def publish(self, folder: Path, names: Sequence[str]) -> None:
        """Do nothing: all processes see the folder."""

    def tidy(self) -> None:
        for folder in (self._folder / "places").glob("*"):
            with suppress(OSError):  # not empty
                folder.rmdir()

    def _path(self, name: str) -> Path:
        return sample_path(self._folder, name)

    def _reason(self, name: str) -> Path:
        return self._path(name).with_suffix(".failed")
