"""Fill a hidden-state store from conversations.

Reads:  the output folder of `synth generate`.
Writes: a store (contracts/store.py). Every sample of every conversation ends in its ledger: done, truncated (a reply
        was cut: kept out), filtered (too long, nothing supervised, a loop) or failed (its states did not hold).

Samples stream: read as the engine takes them, stored by other processes as they come out of it. A shard keeps its
ledger in shards/<i>-of-<n>/; whoever finishes last joins the ledgers.
"""

from __future__ import annotations

import errno
import os
import shutil
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import BrokenExecutor, Future, ProcessPoolExecutor, wait
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from contracts.conversation import check_written_by, find_part, hash_conversations
from contracts.errors import IncompleteError, UserError
from contracts.ledger import STATUSES, LedgerFile, check_counts
from contracts.recipe import DumpSection, Recipe
from contracts.run import Run
from contracts.seen import Seen
from contracts.store import Manifest, Store
from contracts.target import Target, captured_layers
from dump.capture import Staging
from dump.plan import make_plan, refuse_full_disk
from dump.rendered import TemplateMasks
from dump.samples import Row, judge, read_rows
from dump.shards import ids_elsewhere, join_shards
from dump.writer import StoreJob, make_pool, store_sample
from serve.engine import engine_name
from serve.extraction import longest_sample

STAGE = "dump run"
LOCAL_MEMORY = Path("/dev/shm")  # noqa: S108 (a folder of our own is made in it)
MIN_FAILURES = 20
"""Failures from which on their fraction counts while the run goes on."""


def dump(
    recipe: Recipe, conversations: Path, output: Path, *, shard: tuple[int, int] | None = None, force: bool = False
) -> dict[str, Any]:
    """Capture every sample that the store still lacks; its summary (counts by status, tokens, bytes).

    `shard` (i, n) takes the conversations whose id is i modulo n; of a synthesis in n shards its shard i, which is all
    that must be finished. `force` goes on when the disk seems too small. Raises UserError for conversations of another
    target and for a full disk, IncompleteError for too many rejected samples.
    """
    target = Target.read(recipe.target.path)
    folders = find_part(conversations, shard)
    check_written_by(folders[0], target)
    layer_ids = captured_layers(recipe.target, target)
    store = Store(output)
    folder = output if shard is None else store.shard_folder(*shard)
    elsewhere = ids_elsewhere(store, shard[1]) if shard else frozenset[str]()
    checksum = hash_conversations(folders, shard)
    manifest = make_manifest(recipe, target, layer_ids, conversations, checksum if shard is None else "")
    run = Run.open(
        folder,
        STAGE,
        settings={
            "dump": recipe.dump.settings(),
            "layer_ids": layer_ids,
            "max_tokens": longest_sample(recipe, target),
            "serve": recipe.serve.settings(),
            **({} if shard is None else {"shard": f"{shard[0]}/{shard[1]}"}),
        },
        inputs={"conversations": checksum, "target": target.fingerprint},
        recipe_yaml=recipe.to_yaml(),
    )
    if run.complete:
        print(f"dump: {folder} is finished, skipped ({_describe(run.state['summary'])})")
    else:
        store.claim(manifest)
        ledger = DumpLedger(folder / "ledger.jsonl")
        plan = make_plan(recipe, target, layer_ids, folders, shard, ledger.has, elsewhere)
        if ledger.counts.total():
            print(f"dump: {ledger.counts.total()} of {plan.rows} samples are there already, going on")
        if not force:
            refuse_full_disk(output, plan.bytes)
        masks = TemplateMasks(recipe.target, target)
        todo = (row for row in read_rows(folders, masks, shard) if row.sample_id not in elsewhere)
        rows = _take_rows(recipe, ledger, todo, longest_sample(recipe, target))
        if not plan.samples:
            assert next(rows, None) is None  # the ledger learns of those that are left out; no engine is needed
        else:
            staging = Staging(_make_staging(recipe, output), int(recipe.dump.staging_gib * 2**30))
            job = StoreJob(store, recipe.dump.dtype, len(layer_ids), target.hidden_size)
            with make_pool(recipe.dump.writers) as pool:
                try:
                    backend = make_backend(recipe, target, layer_ids, staging)
                    fill_store(recipe.dump, backend, staging, rows, plan.samples, job, ledger, pool, run.tick)
                    backend.close()
                finally:
                    pool.shutdown(cancel_futures=True)
                    shutil.rmtree(staging.folder, ignore_errors=True)
        masks.tell()
        counts = {status: ledger.counts[status] for status in STATUSES}
        summary = {**counts, "samples": counts["done"], "tokens": ledger.tokens, "bytes": ledger.bytes}
        summary["rows"] = plan.rows + plan.elsewhere
        ledger.close()
        check_counts(folder / "ledger.jsonl", counts, plan.rows)
        print(f"dump: {_describe(summary)} in {run.seconds:.0f} s -> {folder}")
        ledger.refuse_failures(recipe.dump.max_reject_fraction, plan.rows)
        run.finish(summary)
    if shard is not None:
        return join_shards(store, shard[1], recipe)
    return dict(run.state["summary"])


def make_manifest(recipe: Recipe, target: Target, layer_ids: list[int], conversations: Path, checksum: str) -> Manifest:
    """What the states of this dump are. A shard has no `checksum` of all conversations: it knows its part of them."""
    engine = engine_name() if recipe.dump.backend != "hf" else _transformers_version()
    return Manifest(
        target=str(target.path),
        target_fingerprint=target.fingerprint,
        quantization=str((target.config.get("quantization_config") or {}).get("quant_method", "none")),
        layer_ids=layer_ids,
        num_layers=target.num_layers,
        hidden_size=target.hidden_size,
        final_norm=target.final_norm,
        tokenizer=target.tokenizer_checksum,
        template=target.template_checksum,
        engine=engine[0],
        engine_version=engine[1],
        dtype=recipe.dump.dtype,
        conversations=checksum,
        conversations_folder=str(conversations.absolute()),
    )


def _transformers_version() -> tuple[str, str]:
    from importlib.metadata import version

    return "transformers", version("transformers")


class DumpLedger:
    """The ledger of a dump in progress: counts, and which samples it has; safe to use from several threads."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.counts: Counter[str] = Counter()
        self.tokens = self.bytes = 0
        self.first_failure = ""
        self._file = LedgerFile(path)
        self._seen = Seen()
        self._lock = threading.Lock()
        for entry in self._file.read():
            self._account(entry)

    def add(self, entry: dict[str, Any]) -> None:
        """Add and sync one line, which comes after everything that it speaks of."""
        with self._lock:
            self._file.append([entry])
            self._account(entry)

    def has(self, sample_id: str) -> bool:
        with self._lock:
            return self._seen.has("sample", sample_id)

    def refuse_failures(self, max_fraction: float, num_rows: int) -> None:
        """Raise IncompleteError when more than that fraction of the samples was rejected."""
        failed = self.counts["failed"]
        if failed > max_fraction * num_rows:
            raise IncompleteError(
                f"{self.path}: found {failed} of {num_rows} samples rejected (the first: {self.first_failure}), "
                f"expected at most {max_fraction:.0%}. Look at the engine; delete the store; dump again."
            )

    def close(self) -> None:
        self._file.close()

    def _account(self, entry: dict[str, Any]) -> None:
        self._seen.first_row("sample", entry["id"], 0)
        self.counts[entry["status"]] += 1
        self.tokens += entry.get("tokens", 0)
        self.bytes += entry.get("size", 0)
        if entry["status"] == "failed" and not self.first_failure:
            self.first_failure = entry["reason"]


def _take_rows(recipe: Recipe, ledger: DumpLedger, rows: Iterator[Row], max_tokens: int) -> Iterator[Row]:
    """The rows to capture; the ledger learns of the others."""
    for row in rows:
        if ledger.has(row.sample_id):
            continue
        verdict = judge(recipe.dump, row, max_tokens)
        if verdict.row is None:
            ledger.add({"id": row.sample_id, "status": verdict.status, "reason": verdict.reason})
        else:
            yield verdict.row


def fill_store(
    section: DumpSection,
    backend: Any,
    staging: Staging,
    rows: Iterator[Row],
    num_rows: int,
    job: StoreJob,
    ledger: DumpLedger,
    pool: ProcessPoolExecutor,
    tick: Callable[[], None] = lambda: None,
) -> None:
    """Let the backend work through the rows while other processes store what it hands out.

    Raises UserError when the disk is full, IncompleteError when too many samples are rejected.
    """
    waiting: dict[str, Row] = {}
    storing: set[Future[dict[str, Any]]] = set()
    problems: list[BaseException] = []
    first_bytes, first_tokens, started = ledger.bytes, ledger.tokens, time.monotonic()

    def send() -> Iterator[tuple[str, list[int]]]:
        for row in rows:
            waiting[row.sample_id] = row
            yield row.sample_id, row.sample.token_ids

    def account(row: Row, future: Future[dict[str, Any]]) -> None:
        """Runs in the pool's thread as soon as a sample is stored; what it holds is on the disk."""
        try:
            if not future.cancelled():
                ledger.add(future.result())
                if ledger.counts["failed"] >= MIN_FAILURES:
                    ledger.refuse_failures(section.max_reject_fraction, num_rows)
        except BaseException as error:
            problems.append(error)
        finally:
            staging.give(row.num_tokens * backend.token_bytes)
            storing.discard(future)

    with tqdm(total=num_rows, desc="dump", unit="sample", mininterval=1, disable=None) as bar:
        try:
            for staged in backend.capture(send(), staging):
                row = waiting.pop(staged.sample_id)
                future = pool.submit(store_sample, job, row, staged)
                storing.add(future)
                future.add_done_callback(partial(account, row))
                bar.update()
                seconds = max(time.monotonic() - started, 1e-3)
                bar.set_postfix_str(
                    f"{(ledger.tokens - first_tokens) / seconds:.0f} tok/s, "
                    f"{(ledger.bytes - first_bytes) / seconds / 1e6:.1f} MB/s, "
                    f"staged {staging.taken_bytes / 2**20:.0f} MiB",
                    refresh=False,
                )
                tick()
                if problems:
                    break
            while storing and not problems:
                wait(list(storing), timeout=0.2)
        except BrokenExecutor as error:  # the pool takes no more: a writer died
            problems.append(error)
        finally:
            for future in list(storing):
                future.cancel()
    for problem in problems[:1]:
        if isinstance(problem, OSError) and problem.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(
                job.store.folder,
                found=f"{problem.strerror} after {ledger.counts['done']} samples",
                expected="a disk that takes the store",
                fix="Make room and run the same command again: what was finished is kept.",
            ) from None
        if isinstance(problem, BrokenExecutor):
            raise IncompleteError(
                f"{job.store.folder}: found a writer process that died, expected it to live as long as the run (was it "
                "out of memory?). Run the same command again: what was finished is kept."
            )
        raise problem


def make_backend(recipe: Recipe, target: Target, layer_ids: list[int], staging: Staging) -> Any:
    """What captures: vLLM here, servers, or transformers."""
    if recipe.dump.backend == "server":
        from dump.server import Servers

        return Servers(recipe, target, layer_ids)
    if recipe.dump.backend == "hf":
        from dump.hf import Transformers

        return Transformers(recipe, target, layer_ids)
    from dump.vllm_offline import VllmOffline

    return VllmOffline(recipe, target, layer_ids, staging)


def _make_staging(recipe: Recipe, output: Path) -> Path:
    """An empty folder for this process: in the recipe's place, in local memory, or in the store."""
    parent = recipe.dump.staging_dir or (LOCAL_MEMORY if os.access(LOCAL_MEMORY, os.W_OK) else output / "staging")
    parent.mkdir(parents=True, exist_ok=True)
    name = f"draftline-dump-{socket.gethostname()}"
    for left in parent.glob(f"{name}-*"):  # of killed runs: what they held is captured again
        if not Path(f"/proc/{left.name.rpartition('-')[2]}").exists():
            shutil.rmtree(left, ignore_errors=True)
    folder = parent / f"{name}-{os.getpid()}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return folder


def _describe(summary: dict[str, Any]) -> str:
    dropped = (
        ", ".join(f"{summary[s]} {s}" for s in ("truncated", "filtered", "failed") if summary[s]) or "none dropped"
    )
    return f"{summary['samples']} samples, {summary['tokens']} tokens, {summary['bytes'] / 1e6:.0f} MB; {dropped}"
