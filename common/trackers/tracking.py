"""Log a run to several trackers at once, from threads: a slow or failing tracker neither stops nor delays a run.

Each tracker has a thread and a queue. A value that a tracker refuses is tried again after a wait that doubles; the user
is warned once, and told at the end what was not logged. Writes: see identity.py and the trackers.
"""

from __future__ import annotations

import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pkgutil import resolve_name

from common.redact import redact_url
from common.trackers import TRACKERS
from common.trackers.identity import note_tracker, read_identity
from common.trackers.tracker import TrackedRun, Tracker

CLOSE_TIMEOUT_S = 60.0  # for all trackers together
FIRST_WAIT_S, LONGEST_WAIT_S = 1.0, 300.0

Entry = tuple[dict[str, float], int]
"""Values by name, and their step."""


class Tracking:
    """The trackers of one run; use it as a context manager.

    What a tracker has from an earlier process is left out: `log` may be given everything from the run's start again.
    """

    def __init__(self, run: TrackedRun, names: Sequence[str]) -> None:
        self._run = run
        known = read_identity(run.folder)["trackers"]
        self._lock = threading.Lock()
        self._threads = [_Thread(name, replace(run, known=known.get(name, {})), self._note) for name in names]

    def __enter__(self) -> Tracking:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self.close(failed=kind is not None)

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Log values of one step to all trackers, without waiting for them."""
        for thread in self._threads:
            thread.add((dict(values), step))

    def close(self, *, failed: bool = False) -> None:
        """Wait for all trackers, at most `CLOSE_TIMEOUT_S`, and print what some of them did not get."""
        for thread in self._threads:
            thread.close(failed=failed)
        deadline = time.monotonic() + CLOSE_TIMEOUT_S
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
            if lost := thread.describe_lost():
                print(f"{self._run.stage}: {lost}; {self._run.folder} has them", file=sys.stderr)

    @property
    def complete(self) -> bool:
        """Whether all trackers have everything; of use after `close`."""
        return not any(thread.describe_lost() for thread in self._threads)

    def _note(self, tracker: str, facts: Mapping[str, str]) -> None:
        with self._lock:
            note_tracker(self._run.folder, tracker, facts)


class _Thread(threading.Thread):
    """Sends the entries of one tracker in order. It is a daemon: a tracker that hangs does not keep the process."""

    def __init__(self, tracker: str, run: TrackedRun, note: Callable[[str, Mapping[str, str]], None]) -> None:
        super().__init__(name=f"tracker {tracker}", daemon=True)
        self.tracker = tracker
        self._run, self._note = run, note
        self._entries: deque[Entry] = deque()
        self._num_entries = 0
        self._changed = threading.Condition()
        self._closing = threading.Event()
        self._failed = self._finished = False
        self._error: Exception | None = None

    def add(self, entry: Entry) -> None:
        with self._changed:
            self._entries.append(entry)
            self._num_entries += 1
            self._changed.notify()

    def close(self, *, failed: bool) -> None:
        with self._changed:
            self._failed = failed
            self._closing.set()
            self._changed.notify()

    def run(self) -> None:
        tracker: Tracker | None = None
        wait_s = FIRST_WAIT_S
        while not self._finished:
            # A tracker raises errors of many libraries, and none of them may stop the run that it watches.
            try:
                if tracker is None:
                    tracker = self._begin()
                else:
                    self._go_on(tracker)
                wait_s = FIRST_WAIT_S
            except Exception as error:
                self._warn(error)
                if self._closing.is_set():
                    return
                self._closing.wait(wait_s)
                wait_s = min(2 * wait_s, LONGEST_WAIT_S)

    def _begin(self) -> Tracker:
        tracker: Tracker = resolve_name(TRACKERS[self.tracker])(self._run)
        self._note(self.tracker, tracker.start())
        return tracker

    def _go_on(self, tracker: Tracker) -> None:
        """Wait for an entry and send it; after the last one, finish the run."""
        with self._changed:
            while not (self._entries or self._closing.is_set()):
                self._changed.wait()
            entry = self._entries[0] if self._entries else None
        if entry is None:
            tracker.finish(self._failed)
            self._finished, self._error = True, None
            return
        values, step = entry
        new = {name: value for name, value in values.items() if step > tracker.last_step(name)}
        if new:
            tracker.log(new, step)
        with self._changed:
            self._entries.popleft()

    def _warn(self, error: Exception) -> None:
        if self._error is None:
            print(
                f"{self._run.stage}: {self.tracker} does not answer and is tried again ({_in_words(error)})",
                file=sys.stderr,
            )
        self._error = error

    def describe_lost(self) -> str:
        """Return what was not logged, in words; "" if all was."""
        if self._finished:
            return ""
        with self._changed:
            steps = [step for _, step in self._entries]
        why = _in_words(self._error) if self._error else f"no answer within {CLOSE_TIMEOUT_S:.0f} s"
        if not steps:
            return f"{self.tracker} did not confirm the end of the run ({why})"
        return (
            f"not logged to {self.tracker}: {len(steps)} of {self._num_entries} entries, "
            f"steps {steps[0]} to {steps[-1]} ({why})"
        )


def _in_words(error: Exception) -> str:
    """Return kind and first line of an error, without credentials of a URL."""
    lines = str(error).strip().splitlines() or [""]
    return redact_url(f"{type(error).__name__}: {lines[0][:200]}")
