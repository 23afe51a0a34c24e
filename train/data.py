"""Training samples of a store, in an order that depends on the seed alone, read ahead of the step.

Batch number s holds samples s*n .. s*n + n-1 of an endless sequence of shuffled epochs, with n = global_batch_size /
gradient_accumulation_steps. Each of w processes takes every w-th of them. No batch depends on earlier ones: a resumed
run needs no saved position, and any number of processes sees the same batches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from common.errors import UserError
from common.files import hash_json
from common.progress import track
from contracts.modelopt import ModelOptStore, is_modelopt, open_modelopt
from contracts.store import Manifest, Store, StoredSample, find_token, open_store
from drafts.batch import Batch
from drafts.places import anchor_places
from recipe.recipe import Recipe
from recipe.train import TrainSection
from target.target import Target
from train.processes import Processes

AnyStore = Store | ModelOptStore


def open_states(recipe: Recipe, folder: Path, target: Target) -> tuple[AnyStore, Manifest]:
    """Open a store, or a folder in ModelOpt's layout. Raises UserError if it is of another target."""
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
            fix="Set target.mask_token_id to another free row, or dump again: such samples are then left out.",
        )


class Samples:
    """A store's samples, split by conversation, read on demand and cached up to `cache_bytes`.

    `cut_away`: samples left out because nothing can be drafted within their first `max_tokens` tokens. With
    `keep_dtype`, batches have the stored dtype (a GPU casts faster); else fp32.
    """

    def __init__(
        self,
        store: AnyStore,
        section: TrainSection,
        max_tokens: int,
        cache_bytes: int = 4 << 30,
        keep_dtype: bool = False,
    ) -> None:
        """Split the store's samples. Raises UserError if none is left to train on."""
        self.store, self.section, self.max_tokens = store, section, max_tokens
        self._keep_dtype = keep_dtype
        ids = store.sample_ids()[: section.max_samples]
        self.cut_away = _cut_away(store, ids, max_tokens)
        ids = [id_ for id_ in ids if id_ not in self.cut_away]
        self.held_out = [id_ for id_ in ids if _share(id_) < section.held_out_fraction]
        kept_back = set(self.held_out)
        self.ids = [id_ for id_ in ids if id_ not in kept_back]
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
        self._epoch, self._order = -1, list[int]()

    def read(self, sample_id: str) -> StoredSample:
        """Read a sample; one of more than `max_tokens` tokens is cut there and added to `truncated`."""
        if sample_id in self._cache:
            return self._cache[sample_id]
        sample = self.store.read_sample(sample_id)
        if sample.num_tokens > self.max_tokens:
            self.truncated.add(sample_id)
            cut = slice(self.max_tokens)
            sample = StoredSample(
                sample.input_ids[cut], sample.loss_mask[cut], sample.hidden_states[cut], sample.aux_hidden_states[cut],
                sample.metadata,
            )  # fmt: skip
        size = sample.aux_hidden_states.nbytes + sample.hidden_states.nbytes
        if size <= self._room:
            self._room -= size
            self._cache[sample_id] = sample
        return sample

    def count_supervised(self, vocab_size: int) -> torch.Tensor:
        """Return how often each token is supervised in the training samples, `(V,)`."""
        counts = torch.zeros(vocab_size, dtype=torch.long)
        for sample_id in track(self.ids, desc="vocabulary", unit="sample"):
            sample = self.read(sample_id)
            counts += torch.bincount(sample.input_ids[sample.loss_mask].long(), minlength=vocab_size)
        return counts

    def batch(self, number: int, rank: int = 0, world: int = 1) -> Batch:
        """Return this process's part of batch `number`."""
        first = number * self.section.batch_size
        places = range(first + rank, first + self.section.batch_size, world)
        picked = [self._pick(place) for place in places]
        samples = [self.read(sample_id) for sample_id in picked]
        return Batch(
            token_ids=torch.cat([sample.input_ids for sample in samples]).long(),
            loss_mask=torch.cat([sample.loss_mask for sample in samples]),
            aux_hidden_states=self._join([sample.aux_hidden_states for sample in samples]),
            hidden_states=self._join([sample.hidden_states for sample in samples]),
            lengths=[sample.num_tokens for sample in samples],
            sample_ids=picked,
            seeds=[self.section.seed * 1_000_003 + place for place in places],
        )

    def _join(self, states: list[torch.Tensor]) -> torch.Tensor:
        joined = torch.cat(states)
        return joined if self._keep_dtype else joined.float()

    def _pick(self, place: int) -> str:
        """Return the id of the sample at `place` in the endless sequence of shuffled epochs."""
        epoch, offset = divmod(place, len(self.ids))
        if self._epoch != epoch:
            generator = torch.Generator().manual_seed(self.section.seed * 7_919 + epoch)
            self._order = torch.randperm(len(self.ids), generator=generator).tolist()
            self._epoch = epoch
        return self.ids[self._order[offset]]


@dataclass(frozen=True)
class Planned:
    """A batch and the draft's plan of its step."""

    batch: Batch
    plan: Any


def read_ahead(
    samples: Samples, first_step: int, processes: Processes, plan: Callable[[Batch], Any]
) -> Iterator[Planned]:
    """Yield this process's batches from `first_step` on; the next one is read and planned meanwhile, in a thread."""
    section = samples.section
    first = first_step * section.gradient_accumulation_steps
    end = section.num_steps * section.gradient_accumulation_steps

    def read(number: int) -> Planned:
        batch = samples.batch(number, processes.rank, processes.world)
        return Planned(batch, plan(batch))

    with ThreadPoolExecutor(1, "read-ahead") as pool:
        following = pool.submit(read, first) if first < end else None
        for number in range(first, end):
            assert following is not None
            planned = following.result()
            following = pool.submit(read, number + 1) if number + 1 < end else None
            yield planned


def _cut_away(store: AnyStore, ids: list[str], max_tokens: int) -> set[str]:
    """Return the samples with nothing to draft within `max_tokens`; only longer samples are read."""
    if isinstance(store, ModelOptStore):
        return set()  # ModelOpt's layout has no lengths: such a sample is an error when a batch plans it
    lengths = store.lengths()
    return {
        id_
        for id_ in ids
        if lengths.get(id_, 0) > max_tokens and not len(anchor_places(store.read_mask(id_)[:max_tokens]))
    }


def _share(sample_id: str) -> float:
    """Hash a sample's conversation to [0, 1): the same for all its samples and in every store."""
    return int(hash_json(sample_id.rpartition("-")[0] or sample_id)[:8], 16) / 2**32
