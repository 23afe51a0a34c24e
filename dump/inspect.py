"""Show one sample of a store (tokens coloured by the mask, norms by layer) or statistics of all samples."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import torch

from common.errors import UserError
from contracts.ledger import STATUSES
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
    """Return the mean and range over all tokens of each layer's state norms."""
    states = sample.aux_hidden_states.float().unflatten(1, (len(manifest.layer_ids), -1))
    names = [f"norm of layer {layer_id}" for layer_id in manifest.layer_ids]
    if manifest.final_state != "none":
        states = torch.cat([states, sample.hidden_states.float()[:, None]], dim=1)
        names.append("norm of the final state")
    columns = states.norm(dim=-1).T
    return {
        name: f"{float(column.mean()):.2f} ({float(column.min()):.2f} to {float(column.max()):.2f})"
        for name, column in zip(names, columns, strict=True)
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
    print(f"layers    {manifest.layer_ids} of {manifest.num_layers} and the {manifest.final_state} final state")
    print(f"states    {manifest.hidden_size} wide, {manifest.dtype}, by {manifest.engine} {manifest.engine_version}")
    print(f"tokens    {tokens.sum()}; a sample has {tokens.min()} to {tokens.max()}, {np.median(tokens):.0f} by median")
    print(f"bytes     {size} ({size / 1e9:.2f} GB), {size / max(1, tokens.sum()):.0f} a token")
    reasons = Counter(entry["reason"] for entry in entries if entry.get("reason"))
    for reason, count in reasons.most_common(8):
        print(f"left out  {count}: {reason}")
