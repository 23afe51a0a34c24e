"""Prove the engines on a few of the run's own samples, before the first one is stored.

Reads:  the first conversations, the target's head, and the whole target with transformers if it is small enough.
Writes: preflight.json in the run's folder: what was proven, and a hash of what it depends on.

In this order, so that the first failure names the likely cause:
    whole     the states have the right length and are finite
    ranks     all tensor-parallel ranks captured the same states
    tokens    argmax(lm_head(final_norm(h))) is the token that the target generated (see dump/judge.py)
    layers    the captured layers are those of transformers
    again     the same sample alone a second time gives the same states (prefix caching)
    together  and so do many samples at once (chunked prefill)
"""

from __future__ import annotations

import itertools
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from safetensors.torch import load_file

from common.errors import UserError
from common.files import hash_json, read_json, write_json
from common.memory import free_memory
from contracts.rank_states import PREFLIGHT, find_rank_files
from dump.backends import make_backend
from dump.capture import CaptureBackend, Captured, CaptureError, Engine, Staged, Staging, load_staged
from dump.judge import judge_states
from dump.own_replies import own_replies
from dump.reference import TOLERANCE, LayerDefect, Reference, distance, weights_bytes
from dump.rendered import TemplateMasks
from dump.samples import Filter, Row, cut_sample, read_rows
from dump.server import find_server_folder
from dump.staging import open_staging
from dump.writer import make_stored
from recipe.recipe import Recipe
from serve.ranks import TIMEOUT_S as RANKS_TIMEOUT_S
from serve.ranks import TOLERANCE as RANKS_TOLERANCE
from serve.ranks import partial_sums
from target.head import read_head
from target.layers import captured_layers
from target.target import Target

NUM_SAMPLES = 4
LOOK_AHEAD = 256
"""Samples among which those of the preflight are chosen."""
JUDGED_TOKENS = 256
"""Supervised tokens of a sample that are compared with the head, which may be on a CPU."""
MAX_TOKENS = 2048
"""Length to which samples are cut: each rank writes its states of them, next to those of the other ranks."""
REFERENCE_TOKENS = 128
REFERENCE_BYTES = 20e9
"""Weights of the largest target that transformers runs within the preflight's minute."""
TOGETHER_TOKENS = 32768
"""Tokens captured at once: more than an engine computes in a step, so that some prefills are chunked."""
MAX_COPIES = 64


@dataclass(frozen=True)
class Proof:
    """What was proven of one engine. `ranks`: those compared; 0 if the engine cannot show them."""

    engine: str
    samples: int
    tokens: int
    ranks: int
    layers: bool
    seconds: float


def prove_engines(
    recipe: Recipe, target: Target, backend: CaptureBackend, staging: Staging, rows: Iterable[Row], folder: Path
) -> None:
    """Prove every engine of `backend`, unless an earlier preflight in `folder` was of the same engine and target.

    Raises UserError with the defect and its likely cause; nothing was stored then.
    """
    layers = captured_layers(recipe.target, target)
    settings = backend.settings  # None: unknown, as with servers
    key = "" if settings is None else hash_json([settings, target.fingerprint, layers])
    report = folder / "preflight.json"
    if key and report.exists() and read_json(report, "a preflight's report").get("key") == key:
        return
    if chosen := choose_rows(recipe, target, rows):
        proofs = prove_each(recipe, target, backend, staging, chosen)
        write_json(report, {"key": key, "proofs": [asdict(proof) for proof in proofs]})


def prove_each(
    recipe: Recipe, target: Target, backend: CaptureBackend, staging: Staging, rows: Sequence[Row]
) -> list[Proof]:
    """Prove every engine on `rows` and print what was proven. Raises: see `prove_engines`."""
    checker = Checker(recipe, target, staging, rows)
    proofs = []
    for engine in backend.engines:
        proofs.append(checker.prove(engine))
        print(f"preflight: {_describe(proofs[-1])}", flush=True)
    return proofs


def prove(recipe: Recipe, conversations: Path | None) -> None:
    """Prove the recipe's engines and store nothing.

    On samples of `conversations`, or without them on replies that the first of the recipe's servers writes. Raises: see
    `prove_engines`.
    """
    target = Target.here(recipe.target)
    layer_ids = captured_layers(recipe.target, target)
    with (
        tempfile.TemporaryDirectory() as folder,
        open_staging(recipe.dump, Path(folder)) as staging,
        _samples_of(recipe, target, conversations) as rows,
        closing(make_backend(recipe, target, layer_ids, staging)) as backend,
    ):
        if not rows:
            raise UserError(
                str(conversations), found="no sample to capture", expected="some", fix="See `dump plan` for why."
            )
        prove_each(recipe, target, backend, staging, rows)


@contextmanager
def _samples_of(recipe: Recipe, target: Target, conversations: Path | None) -> Iterator[list[Row]]:
    """Yield the samples of a preflight that stores nothing."""
    if conversations is not None:
        yield choose_rows(recipe, target, read_rows([conversations], TemplateMasks(recipe.target, target)))
    elif recipe.dump.backend == "server":
        folder = find_server_folder(recipe.dump)
        with own_replies(recipe.dump.endpoints[0], folder) as rows:
            yield rows
    else:
        raise UserError(
            "--conversations",
            found="none",
            expected="the output of `synth generate`, or dump.backend=server with dump.endpoints",
            fix="Give the conversations that are to be dumped.",
        )


def choose_rows(recipe: Recipe, target: Target, rows: Iterable[Row]) -> list[Row]:
    """Return a handful of the first rows, cut to MAX_TOKENS: the longest, then greedy ones before sampled ones.

    Replies that begin behind MAX_TOKENS are used, uncut, only if there are no others.
    """
    judge = Filter.of(recipe, target).judge
    usable = [verdict.row for row in itertools.islice(rows, LOOK_AHEAD) if (verdict := judge(row)).row is not None]
    found = [
        replace(row, sample=cut_sample(row.sample, MAX_TOKENS))
        for row in usable
        if row.sample.loss_spans[0][0] < MAX_TOKENS
    ] or sorted(usable, key=lambda row: row.num_tokens)[:1]
    found.sort(key=lambda row: -row.num_tokens)
    others = sorted(found[1:], key=lambda row: row.conversation.sampling.get("temperature") != 0.0)
    return [*found[:1], *others[: NUM_SAMPLES - 1]]


class Checker:
    """The checks of one run, whose reference and head are loaded once for all its engines."""

    def __init__(self, recipe: Recipe, target: Target, staging: Staging, rows: Sequence[Row]) -> None:
        self._recipe, self._target, self._staging, self._rows = recipe, target, staging, rows
        self._layer_ids = captured_layers(recipe.target, target)
        # On the CPU: engines leave no room on their GPUs.
        self._head = read_head(target).to(torch.device("cpu"), torch.float32)
        self._numbers = itertools.count()

    @cached_property
    def _reference(self) -> Reference | None:
        """The target in transformers; None if it is too large."""
        if weights_bytes(self._target) < min(REFERENCE_BYTES, free_memory() / 2):
            return Reference(self._recipe, self._target, torch.device("cpu"))
        return None

    def prove(self, engine: Engine) -> Proof:
        """Check one engine. Raises UserError for the first defect."""
        started, ranks, first = time.monotonic(), 0, []
        for row in self._rows:
            (staged,) = self._run(engine, [row], compare_ranks=True)
            ranks = self._compare_ranks(engine, row, take_rank_states(staged))
            first.append(self._load(engine, row, staged, "alone"))
        for row, captured in zip(self._rows, first, strict=True):
            self._judge(engine, row, captured, is_whole=ranks > 0 or engine.is_reference)
        if not engine.is_reference:
            for row, captured in list(zip(self._rows, first, strict=True))[:2]:
                if defect := self._find_layer_defect(row, captured):
                    raise self._refuse(engine, row, defect.found, defect.expected)
            self._capture_again(engine, first)
            self._capture_together(engine, first)
        return Proof(
            engine.name,
            samples=len(self._rows),
            tokens=sum(row.num_tokens for row in self._rows),
            ranks=ranks,
            layers=engine.is_reference or self._reference is not None,
            seconds=round(time.monotonic() - started, 1),
        )

    def _run(self, engine: Engine, rows: Sequence[Row], *, compare_ranks: bool = False) -> Iterator[Staged]:
        """Yield the staged states of `rows`, each under an id of its own; `sample_id` is the row's index."""
        mark = PREFLIGHT if compare_ranks else "preflight"
        ids = {f"{mark}-{next(self._numbers)}": index for index in range(len(rows))}
        samples = ((name, rows[index].sample.token_ids) for name, index in ids.items())
        for staged in engine.capture(samples, self._staging):
            yield replace(staged, sample_id=str(ids[staged.sample_id]))
            self._staging.give(rows[ids[staged.sample_id]].num_tokens * engine.token_bytes)

    def _load(self, engine: Engine, row: Row, staged: Staged, when: str) -> Captured:
        """Read a sample's states. Raises UserError if they cannot be used."""
        try:
            return load_staged(staged, row.sample.token_ids, len(self._layer_ids), self._target.hidden_size)
        except CaptureError as error:
            raise self._refuse(engine, row, f"{error}, captured {when}", "whole states of its tokens") from None

    def _compare_ranks(self, engine: Engine, row: Row, ranks: Sequence[torch.Tensor]) -> int:
        """Return the number of ranks. Raises UserError if they hold different states."""
        names = [*(f"layer {layer_id}" for layer_id in self._layer_ids), "the final state"]
        for rank, states in enumerate(ranks):
            for slot, name in enumerate(names):
                apart = distance(states[:, slot].float(), ranks[0][:, slot].float())
                if not apart <= RANKS_TOLERANCE:
                    found = f"{name} of tensor-parallel rank {rank} {apart:.2g} off that of rank 0"
                    raise partial_sums(_where(engine, row), found)
        return len(ranks)

    def _judge(self, engine: Engine, row: Row, captured: Captured, *, is_whole: bool) -> None:
        """Raise UserError unless the final states predict the sample's first generated tokens.

        `is_whole`: whether the states are known to be no partial sums.
        """
        start = row.sample.loss_spans[0][0]
        part = replace(row, sample=cut_sample(row.sample, start + JUDGED_TOKENS))
        stored = make_stored(part, Captured(captured.layers[: part.num_tokens], captured.final[: part.num_tokens]))
        dtype = str(captured.final.dtype).removeprefix("torch.")
        judged = judge_states(self._head, stored, self._layer_ids, dtype, tensor_parallel_size=1 if is_whole else 0)
        if judged.found:
            defect = self._find_layer_defect(row, captured)
            seen = f". Beside transformers: found {defect.found}, expected {defect.expected}" if defect else ""
            raise self._refuse(engine, row, judged.found, judged.expected + seen)

    def _find_layer_defect(self, row: Row, captured: Captured) -> LayerDefect | None:
        """Return what the first wrong layer of the sample's first tokens holds; None without a reference, too."""
        if self._reference is None:
            return None
        token_ids = row.sample.token_ids[:REFERENCE_TOKENS]
        states = torch.cat([captured.layers, captured.final[:, None]], dim=1)[: len(token_ids)]
        return self._reference.find_defect(token_ids, states, self._layer_ids, _tolerance(states))

    def _capture_again(self, engine: Engine, first: Sequence[Captured]) -> None:
        """Capture each row a second time, when a prefix cache has it, and compare."""
        for row, captured in zip(self._rows, first, strict=True):
            (staged,) = self._run(engine, [row])
            again = self._load(engine, row, staged, "again")
            self._compare(engine, row, captured, again, "again", "prefix caching")

    def _capture_together(self, engine: Engine, first: Sequence[Captured]) -> None:
        """Capture all rows at once, the longest many times, and compare with those captured alone."""
        copies = min(MAX_COPIES, TOGETHER_TOKENS // self._rows[0].num_tokens)
        rows = [*self._rows, *itertools.repeat(self._rows[0], copies)]
        alone = [*first, *itertools.repeat(first[0], copies)]
        for staged in self._run(engine, rows):
            index = int(staged.sample_id)
            captured = self._load(engine, rows[index], staged, "together with others")
            self._compare(engine, rows[index], alone[index], captured, "together with others", "chunked prefill")

    def _compare(self, engine: Engine, row: Row, one: Captured, other: Captured, when: str, cause: str) -> None:
        for name, a, b in (("layers", one.layers, other.layers), ("final state", one.final, other.final)):
            apart = distance(b.float(), a.float())
            if not apart <= _tolerance(a):
                found = f"{name} {apart:.2g} off those of its first capture, captured {when}"
                raise self._refuse(engine, row, found, f"the same states; the likely cause is {cause}")

    def _refuse(self, engine: Engine, row: Row, found: str, expected: str) -> UserError:
        fix = "Mend the engine; nothing was stored."
        return UserError(_where(engine, row), found=found, expected=expected, fix=fix)


def _where(engine: Engine, row: Row) -> str:
    return f"preflight of {engine.name}, sample {row.sample_id}"


def take_rank_states(staged: Staged) -> list[torch.Tensor]:
    """Return and delete the states `(T, n+1, H)` of each tensor-parallel rank; [] if the engine writes none."""
    if staged.path is None:
        return []
    deadline = time.monotonic() + RANKS_TIMEOUT_S
    ranks, files = find_rank_files(staged.path)
    while len(files) < ranks and time.monotonic() < deadline:
        time.sleep(0.01)
        ranks, files = find_rank_files(staged.path)
    if len(files) < ranks:
        raise UserError(
            staged.path,
            found=f"the states of {len(files)} tensor-parallel ranks after {RANKS_TIMEOUT_S:.0f} s",
            expected=f"those of {ranks}",
            fix="Look at the engine's log.",
        )
    states = [load_file(file)["hidden_states"] for file in files]
    for file in files:
        file.unlink()
    return states


def _tolerance(states: torch.Tensor) -> float:
    return TOLERANCE[str(states.dtype).removeprefix("torch.")]


def _describe(proof: Proof) -> str:
    parts = [f"{proof.engine} predicts the tokens of {proof.samples} samples"]
    parts.append("its layers are transformers'" if proof.layers else "the target is too large to compare its layers")
    if proof.ranks:
        parts.append("the states are whole" if proof.ranks == 1 else f"the states are equal on {proof.ranks} ranks")
    else:
        parts.append("its tensor-parallel ranks were not compared")
    return f"{'; '.join(parts)} ({proof.seconds:.0f} s)"
