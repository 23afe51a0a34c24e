"""The trainer's side of a rolling store: it waits for its samples, and says what it does not need any more.

A sample stays in the window until a checkpoint follows it. So the trainer saves a checkpoint when its steps since the
last one have read half of the window, or when the next step reaches beyond it. The capture fills the other half
meanwhile. When checkpoints are written does not change the weights.
"""

from __future__ import annotations

import sys
import threading
import time
from pathlib import Path
from typing import Literal

import torch

from common.errors import IncompleteError, UserError
from contracts.mooncake import PART_BYTES, Mooncake, MooncakeShelf
from contracts.rolling import Position, RollingStore, is_rolling, open_rolling
from contracts.sample_file import SampleForm
from contracts.shards import folders_by_count, shard_folder
from contracts.shelf import place_key
from drafts.order import WindowPlan, plan_window
from recipe.recipe import Recipe
from target.layers import captured_layers
from target.target import Target
from train.processes import Processes

POLL_S = 0.02
SAY_EVERY_S = 60.0
WRITE_EVERY_S = 2.0


def open_followed(recipe: Recipe, folder: Path, target: Target, mooncake: Mooncake | None = None) -> RollingStore:
    """Open a rolling store; wait until its capture has begun. With Mooncake, `folder` is this node's own.

    Raises UserError if it is of another target, or was begun with other settings of the order than the recipe's.
    """
    said, shelf = 0.0, None
    if mooncake is not None:
        num_layers, length = len(captured_layers(recipe.target, target)), recipe.target.max_model_len
        dump, has_spans = recipe.dump, recipe.dump.unseen_states == "drop"
        form = SampleForm(target.hidden_size, num_layers, dump.dtype, dump.final_state, dump.top_k, has_spans=has_spans)
        shelf = MooncakeShelf(mooncake, largest_bytes=max(form.num_bytes(length) + form.header_bytes, PART_BYTES))
    while not (is_rolling(folder) or (shelf is not None and shelf.fetch(folder))):
        if (folder / "ledger.jsonl").exists():
            raise UserError(folder, found="a whole store", expected="a rolling one", fix="Leave out --follow.")
        if time.monotonic() - said > SAY_EVERY_S:
            said = time.monotonic()
            print(f"train: waiting for `dump run --window` to begin {folder}", flush=True)
        time.sleep(POLL_S)
    store = open_rolling(folder, target, shelf)
    wanted = recipe.training().order(recipe.target.max_model_len)
    for key, value in store.window.order.items():
        if wanted[key] != value:
            raise UserError(
                f"{store.window_path} ({key})",
                found=str(value),
                expected=f"{wanted[key]} as in this recipe",
                fix="Capture and training need the same value: the order of the samples follows from it.",
            )
    if recipe.training().init_from is not None and not recipe.training().held_out_fraction:
        raise UserError(
            "train.held_out_fraction",
            found="0",
            expected="more, to evaluate the draft of train.init_from before the first step",
            fix="Set it, for capture and training: --set train.held_out_fraction=0.01.",
        )
    return store


class Stopped(Exception):
    """The training ends while a thread waits for a sample."""


class Follower:
    """Finds samples by their places. Several threads may use it."""

    def __init__(self, store: RollingStore, batch_size: int) -> None:
        """`batch_size`: the places of an accumulated batch."""
        self.plan: WindowPlan = plan_window(store)
        self._store, self._batch_size = store, batch_size
        self._per_step = self.plan.schedule.per_step
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._saved = self._next = 0
        self._waited_s = self._written = 0.0
        self._started = time.monotonic()
        self._writes = False

    def start(self, first_step: int, processes: Processes) -> None:
        """Say from which step the training goes on."""
        self._saved = self._next = first_step * self._per_step
        self._writes = processes.is_first
        self._started = time.monotonic()
        self._write()

    def stop(self) -> None:
        """Let waiting threads raise Stopped."""
        self._stop.set()

    def locate(self, place: int) -> tuple[str, str]:
        """Return the id of the sample to read at a place, and its name in the store; wait for it.

        In place of a sample whose capture failed, another one of its batch is read. Raises IncompleteError if the
        capture of the whole batch failed.
        """
        first = place - place % self._batch_size
        end = first + self._batch_size
        for other in [place, *reversed(range(first, place)), *range(place + 1, end)]:
            key = place_key(other)
            self.wait_for(key)
            if not self._store.shelf.has_failed(key):
                return self.plan.chosen.train[self.plan.order.pick(other)], key
        raise IncompleteError(
            f"{self._store.folder}: found no captured sample at the places {first} to {end - 1}, expected at least "
            "one. Look at the engine, then run `dump run` again with --retry-failed."
        )

    def wait_for(self, key: str) -> None:
        """Wait until a sample is there, or the reason why it is not. Raises Stopped when the training ends."""
        while not self._store.has(key):
            self.pause()

    def wait_for_held_out(self, sample_id: str) -> None:
        """Wait as `wait_for` does; say once a minute what is awaited."""
        patience = Patience(self._store)
        while not self._store.has(sample_id):
            patience.say(f"held-out sample {sample_id}", self.plan.chosen.held_out.index(sample_id))
            self.pause()

    def pause(self) -> None:
        """Wait a moment. Raises Stopped when the training ends."""
        if self._stop.wait(POLL_S):
            raise Stopped

    def find_lacking(self, step: int, rank: int, world: int) -> list[int]:
        """Return the places that a process reads in a step whose samples are not there."""
        first, per_batch = step * self._per_step, range(rank, self._batch_size, world)
        starts = range(first, first + self._per_step, self._batch_size)
        places = {place_key(start + offset): start + offset for start in starts for offset in per_batch}
        found = self._store.shelf.find(list(places))
        return [place for key, place in places.items() if key not in found]

    def wait_for_step(
        self, step: int, processes: Processes, stopped: dict[str, bool], *, until_empty: bool
    ) -> Literal["ready", "stop", "empty"]:
        """Wait until the samples of a step are there on all processes, or one is told to stop.

        With `until_empty`, do not wait. All processes return the same. Says once a minute what is awaited.
        """
        begun, patience = time.monotonic(), Patience(self._store)
        self._next = step * self._per_step
        while True:
            lacks = self.find_lacking(step, processes.rank, processes.world)
            votes = processes.sum(torch.tensor([bool(lacks), stopped["signal"]], dtype=torch.int64)).tolist()
            self._waited_s += time.monotonic() - begun if lacks else 0.0
            begun = time.monotonic()
            self._write(at_most_every_s=WRITE_EVERY_S)
            if not votes[0]:
                return "ready"
            if votes[1] or until_empty:
                return "stop" if votes[1] else "empty"
            if lacks:
                patience.say(f"the sample at place {lacks[0]} (step {step + 1})", lacks[0])
            time.sleep(POLL_S)

    def must_save(self, step: int, last_saved: int) -> bool:
        """Return whether a checkpoint is due after `step` steps so that the window moves on.

        `last_saved`: the steps of the last checkpoint, also of one that is still being written.
        """
        place, kept, plan = step * self._per_step, last_saved * self._per_step, self.plan
        if plan.schedule.bytes_between(kept, place) * 2 >= plan.num_bytes:
            return True
        return place < plan.schedule.num_places and place + self._per_step > plan.end(kept)

    def note_saved(self, step: int) -> None:
        """Say that a checkpoint after `step` steps is on disk: the samples before it may be deleted."""
        self._saved = step * self._per_step
        self._write()

    def _write(self, at_most_every_s: float = 0.0) -> None:
        with self._lock:
            if not self._writes or time.monotonic() - self._written < at_most_every_s:
                return
            self._written = time.monotonic()
            self._store.write_position(
                Position(
                    first_place=self._saved,
                    next_place=self._next,
                    waited_s=round(self._waited_s, 2),
                    seconds=round(time.monotonic() - self._started, 2),
                )
            )


class Patience:
    """Says once a minute what a trainer waits for: a capture that has ended with an error cannot tell it."""

    def __init__(self, store: RollingStore) -> None:
        self._store = store
        self._begun = self._said = time.monotonic()

    def say(self, what: str, number: int) -> None:
        """`number`: of the sample, in the order that the capture processes share."""
        now = time.monotonic()
        if now - self._said < SAY_EVERY_S:
            return
        self._said = now
        waited = f"train: has waited {now - self._begun:.0f} s for {what}"
        print(f"{waited}, {self._describe_capture(number)}", file=sys.stderr, flush=True)

    def _describe_capture(self, number: int) -> str:
        """Return which capture process is to write a sample, and when it last said where it is."""
        counts = list(folders_by_count(self._store.folder))  # the last one is at work; none where nodes share no disk
        if not counts:
            return "which `dump run --window` captures: look whether it still runs"
        count = counts[-1]
        folder = shard_folder(self._store.folder, number % count, count)
        option = f" --shard {number % count}/{count}" if count > 1 else ""
        who = f"which `dump run --window{option}` captures"
        try:
            age_s = time.time() - (folder / "capture.json").stat().st_mtime
        except FileNotFoundError:
            return f"{who}: it has captured nothing yet"
        return f"{who}: it last wrote {folder}/capture.json {age_s:.0f} s ago, which it does every few seconds"
