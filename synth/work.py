"""Keep many conversations in flight until every prompt is accounted for.

Rows are read and hashed in a thread, some at a time; records are written in another (synth/output.py); between them the
event loop only waits for servers.
"""

from __future__ import annotations

import asyncio
import signal
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

from contracts.errors import IncompleteError, raise_known
from contracts.recipe import Recipe
from contracts.run import Run
from contracts.target import Target
from synth.conversation import Writer, write_conversation
from synth.endpoints import Endpoints, PromptTooLongError, RequestError
from synth.output import LEDGER_FILE, Output
from synth.pace import Pace
from synth.prompts import Prompt, Reject
from synth.rendered import Renderer
from synth.watch import Watch

PROMPTS_AT_ONCE = 64


@dataclass(frozen=True)
class Job:
    """What there is to do in a run, and where it goes."""

    recipe: Recipe
    target: Target
    sampling: Mapping[str, Any]
    """Sampling values that hold for every prompt."""
    todo: Iterator[Prompt | Reject]
    out: Output
    run: Run
    num_expected: int


async def write_all(job: Job, urls: list[str], is_gone: Callable[[], bool]) -> bool:
    """Write the job's conversations with the servers at `urls`; whether Ctrl-C or SIGTERM ended it before its end.

    `is_gone` tells that the servers have ended for good. Raises UserError and IncompleteError as `generate` does.
    """
    pace = Pace.make(job.recipe.synth)
    watch = Watch(job.out.folder, job.out, job.num_expected)
    feed = Feed(job.todo)
    stop = Stop(job.recipe.synth.drain_timeout_s, watch, pace)
    failures_in_row = 0

    async def work(number: int) -> None:
        nonlocal failures_in_row
        while True:
            await pace.admit(number)
            item = None if stop.asked else await feed.take()
            if item is None:
                return pace.close()
            if isinstance(item, Reject):
                job.out.add_reject(item)
                continue
            watch.in_flight += 1
            try:
                conversation = await write_conversation(writer, item)
            except PromptTooLongError as error:
                job.out.add_failure(item, "filtered", str(error))
            except RequestError as error:
                job.out.add_failure(item, "failed", str(error))
                failures_in_row += 1
                _refuse_many_failures(job, failures_in_row, str(error))
            else:
                job.out.add(conversation)
                failures_in_row = 0
            finally:
                watch.in_flight -= 1

    try:
        async with Endpoints(urls, job.recipe.synth, is_gone) as endpoints:
            writer = Writer(endpoints, job.recipe, job.target, job.sampling, Renderer(job.recipe.target, job.target))
            async with asyncio.TaskGroup() as group:
                polling = group.create_task(watch.poll(endpoints, pace, job.run))
                workers = [group.create_task(work(number)) for number in range(min(pace.ceiling, job.num_expected))]
                with stop.on_signals(workers):
                    await asyncio.wait(workers)
                polling.cancel()
            watch.write_line(endpoints, pace)
    except BaseExceptionGroup as errors:
        raise_known(errors)
    finally:
        watch.close()
    return stop.asked


class Feed:
    """Prompts for many workers, drawn from a generator that reads files."""

    def __init__(self, todo: Iterator[Prompt | Reject]) -> None:
        self._todo = todo
        self._ready: deque[Prompt | Reject] = deque()
        self._reading = asyncio.Lock()

    async def take(self) -> Prompt | Reject | None:
        """The next one, or None when all are taken."""
        if not self._ready:
            async with self._reading:
                if not self._ready:
                    self._ready.extend(await asyncio.to_thread(lambda: list(islice(self._todo, PROMPTS_AT_ONCE))))
        return self._ready.popleft() if self._ready else None


class Stop:
    """Ctrl-C or SIGTERM: no new conversations; those in flight have some seconds to end. A second one cuts them off."""

    def __init__(self, drain_timeout_s: float, watch: Watch, pace: Pace) -> None:
        self.asked = False
        self._timeout_s = drain_timeout_s
        self._watch = watch
        self._pace = pace

    @contextmanager
    def on_signals(self, workers: list[asyncio.Task[None]]) -> Iterator[None]:
        loop = asyncio.get_running_loop()

        def cut_off() -> None:
            for worker in workers:
                worker.cancel()

        def drain() -> None:
            if self.asked:
                return cut_off()
            self.asked = True
            self._pace.close()
            print(
                f"\nsynth: stopping; {self._watch.in_flight} conversations have {self._timeout_s:.0f} s to end "
                "(once more: at once)",
                file=sys.stderr,
                flush=True,
            )
            loop.call_later(self._timeout_s, cut_off)
            return None

        numbers = (signal.SIGINT, signal.SIGTERM)
        earlier = [signal.getsignal(number) for number in numbers]
        for number in numbers:
            loop.add_signal_handler(number, drain)
        try:
            yield
        finally:
            for number, handler in zip(numbers, earlier, strict=True):
                loop.remove_signal_handler(number)
                signal.signal(number, handler)


def _refuse_many_failures(job: Job, in_row: int, reason: str) -> None:
    """Raise IncompleteError when so much fails that going on is a waste."""
    synth, failed = job.recipe.synth, job.out.counts["failed"]
    if in_row >= synth.max_failures_in_row:
        what, limit = f"{in_row} failures in a row", "fewer (synth.max_failures_in_row)"
    elif failed >= synth.max_failures_in_row and failed > synth.max_failed_fraction * job.num_expected:
        what = f"{failed} of {job.num_expected} rows failed"
        limit = f"at most {synth.max_failed_fraction:.0%} (synth.max_failed_fraction)"
    else:
        return
    raise IncompleteError(
        f"{job.out.folder / LEDGER_FILE}: found {what} (the last: {reason}), expected {limit}. Mend the cause and run "
        "again with --retry-failed: what was finished is kept."
    )
