"""Move samples from a capture backend into the store and the ledger."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Iterator
from concurrent.futures import BrokenExecutor, Future, ProcessPoolExecutor, wait
from contextlib import closing, contextmanager, nullcontext
from functools import partial
from typing import Any

from common.errors import IncompleteError, UserError
from common.progress import Progress
from contracts.store import Store
from dump.backends import make_backend
from dump.capture import CaptureBackend, Staged, Staging
from dump.kept import Kept
from dump.ledger import DumpLedger
from dump.samples import Capturable
from dump.staging import open_staging
from dump.writer import StoreJob, open_writers, store_sample
from recipe.recipe import Recipe
from target.layers import captured_layers
from target.target import Target

MIN_FAILURES = 20
"""Fewer failures than this do not stop a run while it captures."""


@contextmanager
def open_filler(recipe: Recipe, target: Target, store: Store, ledger: DumpLedger) -> Iterator[Filler]:
    """Start the capture backend, its staging folder and the writer processes; stop them at the end.

    The writers end first, because closing a backend may delete the files that they read.
    """
    layer_ids = captured_layers(recipe.target, target)
    job = StoreJob(store, recipe.dump.dtype, len(layer_ids), target.hidden_size, Kept.of(recipe, target))
    with (
        open_staging(recipe.dump, store.folder) as staging,
        closing(make_backend(recipe, target, layer_ids, staging)) as backend,
        open_writers(recipe.dump.writers) as writers,
    ):
        yield Filler(backend, staging, writers, job, ledger)


class Filler:
    """One pass over the rows: the backend captures, the writers store, the ledger gets an entry per row."""

    def __init__(
        self, backend: CaptureBackend, staging: Staging, writers: ProcessPoolExecutor, job: StoreJob, ledger: DumpLedger
    ) -> None:
        self.backend, self.staging, self._writers, self._job, self._ledger = backend, staging, writers, job, ledger
        self._in_backend: dict[str, Capturable] = {}
        self._storing: set[Future[dict[str, Any]]] = set()
        self._problems: list[BaseException] = []

    def run(
        self,
        rows: Iterator[Capturable],
        num_rows: int,
        tick: Callable[[], None] = lambda: None,
        progress: Progress | None = None,
    ) -> None:
        """Capture and store all rows; call `tick` after each. May be called again for further rows.

        Shows `progress`, which a caller of several runs has opened. Raises UserError if the disk is full,
        IncompleteError if too many samples are rejected or a writer dies.
        """
        with nullcontext(progress) if progress else Progress(num_rows, "dump", "sample") as progress:
            note = self._make_note()
            try:
                for staged in self.backend.capture(self._send(rows), self.staging):
                    self._store(staged)
                    progress.set_note(note())
                    progress.update()
                    tick()
                    if self._problems:
                        break
                while self._storing and not self._problems:
                    wait(list(self._storing), timeout=0.2)
            except BrokenExecutor as error:  # a writer died, and the pool takes no more work
                self._problems.append(error)
        if self._problems:
            raise self._explain(self._problems[0]) from None

    def _send(self, rows: Iterator[Capturable]) -> Iterator[tuple[str, list[int]]]:
        for row in rows:
            self._in_backend[row.sample_id] = row
            yield row.sample_id, row.sample.token_ids

    def _store(self, staged: Staged) -> None:
        row = self._in_backend.pop(staged.sample_id)
        future = self._writers.submit(store_sample, self._job, row, staged)
        self._storing.add(future)
        future.add_done_callback(partial(self._account, row))

    def _account(self, row: Capturable, future: Future[dict[str, Any]]) -> None:
        """Add the ledger entry of a sample that is now durable. Runs in a thread of the pool."""
        try:
            if not future.cancelled():
                self._ledger.add(future.result())
                self._ledger.refuse_failures(MIN_FAILURES)
        except BaseException as error:
            self._problems.append(error)
        finally:
            self.staging.give(row.num_tokens * self.backend.token_bytes)
            self._storing.discard(future)

    def _make_note(self) -> Callable[[], str]:
        """Return a function that describes the rates since this call."""
        ledger, started = self._ledger, time.monotonic()
        first_tokens, first_bytes = ledger.tokens, ledger.bytes

        def note() -> str:
            seconds = max(time.monotonic() - started, 1e-3)
            return (
                f"{(ledger.tokens - first_tokens) / seconds:.0f} tok/s, "
                f"{(ledger.bytes - first_bytes) / seconds / 1e6:.1f} MB/s, "
                f"staged {self.staging.taken_bytes / 2**20:.0f} MiB"
            )

        return note

    def _explain(self, problem: BaseException) -> BaseException:
        """Return the error to raise for what stopped the run."""
        folder = self._job.store.folder
        if isinstance(problem, OSError) and problem.errno in (errno.ENOSPC, errno.EDQUOT):
            return UserError(
                folder,
                found=f"{problem.strerror} after {self._ledger.counts['done']} samples",
                expected="a disk that takes the store",
                fix="Make room and run the same command again: what was finished is kept.",
            )
        if isinstance(problem, BrokenExecutor):
            return IncompleteError(
                f"{folder}: found a writer process that died, expected it to live as long as the run (was it out of "
                "memory?). Run the same command again: what was finished is kept."
            )
        return problem
