"""Read training samples from a store, in an order that follows from the seed alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from contracts.errors import UserError
from contracts.modelopt import ModelOptStore, is_modelopt, open_modelopt
from contracts.recipe import Recipe, TrainSection
from contracts.store import Manifest, Store, StoredSample, open_store
from contracts.target import Target

AnyStore = Store | ModelOptStore


def open_states(recipe: Recipe, folder: Path, target: Target) -> tuple[AnyStore, Manifest]:
    """A store of ours, or a folder in ModelOpt's layout. Raises UserError for one of another target."""
    return (
        open_modelopt(folder, target, recipe.target.aux_layers) if is_modelopt(folder) else open_store(folder, target)
    )


@dataclass(frozen=True)
class Batch:
    """Samples packed one after another. Shapes: token_ids (T,) int64, loss_mask (T,), aux_hidden_states (T, n*H)."""

    token_ids: torch.Tensor
    loss_mask: torch.Tensor
    aux_hidden_states: torch.Tensor
    lengths: list[int]
    anchors: list[torch.Tensor]


class Samples:
    """A store's samples with anchors to train on; reads are lazy and whole samples are kept while memory allows."""

    def __init__(self, store: AnyStore, mask_token_id: int, cache_bytes: int = 4 << 30) -> None:
        """Raises UserError when the store holds no sample at all."""
        self.store = store
        self.mask_token_id = mask_token_id
        self.ids = store.sample_ids()
        if not self.ids:
            raise UserError(
                store.folder, found="no sample", expected="at least one", fix="Dump conversations that were finished."
            )
        self._cache: dict[str, StoredSample] = {}
        self._room = cache_bytes
        self._epoch, self._order = -1, list[int]()

    def read(self, sample_id: str) -> StoredSample:
        """A sample. Raises UserError when it holds the mask token, which must mean "unknown" and nothing else."""
        if sample_id in self._cache:
            return self._cache[sample_id]
        sample = self.store.read_sample(sample_id)
        if bool((sample.input_ids == self.mask_token_id).any()):
            raise UserError(
                self.store.sample_path(sample_id),
                found=f"the mask token {self.mask_token_id} among its tokens",
                expected="a token that never occurs",
                fix="Set target.mask_token_id to another free row.",
            )
        size = sample.aux_hidden_states.nbytes
        if size <= self._room:
            self._room -= size
            self._cache[sample_id] = sample
        return sample

    def batch(self, step: int, section: TrainSection) -> Batch:
        """The batch of a step: the same for a seed whatever ran before, so that a resumed run needs no position.

        Raises UserError for a sample in which no anchor can be drawn.
        """
        first = step * section.batch_samples
        picked = [self._pick(first + i, section.seed) for i in range(section.batch_samples)]
        generator = torch.Generator().manual_seed(section.seed * 1_000_003 + step)
        samples = [self.read(sample_id) for sample_id in picked]
        anchors = []
        for sample_id, sample in zip(picked, samples, strict=True):
            places = anchor_places(sample.loss_mask)
            if not len(places):
                raise UserError(
                    self.store.sample_path(sample_id),
                    found="no place for an anchor",
                    expected="two generated tokens in a row",
                    fix="Dump again: such samples are worth nothing.",
                )
            chosen = torch.randperm(len(places), generator=generator)[: section.num_anchors]
            anchors.append(places[chosen].sort().values)
        return Batch(
            token_ids=torch.cat([sample.input_ids for sample in samples]).long(),
            loss_mask=torch.cat([sample.loss_mask for sample in samples]),
            aux_hidden_states=torch.cat([sample.aux_hidden_states for sample in samples]).float(),
            lengths=[sample.num_tokens for sample in samples],
            anchors=anchors,
        )

    def _pick(self, number: int, seed: int) -> str:
        """The sample at place `number` of the endless sequence of shuffled epochs."""
        epoch, place = divmod(number, len(self.ids))
        if self._epoch != epoch:
            generator = torch.Generator().manual_seed(seed * 7_919 + epoch)
            self._order = torch.randperm(len(self.ids), generator=generator).tolist()
            self._epoch = epoch
        return self.ids[self._order[place]]


def anchor_places(loss_mask: torch.Tensor) -> torch.Tensor:
    """Positions that serving can draft from: a generated token followed by another. Ascending, (N,)."""
    return (loss_mask[:-1] & loss_mask[1:]).nonzero()[:, 0]
