"""Predict a draft's acceptance length: walk held-out conversations as speculative decoding does.

Reads:  a training run's chosen checkpoint, with the rope of its export, or a published draft's folder; and a store of
        held-out conversations.
Writes: OUTPUT (JSON): acceptance length with its bootstrap interval and per position; by thinking mode, category,
        length and temperature of the samples (`rows`: by mode and temperature together), and by the context before each
        step; the reliability of the draft's confidences, if it has some; how many of the samples the draft was trained
        on. With `--proposals`, what the draft proposed at each step (contracts/proposals.py).

The walk of one reply: the first token comes from the prefill and is the first anchor. Draft a block there, accept the
prefix that agrees with the generated tokens, add the target's own next token, and continue from it. The last block ends
at the reply's last token: tokens that a server verifies beyond it are discarded and not counted.

Sampled replies are walked the same way: rejection sampling accepts a greedily drafted token d with the target's
probability q(d), which is also how often the reply has d there. The report also has the expected acceptance, which
counts q(d) instead of 0 or 1 for each token that was tried: the same mean, with less noise. For drafts that are
sampled, too, see train/sampled_drafts.py.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common.cores import count_cores
from common.errors import UserError
from common.files import hash_file, read_json, write_json
from contracts.acceptance import Acceptance
from contracts.draft import DraftConfig, DraftRun
from contracts.proposals import Proposals, read_proposals_head, write_proposals
from contracts.run import read_run
from contracts.store import Manifest, Store, StoredSample, require_final_states
from drafts.draft import Draft
from drafts.places import spans_of
from drafts.published import read_config
from recipe.recipe import Recipe
from target.head import TargetHead, read_head
from target.target import Target
from train.confidence import Tried, summarize_confidence, tried_of
from train.data import AnyStore, open_states
from train.draft import load_served, refuse_unseen, served_config, suppose_config
from train.footprint import measure_drafting
from train.plan import Machine, refuse_unfit, suppose_masks, work_of
from train.processes import Processes, start_processes
from train.sampled_drafts import Expected, expect_steps
from train.start import Start, load_start, open_start, own_config
from train.trained_on import Trained, count_trained_on, find_trained, read_trained
from train.walk import (
    Walk,
    expected_acceptances,
    proposals_of,
    ratios_of,
    refuse_inexact,
    temperature_of,
    walk,
    walk_sample,
)

FEW = 8
"""Samples of an evaluation that only an error message needs."""
MANY = 64
"""Samples that are walked again with shifted layers."""


@dataclass(frozen=True)
class Evaluation:
    """What `train eval` is asked for: a run's checkpoint, or a draft in a folder of any layout.

    `num_samples`: only the store's first; `force`: however small the memory; `proposals`: where to write those.
    """

    store: Path
    output: Path
    run: Path | None = None
    draft: Path | None = None
    num_samples: int | None = None
    force: bool = False
    proposals: Path | None = None

    @property
    def subject(self) -> str:
        """The folder of the draft."""
        return str(self.run or self.draft)


@dataclass(frozen=True)
class Subject:
    """The draft that is evaluated: its config, what identifies its weights, the function that loads them.

    `load` also returns lines that say what became of each tensor of a folder. `start`: the folder that it was read
    from, if it is not a run's checkpoint. `trained`: what is on record of its training.
    """

    config: DraftConfig
    inputs: dict[str, str]
    load: Callable[[TargetHead], tuple[Draft, list[str]]]
    start: Start | None = None
    trained: Trained | None = None


def evaluate(recipe: Recipe, asked: Evaluation) -> dict[str, Any]:
    """Walk a store's samples, shared out over processes; write and return the report (on the first process).

    Raises UserError if the store's target or layers are not the draft's, if it holds no sample, if it has the most
    likely tokens in place of final states and they do not tell what a reply was sampled from, or, without `force`, if
    drafting does not fit into memory.
    """
    target = Target.here(recipe.target)
    store, manifest = open_states(recipe, asked.store, target)
    if manifest.final_state != "top-k":
        require_final_states(asked.store, manifest)
    subject = _open_draft(recipe, target, manifest, asked)
    config = subject.config
    refuse_unseen(config, manifest, asked.run or asked.draft or asked.store)
    inputs = {
        **subject.inputs,
        "yarn": config.yarn.model_dump() if config.yarn else None,
        "store": store.checksum,
        "samples": asked.num_samples,
        "final_norm": target.final_norm,  # changes the expected acceptance
        **({"draft_config": config.model_dump(mode="json")} if subject.start else {}),
    }
    sample_ids = store.sample_ids()[: asked.num_samples]
    trained_on = count_trained_on(store, sample_ids, subject.trained)
    if asked.output.exists():
        report = read_json(asked.output, "an evaluation")
        # Reports of earlier versions have no rows.
        if report.get("inputs") == inputs and "rows" in report and _has_proposals(asked, report):
            print(f"eval: {asked.output} is finished, skipped (acceptance length {report['acceptance_length']:.3f})")
            _warn(trained_on, len(sample_ids))
            return dict(report)
    if not sample_ids:
        raise UserError(asked.store, found="no sample", expected="held-out samples", fix="Give a store that has some.")
    with start_processes() as processes, processes.autocast():
        torch.set_num_threads(recipe.training().num_threads or max(1, count_cores() // processes.world))
        if not asked.force:
            _refuse_unfit(recipe, target, config, store, sample_ids, processes)
        head = read_head(target)
        draft, lines = subject.load(head)
        if processes.is_first:
            print("".join(f"eval: {line}\n" for line in lines), end="")
        draft, head = draft.to(processes.device), head.to(processes.device)
        if subject.start:
            few = (store.read_sample(id_) for id_ in sample_ids[:FEW])
            refuse_layers(subject.start, manifest.layer_ids, lambda: acceptance_of(draft, head, few))
        samples = Samples(store, sample_ids, manifest.layer_ids, keep_proposals=asked.proposals is not None)
        walked, shifted = _walk_all(draft, head, samples, processes)
    report = {**_report(walked, config.num_draft_tokens), **_compare(walked, shifted, config), "inputs": inputs}
    report |= {"set": asked.store.resolve().name, "trained_on": trained_on}
    if processes.is_first:
        if asked.proposals is not None:
            steps = {one.sample: one.proposals for one in walked if one.proposals is not None}
            write_proposals(asked.proposals, Proposals(config.num_draft_tokens, asked.subject, inputs, steps))
            print(f"eval: proposals of {report['steps']} steps -> {asked.proposals}")
        write_json(asked.output, report)
        _print(report, config, asked.output)
        _warn(trained_on, len(sample_ids))
    return report


def _warn(trained_on: int | None, num_samples: int) -> None:
    """Say on stderr if the draft was trained on samples of the evaluation."""
    if trained_on:
        print(
            f"eval: warning: the draft was trained on {trained_on} of the {num_samples} samples: the figures are too "
            "good. Give a store of conversations that were kept out of the training.",
            file=sys.stderr,
        )


def _has_proposals(asked: Evaluation, report: dict[str, Any]) -> bool:
    """Whether the proposals that are asked for are those of a finished report."""
    if asked.proposals is None:
        return True
    return asked.proposals.exists() and read_proposals_head(asked.proposals).inputs == report["inputs"]


def _print(report: dict[str, Any], config: DraftConfig, output: Path) -> None:
    low, high = report["interval"]
    print(
        f"eval: acceptance length {report['acceptance_length']:.3f} [{low:.3f}, {high:.3f}], expected "
        f"{report['expected_acceptance_length']:.3f}, at K = {config.num_draft_tokens} (simulated) over "
        f"{report['samples']} samples, {report['steps']} steps -> {output}"
    )
    if sampled := report.get("sampled_drafts"):
        print(
            f"eval: with draft_sample_method probabilistic: {sampled['acceptance_length']:.3f} on the "
            f"{sampled['samples']} sampled ones"
        )
    if confidence := report.get("confidence"):
        print(
            f"eval: confidences are off by {confidence['calibration_error']:.3f} on average, "
            f"{confidence['calibrated_error']:.3f} after calibration (train export --eval folds it in)"
        )
    for line in report.get("shifted_layers", []):
        low, high = line["gain"]
        verdict = "the folder's layer ids are off by one" if low > 0 else "no better"
        print(
            f"eval: with layers {line['layer_ids']} instead of {config.layer_ids}: {line['acceptance_length']:.3f}, "
            f"gain [{low:+.3f}, {high:+.3f}]: {verdict}"
        )


def _open_draft(recipe: Recipe, target: Target, manifest: Manifest, asked: Evaluation) -> Subject:
    """Return the draft to evaluate. Raises UserError if it does not fit the target."""
    if asked.run is not None:
        read_run(asked.run, "train offline")
        run = DraftRun(asked.run)
        config = served_config(read_config(run), recipe)
        _check_store(asked.store, manifest, config, target)
        weights = run.chosen_weights()
        trained = read_trained(run, weights.parent.name)
        return Subject(config, {"draft": hash_file(weights)}, lambda _: (load_served(run, recipe), []), trained=trained)
    assert asked.draft is not None
    start = open_start(asked.draft, recipe, target)
    source = {"target_fingerprint": target.fingerprint, "store": ""}
    config = own_config(start, suppose_config(recipe, target)).model_copy(update=source)
    config = served_config(config, recipe) if start.draft.is_checkpoint else config

    def load(head: TargetHead) -> tuple[Draft, list[str]]:
        draft = start.method.build(config)
        lines = load_start(start, draft, head)
        return draft.eval(), lines

    return Subject(config, start.inputs("draft"), load, start, find_trained(start))


def acceptance_of(draft: Draft, head: TargetHead, samples: Iterable[StoredSample]) -> Acceptance:
    """Return the predicted acceptance on some samples."""
    steps = [a for sample in samples for reply in walk(sample, draft.draft(sample, head).tokens) for a in reply]
    return Acceptance.from_steps(steps, draft.config.num_draft_tokens)


def refuse_layers(start: Start, stored: list[int], predict: Callable[[], Acceptance], *, exact: bool = False) -> None:
    """Raise UserError if a store lacks layers that a draft reads, or, with `exact`, has others too.

    If all ids are off by one, the folder may count layers in another way than its layout does: then the error tells
    what `predict()`, the evaluation on the store's layers as they are, gives.
    """
    layers = start.draft.layers
    if layers.ids == stored or (not exact and set(layers.ids) <= set(stored)):
        return
    shifts = {theirs - ours for theirs, ours in zip(layers.ids, stored, strict=False)}
    fix = f"Dump again with target.aux_layers={layers.ids}."
    if len(layers.ids) == len(stored) and shifts in ({1}, {-1}):
        found = predict()
        fix = (
            f"All are one too {'high' if shifts == {1} else 'low'}. With the store's layers instead, the draft "
            f"predicts an acceptance length of {found.acceptance_length:.3f} at K = {len(found.histogram) - 1}, the "
            f"first draft token accepted in {found.per_position[0]:.0%} of the steps. If it is that good, its ids are "
            f"off by one: correct them in {start.folder / 'config.json'}. Else: {fix[0].lower()}{fix[1:]}"
        )
    raise UserError(
        start.folder,
        found=f"a draft that reads layers {layers.ids} ({layers.counted})",
        expected=f"the store's layers {stored}",
        fix=fix,
    )


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
    """One walked sample: accepted tokens by reply, their expectation, and the groups that it belongs to.

    `by_context`: acceptance by the number of tokens before a step's anchor, as a bucket. `tried`: the draft tokens that
    were tried, if the draft has confidences. `sampled`: what is expected if draft tokens
    are sampled, for a sampled reply. `proposals`: what was drafted at each step, if that is asked for.
    """

    sample: str
    accepted: list[list[int]]
    expected: float
    groups: dict[str, str]
    by_context: dict[str, Acceptance]
    tried: Tried | None = None
    sampled: Expected | None = None
    proposals: np.ndarray | None = None

    def acceptance(self, num_tokens: int) -> Acceptance:
        return Acceptance.from_steps([a for reply in self.accepted for a in reply], num_tokens)


Shifted = dict[tuple[int, ...], list[Acceptance]]
"""Acceptance of the first samples with other layers than the draft's."""


@dataclass(frozen=True)
class Samples:
    """The samples to walk, `ids` of a store with the layers `stored`."""

    store: AnyStore
    ids: list[str]
    stored: list[int]
    keep_proposals: bool = False

    def read(self, sample_id: str, layer_ids: Sequence[int]) -> StoredSample:
        """Read a sample with the states of these layers alone."""
        sample = self.store.read_sample(sample_id)
        if list(layer_ids) == self.stored:
            return sample
        return sample.of_layers([self.stored.index(i) for i in layer_ids], len(self.stored))


def _walk_all(draft: Draft, head: TargetHead, samples: Samples, processes: Processes) -> tuple[list[Walked], Shifted]:
    """Walk all samples; and the first few with the layers below and above the draft's, if the store has those."""
    layers = draft.config.layer_ids
    walked = [_walk(draft, head, samples, id_) for id_ in processes.track(samples.ids, "eval")]
    shifted: Shifted = {}
    for shift in (-1, 1):
        others = tuple(i + shift for i in layers)
        if set(others) <= set(samples.stored):
            few = samples.ids[:MANY]
            shifted[others] = [acceptance_of(draft, head, [samples.read(id_, others)]) for id_ in few]
    return processes.gather(walked), shifted


def _compare(walked: list[Walked], shifted: Shifted, config: DraftConfig) -> dict[str, Any]:
    """Return the report's part on shifted layers; empty if the store has none. `gain` is an interval."""
    own = [one.acceptance(config.num_draft_tokens) for one in walked]
    lines = [
        {
            "layer_ids": list(layer_ids),
            "acceptance_length": round(Acceptance.pool(parts).acceptance_length, 4),
            "gain": [round(edge, 4) for edge in Acceptance.gain_interval(parts, own[: len(parts)])],
        }
        for layer_ids, parts in shifted.items()
    ]
    return {"layer_ids": config.layer_ids, "shifted_layers": lines} if lines else {}


def _walk(draft: Draft, head: TargetHead, samples: Samples, sample_id: str) -> Walked:
    sample = samples.read(sample_id, draft.config.layer_ids)
    refuse_inexact(sample, sample_id)
    drafted = draft.draft(sample, head)
    found = walk_sample(sample, drafted.tokens)
    groups = {
        "by_mode": sample.metadata.get("thinking_mode", ""),
        "by_category": sample.metadata.get("category", ""),
        "by_length": length_bucket(sample.num_tokens),
        "by_temperature": sample.metadata.get("temperature", ""),
    }
    expected, tried, sampled = expected_acceptances(found, sample, head), None, None
    if drafted.confidence is not None:
        pairs = zip(found.tried_rows, found.tried_tokens, strict=True)
        accepted = [int(sample.input_ids[row + 1]) == token for row, token in pairs]
        tried = tried_of(found.tried_rows, found.tried_slots, drafted.confidence, accepted)
    if temperature_of(sample) > 0.0:
        scores = draft.score(sample, head, temperature_of(sample))
        sampled = expect_steps(ratios_of(sample, head, scores), spans_of(sample.loss_mask))
    by_context = _by_context(found, draft.config.num_draft_tokens)
    proposals = proposals_of(found, drafted.tokens) if samples.keep_proposals else None
    return Walked(sample_id, found.replies, expected, groups, by_context, tried, sampled, proposals)


def _by_context(found: Walk, num_tokens: int) -> dict[str, Acceptance]:
    steps: dict[str, list[int]] = {}
    for place, accepted in zip(found.places, found.steps, strict=True):
        steps.setdefault(length_bucket(place), []).append(accepted)
    return {bucket: Acceptance.from_steps(of_bucket, num_tokens) for bucket, of_bucket in steps.items()}


def _report(walked: list[Walked], num_tokens: int) -> dict[str, Any]:
    """Return the report over samples, without its inputs."""
    parts = [one.acceptance(num_tokens) for one in walked]
    total, groups = Acceptance.pool(parts), dict[str, dict[str, list[Acceptance]]]()
    for one, part in zip(walked, parts, strict=True):
        for name, key in one.groups.items():
            groups.setdefault(name, {}).setdefault(key, []).append(part)
        for bucket, of_bucket in one.by_context.items():
            groups.setdefault("by_context", {}).setdefault(bucket, []).append(of_bucket)
    expected = sum(one.expected for one in walked)
    return {
        **_summarize(parts),
        "expected_acceptance_length": round(1.0 + expected / max(1, total.steps), 4),
        "num_draft_tokens": num_tokens,
        **{
            name: {key: _summarize(members) for key, members in sorted(by_key.items())}
            for name, by_key in groups.items()
        },
        "rows": _make_rows(walked, num_tokens),
        "samples": len(walked),
        **_confidence(walked),
        **_sampled(walked),
        "walks": [{"sample": one.sample, "accepted": one.accepted} for one in walked],
    }


def _make_rows(walked: list[Walked], num_tokens: int) -> list[dict[str, Any]]:
    """Return a row per thinking mode and temperature; a temperature is None where the store has none."""
    groups: dict[tuple[str, str], list[Acceptance]] = {}
    for one in walked:
        key = one.groups["by_mode"], one.groups["by_temperature"]
        groups.setdefault(key, []).append(one.acceptance(num_tokens))
    return [
        {
            "thinking_mode": mode,
            "temperature": float(temperature) if temperature else None,
            "n": len(parts),
            **_summarize(parts),
        }
        for (mode, temperature), parts in sorted(groups.items())
    ]


def _confidence(walked: list[Walked]) -> dict[str, Any]:
    """Return the report's part on confidences; empty if the draft has none."""
    parts = [one.tried for one in walked if one.tried is not None]
    return {"confidence": summarize_confidence(parts)} if parts else {}


def _sampled(walked: list[Walked]) -> dict[str, Any]:
    """Return the report's part on sampled drafts; empty without sampled replies."""
    parts = [one.sampled for one in walked if one.sampled is not None]
    return {"sampled_drafts": {"samples": len(parts), **Expected.pool(parts).summary()}} if parts else {}


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
