"""Predict what a draft is worth: walk held-out conversations as speculative decoding walks them.

Reads:  a training run's chosen checkpoint, with the rope that it will be exported with, and a store of held-out
        conversations.
Writes: OUTPUT (JSON): acceptance length with its bootstrap interval, per position; per thinking mode, category, length.

The walk of one reply: the first token comes from the prefill and is the first anchor. Draft a block there, accept its
prefix that agrees with what the target generated, add the target's own next token, and go on from it. The last block
ends at the reply's last token: what a server verifies beyond it is thrown away and counts for nobody.

Sampled replies walk in the same way: rejection sampling of a greedily drafted token d accepts it with the target's own
probability q(d), which is how often the reply itself has d there. Beside the counted acceptance stands the expected
one, with q(d) in the place of 0 or 1 at the last token that was tried: the same on average, with less noise.
"""

from __future__ import annotations

import json
import os
from collections import defaultdict
from dataclasses import dataclass, field
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
from contracts.target_weights import TargetHead, read_head, sampling_probabilities
from train.data import open_states
from train.drafts import make_draft, served_config

PLACES_A_CHUNK = 1024


@dataclass
class Walk:
    """Accepted draft tokens of each step, reply by reply; and every drafted token that was tried, by the row of the
    state that decides about it."""

    replies: list[list[int]] = field(default_factory=list)
    tried_rows: list[int] = field(default_factory=list)
    tried_tokens: list[int] = field(default_factory=list)

    @property
    def steps(self) -> list[int]:
        return [accepted for reply in self.replies for accepted in reply]


def evaluate(
    recipe: Recipe, run_folder: Path, store_folder: Path, output: Path, num_samples: int | None = None
) -> dict[str, Any]:
    """Walk every sample of the store, or the first so many; the report that is also written to `output`.

    Raises UserError when the store's target or layers are not the draft's.
    """
    torch.set_num_threads(recipe.train.threads or os.cpu_count() or 1)
    target = Target.read(recipe.target.path)
    store, manifest = open_states(recipe, store_folder, target)
    read_run(run_folder, "train offline")
    run = DraftRun(run_folder)
    config = served_config(run.read_config(), recipe)
    if manifest.layer_ids != config.layer_ids or config.target_fingerprint != target.fingerprint:
        raise UserError(
            store_folder,
            found=f"layers {manifest.layer_ids} of target {manifest.target_fingerprint[:12]}",
            expected=f"layers {config.layer_ids} of target {config.target_fingerprint[:12]}, the draft's own",
            fix="Dump the held-out conversations with the recipe that the draft was trained with.",
        )
    inputs = {
        "draft": hash_file(run.chosen_weights()),
        "yarn": config.yarn.model_dump() if config.yarn else None,
        "store": store.checksum,
        "samples": num_samples,
    }
    if output.exists():
        report = read_json(output, "an evaluation")
        if report.get("inputs") == inputs:
            print(f"eval: {output} is finished, skipped (acceptance length {report['acceptance_length']:.3f})")
            return dict(report)
    draft = make_draft(config)
    draft.load_state_dict(load_file(run.chosen_weights()))
    draft.eval()
    head = read_head(target)

    walks: list[dict[str, Any]] = []
    parts: list[Acceptance] = []
    groups: dict[str, dict[str, list[Acceptance]]] = {
        name: defaultdict(list) for name in ("by_mode", "by_category", "by_length", "by_temperature")
    }
    expected = 0.0
    for sample_id in tqdm(store.sample_ids()[:num_samples], desc="eval", unit="sample", mininterval=2, disable=None):
        sample = store.read_sample(sample_id)
        found = walk_sample(sample, draft.draft(sample, head))
        acceptance = Acceptance.from_steps(found.steps, config.block_size - 1)
        expected += expected_acceptances(found, sample, head)
        parts.append(acceptance)
        for name, key in {
            "by_mode": sample.metadata.get("thinking_mode", ""),
            "by_category": sample.metadata.get("category", ""),
            "by_length": length_bucket(sample.num_tokens),
            "by_temperature": sample.metadata.get("temperature", ""),
        }.items():
            groups[name][key].append(acceptance)
        walks.append({"sample": sample_id, "accepted": found.replies})

    total = Acceptance.pool(parts)
    report = {
        **_summarize(parts),
        "expected_acceptance_length": round(1.0 + expected / max(1, total.steps), 4),
        "num_draft_tokens": config.block_size - 1,
        **{
            name: {key: _summarize(members) for key, members in sorted(by_key.items())}
            for name, by_key in groups.items()
        },
        "samples": len(walks),
        "inputs": inputs,
        "walks": walks,
    }
    write_json(output, report)
    low, high = report["interval"]
    print(
        f"eval: acceptance length {total.acceptance_length:.3f} [{low:.3f}, {high:.3f}], expected "
        f"{report['expected_acceptance_length']:.3f}, at K = {config.block_size - 1} (simulated) over {len(walks)} "
        f"samples, {total.steps} steps -> {output}"
    )
    return report


def _summarize(parts: list[Acceptance]) -> dict[str, Any]:
    return {
        **Acceptance.pool(parts).summary(),
        "interval": [round(edge, 4) for edge in Acceptance.interval(parts)],
    }


def length_bucket(num_tokens: int) -> str:
    """The power of two that a sample's length reaches at most, from 128 on."""
    bound = 128
    while bound < num_tokens:
        bound *= 2
    return f"<= {bound:06d} tokens"


def walk(sample: StoredSample, drafted: torch.Tensor) -> list[list[int]]:
    """Accepted draft tokens of each step, reply by reply. `drafted` is `(T, K)` as a draft gives it."""
    return walk_sample(sample, drafted).replies


def walk_sample(sample: StoredSample, drafted: torch.Tensor) -> Walk:
    """The walk through all replies of a sample. `drafted` is `(T, K)`: the tokens that follow each place."""
    tokens = sample.input_ids.tolist()
    found = Walk()
    for start, end in spans_of(sample.loss_mask):
        accepted = []
        place = start
        while place < end - 1:
            block = drafted[place].tolist()
            count = 0
            while count < len(block) and place + 1 + count < end:
                found.tried_rows.append(place + count)
                found.tried_tokens.append(block[count])
                if block[count] != tokens[place + 1 + count]:
                    break
                count += 1
            accepted.append(count)
            place += count + 1
        found.replies.append(accepted)
    return found


@torch.inference_mode()
def expected_acceptances(found: Walk, sample: StoredSample, head: TargetHead) -> float:
    """The sum of the target's own probabilities of all tokens that were tried; the accepted ones of a greedy row."""
    if not found.tried_rows:
        return 0.0
    temperature = sample.metadata.get("temperature", "")
    if not temperature or float(temperature) == 0.0:
        return float(sum(found.steps))
    sampling = json.loads(sample.metadata.get("sampling") or "{}")
    rows, tokens = torch.tensor(found.tried_rows), torch.tensor(found.tried_tokens)
    total = 0.0
    for part, drafted in zip(rows.split(PLACES_A_CHUNK), tokens.split(PLACES_A_CHUNK), strict=True):
        q = sampling_probabilities(
            head.logits(sample.hidden_states[part]), float(temperature), sampling.get("top_p"), sampling.get("top_k")
        )
        total += float(q.gather(1, drafted[:, None]).sum())
    return total


def spans_of(loss_mask: torch.Tensor) -> list[tuple[int, int]]:
    """The runs of True as half-open spans."""
    edges = torch.diff(loss_mask.int(), prepend=torch.zeros(1, dtype=torch.int), append=torch.zeros(1, dtype=torch.int))
    starts, ends = (edges == 1).nonzero()[:, 0], (edges == -1).nonzero()[:, 0]
    return list(zip(starts.tolist(), ends.tolist(), strict=True))
