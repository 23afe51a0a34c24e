"""What one walk through an input finds of each row, kept beside the output: all shards and later starts read it.

Writes: OUTPUT/input-<key>.npz. The key is a hash of the input's checksum and of what else the ids depend on.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
from tqdm import tqdm

from common.files import hash_json, lock_file, make_folder, write_atomic
from common.seen import Seen
from synth.prompts import Prompt, Reject

FORMAT = 1
ROW_OF = {"content": "first_content", "source": "first_source"}
"""The array that has the first row with a row's key, by kind of key."""


@dataclass(frozen=True)
class InputIndex:
    """Shapes, of R rows with S samples each: is_prompt (R, S) bool; ids (R, S, 2) uint64, the halves of the id; first_*
    (R,) int64, the first row with the same content or source id; has_tools (R,) bool.
    """

    is_prompt: np.ndarray
    ids: np.ndarray
    first_content: np.ndarray
    first_source: np.ndarray
    has_tools: np.ndarray

    @classmethod
    def empty(cls, num_rows: int, num_samples: int) -> InputIndex:
        places = (num_rows, num_samples)
        own = np.arange(num_rows)
        return cls(np.zeros(places, bool), np.zeros((*places, 2), np.uint64), own, own.copy(), np.zeros(num_rows, bool))

    def first_row(self, kind: str, key: str, row: int) -> int:  # noqa: ARG002
        """See `Seen.first_row`."""
        return int(getattr(self, ROW_OF[kind])[row])

    def shards(self, count: int) -> np.ndarray:
        """Return the shard of each place, (R, S): of a prompt its id modulo `count`, of an unusable row its index."""
        high, low = self.ids[..., 0] % np.uint64(count), self.ids[..., 1] % np.uint64(count)
        of_ids = (high * np.uint64(2**64 % count) + low) % np.uint64(count)
        of_rows = np.arange(len(self.is_prompt))[:, None] % count
        return np.where(self.is_prompt, of_ids.astype(np.int64), of_rows)


class _Recorder:
    """Remembers the first rows that the walk finds."""

    def __init__(self, index: InputIndex) -> None:
        self._index, self._seen = index, Seen()

    def first_row(self, kind: str, key: str, row: int) -> int:
        first = self._seen.first_row(kind, key, row)
        getattr(self._index, ROW_OF[kind])[row] = first
        return first


Walk = Callable[[_Recorder], Iterator[Prompt | Reject]]


def find_index(folder: Path, depends_on: object, shape: tuple[int, int], walk: Walk) -> InputIndex:
    """Return the index in `folder`, or make it; processes that start at the same time wait for the first one.

    `depends_on`: everything that the ids depend on; `walk`: yields every sample of the input.
    """
    path = folder / f"input-{hash_json([FORMAT, depends_on])[:16]}.npz"
    make_folder(folder)
    with (folder / "input.lock").open("a") as lock:
        lock_file(lock, folder, wait=True)
        if path.exists():
            with np.load(path, allow_pickle=False) as arrays:
                return InputIndex(**{field.name: arrays[field.name] for field in fields(InputIndex)})
        index = _make(shape, walk)
        buffer = io.BytesIO()
        np.savez(buffer, **{field.name: getattr(index, field.name) for field in fields(InputIndex)})
        write_atomic(path, buffer.getvalue())
        return index


def _make(shape: tuple[int, int], walk: Walk) -> InputIndex:
    index = InputIndex.empty(*shape)
    items = walk(_Recorder(index))
    total = shape[0] * shape[1]
    for item in tqdm(items, desc="read", total=total, unit="conv", delay=2, mininterval=1, disable=None):
        if isinstance(item, Prompt):
            place = item.index, item.sample
            index.is_prompt[place] = True
            index.ids[place] = divmod(int(item.id, 16), 2**64)
            index.has_tools[item.index] = item.tools is not None
    return index
