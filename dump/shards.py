"""Join the ledgers of a store's shards once all are finished. Their samples are already in the store.

Writes: the store's ledger.jsonl and run.json, and the checksum of all conversations in its manifest.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.files import lock_file, read_json, write_atomic
from contracts.conversation import add_checksums
from contracts.ledger import STATUSES, Ledger, check_counts
from contracts.run import Run
from contracts.shards import folders_of_others
from contracts.store import Store
from recipe.recipe import Recipe


def join_shards(store: Store, count: int, recipe: Recipe) -> dict[str, Any]:
    """Join the shards if all are finished; return the store's summary, or {} if some are not.

    Raises UserError if the store was begun with other conversations, IncompleteError if the counts do not add up.
    """
    folders = [store.shard_folder(number, count) for number in range(count)]
    states = [_read_state(folder) for folder in folders]
    finished = [state for state in states if state.get("complete")]
    if len(finished) < count:
        print(f"dump: {len(finished)} of {count} shards are finished; the last one joins their ledgers")
        return {}
    with (store.folder / "join.lock").open("a") as lock:
        lock_file(lock, store.folder, wait=True)  # two shards may finish at the same time
        settings = {key: value for key, value in states[0]["settings"].items() if key != "shard"}
        checksum = add_checksums(state["inputs"]["conversations"] for state in states)
        inputs = {**states[0]["inputs"], "conversations": checksum}
        run = Run.open(store.folder, "dump run", settings=settings, inputs=inputs, recipe_yaml=recipe.to_yaml())
        ledgers = _find_ledgers([*folders_of_others(store.folder, count), *folders])
        sizes = [path.stat().st_size for path in ledgers]  # ledgers only grow, so other sizes mean a retry
        if run.complete and run.state["summary"].get("shard_ledgers") == sizes:
            return dict(run.state["summary"])
        entries = _join_entries([*_find_ledgers([store.folder]), *ledgers])
        lines = (json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries)
        write_atomic(store.ledger_path, "".join(lines))
        counts = Counter(entry["status"] for entry in entries)
        check_counts(store.ledger_path, counts, sum(state["summary"]["rows"] for state in states))
        _name_conversations(store, checksum)
        run.state["seconds"] = sum(state["seconds"] for state in states)
        run.finish(
            {
                **{status: counts[status] for status in STATUSES},
                "samples": counts["done"],
                "tokens": sum(entry.get("tokens", 0) for entry in entries),
                "bytes": sum(entry.get("size", 0) for entry in entries),
                "shards": count,
                "shard_ledgers": sizes,
            }
        )
        print(f"dump: joined {count} shards, {counts['done']} samples -> {store.folder}")
        return dict(run.state["summary"])


def count_open(store: Store, count: int) -> int:
    """Return how many of a store's shards are not finished."""
    return sum(not _read_state(store.shard_folder(number, count)).get("complete") for number in range(count))


def _join_entries(ledgers: list[Path]) -> list[dict[str, Any]]:
    """Return each sample's last entry, sorted by id; a failure never replaces another status."""
    latest: dict[str, dict[str, Any]] = {}
    for path in ledgers:
        for id_, entry in Ledger(path).entries.items():
            if entry["status"] != "failed" or id_ not in latest:
                latest[id_] = entry
    return [latest[id_] for id_ in sorted(latest)]


def _name_conversations(store: Store, checksum: str) -> None:
    manifest = store.read_manifest()
    if manifest.conversations not in ("", checksum):
        raise UserError(
            f"{store.manifest_path} (conversations)",
            found=f"{manifest.conversations[:12]}, as when this store was begun",
            expected=f"{checksum[:12]}, as its shards have read",
            fix="Continue with the conversations it was begun with, or choose another --output.",
        )
    store.write_manifest(manifest.model_copy(update={"conversations": checksum}))


def ids_elsewhere(store: Store, count: int) -> frozenset[str]:
    """Return the samples in the ledgers of shards of another count than `count`, without failed ones."""
    ledgers = _find_ledgers(folders_of_others(store.folder, count))
    return frozenset(id_ for path in ledgers for id_ in Ledger(path).ids("done", "truncated", "filtered"))


def _find_ledgers(folders: list[Path]) -> list[Path]:
    """Return the ledgers in `folders`. A run that was stopped at its start has none."""
    return [path for folder in folders if (path := folder / "ledger.jsonl").exists()]


def _read_state(folder: Path) -> dict[str, Any]:
    path = folder / "run.json"
    return dict(read_json(path, "a shard's state")) if path.exists() else {}
