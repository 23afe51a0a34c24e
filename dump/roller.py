"""One process's part of a rolling store: what is there, what to capture next, what to delete.

Nothing but the trainer's position and the files that are there decides what to do. So either side may be killed and
started again at any moment, and a trainer that goes back to an earlier checkpoint has its samples captured again.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from common.files import write_json
from common.progress import LINE_INTERVAL_S, Progress
from contracts.conversation import Sample
from contracts.rolling import CaptureState, Position, RollingStore
from contracts.run import Run
from contracts.shelf import place_key
from drafts.order import WindowPlan
from drafts.places import spans_of
from dump.fill import Filler
from dump.ledger import DumpLedger

LOOK_EVERY_S = 0.1
"""How often the trainer's position is read."""
SAVE_EVERY_S = 2.0
"""How often a process writes where it is."""
RECHECK_MEMORY_S, RECHECK_FILES_S = 1.0, 300.0
"""How often a process that waits looks whether its samples are still there."""


@dataclass(frozen=True)
class Placed:
    """A sample to capture. Its id in the store is its place, or its own if it is held out."""

    sample_id: str
    sample: Sample
    metadata: dict[str, str]

    @property
    def num_tokens(self) -> int:
        return len(self.sample.token_ids)


class WindowLedger(DumpLedger):
    """Counts captured samples, and keeps lines of those alone that failed: the others are files, deleted later."""

    def __init__(self, path: Path, store: RollingStore) -> None:
        super().__init__(path)
        self._store = store

    def add(self, entry: dict[str, Any]) -> None:
        """Count a captured sample; of a failed one, leave the reason in its place, so that the trainer goes on."""
        if entry["status"] == "failed":
            super().add(entry)
            self._store.shelf.write_failure(entry["id"], entry["reason"])
            return
        if entry["id"] in self._failed:
            super().add(entry)
            return
        with self._lock:
            self._statuses["done"] += 1
            self.tokens += entry["tokens"]
            self.bytes += entry["size"]


class Roller:
    """Captures the places p with p mod n = i, for `shard` (i, n). `ledger`: of the samples that it captures."""

    def __init__(
        self, store: RollingStore, plan: WindowPlan, run: Run, shard: tuple[int, int], max_reject_fraction: float
    ) -> None:
        self.ledger = WindowLedger(run.folder / "ledger.jsonl", store)
        self._store, self._plan, self._run = store, plan, run
        self._number, self._count = shard
        self._started = time.monotonic()
        self._waited_s = self._looked = self._saved = 0.0
        self._checked = time.monotonic()
        self._position = store.read_position() or Position(first_place=0, next_place=0)
        self._next = self._first_own(self._position.first_place)
        self._here = self._find_own()
        self._strays = set[int]()
        self._note_first()
        self.ledger.max_failed = max_reject_fraction * self._num_own
        self._sweep()

    def retry_failed(self) -> None:
        """Capture the failed samples again: those in the window, and the held-out ones."""
        places = {place_key(place): place for place in self._here}
        failed = [name for name in (*places, *self._held_out) if self._store.shelf.has_failed(name)]
        for name in failed:
            self._store.shelf.delete(name)
        self._here -= {places[name] for name in failed if name in places}
        self.ledger.retry(failed)

    def run(self, filler: Filler, *, until_full: bool) -> dict[str, Any] | None:
        """Capture, wait and delete until the trainer has read all; return the summary.

        With `until_full`, return None once the window is full. Raises IncompleteError for too many failures.
        """
        num_held_out = len(self._plan.chosen.held_out)
        done = max(0, self._next - self._first_ever) // self._count
        with Progress(self._num_own, "dump", "sample", done) as progress:
            while not self.is_finished:
                filler.run(self._rows(), self._num_own, self._tick, progress)
                self._sweep_strays()
                if until_full and self._find() is None and not self.is_finished:
                    self._save()
                    print(f"dump: the window is full up to place {self._end}, with {num_held_out} held-out samples")
                    return None
                self._wait()
        self._save()
        return self.finish()

    @property
    def is_finished(self) -> bool:
        """Whether the trainer's last checkpoint follows the last place."""
        return self._position.first_place >= self._plan.schedule.num_places

    @property
    def _end(self) -> int:
        """The end of the window."""
        return self._plan.end(self._position.first_place)

    @property
    def _held_out(self) -> Sequence[str]:
        """This process's held-out samples."""
        return self._plan.chosen.held_out[self._number :: self._count]

    @property
    def _num_own(self) -> int:
        """This process's places that the trainer reads."""
        first = self._first_own(self._first_ever)
        return len(range(first, self._plan.schedule.num_places, self._count))

    def _first_own(self, place: int) -> int:
        """Return the first place of this process from `place` on."""
        return place + (self._number - place) % self._count

    def _find_own(self) -> set[int]:
        """Return this process's places that are there; of files, also those outside the window."""
        found = self._store.shelf.find_places(range(self._next, self._end, self._count))
        return {place for place in found if place % self._count == self._number}

    def _note_first(self) -> None:
        """Remember the first place that the trainer has asked for: a trainer may begin with an own checkpoint."""
        first = self._position.first_place
        self._first_ever = self._run.state["first_place"] = min(self._run.state.get("first_place", first), first)
        self._run.tick(0.0)

    def _rows(self) -> Iterator[Placed]:
        """Yield what is to be captured, until the window is full."""
        for id_ in self._held_out:
            if not self._store.has(id_):
                yield self._placed(id_, id_)
        while (place := self._find()) is not None:
            self._here.add(place)
            yield self._placed(place_key(place), self._plan.chosen.train[self._plan.order.pick(place)])

    def _placed(self, key: str, sample_id: str) -> Placed:
        index = self._store.index
        number = index.number(sample_id)
        token_ids, mask = index.read_token_ids(number), index.read_mask(number)
        sample = Sample(token_ids=token_ids.tolist(), loss_spans=spans_of(mask))
        return Placed(key, sample, index.read_metadata(number))

    def _find(self) -> int | None:
        """Return the next place to capture; None if all in the window are there."""
        self._look()
        end = self._end
        self._next = next(place for place in count(self._next, self._count) if place not in self._here or place >= end)
        return self._next if self._next < end else None

    def _look(self) -> None:
        """Read where the trainer is, and delete what is outside the window then."""
        if time.monotonic() - self._looked < LOOK_EVERY_S:
            return
        self._looked = time.monotonic()
        before, self._position = self._position.first_place, self._store.read_position() or self._position
        if self._position.first_place == before:
            return
        first = self._first_own(self._position.first_place)
        if self._position.first_place < before:
            self._next = first
            self._strays |= self._here  # some may be on their way
            self._note_first()
        self._next = max(self._next, first)
        self._sweep()

    def _sweep(self) -> None:
        """Delete this process's samples outside the window, and all behind it: another process may have ended."""
        first, end = self._position.first_place, self._end
        self._store.shelf.delete_before(first)
        for place in [place for place in self._here if not first <= place < end]:
            self._store.shelf.delete(place_key(place))
            self._here.discard(place)

    def _sweep_strays(self) -> None:
        """Once nothing is on its way: delete what arrived beyond the window after the trainer went back."""
        for place in self._strays - self._here:
            self._store.shelf.delete(place_key(place))
        self._strays.clear()

    def _recheck(self) -> None:
        """Once nothing is on its way: notice samples that are gone, with the memory they were in or by hand."""
        every_s = RECHECK_MEMORY_S if self._store.shelf.in_memory else RECHECK_FILES_S
        if time.monotonic() - self._checked < every_s:
            return
        self._checked = time.monotonic()
        found = self._store.shelf.find([place_key(place) for place in self._here])
        lost = {place for place in self._here if place_key(place) not in found}
        if lost:
            self._here -= lost
            self._next = min(self._next, *lost)

    def _wait(self) -> None:
        """Wait until there is something to capture, or until the trainer has read all."""
        said = started = time.monotonic()
        while self._find() is None and not self.is_finished:
            time.sleep(LOOK_EVERY_S)
            self._recheck()
            self._tick()
            if time.monotonic() - said > LINE_INTERVAL_S:
                said = time.monotonic()
                where = f"its last checkpoint is at place {self._position.first_place}, the window ends at {self._end}"
                print(f"dump: the window is full, waiting for the trainer: {where}", file=sys.stderr, flush=True)
            self._waited_s += time.monotonic() - started
            started = time.monotonic()

    def _tick(self) -> None:
        """Save the time and where this process is, from time to time."""
        self._look()
        self._run.tick()
        if time.monotonic() - self._saved > SAVE_EVERY_S:
            self._saved = time.monotonic()
            self._save()

    def _save(self) -> None:
        state = CaptureState(
            next_place=self._next,
            end=self._end,
            captured=self.ledger.counts["done"],
            tokens=self.ledger.tokens,
            num_bytes=self.ledger.bytes,
            waited_s=round(self._waited_s, 2),
            seconds=round(time.monotonic() - self._started, 2),
        )
        write_json(self._run.folder / "capture.json", state.model_dump())

    def finish(self) -> dict[str, Any]:
        """Delete what is left, print the counts and mark the run complete."""
        self._sweep()
        self._store.shelf.tidy()
        self.ledger.close()
        failed = self.ledger.counts["failed"]
        summary = {"samples": self._num_own - failed, "failed": failed}
        print(f"dump: {summary['samples']} samples in the trainer's order, {failed} failed -> {self._store.folder}")
        self.ledger.refuse_failures()
        self._run.finish(summary)
        return summary
