"""Training samples of a store, in an order that follows from the seed alone; read ahead while the draft learns.

Global batch number s holds the samples at places s*n .. s*n + n-1 of an endless sequence of shuffled epochs, n being
`batch_samples`; with several processes each takes every w-th of them. Nothing depends on what ran before, so that a
resumed run needs no position, and any number of processes sees the same batches.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from contracts.errors import UserError
from contracts.files import hash_json
from contracts.modelopt import ModelOptStore, is_modelopt, open_modelopt
from contracts.recipe import Recipe, TrainSection
from contracts.store import Manifest, Store, StoredSample, open_store
from contracts.target import Target
from train.batch import Batch

AnyStore = Store | ModelOptStore


def open_states(recipe: Recipe, folder: Path, target: Target) -> tuple[AnyStore, Manifest]:
    """A store of ours, or a folder in ModelOpt's layout. Raises UserError for one of another target."""
    if is_modelopt(folder):
        return open_modelopt(folder, target, recipe.target.aux_layers)
    return open_store(folder, target)


class Samples:
    """A store's samples, split by conversation; reads are lazy and whole samples are kept while memory allows.

    `cut_away` are those that are left out, since a cut at `max_tokens` leaves nothing of them to draft.
    """

    def __init__(
        self,
        store: AnyStore,
        section: TrainSection,
        max_tokens: int,
        mask_token_id: int | None,
        cache_bytes: int = 4 << 30,
    ) -> None:
        """Raises UserError when the store holds no sample to train on."""
        self.store, self.section, self.max_tokens, self.mask_token_id = store, section, max_tokens, mask_token_id
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
        """A sample, cut at `max_tokens` (and counted) if it is longer.

        Raises UserError when it holds the mask token, which must mean "unknown" and nothing else.
        """
        if sample_id in self._cache:
            return self._cache[sample_id]
        sample = self.store.read_sample(sample_id)
        if self.mask_token_id is not None and bool((sample.input_ids == self.mask_token_id).any()):
            raise UserError(
                self.store.sample_path(sample_id),
                found=f"the mask token {self.mask_token_id} among its tokens",
                expected="a token that never occurs",
                fix="Set target.mask_token_id to another free row.",
            )
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

    def batch(self, number: int, rank: int = 0, world: int = 1) -> Batch:
        """The part of global batch `number` that this process takes."""
        first = number * self.section.batch_samples
        places = range(first + rank, first + self.section.batch_samples, world)
        picked = [self._pick(place) for place in places]
        samples = [self.read(sample_id) for sample_id in picked]
        return Batch(
            token_ids=torch.cat([sample.input_ids for sample in samples]).long(),
            loss_mask=torch.cat([sample.loss_mask for sample in samples]),
            aux_hidden_states=torch.cat([sample.aux_hidden_states for sample in samples]).float(),
            hidden_states=torch.cat([sample.hidden_states for sample in samples]).float(),
            lengths=[sample.num_tokens for sample in samples],
            sample_ids=picked,
            seeds=[self.section.seed * 1_000_003 + place for place in places],
        )

    def _pick(self, place: int) -> str:
        """The sample at one place of the endless sequence of shuffled epochs."""
        epoch, offset = divmod(place, len(self.ids))
        if self._epoch != epoch:
            generator = torch.Generator().manual_seed(self.section.seed * 7_919 + epoch)
            self._order = torch.randperm(len(self.ids), generator=generator).tolist()
            self._epoch = epoch
        return self.ids[self._order[offset]]


def read_ahead(samples: Samples, first: int, end: int, rank: int, world: int) -> Iterator[Batch]:
    """Batches `first` to `end`, each read while the one before is worked on."""
    with ThreadPoolExecutor(1, "read-ahead") as pool:
        following = pool.submit(samples.batch, first, rank, world) if first < end else None
        for number in range(first, end):
            assert following is not None
            batch = following.result()
            following = pool.submit(samples.batch, number + 1, rank, world) if number + 1 < end else None
            yield batch


def _cut_away(store: AnyStore, ids: list[str], max_tokens: int) -> set[str]:
    """Samples of which a cut leaves nothing to draft. Only those that are longer are looked into."""
    if isinstance(store, ModelOptStore):
        return set()  # it has no lengths; such a sample is an error when its turn comes
    lengths = store.lengths()
    return {
        id_
        for id_ in ids
        if lengths.get(id_, 0) > max_tokens and not len(anchor_places(store.read_mask(id_)[:max_tokens]))
    }


def anchor_places(loss_mask: torch.Tensor) -> torch.Tensor:
    """Positions that serving can draft from: a generated token followed by another. Ascending, (N,)."""
    return (loss_mask[:-1] & loss_mask[1:]).nonzero()[:, 0]


def _share(sample_id: str) -> float:
    """Where in [0, 1) a conversation falls, the same for all its samples and in every store."""
    return int(hash_json(sample_id.rpartition("-")[0] or sample_id)[:8], 16) / 2**32
