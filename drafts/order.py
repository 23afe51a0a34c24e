"""Which samples of a store a training reads and in which order: both follow from the recipe and the samples' lengths.

`train offline` reads in this order, and `dump run --window` captures in it.

Place p of the order belongs to step p // global_batch_size. The places are an endless sequence of shuffled epochs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np
import torch

from common.errors import UserError
from common.files import hash_json
from contracts.rolling import RollingStore
from drafts.places import anchor_places

EPOCHS_KEPT = 3


class Lengths(Protocol):
    """The part of a store that `choose_samples` reads. ModelOpt's layout has no lengths: `lengths` is empty."""

    def sample_ids(self) -> list[str]: ...

    def lengths(self) -> Mapping[str, int]: ...

    def read_mask(self, sample_id: str) -> torch.Tensor: ...


@dataclass(frozen=True)
class Chosen:
    """The ids of the samples to train on, of those held out, and of those with nothing to draft within the length."""

    train: list[str]
    held_out: list[str]
    cut_away: set[str]


def choose_samples(store: Lengths, max_tokens: int, max_samples: int | None, held_out_fraction: float) -> Chosen:
    """Choose among the store's first `max_samples` samples, cut to `max_tokens` each; split them by conversation."""
    lengths, ids = store.lengths(), store.sample_ids()[:max_samples]
    cut_away = {
        id_
        for id_ in ids
        if lengths.get(id_, 0) > max_tokens and not len(anchor_places(store.read_mask(id_)[:max_tokens]))
    }
    train, held_out = list[str](), list[str]()
    for id_ in ids:
        if id_ not in cut_away:
            (held_out if _share(id_) < held_out_fraction else train).append(id_)
    return Chosen(train, held_out, cut_away)


def _share(sample_id: str) -> float:
    """Hash a sample's conversation to [0, 1): the same for all its samples and in every store."""
    return int(hash_json(sample_id.rpartition("-")[0] or sample_id)[:8], 16) / 2**32


class Order:
    """The order of `num_samples` samples, which are numbered from 0. Threads may use it at the same time."""

    def __init__(self, num_samples: int, seed: int) -> None:
        self.num_samples = num_samples
        self._seed = seed
        self.epoch = lru_cache(EPOCHS_KEPT)(self._shuffle)

    def pick(self, place: int) -> int:
        """Return the number of the sample at a place."""
        epoch, offset = divmod(place, self.num_samples)
        return int(self.epoch(epoch)[offset])

    def _shuffle(self, epoch: int) -> np.ndarray:
        """Return the samples' numbers in the order of an epoch."""
        generator = torch.Generator().manual_seed(self._seed * 7_919 + epoch)
        return torch.randperm(self.num_samples, generator=generator).numpy()


class Schedule:
    """The bytes of a training's samples in its order; from them, how far a window of so many bytes reaches.

    `sizes`: bytes by sample's number. `num_places`: those of the whole training; `per_step`: those of a step.
    """

    def __init__(self, order: Order, sizes: np.ndarray, num_places: int, per_step: int) -> None:
        self.num_places, self.per_step = num_places, per_step
        self._order, self._sizes = order, sizes.astype(np.int64)
        self._whole = int(self._sizes.sum())
        self._ends = lru_cache(EPOCHS_KEPT)(self._add_up)

    def bytes_between(self, first: int, end: int) -> int:
        """Return the bytes of the samples at the places first .. end - 1."""
        return self._bytes_before(end) - self._bytes_before(first)

    def reach(self, first: int, window: int) -> int:
        """Return the largest end such that the samples at the places first .. end - 1 fit into `window` bytes."""
        limit = self._bytes_before(first) + window
        epoch, rest = divmod(limit, self._whole)
        offset = int(np.searchsorted(self._ends(epoch), rest, side="right"))
        return min(self.num_places, epoch * self._order.num_samples + offset)

    def largest_step(self) -> int:
        """Return the bytes of the largest step."""
        ends = np.arange(0, self.num_places + 1, self.per_step)
        epochs, offsets = np.divmod(ends, self._order.num_samples)
        before = np.empty(len(ends), np.int64)
        for epoch in np.unique(epochs):
            in_epoch = epochs == epoch
            sums = np.concatenate([[0], self._ends(int(epoch))])
            before[in_epoch] = int(epoch) * self._whole + sums[offsets[in_epoch]]
        return int(np.diff(before).max())

    def _bytes_before(self, place: int) -> int:
        epoch, offset = divmod(place, self._order.num_samples)
        return epoch * self._whole + (int(self._ends(epoch)[offset - 1]) if offset else 0)

    def _add_up(self, epoch: int) -> np.ndarray:
        """Return the bytes of an epoch's samples up to and including each."""
        return np.cumsum(self._sizes[self._order.epoch(epoch)])


@dataclass(frozen=True)
class WindowPlan:
    """What a rolling store holds when. `num_bytes`: of the samples in the trainer's order, without what is kept."""

    chosen: Chosen
    order: Order
    schedule: Schedule
    num_bytes: int

    def end(self, first_place: int) -> int:
        """Return the end of the window whose first place is `first_place`."""
        return self.schedule.reach(first_place, self.num_bytes)


def plan_window(store: RollingStore) -> WindowPlan:
    """Plan a rolling store from its settings and its index, for either side.

    Raises UserError if nothing is left to train on, or if a step does not fit into the window: the trainer would wait
    for the capture, and the capture for the trainer.
    """
    window, settings = store.window, store.window.order
    chosen = choose_samples(
        store, settings["target.max_model_len"], settings["train.max_samples"], settings["train.held_out_fraction"]
    )
    if not chosen.train:
        raise UserError(
            store.folder,
            found="no sample to train on",
            expected="at least one",
            fix="Generate conversations that are finished, or raise target.max_model_len.",
        )
    lengths = store.lengths()
    chosen = Chosen(chosen.train, chosen.held_out[: settings["train.evaluate_samples"]], chosen.cut_away)
    order = Order(len(chosen.train), settings["train.seed"])
    sizes = store.file_sizes(np.array([lengths[id_] for id_ in chosen.train]))
    per_step = settings["train.global_batch_size"]
    schedule = Schedule(order, sizes, settings["train.num_steps"] * per_step, per_step)
    kept = store.kept_bytes(lengths[id_] for id_ in chosen.held_out)
    if window.num_bytes < kept + schedule.largest_step():
        raise UserError(
            "--window",
            found=f"{window.num_bytes / 2**30:.4g} GiB",
            expected=f"at least {(kept + schedule.largest_step()) / 2**30:.4g} GiB: the largest step, the index and "
            f"{len(chosen.held_out)} held-out samples",
            fix="Raise it; several times that much lets the capture work ahead.",
        )
    return WindowPlan(chosen, order, schedule, window.num_bytes - kept)
