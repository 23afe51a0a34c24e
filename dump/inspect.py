"""Look at one sample of a store, or at all of it: tokens coloured by the mask, norms by layer, sizes and lengths."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import torch

from contracts.errors import UserError
from contracts.ledger import STATUSES, read_entries
from contracts.show import Decoder, print_tokens, write_html
from contracts.store import Manifest, Store, StoredSample


def inspect_sample(folder: Path, id_: str, html: Path | None) -> None:
    """Show the sample of that id, or beginning of an id. Raises UserError for none or several."""
    store = Store(folder)
    manifest = store.read_manifest()
    entries = _done(store)
    found = [sample_id for sample_id in entries if sample_id.startswith(id_)]
    if len(found) != 1:
        raise UserError(
            f"{folder} ({id_})",
            found=f"{len(found)} samples" + "".join(f", {sample_id}" for sample_id in found[:5]),
            expected="one",
            fix="Give its id, or more of its beginning.",
        )
    sample = store.read_sample(found[0])
    pieces = list(Decoder(Path(manifest.target)).split(sample.input_ids.tolist(), sample.loss_mask.tolist()))
    facts = {key: value for key, value in sample.metadata.items() if value} | _norms(sample, manifest)
    if html is not None:
        write_html(html, f"sample {found[0]}", facts, {"tokens": pieces})
        print(f"dump: {html}")
        return
    print(f"sample {found[0]}")
    for key, value in facts.items():
        print(f"  {key}: {value}")
    print_tokens("tokens", pieces)


def _norms(sample: StoredSample, manifest: Manifest) -> dict[str, str]:
    """Norms of the states of each layer: over all tokens the mean and the range."""
    aux = sample.aux_hidden_states.float().unflatten(1, (sample.num_layers, -1)).norm(dim=-1)
    final = sample.hidden_states.float().norm(dim=-1, keepdim=True)
    names = [f"norm of layer {layer_id}" for layer_id in manifest.layer_ids] + ["norm of the final state"]
    columns = torch.cat([aux, final], dim=1).T
    return {
        name: f"{float(column.mean()):.2f} ({float(column.min()):.2f} to {float(column.max()):.2f})"
        for name, column in zip(names, columns, strict=True)
    }


def show_stats(folder: Path) -> None:
    """Print what a store holds, finished or not."""
    store = Store(folder)
    manifest = store.read_manifest()
    ledgers = [store.ledger_path] if store.ledger_path.exists() else sorted(folder.glob("shards/*/ledger.jsonl"))
    entries = [entry for path in ledgers for entry in read_entries(path)]
    counts = Counter(entry["status"] for entry in entries)
    done = [entry for entry in entries if entry["status"] == "done"]
    tokens = np.array([entry["tokens"] for entry in done] or [0])
    size = sum(entry["size"] for entry in done)
    print(f"{folder}: " + ", ".join(f"{counts[status]} {status}" for status in STATUSES))
    print(f"target    {manifest.target} ({manifest.target_fingerprint[:12]}), {manifest.quantization} quantization")
    print(f"layers    {manifest.layer_ids} of {manifest.num_layers} and the {manifest.final_state} final state")
    print(f"states    {manifest.hidden_size} wide, {manifest.dtype}, by {manifest.engine} {manifest.engine_version}")
    print(f"tokens    {tokens.sum()}; a sample has {tokens.min()} to {tokens.max()}, {np.median(tokens):.0f} by median")
    print(f"bytes     {size} ({size / 1e9:.2f} GB), {size / max(1, tokens.sum()):.0f} a token")
    reasons = Counter(entry["reason"] for entry in entries if entry.get("reason"))
    for reason, count in reasons.most_common(8):
        print(f"left out  {count}: {reason}")


def _done(store: Store) -> dict[str, int]:
    return {entry["id"]: entry["size"] for entry in read_entries(store.ledger_path) if entry["status"] == "done"}
