"""Join the ledgers of a store's shards once all of them are finished; their samples lie in the store already.

Writes: the store's ledger.jsonl, run.json, and in its manifest which conversations these were.
"""

from __future__ import annotations

import fcntl
import json
from collections import Counter
from typing import Any

from contracts.conversation import add_checksums
from contracts.errors import UserError
from contracts.files import read_json, write_atomic
from contracts.ledger import STATUSES, check_counts, read_entries
from contracts.recipe import Recipe
from contracts.run import Run
from contracts.shards import folders_of_others
from contracts.store import Store


def join_shards(store: Store, count: int, recipe: Recipe) -> dict[str, Any]:
    """Join the shards if all are finished; the store's summary, or an empty one when some are not.

    Raises UserError when the store was begun with other conversations, IncompleteError when the counts do not add up.
    """
    folders = [store.shard_folder(number, count) for number in range(count)]
    states = [_read_state(folder) for folder in folders]
    finished = [state for state in states if state.get("complete")]
    if len(finished) < count:
        print(f"dump: {len(finished)} of {count} shards are finished; the last one joins their ledgers")
        return {}
    with (store.folder / "join.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two that end at the same time
        settings = {key: value for key, value in states[0]["settings"].items() if key != "shard"}
        checksum = add_checksums(state["inputs"]["conversations"] for state in states)
        inputs = {**states[0]["inputs"], "conversations": checksum}
        run = Run.open(store.folder, "dump run", settings=settings, inputs=inputs, recipe_yaml=recipe.to_yaml())
        if not run.complete:
            everywhere = [*folders_of_others(store.folder, count), *folders]
            latest = {str(entry["id"]): entry for path in everywhere for entry in read_entries(path / "ledger.jsonl")}
            entries = [latest[id_] for id_ in sorted(latest)]
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
                }
            )
            print(f"dump: joined {count} shards, {counts['done']} samples -> {store.folder}")
        return dict(run.state["summary"])


def _name_conversations(store: Store, checksum: str) -> None:
    manifest = store.read_manifest()
    if manifest.conversations not in ("", checksum):
        raise UserError(
            f"{store.manifest_path} (conversations)",
            found=f"{manifest.conversations[:12]}, as when this store was begun",
            expected=f"{checksum[:12]}, as its shards have read",
            fix="Go on with the conversations of the beginning, or choose another --output.",
        )
    store.write_manifest(manifest.model_copy(update={"conversations": checksum}))


def ids_elsewhere(store: Store, count: int) -> frozenset[str]:
    """Samples that shards of another number than `count` have accounted for, but for those that failed there."""
    entries = (
        entry for path in folders_of_others(store.folder, count) for entry in read_entries(path / "ledger.jsonl")
    )
    return frozenset(str(entry["id"]) for entry in entries if entry["status"] != "failed")


def _read_state(folder: Any) -> dict[str, Any]:
    path = folder / "run.json"
    return dict(read_json(path, "a shard's state")) if path.exists() else {}
