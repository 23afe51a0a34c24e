"""Prove a store: its files are whole, hold the tokens that were generated, and states that predict them.

Reads:  a finished store, the target's head, the conversations (where they still are), and the target itself in
        transformers for a few samples, where it fits into memory.
Writes: verified.json in the store, for the ledger as it was.

Greedy rows: argmax(lm_head(final_norm(hidden_states[t]))) must be the token at t + 1 wherever that one was generated.
Batches of other shapes round differently: a token whose logit is within the tolerance of the largest counts as a tie.
Sampled rows: with q the distribution that the state gives under the row's sampling parameters, log q(token) is -H(q) on
average; the sum of the differences, over its standard deviation, must not lie far from 0.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from contracts.conversation import CONVERSATIONS_FILE, Sample, hash_conversations
from contracts.errors import IncompleteError
from contracts.files import read_json, write_json
from contracts.ledger import Ledger
from contracts.recipe import Recipe
from contracts.run import read_run
from contracts.store import Manifest, Store, StoredSample, open_store
from contracts.target import Target
from contracts.target_weights import TargetHead, kept_by, read_head
from dump.diagnose import find_plain_defect, name_defect
from dump.reference import compare_layers, fits_memory
from dump.rendered import TemplateMasks
from dump.samples import judge, read_rows

# Largest logit gap that rounding explains, by the dtype of the stored states (logits are of the order of 10).
TIE_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.25, "fp8_e4m3": 2.0}
MAX_DEVIATIONS = 8.0
TOKENS_A_CHUNK = 2048


@dataclass
class Counts:
    """What a proof has gone through."""

    files: int = 0
    greedy: int = 0
    tokens: int = 0
    matches: int = 0
    ties: int = 0
    sampled: int = 0
    sampled_tokens: int = 0
    compared: int = 0
    reference: int = 0
    coverage: dict[str, Counter[str]] = field(default_factory=dict)


def verify(recipe: Recipe, folder: Path, *, once: bool = False, num_reference: int = 8) -> dict[str, Any]:
    """Check every sample, and the layers of `num_reference` of them; the counts.

    Raises UserError for a broken file, IncompleteError that names the defect and the first sample that has it. `once`
    takes an earlier proof of the same ledger for good; damage since then goes unseen.
    """
    target = Target.read(recipe.target.path)
    store, manifest = open_store(folder, target)
    checksum, report_path = store.checksum, folder / "verified.json"
    if once and report_path.exists() and read_json(report_path, "a proof")["ledger"] == checksum:
        print(f"verify: {folder} is proven already, skipped")
        return dict(read_json(report_path, "a proof"))
    _check_manifest(store, manifest, target)
    ledger = Ledger(store.ledger_path)
    ledger.close()
    head, counts = read_head(target), Counts()
    done = sorted(ledger.ids("done"))
    folder_of_sources = _find_sources(manifest)
    walk = (
        ((id_, None) for id_ in done)
        if folder_of_sources is None
        else _walk(store, recipe, target, folder_of_sources, ledger)
    )
    for sample_id, source in tqdm(walk, total=len(done), desc="verify", unit="sample", mininterval=2, disable=None):
        store.check_file(sample_id, ledger.entries[sample_id])
        sample = store.read_sample(sample_id)
        counts.files += 1
        if source is not None:
            _check_tokens(store, sample_id, sample, source)
            counts.compared += 1
        _check_states(store, manifest, sample_id, sample, head, counts)
        mode = sample.metadata.get("thinking_mode") or "(none)"
        covered = counts.coverage.setdefault(mode, Counter())
        covered["tokens"] += sample.num_tokens
        covered["supervised"] += int(sample.loss_mask.sum())
    if counts.files != len(done):
        raise IncompleteError(
            f"{store.ledger_path}: found {len(done)} samples, expected the {counts.files} that the conversations have. "
            "Dump again."
        )
    if num_reference and done and fits_memory(target):
        chosen = done[:: max(1, len(done) // num_reference)][:num_reference]
        compare_layers(recipe, target, store, manifest, chosen)
        counts.reference = len(chosen)
    report = {"ledger": checksum, "samples": counts.greedy, **_to_report(counts)}
    _tell(counts, manifest)
    write_json(report_path, report)
    return report


def _check_manifest(store: Store, manifest: Manifest, target: Target) -> None:
    expected = {"final_norm": target.final_norm, "final_state": "pre-norm", "num_layers": target.num_layers}
    for key, value in expected.items():
        if getattr(manifest, key) != value:
            raise IncompleteError(
                f"{store.manifest_path} ({key}): found {getattr(manifest, key)!r}, expected {value!r} as the target "
                "has it: every sample would be read wrongly. Dump again."
            )


def _find_sources(manifest: Manifest) -> Path | None:
    """The folder of the conversations, if they are where they were, unchanged."""
    folder = Path(manifest.conversations_folder)
    there = manifest.conversations_folder and (folder / CONVERSATIONS_FILE).exists()
    if there and hash_conversations([folder]) == manifest.conversations:
        return folder
    print("verify: the conversations are not at hand; tokens and masks are not compared with them")
    return None


def _walk(
    store: Store, recipe: Recipe, target: Target, conversations: Path, ledger: Ledger
) -> Iterator[tuple[str, Sample | None]]:
    """Every sample that is done, as it was generated, cut as the dump was told to."""
    settings = read_run(store.folder, "dump run")["settings"]
    section = recipe.dump.model_copy(update={"truncate": settings["dump"]["truncate"]})
    for row in read_rows([conversations], TemplateMasks(recipe.target, target)):
        if ledger.entries.get(row.sample_id, {}).get("status") == "done":
            taken = judge(section, row, settings["max_tokens"]).row
            yield row.sample_id, taken.sample if taken else row.sample


def _check_tokens(store: Store, sample_id: str, sample: StoredSample, source: Sample) -> None:
    """Raise IncompleteError unless tokens and mask are the conversation's."""
    path = store.sample_path(sample_id)
    found, expected = sample.input_ids.tolist(), source.token_ids
    if found != expected:
        place = next(
            (i for i, (a, b) in enumerate(zip(found, expected, strict=False)) if a != b), min(len(found), len(expected))
        )
        missing = len(expected) - len(found)
        what = f"{missing} tokens missing" if missing > 0 else "other tokens than were generated"
        raise IncompleteError(
            f"{path}: found {what}, first at {place} ({len(found)} tokens), expected the conversation's "
            f"{len(expected)}. Dump again."
        )
    mask = torch.zeros(len(expected), dtype=torch.bool)
    for start, end in source.loss_spans:
        mask[start:end] = True
    if not torch.equal(mask, sample.loss_mask):
        raise IncompleteError(
            f"{path}: found a loss mask of {int(sample.loss_mask.sum())} tokens, expected the conversation's spans of "
            f"{int(mask.sum())}. Dump again."
        )


def _check_states(
    store: Store, manifest: Manifest, sample_id: str, sample: StoredSample, head: TargetHead, counts: Counts
) -> None:
    """Raise IncompleteError that names the defect unless the final states predict the generated tokens."""
    if plain := find_plain_defect(head, sample):
        raise IncompleteError(
            f"{store.sample_path(sample_id)}: found that {plain}, expected the target's un-normed states. Dump again."
        )
    tolerance = TIE_TOLERANCE[manifest.dtype]
    if float(sample.metadata["temperature"] or "nan") != 0.0:
        deviations, num_tokens = sampled_deviations(head, sample)
        counts.sampled += 1
        counts.sampled_tokens += num_tokens
        if not abs(deviations) <= MAX_DEVIATIONS:
            raise IncompleteError(
                f"{store.sample_path(sample_id)}: found {num_tokens} sampled tokens whose log-probability under its "
                f"states lies {deviations:.1f} standard deviations off, expected at most {MAX_DEVIATIONS:.0f}: "
                f"{name_defect(head, sample, manifest)}. Dump again."
            )
        return
    gaps = logit_gaps(head, sample)
    counts.greedy += 1
    counts.tokens += gaps.numel()
    counts.matches += int((gaps == 0).sum())
    counts.ties += int(((gaps > 0) & (gaps <= tolerance)).sum())
    worst = float(gaps.max())
    if not worst <= tolerance:
        wrong = int((gaps > tolerance).sum())
        raise IncompleteError(
            f"{store.sample_path(sample_id)}: found {wrong} of {gaps.numel()} generated tokens that its states do "
            f"not predict (logit gap up to {worst:.2f}), expected argmax(lm_head({manifest.final_norm}_norm(h))) "
            f"to be the next token: {name_defect(head, sample, manifest)}. Dump again."
        )


@torch.inference_mode()
def logit_gaps(head: TargetHead, sample: StoredSample) -> torch.Tensor:
    """How far each generated token's logit lies under the largest one: `(number of supervised tokens,)`, 0 = argmax."""
    gaps = []
    for logits, tokens in predict(head, sample):
        gaps.append(logits.amax(-1) - logits.gather(1, tokens[:, None])[:, 0])
    return torch.cat(gaps)


def predict(head: TargetHead, sample: StoredSample) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Logits `(t, V)` at the places before generated tokens, and these tokens `(t,)`, some at a time."""
    places = sample.loss_mask.nonzero()[:, 0]
    for chunk in places.split(TOKENS_A_CHUNK):
        yield head.logits(sample.hidden_states[chunk - 1]), sample.input_ids[chunk].long()


@torch.inference_mode()
def sampled_deviations(head: TargetHead, sample: StoredSample) -> tuple[float, int]:
    """Standard deviations between what the sampled tokens' log-probabilities sum to and what they should, and how many.

    A token that the row's top_p or top_k excludes, by more than rounding explains, gives infinity.
    """
    sampling = json.loads(sample.metadata.get("sampling") or "{}")
    total = variance = 0.0
    count = 0
    for logits, tokens in predict(head, sample):
        log_q = (logits / float(sample.metadata["temperature"])).log_softmax(-1)
        keep = kept_by(log_q.exp(), sampling.get("top_p"), sampling.get("top_k"))
        own = log_q.gather(1, tokens[:, None])[:, 0]
        outside = ~keep.gather(1, tokens[:, None])[:, 0]
        keep.scatter_(1, tokens[:, None], True)  # at the edge, rounding decides
        log_q = log_q.masked_fill(~keep, -torch.inf).log_softmax(-1)
        q = log_q.exp()
        mean = (q * log_q.nan_to_num(neginf=0.0)).sum(-1)
        square = (q * log_q.nan_to_num(neginf=0.0) ** 2).sum(-1)
        if bool((outside & (own < -10.0)).any()):
            return float("inf"), len(tokens)
        total += float((log_q.gather(1, tokens[:, None])[:, 0] - mean).sum())
        variance += float((square - mean**2).clamp_min(0).sum())
        count += len(tokens)
    return total / max(variance, 1e-6) ** 0.5 if count else 0.0, count


def _to_report(counts: Counts) -> dict[str, Any]:
    coverage = {mode: dict(counter) for mode, counter in sorted(counts.coverage.items())}
    return {**{k: v for k, v in vars(counts).items() if k not in ("greedy", "coverage")}, "coverage": coverage}


def _tell(counts: Counts, manifest: Manifest) -> None:
    print(
        f"verify: {counts.files} files whole; {counts.matches} of {counts.tokens} generated tokens of {counts.greedy} "
        f"greedy samples are the states' argmax, {counts.ties} ties within {TIE_TOLERANCE[manifest.dtype]}"
    )
    if counts.sampled:
        print(
            f"verify: {counts.sampled_tokens} tokens of {counts.sampled} sampled rows are as likely as they should be"
        )
    if counts.compared:
        print(f"verify: tokens and masks of {counts.compared} samples are the conversations'")
    if counts.reference:
        print(f"verify: all layers of {counts.reference} samples are as transformers computes them")
    else:
        print("verify: the layers were not compared with transformers: the target does not fit, or --reference is 0")
    for mode, covered in sorted(counts.coverage.items()):
        print(f"verify: mode {mode}: {covered['supervised']} of {covered['tokens']} tokens supervised")
