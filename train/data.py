"""Training samples of a store, in an order that depends on the seed alone, read ahead of the step.

Batch number s holds samples s*n .. s*n + n-1 of an endless sequence of shuffled epochs, with n = global_batch_size /
gradient_accumulation_steps. Each of w processes takes every w-th of them. No batch depends on earlier ones: a resumed
run needs no saved position, and any number of processes sees the same batches.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common.errors import UserError
from common.progress import track
from contracts.modelopt import ModelOptStore, is_modelopt, open_modelopt
from contracts.mooncake import Mooncake
from contracts.rolling import RollingStore
from contracts.shelf import GoneError
from contracts.store import Manifest, Store, StoredSample, find_token, open_store
from contracts.top_tokens import TopTokens
from drafts.batch import Batch
from drafts.moving import tensors_of, to_device
from drafts.order import Order, choose_samples
from recipe.recipe import Recipe
from recipe.train import TrainSection
from target.target import Target
from train.follow import Follower, open_followed
from train.processes import Processes

AnyStore = Store | ModelOptStore
MAX_AHEAD = 16
"""Batches read ahead at most, however small they are."""
MAX_PLACES = 1_000_000
"""Places of the sequence of samples that `largest_masks` looks at: about a second."""


@dataclass(frozen=True)
class Following:
    """How to read a rolling store. `until_empty`: stop where the next samples are not there yet, instead of waiting.

    With `mooncake`, the samples are in the memory of other nodes.
    """

    until_empty: bool = False
    mooncake: Mooncake | None = None


def open_states(
    recipe: Recipe, folder: Path, target: Target, following: Following | None = None
) -> tuple[AnyStore, Manifest]:
    """Open a whole store, a folder in ModelOpt's layout, or, with `following`, a rolling store.

    Raises UserError if it is of another target.
    """
    if following is not None:
        rolling = open_followed(recipe, folder, target, following.mooncake)
        return rolling, rolling.read_manifest()
    if is_modelopt(folder):
        return open_modelopt(folder, target, recipe.target.aux_layers)
    return open_store(folder, target)


def refuse_mask_token(samples: Samples, mask_token_id: int | None, processes: Processes) -> None:
    """Raise UserError if a sample holds the mask token, which must mean "unknown" and nothing else.

    `dump run` leaves such samples out; a store of another tool, or of a recipe with another mask token, may hold some.
    Each process reads its share of the samples in use.
    """
    store, ids = samples.store, [*samples.ids, *samples.held_out][processes.rank :: processes.world]
    if mask_token_id is not None and (sample_id := find_token(store, mask_token_id, ids)) is not None:
        raise UserError(
            store.sample_path(sample_id),
            found=f"the mask token {mask_token_id} among its tokens",
            expected="a token that never occurs",
            fix="Set target.mask_token_id to another free row or special token, or dump again: such samples are then "
            "left out.",
        )


class Samples:
    """A store's samples, split by conversation, read on demand and cached up to `cache_bytes`.

    `cut_away`: samples left out because nothing can be drafted within their first `max_tokens` tokens. For a GPU,
    batches have the stored dtype and lie in pinned memory; the GPU casts faster. For a CPU they are fp32. Threads may
    read at the same time.
    """

    def __init__(
        self,
        store: AnyStore,
        section: TrainSection,
        max_tokens: int,
        cache_bytes: int = 4 << 30,
        on_gpu: bool = False,
    ) -> None:
        """Split the store's samples. Raises UserError if none is left to train on."""
        self.store, self.section, self.max_tokens = store, section, max_tokens
        self._on_gpu = on_gpu
        self.follower = Follower(store, section.batch_size) if isinstance(store, RollingStore) else None
        chosen = choose_samples(store, max_tokens, section.max_samples, section.held_out_fraction)
        self.ids, self.held_out, self.cut_away = chosen.train, chosen.held_out, chosen.cut_away
        if not self.ids:
            raise UserError(
                store.folder,
                found=f"no sample ({len(self.cut_away)} have nothing to draft within {max_tokens} tokens)",
                expected="at least one",
                fix="Dump conversations that were finished, or raise target.max_model_len.",
            )
        self.truncated: set[str] = set()
        self._cache: dict[str, StoredSample] = {}
        self._room = cache_bytes
        self._order = Order(len(self.ids), section.seed)
        self._lock = threading.Lock()

    def read(self, sample_id: str) -> StoredSample:
        """Read a sample; one of more than `max_tokens` tokens is cut there and added to `truncated`.

        Its final states, or most likely tokens, are read only if the objective needs them; for a GPU, fp8 states stay
        as they are.
        """
        if sample_id in self._cache:
            return self._cache[sample_id]
        sample = self._read_file(sample_id, sample_id)
        size = sample.aux_hidden_states.nbytes + sample.hidden_states.nbytes + (sample.top.nbytes if sample.top else 0)
        with self._lock:
            if size <= self._room:
                self._room -= size
                self._cache[sample_id] = sample
        return sample

    def _read_file(self, name: str, sample_id: str) -> StoredSample:
        """Read the sample that has `name` in the store, and cut it."""
        needed = self.section.draft.needs_final_states
        sample = self.store.read_sample(name, final_states=needed, decode=not self._on_gpu)
        if sample.num_tokens > self.max_tokens:
            self.truncated.add(sample_id)
            sample = sample.cut(self.max_tokens)
        return sample

    def _read_at(self, place: int) -> tuple[str, StoredSample]:
        """Return the id and the sample at a place of the order. Raises UserError if its file has other tokens."""
        if self.follower is None:
            sample_id = self._pick(place)
            return sample_id, self.read(sample_id)
        while True:
            sample_id, name = self.follower.locate(place)
            try:
                sample = self._read_file(name, sample_id)
                break
            except GoneError:  # it is captured again
                self.follower.pause()
        if not torch.equal(sample.input_ids, self.store.read_token_ids(sample_id)[: sample.num_tokens]):
            raise UserError(
                self.store.sample_path(name),
                found="other token ids than the index has for this place",
                expected=f"those of sample {sample_id}",
                fix="Delete this file: it is captured again. Look for two captures of one place.",
            )
        return sample_id, sample

    def close(self) -> None:
        """Let threads that wait for samples of a rolling store end."""
        if self.follower is not None:
            self.follower.stop()

    def read_looks(self, sample_ids: Iterable[str]) -> Iterator[StoredSample]:
        """Yield samples to evaluate on, decoded. Of a rolling store they are held out; failed captures are left out."""
        for sample_id in sample_ids:
            if isinstance(self.store, RollingStore) and self.follower is not None:
                self.follower.wait_for_held_out(sample_id)
                if self.store.shelf.has_failed(sample_id):
                    continue
            yield self.read(sample_id).decoded()

    def count_supervised(self, vocab_size: int) -> torch.Tensor:
        """Return how often each token is supervised in the training samples, `(V,)`."""
        counts = torch.zeros(vocab_size, dtype=torch.long)
        for sample_id in track(self.ids, desc="vocabulary", unit="sample"):
            mask = self.store.read_mask(sample_id)[: self.max_tokens]
            token_ids = self.store.read_token_ids(sample_id)[: self.max_tokens]
            counts += torch.bincount(token_ids[mask].long(), minlength=vocab_size)
        return counts

    def largest_masks(self, rank: int, world: int) -> list[torch.Tensor]:
        """Return the loss masks of this process's batch with most tokens, for plans of memory.

        Of long runs, the first `MAX_PLACES` places count. Where the store has no lengths, all samples count as
        `max_tokens` long.
        """
        section = self.section
        store = self.store if isinstance(self.store, Store) else None
        lengths = store.lengths() if store else {}
        batches = min(section.num_steps * section.gradient_accumulation_steps, max(1, MAX_PLACES // section.batch_size))
        places = range(batches * section.batch_size)
        sizes = np.fromiter(
            (min(lengths.get(self._pick(p), self.max_tokens), self.max_tokens) for p in places), np.int64
        )
        totals = sizes.reshape(-1, section.batch_size)[:, rank::world].sum(1)
        first = int(totals.argmax()) * section.batch_size
        picked = [self._pick(place) for place in range(first + rank, first + section.batch_size, world)]
        if store is None:
            return [torch.ones(self.max_tokens, dtype=torch.bool)] * len(picked)
        return [store.read_mask(id_)[: self.max_tokens] for id_ in picked]

    def batch(self, number: int, rank: int = 0, world: int = 1) -> Batch:
        """Return this process's part of batch `number`."""
        first = number * self.section.batch_size
        places = range(first + rank, first + self.section.batch_size, world)
        picked, samples = zip(*map(self._read_at, places), strict=True)
        return Batch(
            token_ids=torch.cat([sample.input_ids for sample in samples]).long(),
            loss_mask=torch.cat([sample.loss_mask for sample in samples]),
            aux_hidden_states=self._join([sample.aux_hidden_states for sample in samples]),
            hidden_states=self._join([sample.hidden_states for sample in samples]),
            top=_join_top([sample.top for sample in samples]),
            scales={name: self._join([sample.scales[name] for sample in samples]) for name in samples[0].scales},
            lengths=[sample.num_tokens for sample in samples],
            sample_ids=list(picked),
            seeds=[self.section.seed * 1_000_003 + place for place in places],
        )

    def _join(self, states: list[torch.Tensor]) -> torch.Tensor:
        if not self._on_gpu:
            return torch.cat(states).float()
        shape = (sum(map(len, states)), states[0].shape[1])
        # torch keeps freed pinned memory and hands it out again once the copies from it are done.
        joined = torch.empty(shape, dtype=states[0].dtype, pin_memory=torch.cuda.is_available())
        start = 0
        for part in states:
            joined[start : start + len(part)] = part
            start += len(part)
        return joined

    def _pick(self, place: int) -> str:
        """Return the id of the sample at `place` in the endless sequence of shuffled epochs."""
        return self.ids[self._order.pick(place)]


def _join_top(parts: Sequence[TopTokens | None]) -> TopTokens | None:
    tops = [part for part in parts if part is not None]
    if not tops:
        return None
    return TopTokens(torch.cat([top.ids for top in tops]), torch.cat([top.log_probs for top in tops]))


@dataclass(frozen=True)
class Planned:
    """A batch and the draft's plan for it. `normalizer`: that of all batches of its step."""

    batch: Batch
    plan: Any
    normalizer: float = 0.0

    @property
    def num_bytes(self) -> int:
        """Bytes of the batch's states."""
        top = self.batch.top
        return self.batch.aux_hidden_states.nbytes + self.batch.hidden_states.nbytes + (top.nbytes if top else 0)


def read_ahead(
    samples: Samples, first_step: int, processes: Processes, plan: Callable[[Batch], Any]
) -> Iterator[Planned]:
    """Yield this process's batches from `first_step` on, on its device.

    Threads read and plan the next ones meanwhile: as many as fit into `train.read_ahead_gib`, at least one. A GPU holds
    two batches: that of the step and the next one, whose copy runs beside the step.
    """
    section = samples.section
    first = first_step * section.gradient_accumulation_steps
    end = section.num_steps * section.gradient_accumulation_steps

    def read(number: int) -> Planned:
        batch = samples.batch(number, processes.rank, processes.world)
        return Planned(batch, plan(batch))

    on_gpu = processes.device.type == "cuda"
    num_readers = section.num_readers or (4 if on_gpu else 1)
    budget = int((section.read_ahead_gib or (4.0 if on_gpu else 1.0)) * 2**30)
    ahead = _read_in_threads(read, range(first, end), num_readers, budget)
    steps = _count_slots(ahead, section.gradient_accumulation_steps)
    yield from copy_ahead(steps, processes.device) if on_gpu else steps


def _count_slots(batches: Iterator[Planned], accumulated: int) -> Iterator[Planned]:
    """Yield batches with the slots of their step, by which each batch's loss is divided."""
    while micro := list(islice(batches, accumulated)):
        normalizer = sum(planned.plan.normalizer for planned in micro)
        while micro:  # a batch is freed once it is used
            yield replace(micro.pop(0), normalizer=normalizer)


def _read_in_threads(
    read: Callable[[int], Planned], numbers: range, num_readers: int, budget: int
) -> Iterator[Planned]:
    """Yield `read(number)` in order; threads read ahead within `budget` bytes, which the last batch measures."""
    waiting, following = deque[Future[Planned]](), iter(numbers)
    with ThreadPoolExecutor(num_readers, "read-ahead") as pool:
        for number in islice(following, 1):
            waiting.append(pool.submit(read, number))
        while waiting:
            planned = waiting.popleft().result()
            depth = min(MAX_AHEAD, max(1, budget // max(1, planned.num_bytes)))
            for number in islice(following, depth - len(waiting)):
                waiting.append(pool.submit(read, number))
            yield planned


def copy_ahead(batches: Iterable[Planned], device: torch.device) -> Iterator[Planned]:
    """Yield batches on a GPU; each is copied by a stream of its own while the step before it runs."""
    stream, copied = torch.cuda.Stream(device), deque[tuple[Planned, torch.cuda.Event]]()
    for planned in batches:
        with torch.cuda.stream(stream):
            moved = to_device(planned, device)
            copied.append((moved, stream.record_event()))
        if len(copied) == 2:
            yield _take(*copied.popleft())
    while copied:
        yield _take(*copied.popleft())


def _take(planned: Planned, event: torch.cuda.Event) -> Planned:
    """Let the step wait for a copy on the device, and keep the copy's memory until the step is done."""
    current = torch.cuda.current_stream()
    current.wait_event(event)
    for tensor in tensors_of(planned):
        tensor.record_stream(current)
    return replace(planned, batch=planned.batch.decoded())
