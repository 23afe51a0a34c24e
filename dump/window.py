"""Fill a rolling store: capture what the trainer reads next, wait while the window is full, delete what it has read.

Reads:  the output folder of a finished `synth generate`; where the trainer is (trainer.json of the store).
Writes: a rolling store (contracts/rolling.py). Each process captures every n-th place of the trainer's order, from the
        trainer's last checkpoint as far as the window reaches, and ends after the trainer's last one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.files import lock_file, write_json
from contracts.conversation import Sample, check_written_by, hash_conversations
from contracts.mooncake import PART_BYTES, SMALL_SEGMENT, Mooncake, MooncakeShelf
from contracts.rolling import RollingStore, Window, is_rolling, write_index
from contracts.run import Run
from contracts.shards import folders_of_others
from drafts.order import plan_window
from dump.fill import open_filler
from dump.plan import refuse_full_disk
from dump.preflight import prove_engines
from dump.rendered import TemplateMasks
from dump.roller import Roller
from dump.run import STAGE, dump_settings, make_manifest
from dump.samples import Filter, metadata_of, read_rows
from recipe.recipe import Recipe
from recipe.sizes import stored_bytes
from target.target import Target

SEGMENT_SHARE = 1.25
"""Memory that a capture process lends to Mooncake, relative to its share of the window."""


@dataclass(frozen=True)
class Rolling:
    """How a rolling store is filled: its bytes, this process's part, and whether to stop once the window is full."""

    num_bytes: int
    shard: tuple[int, int] = (0, 1)
    until_full: bool = False
    force: bool = False
    retry_failed: bool = False
    mooncake: Mooncake | None = None


def dump_window(recipe: Recipe, conversations: Path, output: Path, rolling: Rolling) -> dict[str, Any] | None:
    """Capture until the trainer has read all, and return the summary; with `until_full`, maybe None before that.

    Raises UserError for conversations of another target, for a window that holds less than a step, for a whole store
    in `output` and for a full disk; IncompleteError for too many rejected samples.
    """
    target, store = Target.here(recipe.target), RollingStore(output)
    if rolling.mooncake is not None:
        store = RollingStore(output, _open_shelf(recipe, target, rolling))
    check_written_by(conversations, target)
    if store.ledger_path.exists():
        raise UserError(output, found="a whole store", expected="a new folder", fix="Choose another --output.")
    folders_of_others(output, rolling.shard[1])  # none of them may be at work
    order = recipe.training().order(recipe.target.max_model_len)
    checksum = hash_conversations([conversations])
    run = Run.open(
        store.shard_folder(*rolling.shard),
        STAGE,
        settings={**dump_settings(recipe, target, rolling.shard), "window": {"bytes": rolling.num_bytes, **order}},
        inputs={"conversations": checksum, "target": target.fingerprint},
        recipe_yaml=recipe.to_yaml(),
    )
    if run.complete and not rolling.retry_failed:
        print(f"dump: {run.folder} is finished, skipped")
        return dict(run.state["summary"])
    store.claim(make_manifest(recipe, target, conversations, checksum))
    _open_window(recipe, target, store, conversations, Window(num_bytes=rolling.num_bytes, order=order))
    plan = plan_window(store)
    if rolling.shard[0] == 0:
        store.publish()
    if not (rolling.force or store.shelf.in_memory):
        refuse_full_disk(output, rolling.num_bytes - _bytes_there(store))
    roller = Roller(store, plan, run, rolling.shard, recipe.dump.max_reject_fraction)
    if rolling.retry_failed:
        roller.retry_failed()
    if roller.is_finished:
        return roller.finish()
    with open_filler(recipe, target, store, roller.ledger) as filler:
        if recipe.dump.preflight:
            rows = read_rows([conversations], TemplateMasks(recipe.target, target))
            prove_engines(recipe, target, filler.backend, filler.staging, rows, run.folder)
        return roller.run(filler, until_full=rolling.until_full)


def _open_shelf(recipe: Recipe, target: Target, rolling: Rolling) -> MooncakeShelf:
    """Lend memory for this process's share of the window, and some more: places are shared out by number, not size."""
    assert rolling.mooncake is not None
    largest = stored_bytes(recipe, target, recipe.target.max_model_len)
    segment = int(SEGMENT_SHARE * rolling.num_bytes / rolling.shard[1]) + 4 * largest + SMALL_SEGMENT
    return MooncakeShelf(rolling.mooncake, segment, max(largest, PART_BYTES))


def _open_window(recipe: Recipe, target: Target, store: RollingStore, conversations: Path, window: Window) -> None:
    """Write the index of all samples and the window's settings, or compare with those that are there.

    Raises UserError if the store was begun with other settings.
    """
    with (store.folder / "claim.lock").open("a") as lock:
        lock_file(lock, store.folder, wait=True)  # several processes may begin at once
        if is_rolling(store.folder):
            found = store.window
            for key in ("num_bytes", "order"):
                if getattr(found, key) != getattr(window, key):
                    raise UserError(
                        f"{store.window_path} ({key})",
                        found=str(getattr(found, key)),
                        expected=str(getattr(window, key)),
                        fix="Go on with the settings this store was begun with, or choose another --output.",
                    )
            return
        left_out, row_filter = dict.fromkeys(("truncated", "filtered"), 0), Filter.of(recipe, target)
        masks, num_rows = TemplateMasks(recipe.target, target), 0

        def samples() -> Iterator[tuple[str, Sample, dict[str, str]]]:
            nonlocal num_rows
            for num_rows, row in enumerate(read_rows([conversations], masks), start=1):  # noqa: B007 (counted)
                verdict = row_filter.judge(row)
                if verdict.row is None:
                    left_out[verdict.status] += 1
                else:
                    yield row.sample_id, verdict.row.sample, metadata_of(row.conversation)

        index = write_index(store.index_folder, samples())
        masks.print_counts()
        filled = window.model_copy(update={"rows": num_rows, "left_out": left_out, "index": index})
        write_json(store.window_path, filled.model_dump())
    dropped = ", ".join(f"{number} {status}" for status, number in left_out.items() if number) or "none dropped"
    print(f"dump: {len(store.index.ids)} of {num_rows} rows are in the trainer's order; {dropped}")


def _bytes_there(store: RollingStore) -> int:
    return sum(path.stat().st_size for path in store.folder.rglob("*.safetensors"))
