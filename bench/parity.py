"""Compare trainer and engine on a few prompts and find the first tensor on the way to the draft's logits that differs.

Reads:  a training run, its export, a store of greedy conversations.
Writes: OUTPUT/trainer.safetensors (`train trace`), OUTPUT/parity.json (the differences by stage).

Stages, each an input of the next: the captured layers; the target's greedy tokens (final norm and lm_head); the mask
token and its embedding; the vocabulary map; the Markov bias after the anchor; the draft's logits, slot by slot; the
scores of the candidates, slot by slot; the confidence of the first draft token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.explain import explain_config
from common.errors import IncompleteError
from common.files import write_json
from common.stages import run_stage
from contracts.draft import DraftRun
from contracts.store import open_store
from contracts.trace import Trace, read_traces
from drafts import METHODS
from drafts.published import read_config, read_descriptor
from recipe.recipe import Recipe
from serve.trace import trace_engine
from target.target import Target

LIMITS = {"float32": 1e-3, "float16": 1e-2, "bfloat16": 5e-2}
"""Relative differences that rounding explains, by the engine's dtype."""


@dataclass(frozen=True)
class Finding:
    """A stage of one sample: the difference, its description, and whether it exceeds the limit."""

    stage: str
    sample_id: str
    difference: float
    differs: bool
    text: str


@dataclass(frozen=True)
class Compared:
    """A training run, its export, and a store of greedy conversations."""

    run: DraftRun
    export: Path
    store: Path


def parity(
    recipe: Recipe, recipe_args: Sequence[str], compared: Compared, output: Path, num_samples: int
) -> dict[str, Any]:
    """Compare trainer and engine; return the report. `recipe_args`: the flags that `recipe` was loaded from.

    Raises IncompleteError with the first difference and its likely cause.
    """
    target = Target.here(recipe.target)
    store, manifest = open_store(compared.store, target)
    path = output / "trainer.safetensors"
    places = ("--run", compared.run.folder, "--store", store.folder, "--output", path)
    run_stage("train", "trace", *recipe_args, *places, "--samples", num_samples)
    trainer = read_traces(path)
    _calibrate(trainer, read_descriptor(compared.export).calibration)
    samples = [(trace.sample_id, trace.start, trace.tensors["token_ids"].tolist()) for trace in trainer]
    engine = trace_engine(recipe, target, compared.export, samples, len(trainer[0].tensors["teacher"]))
    limit = LIMITS.get(str(recipe.serve.args.get("dtype", "bfloat16")), LIMITS["bfloat16"])
    method = METHODS[read_config(compared.run).method]
    findings = compare(trainer, engine, manifest.layer_ids, limit, autoregressive=method.autoregressive)
    worst = worst_of(findings)
    report = {"samples": len(trainer), "limit": limit, "stages": [vars(found) for found in worst]}
    write_json(output / "parity.json", report)
    for found in worst:
        print(f"{found.stage:<28}{'DIFFERS' if found.differs else 'same':<9}{found.text}")
    first = next((found for found in findings if found.differs), None)
    if first is None:
        print(f"parity: trainer and engine agree on {len(trainer)} samples -> {output}")
        return report
    cause = explain_config(compared.export, compared.run, store)
    cause = cause or CAUSES[first.stage.split(" ")[0].rstrip("s")]
    raise IncompleteError(
        f"{compared.export}: found {first.stage} of sample {first.sample_id} to differ between trainer and engine "
        f"({first.text}), expected the same. {cause}"
    )


def _calibrate(trainer: Sequence[Trace], calibration: tuple[float, float] | None) -> None:
    """Apply an export's calibration to the trainer's confidences, which are those of the checkpoint."""
    for trace in trainer:
        if calibration is not None and "confidence" in trace.tensors:
            scale, shift = calibration
            trace.tensors["confidence"] = (trace.tensors["confidence"].logit() * scale + shift).sigmoid()


CAUSES = {
    "layer": "The engine captures other layers than the store holds, or applies other norms: run `dump verify`.",
    "teacher": "Final norm or lm_head differ from the engine's: run `dump verify` on the store.",
    "mask": "The engine fills its slots with another token, or its embedding differs.",
    "vocabulary": "The export's d2t is not the trained one: export again.",
    "markov": "The engine's Markov factors, or the token that it takes as the one before the first slot, differ.",
    "confidence": "The confidence head's weight or bias, or the states that it reads, differ.",
    "candidate": "The logits are equal: look at the weights of the head that scores candidates, and what it reads.",
    "draft": "The inputs are equal: look at the draft's norms (rms_norm_eps), rope and weights.",
}


def compare(
    trainer: Sequence[Trace],
    engine: Sequence[Trace],
    layer_ids: Sequence[int],
    limit: float,
    *,
    autoregressive: bool,
) -> list[Finding]:
    """List the findings of all samples, stage by stage. `autoregressive`: draft tokens are inputs of the next ones."""
    pairs = list(zip(trainer, engine, strict=True))
    found = [finding for a, b in pairs for finding in _layers(a, b, layer_ids, limit)]
    found += [finding for a, b in pairs for finding in _teacher(a, b)]
    found += [finding for a, b in pairs for finding in _mask(a, b, limit)]
    found += [finding for a, b in pairs for finding in _vocabulary(a, b)]
    found += [finding for a, b in pairs for finding in _of_first_slot("markov_bias", a, b, limit)]
    found += [finding for a, b in pairs for finding in _draft_logits(a, b, limit, autoregressive)]
    found += [finding for a, b in pairs for finding in _candidate_scores(a, b, limit)]
    return found + [finding for a, b in pairs for finding in _of_first_slot("confidence", a, b, limit)]


def worst_of(findings: Sequence[Finding]) -> list[Finding]:
    """Return the worst finding of each stage, in order."""
    found: dict[str, Finding] = {}
    for finding in findings:
        if finding.stage not in found or finding.difference > found[finding.stage].difference:
            found[finding.stage] = finding
    return list(found.values())


def _layers(ours: Trace, theirs: Trace, layer_ids: Sequence[int], limit: float) -> Iterator[Finding]:
    a, b = ours.tensors["layers"], theirs.tensors["layers"]
    if a.shape != b.shape:
        text = f"{list(a.shape)} (tokens, layers, size) and {list(b.shape)}"
        yield Finding("layers", ours.sample_id, float("inf"), True, text)
        return
    for number, layer_id in enumerate(layer_ids):
        apart = float((a[:, number] - b[:, number]).norm() / a[:, number].norm())
        text = f"relative difference {apart:.2g}"
        yield Finding(f"layer {layer_id}", ours.sample_id, apart, not apart <= limit, text)


def _teacher(ours: Trace, theirs: Trace) -> Iterator[Finding]:
    recorded = ours.tensors["token_ids"][ours.start :].tolist()
    pairs = zip(ours.tensors["teacher"].tolist(), theirs.tensors["teacher"].tolist(), recorded, strict=False)
    for place, (a, b, known) in enumerate(pairs):
        if a != b:
            text = f"token {place} of the reply: {a} by the store's state, {b} by the engine"
            yield Finding("teacher argmax", ours.sample_id, 1.0, True, text)
            return
        if b != known:  # from here on the contexts differ
            break
    yield Finding("teacher argmax", ours.sample_id, 0.0, False, "the same tokens")


def _mask(ours: Trace, theirs: Trace, limit: float) -> Iterator[Finding]:
    if "mask_token" not in ours.tensors:
        return
    a, b = int(ours.tensors["mask_token"]), int(theirs.tensors["mask_token"])
    yield Finding("mask token", ours.sample_id, float(a != b), a != b, f"{a} and {b}")
    one, other = ours.tensors["mask_embedding"], theirs.tensors["mask_embedding"]
    apart = float((one - other).norm() / one.norm().clamp(min=1e-12))
    yield Finding("mask embedding", ours.sample_id, apart, not apart <= limit, f"relative difference {apart:.2g}")


def _vocabulary(ours: Trace, theirs: Trace) -> Iterator[Finding]:
    a, b = ours.tensors.get("vocabulary"), theirs.tensors.get("vocabulary")
    if a is None and b is None:
        return
    if a is None or b is None or len(a) != len(b):
        sizes = [("all" if tokens is None else len(tokens)) for tokens in (a, b)]
        text = f"{sizes[0]} and {sizes[1]} tokens known"
        yield Finding("vocabulary map", ours.sample_id, 1.0, True, text)
        return
    apart = float((a != b).float().mean())
    first = int((a != b).int().argmax())
    text = f"{int((a != b).sum())} of {len(a)} entries" + (
        f"; {first} is {int(a[first])} and {int(b[first])}" * (apart > 0)
    )
    yield Finding("vocabulary map", ours.sample_id, apart, apart > 0, text)


def _of_first_slot(name: str, ours: Trace, theirs: Trace, limit: float) -> Iterator[Finding]:
    """Compare a tensor of all slots at the first one, whose token before is the anchor on both sides."""
    if name not in ours.tensors or not _same_anchor(ours, theirs):
        return
    stage = name.replace("_", " ")
    if name not in theirs.tensors:
        yield Finding(stage, ours.sample_id, float("inf"), True, "the engine has none")
        return
    a, b = ours.tensors[name][0], theirs.tensors[name][0]
    apart = float((a - b).abs().max() / a.abs().max().clamp(min=1e-12))
    yield Finding(stage, ours.sample_id, apart, not apart <= limit, f"relative difference {apart:.2g}")


def _same_anchor(ours: Trace, theirs: Trace) -> bool:
    return int(theirs.tensors["teacher"][0]) == int(ours.tensors["token_ids"][ours.start])


def _draft_logits(ours: Trace, theirs: Trace, limit: float, autoregressive: bool) -> Iterator[Finding]:
    if not _same_anchor(ours, theirs):
        return  # the engine drafts after another token
    a, b = ours.tensors["draft_logits"], theirs.tensors["draft_logits"]
    for slot in range(len(a)):
        known = a[slot].isfinite() & b[slot].isfinite()
        same = bool((a[slot].isfinite() == b[slot].isfinite()).all())
        scale = a[slot][known].abs().max().clamp(min=1e-12)
        apart = float((a[slot][known] - b[slot][known]).abs().max() / scale) if same else float("inf")
        text = f"logits apart by {apart:.2g} of the largest; tokens {int(a[slot].argmax())} and {int(b[slot].argmax())}"
        yield Finding(f"draft slot {slot + 1}", ours.sample_id, apart, not apart <= limit, text)
        if autoregressive and int(a[slot].argmax()) != int(b[slot].argmax()):
            return  # from here on the inputs differ


def _candidate_scores(ours: Trace, theirs: Trace, limit: float) -> Iterator[Finding]:
    """Compare the scores of the candidates on both sides; rounding may let the least likely ones differ."""
    if "candidate_scores" not in ours.tensors or not _same_anchor(ours, theirs):
        return
    a, b = ours.tensors["candidate_scores"], theirs.tensors["candidate_scores"]
    for slot in range(len(a)):
        known = a[slot].isfinite() & b[slot].isfinite()
        scale = a[slot][a[slot].isfinite()].abs().max().clamp(min=1e-12)
        apart = float((a[slot][known] - b[slot][known]).abs().max() / scale) if known.any() else float("inf")
        tokens = int(a[slot].argmax()), int(b[slot].argmax())
        text = f"scores apart by {apart:.2g} of the largest; tokens {tokens[0]} and {tokens[1]}"
        yield Finding(f"candidate slot {slot + 1}", ours.sample_id, apart, not apart <= limit, text)
        if tokens[0] != tokens[1]:
            return  # from here on the candidates follow other tokens
