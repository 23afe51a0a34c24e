"""Show one sample of a store (tokens coloured by the mask, norms by layer) or statistics of all samples."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np

from common.errors import UserError
from contracts.ledger import STATUSES
from contracts.sample_file import TOP_TOKENS
from contracts.store import Manifest, Store, StoredSample
from dump.browse import last_entries, make_row
from target.browse import Browser
from target.view import Decoder, print_tokens


def inspect_sample(folder: Path, id_: str, html: Path | None) -> None:
    """Show the sample whose id is or begins with `id_`. Raises UserError unless there is exactly one."""
    store = Store(folder)
    manifest = store.read_manifest()
    found = [sample_id for sample_id in store.sample_ids() if sample_id.startswith(id_)]
    if len(found) != 1:
        raise UserError(
            f"{folder} ({id_})",
            found=f"{len(found)} samples" + "".join(f", {sample_id}" for sample_id in found[:5]),
            expected="one",
            fix="Give the whole id, or more of it.",
        )
    sample = store.read_sample(found[0])
    target, row = Path(manifest.target), make_row(found[0], sample, _norms(sample, manifest))
    if html is not None:
        browser = Browser(f"sample {found[0]}", "samples", target)
        browser.add(row)
        browser.write(html)
        print(f"dump: {html}")
        return
    print(f"sample {found[0]}")
    for key, value in {**row.facets, **row.facts}.items():
        if value:
            print(f"  {key}: {value}")
    print_tokens("tokens", list(Decoder(target).split(sample.input_ids.tolist(), sample.loss_mask.tolist())))


def _norms(sample: StoredSample, manifest: Manifest) -> dict[str, str]:
    """Return the mean and range over all stored tokens of each layer's state norms, or of the most likely tokens."""
    layers = sample.aux_hidden_states.float().unflatten(1, (len(manifest.layer_ids), -1)).norm(dim=-1)
    layers = layers[sample.has("aux_hidden_states")]
    found = {f"norm of layer {id_}": column for id_, column in zip(manifest.layer_ids, layers.T, strict=True)}
    if sample.hidden_states.shape[1]:
        found["norm of the final state"] = sample.hidden_states.float().norm(dim=-1)[sample.has("hidden_states")]
    if sample.top is not None:
        rest = sample.top.log_probs[sample.has(TOP_TOKENS), -1].float().exp()
        found[f"probability of all but the {sample.top.k} most likely tokens"] = rest
    return {
        name: f"{float(column.mean()):.4g} ({float(column.min()):.4g} to {float(column.max()):.4g})"
        for name, column in found.items()
        if len(column)
    }


def show_stats(folder: Path) -> None:
    """Print counts, lengths and sizes of a store, finished or not."""
    store = Store(folder)
    manifest = store.read_manifest()
    entries = last_entries(store)
    counts = Counter(entry["status"] for entry in entries)
    done = [entry for entry in entries if entry["status"] == "done"]
    tokens = np.array([entry["tokens"] for entry in done] or [0])
    size = sum(entry["size"] for entry in done)
    print(f"{folder}: " + ", ".join(f"{counts[status]} {status}" for status in STATUSES))
    print(f"target    {manifest.target} ({manifest.target_fingerprint[:12]}), {manifest.quantization} quantization")
    finals = {"none": "no final state", "top-k": f"the {manifest.top_k} most likely next tokens"}
    final = finals.get(manifest.final_state, f"the {manifest.final_state} final state")
    unseen = "" if manifest.unseen_states is None else ", without states that no block sees"
    print(f"layers    {manifest.layer_ids} of {manifest.num_layers} and {final}{unseen}")
    print(f"states    {manifest.hidden_size} wide, {manifest.dtype}, by {manifest.engine} {manifest.engine_version}")
    print(f"tokens    {tokens.sum()}; a sample has {tokens.min()} to {tokens.max()}, {np.median(tokens):.0f} by median")
    print(f"bytes     {size} ({size / 1e9:.2f} GB), {size / max(1, tokens.sum()):.0f} a token")
    reasons = Counter(entry["reason"] for entry in entries if entry.get("reason"))
    for reason, count in reasons.most_common(8):
        print(f"left out  {count}: {reason}")
