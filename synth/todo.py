"""The conversations that a run still has to generate, found by reading its whole input once.

A place is a row and one of its samples: place (i, j) is sample j of row i.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tqdm import tqdm

from common.seen import Seen
from contracts.ledger import STATUSES, read_entries
from contracts.prompt_files import PromptSet, Wanted
from contracts.shards import shard_of
from recipe.synth import SynthSection
from synth.output import LEDGER_FILE, Output
from synth.prompts import Prompt, Reject, read_prompts


@dataclass(frozen=True)
class Source:
    """The prompts of an input: rows with modes, temperatures and samples."""

    prompt_set: PromptSet
    section: SynthSection
    temperatures: Sequence[float]
    _seen: Seen = field(default_factory=Seen)

    @property
    def shape(self) -> tuple[int, int]:
        """Number of rows, and of samples per row."""
        return self.prompt_set.num_rows, self.section.num_samples * len(self.temperatures)

    def read(self, wanted: Wanted = lambda _: True) -> Iterator[Prompt | Reject]:
        """Yield every sample of the wanted rows. Read the whole input first, so that repeated rows are known."""
        rows = self.prompt_set.rows(wanted)
        return read_prompts(rows, self.section.modes_in_turn, self.temperatures, self.section.num_samples, self._seen)


class Todo:
    """The open places of one shard of a source; use `Todo.find`."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._ours = np.zeros(source.shape, dtype=bool)
        self._is_prompt = np.zeros(source.shape, dtype=bool)
        self._open = self._ours
        self.num_with_tools = 0

    @classmethod
    def find(
        cls, source: Source, out: Output, shard: tuple[int, int] | None, others: Sequence[Path], *, retry_failed: bool
    ) -> Todo:
        """Find the places of `shard` that are neither in `out` nor in the folders of `others`.

        With `retry_failed`, failed places are open again.
        """
        todo = cls(source)
        again = ("failed",) if retry_failed else ()
        todo._walk(shard or (0, 1))
        for entry in (entry for other in others for entry in read_entries(other / LEDGER_FILE)):
            if entry["status"] not in again:
                todo._ours[entry["index"], entry["sample"]] = False
        todo._ours |= out.places_with(STATUSES).reshape(source.shape)
        settled = [status for status in STATUSES if status not in again]
        todo._open = todo._ours & ~out.places_with(settled).reshape(source.shape)
        return todo

    @property
    def num_expected(self) -> int:
        """Number of conversations in the finished shard."""
        return int(self._ours.sum())

    @property
    def num_open(self) -> int:
        return int(self._open.sum())

    @property
    def needs_server(self) -> bool:
        """Whether any open place is a usable prompt."""
        return bool((self._open & self._is_prompt).any())

    def items(self) -> Iterator[Prompt | Reject]:
        """Yield the open places in the order of the input."""
        is_open = self._open
        items = self._source.read(lambda index: bool(is_open[index].any()))
        return (item for item in items if self._open[item.index, item.sample])

    def _walk(self, shard: tuple[int, int]) -> None:
        number, count = shard
        places = self._ours.size
        items = tqdm(self._source.read(), desc="read", total=places, unit="conv", delay=2, mininterval=1, disable=None)
        for item in items:
            is_prompt = isinstance(item, Prompt)
            place = shard_of(item.id, count) if isinstance(item, Prompt) else item.index % count
            self._ours[item.index, item.sample] = place == number
            self._is_prompt[item.index, item.sample] = is_prompt
            self.num_with_tools += isinstance(item, Prompt) and item.tools is not None and place == number
