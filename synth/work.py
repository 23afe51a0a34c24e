"""Keep many conversations in flight until every prompt has its ledger line.

One thread reads and hashes rows, another writes records (synth/output.py). The event loop only waits for servers.
"""

from __future__ import annotations

import asyncio
import signal
import sys
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice

from common.errors import IncompleteError, raise_known
from contracts.run import Run
from recipe.recipe import Recipe
from serve.endpoints import Endpoints, PromptTooLongError, RequestError
from synth.conversation import Writer, write_conversation
from synth.demand import Demand
from synth.output import LEDGER_FILE, Output
from synth.pace import Pace
from synth.prompts import Prompt, Reject
from synth.rendered import Renderer
from synth.sampling import SharedSampling
from synth.todo import Todo
from synth.tokens import TokenCheck, UnusableTokensError
from synth.tool_calls import ToolCallParser
from synth.watch import Watch
from target.target import Target

PROMPTS_AT_ONCE = 64


@dataclass(frozen=True)
class Job:
    """The open conversations of a run, and the objects that generate them."""

    recipe: Recipe
    target: Target
    sampling: SharedSampling
    todo: Todo
    out: Output
    run: Run
    tool_calls: ToolCallParser | None
    tokens: TokenCheck
    demand: Demand


async def write_all(job: Job, urls: list[str], is_gone: Callable[[], bool]) -> bool:
    """Generate the job's conversations on the servers; return whether Ctrl-C or SIGTERM stopped it.

    `is_gone` returns whether the stage's own server has exited. Raises: see `generate`.
    """
    num_expected = job.todo.num_expected
    pace = Pace.make(job.recipe.synth)
    watch = Watch(job.out.folder, job.out, num_expected)
    stop = Stop(job.recipe.synth.drain_timeout_s, watch, pace)
    feed = Feed(job.todo, job.demand, stop)
    failures_in_row = 0

    async def work(number: int) -> None:
        nonlocal failures_in_row
        while True:
            await pace.admit(number)
            item = await feed.take()
            if item is None:
                return pace.close()
            if isinstance(item, Reject):
                job.out.add_reject(item)
                continue
            watch.in_flight += 1
            done = False
            try:
                conversation = await write_conversation(writer, item)
            except (PromptTooLongError, UnusableTokensError) as error:
                job.out.add_failure(item, "filtered", str(error))
            except RequestError as error:
                job.out.add_failure(item, "failed", str(error))
                failures_in_row += 1
                _refuse_many_failures(job, failures_in_row, str(error))
            else:
                job.out.add(conversation)
                done, failures_in_row = conversation.finish_reason == "stop", 0
            finally:
                watch.in_flight -= 1
                job.demand.end(item, done=done)

    section = job.recipe.synth
    limit = max(section.max_concurrency, section.concurrency or 0) + 16
    try:
        async with Endpoints(urls, section, stage="synth", max_connections=limit, is_gone=is_gone) as endpoints:
            renderer = Renderer(job.recipe.target, job.target)
            writer = Writer(endpoints, job.recipe, job.target, job.sampling, renderer, job.tool_calls, job.tokens)
            async with asyncio.TaskGroup() as group:
                polling = group.create_task(watch.poll(endpoints, pace, job.run))
                workers = [group.create_task(work(number)) for number in range(min(pace.ceiling, num_expected))]
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
    """Distributes the open prompts, which a thread reads from files, to many workers; leaves out those not needed."""

    def __init__(self, todo: Todo, demand: Demand, stop: Stop) -> None:
        self._todo, self._demand, self._stop = todo, demand, stop
        self._items = todo.items()
        self._ready: deque[Prompt | Reject] = deque()
        self._reading = asyncio.Lock()
        self._num_left_out = 0

    async def take(self) -> Prompt | Reject | None:
        """Return the next prompt that is needed, or None if there is none, or the run is to stop."""
        while True:
            await self._demand.wait_for_room(self._is_over)
            item = None if self._is_over() else await self._next()
            if item is None or self._is_over():
                return None
            if isinstance(item, Reject) or self._demand.begin(item):
                self._todo.take(item)
                return item
            self._num_left_out += 1

    def _is_over(self) -> bool:
        return self._stop.asked or self._demand.is_met

    async def _next(self) -> Prompt | Reject | None:
        if not self._ready:
            async with self._reading:
                while not self._ready:
                    self._ready.extend(await asyncio.to_thread(lambda: list(islice(self._items, PROMPTS_AT_ONCE))))
                    if not self._ready:
                        # Rows left out for conversations that then did not end well may be needed now.
                        if not (self._num_left_out and await self._demand.has_freed(self._is_over)):
                            return None
                        self._num_left_out, self._items = 0, self._todo.items()
        return self._ready.popleft()


class Stop:
    """On Ctrl-C or SIGTERM, start no conversation and let those in flight finish in time; on a second, cancel them."""

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
    """Raise IncompleteError if too many rows fail."""
    synth, failed, num_expected = job.recipe.synth, job.out.counts["failed"], job.todo.num_expected
    if in_row >= synth.max_failures_in_row:
        what, limit = f"{in_row} failures in a row", "fewer (synth.max_failures_in_row)"
    elif failed >= synth.max_failures_in_row and failed > synth.max_failed_fraction * num_expected:
        what = f"{failed} of {num_expected} rows failed"
        limit = f"at most {synth.max_failed_fraction:.0%} (synth.max_failed_fraction)"
    else:
        return
    raise IncompleteError(
        f"{job.out.folder / LEDGER_FILE}: found {what} (the last: {reason}), expected {limit}. Fix the cause and run "
        "again with --retry-failed: what was finished is kept."
    )
