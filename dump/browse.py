"""Write a page to look through the samples of a store, with what a draft proposed over them.

Reads:  STORE's manifest, ledger and tokens, finished or not; the target's tokenizer; proposals of `train eval`.
Writes: one HTML file (target/browse.py).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import UserError
from common.loops import find_loop
from common.progress import track
from contracts.ledger import Ledger
from contracts.proposals import Proposals, read_proposals
from contracts.shards import folders_by_count
from contracts.store import READERS, Store, StoredSample
from drafts.places import spans_of
from recipe.synth import SynthSection
from target.browse import Browser, Part, Row, spread


def browse(store_folder: Path, output: Path, limit: int | None, target: Path | None, proposals: Path | None) -> None:
    """Write a page of a store's samples, at most `limit` of them, spread evenly; with `proposals`, of those in it.

    `target`: its folder, if it has moved. Raises UserError for a folder that is no store, for proposals over another
    store, or if a sample is broken.
    """
    store = Store(store_folder)
    manifest = store.read_manifest()
    entries = sorted(last_entries(store), key=lambda entry: entry["id"])
    walked = None
    if proposals is not None:
        walked = read_proposals(proposals)
        _refuse_others(proposals, walked, store)
        entries = [entry for entry in entries if entry["id"] in walked.steps]
    chosen = spread(entries, limit)
    draft = f"{walked.draft}, K = {walked.num_draft_tokens}" if walked else ""
    browser = Browser(f"dump: {store_folder}", "samples", target or Path(manifest.target), draft)
    for row in track(_read_rows(store, chosen, walked), "browse", "sample", total=len(chosen)):
        browser.add(row)
    browser.write(output)
    print(f"dump: {len(chosen)} of {len(entries)} samples -> {output} ({output.stat().st_size / 1e6:.1f} MB)")


def last_entries(store: Store) -> list[dict[str, Any]]:
    """Return the last entry of each sample, also from shards that are not joined yet."""
    if store.ledger_path.exists():
        return list(Ledger(store.ledger_path).entries.values())
    shards = [path for paths in folders_by_count(store.folder).values() for path in paths]
    ledgers = [Ledger(path) for shard in shards if (path := shard / "ledger.jsonl").exists()]
    return list({id_: entry for ledger in ledgers for id_, entry in ledger.entries.items()}.values())


def make_row(
    sample_id: str, sample: StoredSample, more: Mapping[str, str] | None = None, steps: np.ndarray | None = None
) -> Row:
    """Return a sample as a row of the page, with `more` facts. A loop is found as `synth` finds it by default."""
    ids, spans = sample.input_ids.tolist(), spans_of(sample.loss_mask)
    min_tokens = SynthSection.model_fields["min_loop_tokens"].default
    loops = [loop for start, end in spans if (loop := find_loop(ids[start:end], min_tokens))]
    facets = {
        "status": "done",
        "thinking mode": sample.metadata.get("thinking_mode", ""),
        "category": sample.metadata.get("category", ""),
        "finish reason": sample.metadata.get("finish_reason", ""),
        "loop": "yes" if loops else "no",
        "temperature": sample.metadata.get("temperature", ""),
    }
    sampling = json.loads(sample.metadata.get("sampling") or "{}")
    facts = {
        "repeats": ", ".join(f"{tokens} tokens with period {period}" for period, tokens in loops),
        "sampling": ", ".join(f"{key} {value}" for key, value in sampling.items()),
        **(more or {}),
    }
    facts = {key: value for key, value in facts.items() if value}
    return Row(sample_id, shorten(sample_id), facets, facts, [Part("", ids, spans, steps)])


def shorten(sample_id: str) -> str:
    """Return the beginning of a sample's id, by which `dump inspect` finds it."""
    return sample_id[:12]


def _read_rows(store: Store, entries: Sequence[Mapping[str, Any]], walked: Proposals | None) -> Iterator[Row]:
    def read(entry: Mapping[str, Any]) -> Row:
        if entry["status"] != "done":
            return Row(
                entry["id"], shorten(entry["id"]), {"status": entry["status"]}, {"reason": str(entry.get("reason", ""))}
            )
        steps = walked.steps[entry["id"]] if walked else None
        return make_row(entry["id"], store.read_tokens(entry["id"]), steps=steps)

    with ThreadPoolExecutor(READERS) as pool:
        for first in range(0, len(entries), 64 * READERS):  # a bounded number waits in memory
            yield from pool.map(read, entries[first : first + 64 * READERS])


def _refuse_others(path: Path, proposals: Proposals, store: Store) -> None:
    """Raise UserError if the proposals are not over this store."""
    if not store.ledger_path.exists() or proposals.inputs.get("store") != store.checksum:
        raise UserError(
            path,
            found="proposals over another store, or over an earlier state of this one",
            expected=f"proposals over {store.folder}",
            fix="Give the store that `train eval` walked, or walk this one again with `train eval --proposals`.",
        )
