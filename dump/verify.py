"""Prove a store: its files are complete, hold the generated tokens, and hold states that predict them.

Reads:  a finished store, the target's head, the conversations (if they still exist), and the whole target with
        transformers for a few samples, if it fits into memory.
Writes: in the store, unless it is read-only: verified.jsonl, the proof of each sample, so that the next run reads only
        what has changed (dump/proofs.py); verified.json, the counts and the checksum of a wholly proven ledger.

Greedy samples: argmax(lm_head(final_norm(hidden_states[t]))), with the sampling penalties applied, must be the token at
t + 1 if that one was generated. Batches of other shapes round differently, so a token whose logit is within the
tolerance of the largest counts as a tie.
Of a store with the most likely tokens in place of the final states, their first one must be the token.
Sampled ones: the tokens' log-probability under the row's sampling parameters must be near its mean, the negative
entropy (see `sampled_deviations`).
"""

from __future__ import annotations

import random
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from common.cores import count_cores
from common.errors import IncompleteError
from common.files import UnwritableError, hash_json, read_json, write_json
from common.progress import track
from contracts.conversation import CONVERSATIONS_FILE, Sample, hash_conversations
from contracts.ledger import Ledger
from contracts.run import read_run
from contracts.store import Manifest, Store, StoredSample, open_store
from drafts.moving import find_device, to_device
from dump.judge import Judgement, judge_states, tolerance_of
from dump.proofs import Proofs
from dump.reference import compare_layers, fits_memory
from dump.rendered import TemplateMasks
from dump.samples import cut_sample, read_rows
from recipe.recipe import Recipe
from target.head import TargetHead, read_head
from target.target import Target

MAX_READERS = 8
"""Threads that check and read files; each holds a sample."""


@dataclass
class Counts:
    """Numbers of checked files, samples and tokens. `coverage`: tokens by thinking mode.

    `known`: how many of the files were proven before. `beyond`: samples whose tokens cannot be predicted from the most
    likely ones alone.
    """

    files: int = 0
    greedy: int = 0
    tokens: int = 0
    matches: int = 0
    ties: int = 0
    sampled: int = 0
    sampled_tokens: int = 0
    compared: int = 0
    reference: int = 0
    unknown: int = 0
    beyond: int = 0
    known: int = 0
    coverage: dict[str, Counter[str]] = field(default_factory=dict)

    @classmethod
    def of(cls, sample: StoredSample, judged: Judgement, *, compared: bool) -> Counts:
        """Return the counts of one sample that passed. `compared`: with its conversation."""
        mode = sample.metadata.get("thinking_mode") or "(none)"
        covered = Counter(tokens=sample.num_tokens, supervised=int(sample.loss_mask.sum()))
        found = cls(files=1, compared=int(compared), coverage={mode: covered})
        if judged.temperature is None:
            found.unknown = 1
        elif judged.is_beyond:
            found.beyond = 1
        elif judged.temperature != 0.0:
            found.sampled, found.sampled_tokens = 1, judged.tokens
        else:
            found.greedy, found.tokens, found.matches, found.ties = 1, judged.tokens, judged.matches, judged.ties
        return found

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Counts:
        """Return the counts that `to_json` gave."""
        return cls(**{**value, "coverage": {mode: Counter(part) for mode, part in value["coverage"].items()}})

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "coverage": {mode: dict(part) for mode, part in sorted(self.coverage.items())}}

    def add(self, other: Counts) -> None:
        """Add the counts of further samples."""
        for name, value in vars(other).items():
            if name != "coverage":
                setattr(self, name, getattr(self, name) + value)
        for mode, part in other.coverage.items():
            self.coverage.setdefault(mode, Counter()).update(part)


@dataclass(frozen=True)
class Part:
    """Which samples to check: all, or `num_samples` drawn with `seed`; of these, every n-th from the i-th on."""

    num_samples: int | None = None
    seed: int = 0
    shard: tuple[int, int] | None = None

    @property
    def is_whole(self) -> bool:
        return self.num_samples is None and self.shard is None

    def choose(self, ids: list[str]) -> list[str]:
        """Return the part's ids, ascending."""
        if self.num_samples is not None:
            ids = sorted(random.Random(self.seed).sample(ids, min(self.num_samples, len(ids))))
        first, step = self.shard or (0, 1)
        return ids[first::step]


def verify(
    recipe: Recipe,
    folder: Path,
    *,
    once: bool = False,
    again: bool = False,
    num_reference: int = 8,
    part: Part | None = None,
) -> dict[str, Any]:
    """Check the samples of a part of the store, and the layers of `num_reference` of them; return the counts.

    Samples that were proven before are read only if their file has changed, or with `again`. `once` accepts an earlier
    proof of the same ledger and does not look for damage since then. Raises UserError for a broken file,
    IncompleteError with the defect and the first sample that has it.
    """
    target, part = Target.here(recipe.target), part or Part()
    store, manifest = open_store(folder, target)
    checksum, report_path = store.checksum, folder / "verified.json"
    if once and report_path.exists() and read_json(report_path, "a proof")["ledger"] == checksum:
        print(f"verify: {folder} is proven already, skipped")
        return dict(read_json(report_path, "a proof"))
    _check_manifest(store, manifest, target)
    entries = {id_: entry for id_, entry in sorted(Ledger(store.ledger_path).entries.items()) if _is_done(entry)}
    chosen, sources = part.choose(list(entries)), _find_sources(manifest)
    proofs = Proofs(store, _terms(manifest, target, sources), again=again)
    counts, todo = _split(proofs, chosen, entries)
    device = find_device()
    head = read_head(target).to(device, torch.float32)
    walked = _read_ahead(store, entries, _walk(store, recipe, target, sources, todo))
    for sample_id, source, sample in track(walked, "verify", "sample", len(todo)):
        if source is not None:
            _check_tokens(store, sample_id, sample, source)
        judged = _check_states(store, manifest, sample_id, to_device(sample, device), head)
        found = Counts.of(sample, judged, compared=source is not None)
        proofs.add(sample_id, entries[sample_id], found.to_json())
        counts.add(found)
    if counts.files != len(chosen):
        raise IncompleteError(
            f"{store.ledger_path}: found {len(chosen)} samples, expected the {counts.files} that the conversations "
            "have. Dump again."
        )
    counts.reference = sum(proofs.has_layers(id_, entries[id_]) for id_ in chosen)
    wanted = num_reference - counts.reference
    if wanted > 0 and chosen and fits_memory(target):
        reference = chosen[:: max(1, len(chosen) // wanted)][:wanted]
        compare_layers(recipe, target, store, manifest, reference)
        counts.reference += len(reference)
        for sample_id in reference:
            proofs.add(sample_id, entries[sample_id], None)
    proofs.flush()
    report = {"ledger": checksum, "samples": counts.greedy, **_to_report(counts)}
    _print_counts(counts, manifest)
    if part.is_whole:
        _write_report(report_path, report)
    else:
        print(f"verify: {len(chosen)} of {len(entries)} samples were checked")
    return report


def _split(proofs: Proofs, chosen: list[str], entries: Mapping[str, Mapping[str, Any]]) -> tuple[Counts, list[str]]:
    """Return the counts of the samples that were proven before, and the other samples."""
    counts, todo = Counts(), []
    for sample_id in chosen:
        if (known := proofs.find(sample_id, entries[sample_id])) is None:
            todo.append(sample_id)
        else:
            counts.add(Counts.from_json({**known, "known": 1}))
    return counts, todo


def _is_done(entry: Mapping[str, Any]) -> bool:
    return bool(entry["status"] == "done")


def _terms(manifest: Manifest, target: Target, sources: Path | None) -> dict[str, Any]:
    """Return what a sample's proof depends on, besides its file."""
    return {
        # Without the keys that earlier versions did not have, where they say nothing.
        "manifest": hash_json(manifest.model_dump(exclude={"target", "conversations_folder"}, exclude_none=True)),
        "target": target.fingerprint,
        "final_norm": target.final_norm,
        "with_conversations": sources is not None,
    }


def _read_ahead(
    store: Store, entries: Mapping[str, Mapping[str, Any]], walked: Iterable[tuple[str, Sample | None]]
) -> Iterator[tuple[str, Sample | None, StoredSample]]:
    """Yield each sample with its source, in order. Threads check the files and read them ahead."""

    def read(sample_id: str) -> StoredSample:
        store.check_file(sample_id, dict(entries[sample_id]))
        return store.read_sample(sample_id)

    num_threads = min(count_cores(), MAX_READERS)
    waiting: deque[tuple[str, Sample | None, Future[StoredSample]]] = deque()
    with ThreadPoolExecutor(num_threads) as pool:
        try:
            for sample_id, source in walked:
                waiting.append((sample_id, source, pool.submit(read, sample_id)))
                if len(waiting) > num_threads:
                    first_id, first_source, first = waiting.popleft()
                    yield first_id, first_source, first.result()
            for first_id, first_source, first in waiting:
                yield first_id, first_source, first.result()
        finally:
            pool.shutdown(cancel_futures=True)


def _write_report(path: Path, report: dict[str, Any]) -> None:
    """Write the proof for `--once`, unless the store is read-only."""
    with suppress(UnwritableError):  # dump/proofs.py says so
        write_json(path, report)


def _check_manifest(store: Store, manifest: Manifest, target: Target) -> None:
    fixes = {
        "final_norm": "Correct target.final_norm in the recipe, or this key: the states are those before the norm.",
        "final_state": "Dump again.",
        "num_layers": "Dump again.",
    }
    stored = manifest.final_state if manifest.final_state in ("none", "top-k") else "pre-norm"
    expected = {"final_norm": target.final_norm, "final_state": stored, "num_layers": target.num_layers}
    for key, value in expected.items():
        if getattr(manifest, key) != value:
            raise IncompleteError(
                f"{store.manifest_path} ({key}): found {getattr(manifest, key)!r}, expected {value!r} as in the "
                f"target; otherwise every sample is misread. {fixes[key]}"
            )


def _find_sources(manifest: Manifest) -> Path | None:
    """Return the folder of the conversations if they still exist, unchanged."""
    folder = Path(manifest.conversations_folder)
    there = manifest.conversations_folder and (folder / CONVERSATIONS_FILE).exists()
    if there and hash_conversations([folder]) == manifest.conversations:
        return folder
    print("verify: the conversations are gone or changed; tokens and masks are not compared with them")
    return None


def _walk(
    store: Store, recipe: Recipe, target: Target, sources: Path | None, chosen: list[str]
) -> Iterator[tuple[str, Sample | None]]:
    """Yield the chosen samples with their sources, cut where the dump cut them; None where the sources are gone."""
    if sources is None or not chosen:
        yield from ((sample_id, None) for sample_id in chosen)
        return
    max_tokens, wanted = read_run(store.folder, "dump run")["settings"]["max_tokens"], set(chosen)
    for row in read_rows([sources], TemplateMasks(recipe.target, target)):
        if row.sample_id in wanted:
            yield row.sample_id, cut_sample(row.sample, max_tokens)


def _check_tokens(store: Store, sample_id: str, sample: StoredSample, source: Sample) -> None:
    """Raise IncompleteError unless tokens and mask equal the conversation's."""
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
    store: Store, manifest: Manifest, sample_id: str, sample: StoredSample, head: TargetHead
) -> Judgement:
    """Raise IncompleteError with the defect unless the final states, if there are any, predict the generated tokens."""
    if manifest.final_state == "none":
        return Judgement()
    judged = judge_states(head, sample, manifest.layer_ids, manifest.dtype, manifest.tensor_parallel_size)
    if judged.found:
        raise IncompleteError(
            f"{store.sample_path(sample_id)}: found {judged.found}, expected {judged.expected}. Dump again."
        )
    return judged


def _to_report(counts: Counts) -> dict[str, Any]:
    return {name: value for name, value in counts.to_json().items() if name != "greedy"}


def _print_counts(counts: Counts, manifest: Manifest) -> None:
    if manifest.final_state == "none":
        print(
            f"verify: {counts.files} files whole; without final states (dump.final_states=drop) no tokens are predicted"
        )
    else:
        _print_predicted(counts, manifest)
    if counts.compared:
        print(f"verify: tokens and masks of {counts.compared} samples are the conversations'")
    for mode, covered in sorted(counts.coverage.items()):
        print(f"verify: mode {mode}: {covered['supervised']} of {covered['tokens']} tokens supervised")
    if counts.known:
        print(f"verify: {counts.known} of the files were proven before and have not changed (--again reads them)")
    if counts.reference:
        print(f"verify: all layers of {counts.reference} samples are as transformers computes them")
    else:
        print("verify: the layers were not compared with transformers: the target does not fit, or --reference is 0")


def _print_predicted(counts: Counts, manifest: Manifest) -> None:
    is_top = manifest.final_state == "top-k"
    what = "most likely ones" if is_top else "states' argmax"
    print(
        f"verify: {counts.files} files whole; {counts.matches} of {counts.tokens} generated tokens of {counts.greedy} "
        f"greedy samples are the {what}, {counts.ties} ties within {tolerance_of(manifest.dtype, is_top=is_top)}"
        f"{'' if is_top else ' (in proportion for logits above 10)'}"
    )
    if is_top:
        print("verify: without final states the log-probabilities were not computed again")
    if counts.beyond:
        print(
            f"verify: the tokens of {counts.beyond} samples were not predicted: they were drawn with penalties, or "
            f"from more than the {manifest.top_k} stored tokens"
        )
    if counts.sampled:
        print(
            f"verify: {counts.sampled_tokens} tokens of {counts.sampled} sampled rows are as likely as they should be"
        )
    if counts.unknown:
        print(f"verify: {counts.unknown} samples have no temperature on record: their tokens were not predicted")
