"""A rolling store: the part of a store that a trainer reads next, captured ahead of it and deleted behind it.

    manifest.json           as in a whole store
    window.json             the bytes of the window, and the settings that the order of the samples follows from
    index/samples.jsonl     one line per sample that may be captured: id, tokens, metadata
          token_ids.bin     the token ids of all samples one after another, int32 little endian
          masks.bin         their loss masks, one byte per token
    samples/3f/<id>...      held-out samples, which evaluations read again and again
    places/000012/000000012345.safetensors   the sample at place 12345 of the trainer's order (drafts/order.py)
                  000000012345.failed        why its capture failed
    trainer.json            where the trainer is: its last checkpoint and its next step
    shards/<i>-of-<n>/      a capture process: run.json, ledger.jsonl (failed places), capture.json (where it is)

With Mooncake (contracts/mooncake.py), `samples/`, `places/` and `trainer.json` are objects in memory instead of files,
and each node has its own folder with the rest.

`dump run --window` captures the places p with p mod n = i, in their order, as far as the window reaches from the
trainer's last checkpoint, and deletes all others. Both sides know the size of every sample beforehand, so they agree
on what is in the window without a message. A file appears under its name when it is whole.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict

from common.files import hash_file, read_json
from common.tensor_file import Buffer
from contracts.conversation import Sample
from contracts.sample_file import StoredSample
from contracts.shelf import FolderShelf, Shelf, sample_path
from contracts.store import ROLLING_FILE, Store, refuse_other_target
from contracts.target_identity import TargetIdentity

POSITION_NOTE = "trainer.json"
PUBLISHED = ("manifest.json", "index/samples.jsonl", "index/token_ids.bin", "index/masks.bin", "window.json")


class Window(BaseModel):
    """The settings of a rolling store. `order`: values of the recipe that decide which sample is at which place.

    `rows`: all rows of the conversations; `left_out`: those that are not captured, by status.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    format_version: int = 1
    num_bytes: int
    order: dict[str, Any]
    rows: int = 0
    left_out: dict[str, int] = {}
    index: str = ""


class Position(BaseModel):
    """Where the trainer is: `first_place` follows its last checkpoint, `next_place` its last step.

    `waited_s` of `seconds` it has waited for samples.
    """

    model_config = ConfigDict(extra="ignore", frozen=True)

    first_place: int
    next_place: int
    waited_s: float = 0.0
    seconds: float = 0.0


class CaptureState(BaseModel):
    """Where a capture process is: it has captured its places up to `next_place`, and may capture up to `end`.

    `waited_s` of `seconds` it has waited for the trainer; `tokens` and `num_bytes` were captured in the rest.
    """

    model_config = ConfigDict(extra="ignore", frozen=True)

    next_place: int
    end: int
    captured: int = 0
    tokens: int = 0
    num_bytes: int = 0
    waited_s: float = 0.0
    seconds: float = 0.0


class RollingStore(Store):
    """A rolling store's folder. `sample_ids`, `lengths`, masks and token ids are those of all samples to capture."""

    def __init__(self, folder: Path, shelf: Shelf | None = None) -> None:
        """`shelf`: where the samples are; default: in the folder."""
        super().__init__(folder)
        self.shelf = shelf or FolderShelf(folder)

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder, "shelf": self.shelf}  # not the index, which may take gigabytes

    @property
    def window_path(self) -> Path:
        return self.folder / ROLLING_FILE

    @property
    def index_folder(self) -> Path:
        return self.folder / "index"

    @cached_property
    def window(self) -> Window:
        """The settings. Raises UserError if they cannot be read."""
        return Window.model_validate(read_json(self.window_path, "the window of a `dump run --window`"))

    @property
    def checksum(self) -> str:
        """Hash of all samples' ids, tokens and masks."""
        return self.window.index

    @cached_property
    def index(self) -> Index:
        return Index(self.index_folder)

    def sample_path(self, sample_id: str) -> Path:
        return sample_path(self.folder, sample_id)

    def write_sample(
        self,
        sample_id: str,
        sample: StoredSample,
        dtype: str | None = None,
        buffer: Buffer | None = None,
        *,
        final_states: bool = True,
    ) -> dict[str, Any]:
        return self.shelf.write(sample_id, sample, dtype, buffer or Buffer(), final_states=final_states)

    def read_sample(self, sample_id: str, *, final_states: bool = True, decode: bool = True) -> StoredSample:
        return self.shelf.read(sample_id, final_states=final_states, decode=decode)

    def has(self, *names: str) -> bool:
        """Return whether all of these samples are there, or the reasons why they are not."""
        return len(self.shelf.find(names)) == len(names)

    def sample_ids(self) -> list[str]:
        return self.index.ids

    def lengths(self) -> dict[str, int]:
        return dict(zip(self.index.ids, self.index.lengths.tolist(), strict=True))

    def read_mask(self, sample_id: str) -> torch.Tensor:
        return self.index.read_mask(self.index.number(sample_id))

    def read_token_ids(self, sample_id: str) -> torch.Tensor:
        return self.index.read_token_ids(self.index.number(sample_id))

    def file_sizes(self, lengths: np.ndarray) -> np.ndarray:
        """Return the bytes of the files of samples of these lengths; no file is larger."""
        form = self.read_manifest().form
        return lengths.astype(np.int64) * form.num_bytes(1) + form.header_bytes

    def kept_bytes(self, held_out: Iterable[int]) -> int:
        """Return the bytes of what is never deleted: the index and the held-out samples, given by their lengths."""
        sizes = self.file_sizes(np.array(list(held_out), np.int64))
        return int(sizes.sum()) + sum(path.stat().st_size for path in self.index_folder.iterdir())

    def read_position(self) -> Position | None:
        """Return where the trainer is; None if that is not known: it has not begun, or is gone with its memory."""
        note = self.shelf.read_note(POSITION_NOTE)
        return None if note is None else Position.model_validate_json(note)

    def write_position(self, position: Position) -> None:
        self.shelf.write_note(POSITION_NOTE, position.model_dump_json(indent=1).encode())

    def publish(self) -> None:
        """Give trainers of other nodes what they need besides the samples."""
        self.shelf.publish(self.folder, PUBLISHED)


class Index:
    """The ids, lengths, token ids and masks of all samples, numbered in ascending order of their ids."""

    def __init__(self, folder: Path) -> None:
        self._lines_path = folder / "samples.jsonl"
        ids, lengths, offsets = list[str](), list[int](), [0]
        with self._lines_path.open("rb") as file:
            for line in file:
                entry = json.loads(line)
                ids.append(entry["id"])
                lengths.append(entry["tokens"])
                offsets.append(offsets[-1] + len(line))
        order = sorted(range(len(ids)), key=ids.__getitem__)
        self.ids = [ids[number] for number in order]
        self.lengths = np.array(lengths, np.int64)[order]
        self._offsets = np.array(offsets, np.int64)[order]
        self._starts = (np.cumsum(lengths) - lengths)[order]
        self._token_ids = np.memmap(folder / "token_ids.bin", "<i4", "r")
        self._masks = np.memmap(folder / "masks.bin", np.bool_, "r")

    def number(self, sample_id: str) -> int:
        """Return a sample's number. Raises KeyError if there is none."""
        return self._numbers[sample_id]

    def read_token_ids(self, number: int) -> torch.Tensor:
        """Return a sample's token ids `(T,)`."""
        return torch.from_numpy(self._token_ids[self._part(number)].copy())

    def read_mask(self, number: int) -> torch.Tensor:
        """Return a sample's loss mask `(T,)`."""
        return torch.from_numpy(self._masks[self._part(number)].copy())

    def read_metadata(self, number: int) -> dict[str, str]:
        """Return the metadata of a sample's file."""
        with self._lines_path.open("rb") as file:
            file.seek(int(self._offsets[number]))
            return dict(json.loads(file.readline())["metadata"])

    def _part(self, number: int) -> slice:
        return slice(int(self._starts[number]), int(self._starts[number] + self.lengths[number]))

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return {id_: number for number, id_ in enumerate(self.ids)}


def write_index(folder: Path, samples: Iterable[tuple[str, Sample, dict[str, str]]]) -> str:
    """Write the index of `samples`, (id, sample, metadata) each; return its checksum."""
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    names = ("samples.jsonl", "token_ids.bin", "masks.bin")
    files = [(temporary / name).open("wb") for name in names]
    try:
        for id_, sample, metadata in samples:
            line = {"id": id_, "tokens": len(sample.token_ids), "metadata": metadata}
            files[0].write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
            files[1].write(np.array(sample.token_ids, "<i4").tobytes())
            mask = np.zeros(len(sample.token_ids), np.bool_)
            for start, end in sample.loss_spans:
                mask[start:end] = True
            files[2].write(mask.tobytes())
        for file in files:
            file.flush()
            os.fsync(file.fileno())
    finally:
        for file in files:
            file.close()
    checksum = "-".join(hash_file(temporary / name)[:21] for name in names)
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)
    return checksum


def is_rolling(folder: Path) -> bool:
    """Return whether a folder holds a rolling store."""
    return (folder / ROLLING_FILE).exists()


def open_rolling(folder: Path, target: TargetIdentity, shelf: Shelf | None = None) -> RollingStore:
    """Open a rolling store. Raises UserError if it is of another target."""
    store = RollingStore(folder, shelf)
    refuse_other_target(folder, store.read_manifest(), target)
    return store
