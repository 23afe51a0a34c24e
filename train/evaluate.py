"""Predict what a draft is worth: walk held-out conversations as speculative decoding walks them.

Reads:  a training run's last checkpoint and a store of held-out conversations (greedy rows).
Writes: OUTPUT (JSON): acceptance length, per position, per thinking mode, per category.

The walk of one reply: the first token comes from the prefill and is the first anchor. Draft a block there, accept its
prefix that agrees with what the target generated, add the target's own next token, and go on from it. The last block
ends at the reply's last token: what a server verifies beyond it is thrown away and counts for nobody.
"""

from __future__ import annotations

import os
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tqdm import tqdm

from contracts.acceptance import Acceptance
from contracts.draft import DraftRun
from contracts.errors import UserError
from contracts.files import hash_file, read_json, write_json
from contracts.recipe import Recipe
from contracts.run import read_run
from contracts.store import StoredSample
from contracts.target import Target
from contracts.target_weights import TargetHead, read_head
from train.data import anchor_places, open_states
from train.dflash import DFlash, plan_blocks


def evaluate(recipe: Recipe, run_folder: Path, store_folder: Path, output: Path) -> dict[str, Any]:
    """Walk every sample of the store; the report that is also written to `output`.

    Raises UserError when the store's target or layers are not the draft's, or when its rows were sampled.
    """
    torch.set_num_threads(recipe.train.threads or os.cpu_count() or 1)
    target = Target.read(recipe.target.path)
    store, manifest = open_states(recipe, store_folder, target)
    read_run(run_folder, "train offline")
    run = DraftRun(run_folder)
    config = run.read_config()
    if manifest.layer_ids != config.layer_ids or config.target_fingerprint != target.fingerprint:
        raise UserError(
            store_folder,
            found=f"layers {manifest.layer_ids} of target {manifest.target_fingerprint[:12]}",
            expected=f"layers {config.layer_ids} of target {config.target_fingerprint[:12]}, the draft's own",
            fix="Dump the held-out conversations with the recipe that the draft was trained with.",
        )
    inputs = {"draft": hash_file(run.latest_weights()), "store": store.checksum}
    if output.exists():
        report = read_json(output, "an evaluation")
        if report.get("inputs") == inputs:
            print(f"eval: {output} is finished, skipped (acceptance length {report['acceptance_length']:.3f})")
            return dict(report)
    model = DFlash(config)
    model.load_state_dict(load_file(run.latest_weights()))
    model.eval()
    head = read_head(target)

    walks: list[dict[str, Any]] = []
    by_mode: dict[str, list[Acceptance]] = defaultdict(list)
    by_category: dict[str, list[Acceptance]] = defaultdict(list)
    for sample_id in tqdm(store.sample_ids(), desc="eval", unit="sample", mininterval=2):
        sample = store.read_sample(sample_id)
        if float(sample.metadata["temperature"] or "nan") != 0.0:
            raise UserError(
                store.sample_path(sample_id),
                found=f"a reply sampled at temperature {sample.metadata['temperature']}",
                expected="greedy replies",
                fix="Write the held-out conversations with --set synth.temperature=0.",
            )
        accepted = walk(sample, draft_blocks(model, head, sample))
        acceptance = Acceptance.from_steps([a for reply in accepted for a in reply], config.block_size - 1)
        by_mode[sample.metadata["thinking_mode"]].append(acceptance)
        by_category[sample.metadata["category"]].append(acceptance)
        walks.append({"sample": sample_id, "accepted": accepted})

    total = Acceptance.pool(part for parts in by_mode.values() for part in parts)
    report = {
        **total.summary(),
        "by_mode": {mode: Acceptance.pool(parts).summary() for mode, parts in sorted(by_mode.items())},
        "by_category": {name: Acceptance.pool(parts).summary() for name, parts in sorted(by_category.items())},
        "samples": len(walks),
        "inputs": inputs,
        "walks": walks,
    }
    write_json(output, report)
    print(
        f"eval: acceptance length {total.acceptance_length:.3f} at K = {config.block_size - 1} (simulated, greedy) "
        f"over {len(walks)} samples, {total.steps} steps -> {output}"
    )
    return report


@torch.inference_mode()
def draft_blocks(model: DFlash, head: TargetHead, sample: StoredSample) -> torch.Tensor:
    """The draft's greedy tokens after every position that serving could draft from: `(T, B-1)`, -1 elsewhere."""
    anchors = anchor_places(sample.loss_mask)
    drafted = torch.full((sample.num_tokens, model.config.block_size - 1), -1)
    if len(anchors):
        blocks = plan_blocks([sample.num_tokens], [anchors], model.config.block_size)
        hidden = model(sample.input_ids.long(), sample.aux_hidden_states.float(), blocks, head.embedding)
        drafted[anchors] = torch.nn.functional.linear(hidden, head.lm_head).argmax(-1)
    return drafted


def walk(sample: StoredSample, drafted: torch.Tensor) -> list[list[int]]:
    """Accepted draft tokens of each step, reply by reply. `drafted` is `(T, B-1)` as `draft_blocks` gives it."""
    tokens = sample.input_ids.tolist()
    replies = []
    for start, end in spans_of(sample.loss_mask):
        accepted = []
        place = start
        while place < end - 1:
            block = drafted[place].tolist()
            count = 0
            while count < len(block) and place + 1 + count < end and block[count] == tokens[place + 1 + count]:
                count += 1
            accepted.append(count)
            place += count + 1
        replies.append(accepted)
    return replies


def spans_of(loss_mask: torch.Tensor) -> list[tuple[int, int]]:
    """The runs of True as half-open spans."""
    edges = torch.diff(loss_mask.int(), prepend=torch.zeros(1, dtype=torch.int), append=torch.zeros(1, dtype=torch.int))
    starts, ends = (edges == 1).nonzero()[:, 0], (edges == -1).nonzero()[:, 0]
    return list(zip(starts.tolist(), ends.tolist(), strict=True))
