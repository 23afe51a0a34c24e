"""Have the target write the conversations of a whole prompt set, exactly once each.

Reads:  prompts (synth/sources.py), a recipe, a served target.
Writes: OUTPUT/conversations.jsonl, ledger.jsonl, rejects.jsonl (synth/output.py) and metrics.jsonl (synth/watch.py);
        of shard i of n, to OUTPUT/shards/<i>-of-<n>/, for `synth merge`.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from contracts.errors import IncompleteError, UserError
from contracts.files import read_json
from contracts.ledger import STATUSES, check_counts, read_entries
from contracts.recipe import Recipe
from contracts.run import Run
from contracts.seen import Seen
from contracts.shards import folders_by_count, folders_of_others, shard_folder, shard_of
from contracts.target import Target
from serve.command import build_command
from serve.server import find_port, run_server
from synth.conversation import check_modes, resolve_sampling
from synth.output import LEDGER_FILE, Output
from synth.prompts import Prompt, Reject, read_prompts
from synth.sources import Wanted, open_prompts
from synth.work import Job, write_all

STAGE = "synth generate"


def generate(
    recipe: Recipe,
    prompts: str | Path,
    output: Path,
    *,
    shard: tuple[int, int] | None = None,
    retry_failed: bool = False,
) -> dict[str, Any]:
    """Write every conversation that `output` still lacks; its summary (counts by status, tokens).

    Without `synth.endpoints` a server is started and stopped. `shard` (i, n) takes the conversations whose id is i
    modulo n, and of the rows that cannot be used those whose number is. Raises UserError for bad input, IncompleteError
    when the servers are lost or too many rows failed, and KeyboardInterrupt after Ctrl-C or SIGTERM; all keep what was
    finished.
    """
    check_modes(recipe)
    temperatures, sampling = resolve_sampling(recipe)
    target = Target.read(recipe.target.path)
    prompt_set = open_prompts(prompts)
    if shard is None:
        _refuse_shards(output, retry_failed)
        folder, others = output, list[Path]()
    else:
        folder, others = shard_folder(output, *shard), folders_of_others(output, shard[1])
    run = Run.open(
        folder,
        STAGE,
        settings={
            "synth": {**recipe.synth.settings(), "temperature": temperatures, **sampling},
            "serve": recipe.serve.settings(),
            "max_model_len": recipe.target.max_model_len,
            "thinking_mode_values": recipe.target.thinking_mode_values,
            **({} if shard is None else {"shard": f"{shard[0]}/{shard[1]}"}),
        },
        inputs={"prompts": prompt_set.checksum, "target": target.fingerprint},
        recipe_yaml=recipe.to_yaml(),
    )
    seen, samples_per_row = Seen(), recipe.synth.num_samples * len(temperatures)

    def read(wanted: Wanted = lambda _: True) -> Iterator[Prompt | Reject]:
        rows = prompt_set.rows(wanted)
        return read_prompts(rows, recipe.synth.modes_in_turn, temperatures, recipe.synth.num_samples, seen)

    out = Output(folder, prompt_set.num_rows, samples_per_row)
    again = ("", "failed") if retry_failed else ("",)
    ours = find_places(read(), prompt_set.num_rows, samples_per_row, shard)
    for entry in (entry for other in others for entry in read_entries(other / LEDGER_FILE)):
        if entry["status"] not in again:
            ours[entry["index"], entry["sample"]] = False
    ours |= out.accounted.reshape(ours.shape)
    num_expected = int(ours.sum())
    num_open = num_expected - out.counts.total() + (out.counts["failed"] if retry_failed else 0)
    if run.complete and not num_open:
        out.close()
        print(f"synth: {folder} is finished, skipped ({describe(run.state['summary'])})")
        return dict(run.state["summary"])
    run.reopen()
    print(f"synth: {prompt_set.num_rows} rows in {len(prompt_set.files)} files; {num_expected} conversations to write")
    if out.counts.total():
        print(f"synth: {num_expected - num_open} of {num_expected} are there already, going on with {num_open}")

    def is_open(index: int, sample: int) -> bool:
        return bool(ours[index, sample]) and out.status(index, sample) in again

    todo = (
        item
        for item in read(lambda index: any(is_open(index, sample) for sample in range(samples_per_row)))
        if is_open(item.index, item.sample)
    )
    job = Job(recipe, target, sampling, todo, out, run, num_expected)
    stopped = False
    try:
        if num_open:
            with serve_target(recipe, target, folder) as (urls, is_gone):
                stopped = asyncio.run(write_all(job, urls, is_gone))
    finally:
        out.close()
        run.tick(0.0)
    if stopped:
        raise KeyboardInterrupt
    summary = {
        **{status: out.counts[status] for status in STATUSES},
        "input": num_expected,
        "rows": prompt_set.num_rows,
        "places": ours.size,  # of the whole input
        "tokens": out.tokens,
        **out.flags,
    }
    check_counts(folder / LEDGER_FILE, {status: out.counts[status] for status in STATUSES}, num_expected)
    print(f"synth: {describe(summary)} in {run.seconds:.0f} s -> {folder / 'conversations.jsonl'}")
    _refuse_useless(folder, out, recipe.synth.max_failed_fraction, num_expected)
    run.finish(summary)
    return summary


def _refuse_shards(output: Path, retry_failed: bool) -> None:
    """Raise UserError where a run without --shard would write beside shards, which a dump may read instead."""
    path = output / "run.json"
    merged = path.exists() and read_json(path, "a run's state")["complete"]
    if folders_by_count(output) and (retry_failed or not merged):
        raise UserError(
            output / "shards",
            found="shards",
            expected="none in the output of a run without --shard",
            fix="Go on with them (--shard I/N) and join them with `synth merge`, or choose another --output.",
        )


def find_places(
    items: Iterator[Prompt | Reject], num_rows: int, samples_per_row: int, shard: tuple[int, int] | None
) -> np.ndarray:
    """(rows, samples) bool: which places are this shard's. Walks the whole input: every shard must know of repeats."""
    ours = np.zeros((num_rows, samples_per_row), dtype=bool)
    total = num_rows * samples_per_row
    for item in tqdm(items, desc="read", total=total, unit="conv", delay=2, mininterval=1, disable=None):
        number, count = shard or (0, 1)
        place = item.index % count if isinstance(item, Reject) else shard_of(item.id, count)
        ours[item.index, item.sample] = place == number
    return ours


@contextmanager
def serve_target(recipe: Recipe, target: Target, folder: Path) -> Iterator[tuple[list[str], Callable[[], bool]]]:
    """URLs of the recipe's endpoints, or of a server that lives as long as the block; whether it is gone for good."""
    if recipe.synth.endpoints:
        yield recipe.synth.endpoints, lambda: False
        return
    command = build_command(recipe, target, port=find_port(recipe.serve.host, recipe.serve.port), purpose="synth")
    timeout_s = recipe.serve.startup_timeout_s
    with run_server(command, log_path=folder / "server.log", startup_timeout_s=timeout_s) as server:
        yield [f"{server.url}/v1"], lambda: server.process.poll() is not None


def _refuse_useless(folder: Path, out: Output, max_failed_fraction: float, num_expected: int) -> None:
    """Tell of failures; raise when they are too many, or when no row at all could be used."""
    status = "failed" if out.counts["failed"] else "filtered"
    if not out.counts[status] or (status == "filtered" and out.counts["filtered"] < num_expected):
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
