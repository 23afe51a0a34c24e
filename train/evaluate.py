"""Predict a draft's acceptance length: walk held-out conversations as speculative decoding does.

Reads:  a training run's chosen checkpoint, with the rope of its export, and a store of held-out conversations.
Writes: OUTPUT (JSON): acceptance length with its bootstrap interval and per position; by thinking mode, category,
        length and temperature.

The walk of one reply: the first token comes from the prefill and is the first anchor. Draft a block there, accept the
prefix that agrees with the generated tokens, add the target's own next token, and continue from it. The last block ends
at the reply's last token: tokens that a server verifies beyond it are discarded and not counted.

Sampled replies are walked the same way: rejection sampling accepts a greedily drafted token d with the target's
probability q(d), which is also how often the reply has d there. The report also has the expected acceptance, which
counts q(d) instead of 0 or 1 for each token that was tried: the same mean, with less noise.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from common.cores import count_cores
from common.errors import UserError
from common.files import hash_file, read_json, write_json
from contracts.acceptance import Acceptance
from contracts.draft import DraftConfig, DraftRun
from contracts.run import read_run
from contracts.store import Manifest, Store, StoredSample
from drafts.draft import Draft
from drafts.places import spans_of
from drafts.published import read_config
from recipe.recipe import Recipe
from target.head import TargetHead, read_head
from target.sampling import Context, probabilities_of
from target.target import Target
from train.data import AnyStore, open_states
from train.draft import load_served, served_config
from train.footprint import measure_drafting
from train.plan import Machine, refuse_unfit, suppose_masks, work_of
from train.processes import Processes, start_processes

ROWS_PER_CHUNK = 1024


@dataclass
class Walk:
    """Accepted draft tokens of each step, by reply; and each draft token that was tried, with the row of the state that
    verifies it."""

    replies: list[list[int]] = field(default_factory=list)
    tried_rows: list[int] = field(default_factory=list)
    tried_tokens: list[int] = field(default_factory=list)

    @property
    def steps(self) -> list[int]:
        return [accepted for reply in self.replies for accepted in reply]


@dataclass(frozen=True)
class Evaluation:
    """What `train eval` is asked for. `num_samples`: only the store's first; `force`: however small the memory."""

    run: Path
    store: Path
    output: Path
    num_samples: int | None = None
    force: bool = False


def evaluate(recipe: Recipe, asked: Evaluation) -> dict[str, Any]:
    """Walk a store's samples, shared out over processes; write and return the report (on the first process).

    Raises UserError if the store's target or layers are not the draft's, if it holds no sample, or, without `force`, if
    drafting does not fit into memory.
    """
    target = Target.here(recipe.target)
    store, manifest = open_states(recipe, asked.store, target)
    read_run(asked.run, "train offline")
    run = DraftRun(asked.run)
    config = served_config(read_config(run), recipe)
    _check_store(asked.store, manifest, config, target)
    inputs = {
        "draft": hash_file(run.chosen_weights()),
        "yarn": config.yarn.model_dump() if config.yarn else None,
        "store": store.checksum,
        "samples": asked.num_samples,
        "final_norm": target.final_norm,  # changes the expected acceptance
    }
    if asked.output.exists():
        report = read_json(asked.output, "an evaluation")
        if report.get("inputs") == inputs:
            print(f"eval: {asked.output} is finished, skipped (acceptance length {report['acceptance_length']:.3f})")
            return dict(report)
    sample_ids = store.sample_ids()[: asked.num_samples]
    if not sample_ids:
        raise UserError(asked.store, found="no sample", expected="held-out samples", fix="Give a store that has some.")
    with start_processes() as processes, processes.autocast():
        torch.set_num_threads(recipe.training().num_threads or max(1, count_cores() // processes.world))
        if not asked.force:
            _refuse_unfit(recipe, target, config, store, sample_ids, processes)
        draft, head = load_served(run, recipe).to(processes.device), read_head(target).to(processes.device)
        walked = [_walk(draft, head, store, id_) for id_ in processes.track(sample_ids, "eval")]
        walked = processes.gather(walked)
    report = {**_report(walked, config.num_draft_tokens), "inputs": inputs}
    if processes.is_first:
        write_json(asked.output, report)
        low, high = report["interval"]
        print(
            f"eval: acceptance length {report['acceptance_length']:.3f} [{low:.3f}, {high:.3f}], expected "
            f"{report['expected_acceptance_length']:.3f}, at K = {config.num_draft_tokens} (simulated) over "
            f"{report['samples']} samples, {report['steps']} steps -> {asked.output}"
        )
    return report


def _check_store(folder: Path, manifest: Manifest, config: DraftConfig, target: Target) -> None:
    """Raise UserError if a store's layers or target are not the draft's."""
    if manifest.layer_ids != config.layer_ids or config.target_fingerprint != target.fingerprint:
        raise UserError(
            folder,
            found=f"layers {manifest.layer_ids} of target {manifest.target_fingerprint[:12]}",
            expected=f"layers {config.layer_ids} of target {config.target_fingerprint[:12]}, the draft's own",
            fix="Dump the held-out conversations with the recipe that the draft was trained with.",
        )


@dataclass(frozen=True)
class Walked:
    """One walked sample: accepted tokens by reply, their expectation, and the groups that it belongs to."""

    sample: str
    accepted: list[list[int]]
    expected: float
    groups: dict[str, str]


def _walk(draft: Draft, head: TargetHead, store: AnyStore, sample_id: str) -> Walked:
    sample = store.read_sample(sample_id)
    found = walk_sample(sample, draft.draft(sample, head))
    groups = {
        "by_mode": sample.metadata.get("thinking_mode", ""),
        "by_category": sample.metadata.get("category", ""),
        "by_length": length_bucket(sample.num_tokens),
        "by_temperature": sample.metadata.get("temperature", ""),
    }
    return Walked(sample_id, found.replies, expected_acceptances(found, sample, head), groups)


def _report(walked: list[Walked], num_tokens: int) -> dict[str, Any]:
    """Return the report over samples, without its inputs."""
    parts = [Acceptance.from_steps([a for reply in one.accepted for a in reply], num_tokens) for one in walked]
    total, groups = Acceptance.pool(parts), dict[str, dict[str, list[Acceptance]]]()
    for one, part in zip(walked, parts, strict=True):
        for name, key in one.groups.items():
            groups.setdefault(name, {}).setdefault(key, []).append(part)
    expected = sum(one.expected for one in walked)
    return {
        **_summarize(parts),
        "expected_acceptance_length": round(1.0 + expected / max(1, total.steps), 4),
        "num_draft_tokens": num_tokens,
        **{
            name: {key: _summarize(members) for key, members in sorted(by_key.items())}
            for name, by_key in groups.items()
        },
        "samples": len(walked),
        "walks": [{"sample": one.sample, "accepted": one.accepted} for one in walked],
    }


def _refuse_unfit(
    recipe: Recipe, target: Target, config: DraftConfig, store: AnyStore, sample_ids: list[str], processes: Processes
) -> None:
    """Raise UserError if drafting for the longest sample does not fit into memory."""
    lengths = store.lengths() if isinstance(store, Store) else {}
    longest = max(lengths.get(id_, config.max_position_embeddings) for id_ in sample_ids)
    masks = suppose_masks(1, max(2, longest))
    work = work_of(recipe.training(), config, target, masks, processes.device.type == "cuda")
    refuse_unfit("train eval", Machine.here(processes.device), work, measure_drafting, ("single", 1))


def _summarize(parts: list[Acceptance]) -> dict[str, Any]:
    return {
        **Acceptance.pool(parts).summary(),
        "interval": [round(edge, 4) for edge in Acceptance.interval(parts)],
    }


def length_bucket(num_tokens: int) -> str:
    """Return the name of a length's bucket, the smallest power of two from 128 that is not below it."""
    bound = 128
    while bound < num_tokens:
        bound *= 2
    return f"<= {bound:06d} tokens"


def walk(sample: StoredSample, drafted: torch.Tensor) -> list[list[int]]:
    """Return the accepted draft tokens of each step, by reply. `drafted` is `(T, K)`, from `Draft.draft`."""
    return walk_sample(sample, drafted).replies


def walk_sample(sample: StoredSample, drafted: torch.Tensor) -> Walk:
    """Walk all replies of a sample. `drafted` is `(T, K)`: the draft tokens after each position."""
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
    """Return the target's summed probability of all tried tokens; for a greedy sample, the accepted ones."""
    if not found.tried_rows:
        return 0.0
    temperature = sample.metadata.get("temperature", "")
    if not temperature or float(temperature) == 0.0:
        return float(sum(found.steps))
    sampling = {**json.loads(sample.metadata.get("sampling") or "{}"), "temperature": temperature}
    rows, tokens = torch.tensor(found.tried_rows), torch.tensor(found.tried_tokens)
    starts = torch.tensor([start for start, _ in spans_of(sample.loss_mask)])
    total = 0.0
    for part, drafted in zip(rows.split(ROWS_PER_CHUNK), tokens.split(ROWS_PER_CHUNK), strict=True):
        prompt_lengths = starts[torch.searchsorted(starts, part, right=True) - 1]
        context = Context(sample.input_ids, part + 1, prompt_lengths)
        logits = head.logits(sample.hidden_states[part].to(head.lm_head.device))
        q = probabilities_of(sampling, logits, context.to(logits.device)).cpu()
        total += float(q.gather(1, drafted[:, None]).sum())
    return total
