"""Prove a store: its files are whole, and its final states predict what the target generated.

Reads:  a finished store and the target's head. Writes: verified.json in the store, for the ledger as it was.

For greedy rows, argmax(lm_head(final_norm(hidden_states[t]))) must be the token at t + 1 wherever that one was
generated. Batches of other shapes round differently, so a token whose logit is within the tolerance of the largest one
counts as a tie; anything else means that the states are not the target's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from contracts.errors import IncompleteError
from contracts.files import hash_file, read_json, write_json
from contracts.ledger import Ledger
from contracts.recipe import Recipe
from contracts.store import StoredSample, open_store
from contracts.target import Target
from contracts.target_weights import TargetHead, read_head

# Largest logit gap that rounding explains, by the dtype of the stored states (logits are of the order of 10).
TIE_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.25}
TOKENS_A_CHUNK = 2048


def verify(recipe: Recipe, folder: Path, *, once: bool = False) -> dict[str, Any]:
    """Check every file and every greedy row; the counts. Raises on the first sample that does not hold.

    `once` takes an earlier proof of the same ledger for good; damage since then goes unseen.
    """
    target = Target.read(recipe.target.path)
    store, manifest = open_store(folder, target)
    checksum, report_path = hash_file(store.ledger_path), folder / "verified.json"
    if once and report_path.exists() and read_json(report_path, "a proof")["ledger"] == checksum:
        print(f"verify: {folder} is proven already, skipped")
        return dict(read_json(report_path, "a proof"))
    head = read_head(target)
    tolerance = TIE_TOLERANCE[manifest.dtype]
    ledger = Ledger(store.ledger_path)
    ledger.close()
    tokens = matches = ties = greedy = 0
    for sample_id in tqdm(ledger.ids("done"), desc="verify", unit="sample", mininterval=2):
        store.check_file(sample_id, ledger.entries[sample_id])
        sample = store.read_sample(sample_id)
        if float(sample.metadata["temperature"] or "nan") != 0.0:
            continue
        gaps = logit_gaps(head, sample)
        greedy += 1
        tokens += gaps.numel()
        matches += int((gaps == 0).sum())
        ties += int(((gaps > 0) & (gaps <= tolerance)).sum())
        worst = float(gaps.max())
        if worst > tolerance:
            wrong = int((gaps > tolerance).sum())
            raise IncompleteError(
                f"{store.sample_path(sample_id)}: found {wrong} of {gaps.numel()} generated tokens that its states do "
                f"not predict (logit gap up to {worst:.2f}), expected argmax(lm_head({manifest.final_norm}_norm(h))) "
                "to be the next token. These are not this target's un-normed final states: dump again."
            )
    print(
        f"verify: {len(ledger.ids('done'))} files whole; {matches} of {tokens} generated tokens of {greedy} greedy "
        f"samples are the states' argmax, {ties} ties within {tolerance}"
    )
    report = {"ledger": checksum, "samples": greedy, "tokens": tokens, "matches": matches, "ties": ties}
    write_json(report_path, report)
    return report


@torch.inference_mode()
def logit_gaps(head: TargetHead, sample: StoredSample) -> torch.Tensor:
    """How far each generated token's logit lies under the largest one: `(number of supervised tokens,)`, 0 = argmax."""
    places = sample.loss_mask.nonzero()[:, 0]
    gaps = []
    for chunk in places.split(TOKENS_A_CHUNK):
        logits = head.logits(sample.hidden_states[chunk - 1])
        tokens = sample.input_ids[chunk].long()
        gaps.append(logits.amax(-1) - logits.gather(1, tokens[:, None])[:, 0])
    return torch.cat(gaps)
