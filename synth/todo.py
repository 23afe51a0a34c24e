"""The conversations that a run still has to generate, found from the index of its input.

A place is a row and one of its samples: place (i, j) is sample j of row i.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

from contracts.ledger import STATUSES, read_entries
from contracts.prompt_files import PromptSet, Wanted
from recipe.synth import SynthSection
from synth.input_index import InputIndex, find_index
from synth.output import LEDGER_FILE, Output
from synth.prompts import FirstRows, Prompt, Reject, read_prompts


@dataclass(frozen=True)
class Source:
    """The prompts of an input: rows with modes, temperatures and samples. `folder`: where its index is kept."""

    prompt_set: PromptSet
    section: SynthSection
    temperatures: Sequence[float]
    folder: Path

    @property
    def shape(self) -> tuple[int, int]:
        """Number of rows, and of samples per row."""
        return self.prompt_set.num_rows, self.section.num_samples * len(self.temperatures)

    @cached_property
    def index(self) -> InputIndex:
        """What is known of every row; the first process that needs it reads the whole input."""
        depends_on = [self.prompt_set.checksum, self.section.modes_in_turn, self.shape]
        return find_index(self.folder, depends_on, self.shape, partial(self._read, lambda _: True))

    def read(self, wanted: Wanted) -> Iterator[Prompt | Reject]:
        """Yield every sample of the wanted rows."""
        return self._read(wanted, self.index)

    def _read(self, wanted: Wanted, seen: FirstRows) -> Iterator[Prompt | Reject]:
        rows = self.prompt_set.rows(wanted)
        return read_prompts(rows, self.section.modes_in_turn, self.temperatures, self.section.num_samples, seen)


class Todo:
    """The open places of one shard of a source; use `Todo.find`."""

    def __init__(self, source: Source, shard: tuple[int, int]) -> None:
        self._source = source
        self._ours = source.index.shards(shard[1]) == shard[0]
        self._is_prompt = source.index.is_prompt
        with_tools = self._ours & self._is_prompt & source.index.has_tools[:, None]
        self.num_with_tools = int(with_tools.sum())
        self._open = self._settled = self._ours

    @classmethod
    def find(
        cls, source: Source, out: Output, shard: tuple[int, int] | None, others: Sequence[Path], *, retry_failed: bool
    ) -> Todo:
        """Find the places of `shard` that are neither in `out` nor in the folders of `others`.

        With `retry_failed`, failed places are open again.
        """
        todo = cls(source, shard or (0, 1))
        again = ("failed",) if retry_failed else ()
        for entry in (entry for other in others for entry in read_entries(other / LEDGER_FILE)):
            if entry["status"] not in again:
                todo._ours[entry["index"], entry["sample"]] = False
        todo._settled = out.places_with(STATUSES).reshape(source.shape)
        todo._ours |= todo._settled
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

    @property
    def num_unreached(self) -> int:
        """Number of places that were neither taken nor have a ledger line from earlier."""
        return int((self._open & ~self._settled).sum())

    def take(self, item: Prompt | Reject) -> None:
        """Count a place as taken: it is no longer open."""
        self._open[item.index, item.sample] = False

    def items(self) -> Iterator[Prompt | Reject]:
        """Yield the open places in the order of the input; it may be called again for those that were not taken."""
        is_open = self._open
        items = self._source.read(lambda index: bool(is_open[index].any()))
        return (item for item in items if self._open[item.index, item.sample])
