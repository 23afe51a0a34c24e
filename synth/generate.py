"""Have the target write the conversations of a whole prompt set, exactly once each.

Reads:  prompts (synth/sources.py), a recipe, a served target.
Writes: OUTPUT/conversations.jsonl, ledger.jsonl, rejects.jsonl (synth/output.py) and metrics.jsonl (synth/watch.py);
        of shard i of n, to OUTPUT/shards/<i>-of-<n>/, for `synth merge`.
"""

from __future__ import annotations

import asyncio
import signal
import sys
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

from contracts.errors import IncompleteError, UserError, raise_known
from contracts.ledger import STATUSES, check_counts, read_entries
from contracts.recipe import Recipe
from contracts.run import Run
from contracts.target import Target
from serve.command import build_command
from serve.server import find_port, run_server
from synth.conversation import Writer, check_modes, resolve_sampling, write_conversation
from synth.endpoints import Endpoints, PromptTooLongError, RequestError
from synth.output import LEDGER_FILE, Output
from synth.pace import Pace
from synth.prompts import Prompt, Reject, Seen, read_prompts
from synth.rendered import Renderer
from synth.sources import open_prompts
from synth.watch import Watch

STAGE = "synth generate"
PROMPTS_AT_ONCE = 64


def generate(
    recipe: Recipe,
    prompts: str | Path,
    output: Path,
    *,
    shard: tuple[int, int] | None = None,
    retry_failed: bool = False,
) -> dict[str, Any]:
    """Write every conversation that `output` still lacks; its summary (counts by status, tokens).

    Without `synth.endpoints` a server is started and stopped. `shard` (i, n) takes the rows whose place in the input is
    i modulo n. Raises UserError for bad input, IncompleteError when the servers are lost or too many rows failed, and
    KeyboardInterrupt after Ctrl-C or SIGTERM; all keep what was finished.
    """
    check_modes(recipe)
    temperatures, defaults = resolve_sampling(recipe)
    target = Target.read(recipe.target.path)
    prompt_set = open_prompts(prompts)
    folder = output if shard is None else output / "shards" / f"{shard[0]:05d}-of-{shard[1]:05d}"
    run = Run.open(
        folder,
        STAGE,
        settings={
            "synth": {**recipe.synth.settings(), "temperature": temperatures, **defaults},
            "serve": recipe.serve.settings(),
            "max_model_len": recipe.target.max_model_len,
            "thinking_mode_values": recipe.target.thinking_mode_values,
            **({} if shard is None else {"shard": f"{shard[0]}/{shard[1]}"}),
        },
        inputs={"prompts": prompt_set.checksum, "target": target.fingerprint},
        recipe_yaml=recipe.to_yaml(),
    )
    samples_per_row = recipe.synth.num_samples * len(temperatures)
    first, step = shard or (0, 1)
    num_rows = len(range(first, prompt_set.num_rows, step))
    num_expected = num_rows * samples_per_row
    seen = Seen()

    def note(entry: dict[str, Any]) -> None:
        if entry["sample"] == 0:
            seen.note(entry["id"], entry.get("source", ""), entry["index"])

    out = Output(folder, prompt_set.num_rows, samples_per_row, note)
    again = ("", "failed") if retry_failed else ("",)

    def wanted(index: int) -> bool:
        return index % step == first and any(out.status(index, sample) in again for sample in range(samples_per_row))

    num_open = num_expected - out.counts.total() + (out.counts["failed"] if retry_failed else 0)
    if run.complete and not num_open:
        out.close()
        print(f"synth: {folder} is finished, skipped ({describe(run.state['summary'])})")
        return dict(run.state["summary"])
    run.reopen()
    print(f"synth: {prompt_set.num_rows} rows in {len(prompt_set.files)} files; {num_expected} conversations to write")
    if out.counts.total():
        print(f"synth: {num_expected - num_open} of {num_expected} are there already, going on with {num_open}")
    todo = (
        item
        for item in read_prompts(
            prompt_set.rows(wanted), recipe.synth.thinking_modes, temperatures, recipe.synth.num_samples, seen
        )
        if isinstance(item, Reject) or out.status(item.index, item.sample) in again
    )
    stopped = False
    try:
        if num_open:
            with serve_target(recipe, target, folder) as (urls, is_gone):
                stopped = asyncio.run(_write_all(recipe, target, defaults, urls, is_gone, todo, out, run, num_expected))
    finally:
        out.close()
        run.tick(0.0)
    if stopped:
        raise KeyboardInterrupt
    summary = {
        **{status: out.counts[status] for status in STATUSES},
        "input": num_expected,
        "rows": num_rows,
        "tokens": out.tokens,
        **out.flags,
    }
    check_counts(folder / LEDGER_FILE, {status: out.counts[status] for status in STATUSES}, num_expected)
    print(f"synth: {describe(summary)} in {run.seconds:.0f} s -> {folder / 'conversations.jsonl'}")
    _refuse_useless(folder, out, recipe.synth.max_failed_fraction, num_expected)
    run.finish(summary)
    return summary


@contextmanager
def serve_target(recipe: Recipe, target: Target, folder: Path) -> Iterator[tuple[list[str], Callable[[], bool]]]:
    """URLs of the recipe's endpoints, or of a server that lives as long as the block; whether it is gone for good."""
    if recipe.synth.endpoints:
        yield recipe.synth.endpoints, lambda: False
        return
    command = build_command(recipe, target, port=find_port(recipe.serve.host, recipe.serve.port))
    timeout_s = recipe.serve.startup_timeout_s
    with run_server(command, log_path=folder / "server.log", startup_timeout_s=timeout_s) as server:
        yield [f"{server.url}/v1"], lambda: server.process.poll() is not None


async def _write_all(
    recipe: Recipe,
    target: Target,
    defaults: Mapping[str, Any],
    urls: list[str],
    is_gone: Callable[[], bool],
    todo: Iterator[Prompt | Reject],
    out: Output,
    run: Run,
    num_expected: int,
) -> bool:
    """Keep as many conversations in flight as the pace allows, until all prompts are accounted for or a signal comes.

    Returns whether it was a signal.
    """
    pace = Pace.make(recipe.synth)
    watch = Watch(out.folder, out, num_expected)
    feed: deque[Prompt | Reject] = deque()
    feeding = asyncio.Lock()
    stop = Stop(recipe.synth.drain_timeout_s, watch, pace)
    failures_in_row = 0

    async def next_prompt() -> Prompt | None:
        """The next prompt; rows are read and hashed in a thread, some at a time."""
        while not stop.asked:
            if not feed:
                async with feeding:
                    if not feed:
                        feed.extend(await asyncio.to_thread(lambda: list(islice(todo, PROMPTS_AT_ONCE))))
                        if not feed:
                            return None
                continue
            item = feed.popleft()
            if isinstance(item, Prompt):
                return item
            out.add_reject(item)
        return None

    async def work(number: int) -> None:
        nonlocal failures_in_row
        while True:
            await pace.admit(number)
            prompt = await next_prompt()
            if prompt is None:
                pace.close()
                return
            watch.in_flight += 1
            place = (prompt.id, prompt.index, prompt.sample, prompt.source_id)
            try:
                conversation = await write_conversation(writer, prompt)
            except PromptTooLongError as error:
                out.add_failure(*place, "filtered", str(error))
            except RequestError as error:
                out.add_failure(*place, "failed", str(error))
                failures_in_row += 1
                _refuse_many_failures(recipe, out, failures_in_row, num_expected, str(error))
            else:
                out.add(conversation)
                failures_in_row = 0
            finally:
                watch.in_flight -= 1

    try:
        async with Endpoints(urls, recipe.synth, is_gone) as endpoints:
            writer = Writer(endpoints, recipe, target, defaults, Renderer(target))
            async with asyncio.TaskGroup() as group:
                polling = group.create_task(watch.poll(endpoints, pace, run))
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


def _refuse_many_failures(recipe: Recipe, out: Output, in_row: int, num_expected: int, reason: str) -> None:
    """Raise IncompleteError when so much fails that going on is a waste."""
    synth, failed = recipe.synth, out.counts["failed"]
    if in_row >= synth.max_failures_in_row:
        what, limit = f"{in_row} failures in a row", "fewer (synth.max_failures_in_row)"
    elif failed >= synth.max_failures_in_row and failed > synth.max_failed_fraction * num_expected:
        what = f"{failed} of {num_expected} rows failed"
        limit = f"at most {synth.max_failed_fraction:.0%} (synth.max_failed_fraction)"
    else:
        return
    raise IncompleteError(
        f"{out.folder / LEDGER_FILE}: found {what} (the last: {reason}), expected {limit}. Mend the cause and run "
        "again with --retry-failed: what was finished is kept."
    )


def _refuse_useless(folder: Path, out: Output, max_failed_fraction: float, num_expected: int) -> None:
    """Tell of failures; raise when they are too many, or when no row at all could be used."""
    status = "failed" if out.counts["failed"] else "filtered"
    if status == "filtered" and out.counts["filtered"] < num_expected:
        return
    entries = (entry for entry in read_entries(folder / LEDGER_FILE) if entry["status"] == status)
    still = (entry["reason"] for entry in entries if out.status(entry["index"], entry["sample"]) == status)
    reason = Counter(still).most_common(1)[0][0]
    if status == "filtered":
        raise UserError(
            folder / "rejects.jsonl",
            found=f"all {num_expected} rows filtered, most often: {reason}",
            expected="rows that can be used",
            fix="Look at the reasons, mend the prompts, and give another --output.",
        )
    failed = out.counts["failed"]
    print(f"synth: {failed} rows failed, most often: {reason}. Try them again with --retry-failed.")
    if failed > max_failed_fraction * num_expected:
        raise IncompleteError(
            f"{folder / LEDGER_FILE}: found {failed} of {num_expected} rows failed ({reason}), expected at "
            f"most {max_failed_fraction:.0%}. Mend the cause and run again with --retry-failed."
        )


def describe(summary: Mapping[str, int]) -> str:
    """A summary in words, for people."""
    parts = [f"{summary[status]} {status}" for status in STATUSES if summary[status]]
    parts += [f"{summary[flag]} {flag}" for flag in ("loop", "stopped", "rendered") if summary.get(flag)]
    return f"{summary['input']} rows: {', '.join(parts)}; {summary['tokens']} tokens"
