"""Count how many samples of an evaluation the draft was trained on: on those its figures are too good.

Reads: a training run's run.json, or the certificate of an export; the ids and token ids of the store that it was
       trained on, if that is the evaluated one or still where it was. No states are read.

A store is the training store if it has the checksum that the training recorded. A sample was trained on if the training
store has its id, the training chose it, the steps up to the draft's checkpoint reached it, and its tokens are those of
the training store: ids alone prove nothing, because folders of other tools may number their samples. Of a rolling
store, a sample whose capture failed counts as trained on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from common.errors import UserError
from common.files import read_json
from contracts.certificate import CERTIFICATE_FILE, read_certificate
from contracts.draft import STEP_FOLDER, DraftRun
from contracts.modelopt import ModelOptStore, is_modelopt
from contracts.rolling import RollingStore, is_rolling
from contracts.store import Store
from drafts.order import Order, choose_samples
from train.start import Start

FOLDER_KEY = "store_folder"
"""Key of a training's run.json: where its store was."""
SETTINGS = ("max_samples", "held_out_fraction", "seed", "global_batch_size")
"""Keys of `train` that decide which samples a step reads."""


@dataclass(frozen=True)
class Trained:
    """What is on record of a draft's training. `store`: checksum; `folder`: where the store was, None if unknown.

    `settings`: the values of SETTINGS; `max_tokens`: the length that samples were cut to; `steps`: those before the
    checkpoint; `counts`: samples to train on and held out, None if the run is unfinished.
    """

    store: str
    folder: Path | None
    settings: Mapping[str, Any]
    max_tokens: int
    steps: int
    counts: tuple[int, int] | None


def read_trained(run: DraftRun, checkpoint: str) -> Trained | None:
    """Return what a run records of its training up to a checkpoint (a folder's name); None for one of another form."""
    state, step = read_json(run.folder / "run.json", "the output of `train offline`"), STEP_FOLDER.fullmatch(checkpoint)
    train, summary = state["settings"]["train"], state["summary"]
    if step is None or not set(SETTINGS) <= train.keys():  # a run of an earlier version
        return None
    return Trained(
        store=state["inputs"]["store"],
        folder=Path(state[FOLDER_KEY]) if FOLDER_KEY in state else None,
        settings=train,
        max_tokens=state["settings"]["draft"]["max_position_embeddings"],
        steps=int(step[1]),
        counts=(summary["samples"], summary["held_out"]) if summary else None,
    )


def find_trained(start: Start) -> Trained | None:
    """Return what is on record of the training of a draft in a folder; None for one that others published."""
    folder = start.draft.path
    if start.draft.is_checkpoint:
        return read_trained(DraftRun(folder.parent), folder.name) if (folder.parent / "run.json").exists() else None
    if not (folder / CERTIFICATE_FILE).exists():
        return None
    try:
        certificate, _ = read_certificate(folder)
    except UserError:  # a file of another tool; nothing here depends on it
        return None
    data, step = certificate.data, STEP_FOLDER.fullmatch(certificate.training.checkpoint)
    train = certificate.recipe.get("train") or {}
    if step is None or not set(SETTINGS) <= train.keys():
        return None
    max_tokens = certificate.recipe["target"]["max_model_len"]
    return Trained(data.store, None, train, max_tokens, int(step[1]), (data.samples, data.held_out))


def count_trained_on(store: Store | ModelOptStore, sample_ids: Sequence[str], trained: Trained | None) -> int | None:
    """Return how many of a store's samples a draft was trained on; None if that cannot be told."""
    if trained is None:
        return None
    try:
        training = _find_store(store, trained)
        chosen = _chosen(training, trained) if training is not None else None
        if training is None or chosen is None:
            return None
        shared = [id_ for id_ in sample_ids if id_ in chosen]
        if training is store:
            return len(shared)
        return sum(
            _begin_alike(store.read_token_ids(id_), training.read_token_ids(id_)[: trained.max_tokens])
            for id_ in shared
        )
    except (OSError, UserError):  # a training store of which files are gone
        return None


def _find_store(evaluated: Store | ModelOptStore, trained: Trained) -> Store | ModelOptStore | None:
    """Return the training store, which may be the evaluated one; None if it is gone or was changed."""
    # A ledger has the hash of every sample; the checksum of ModelOpt's layout has names and sizes alone.
    if isinstance(evaluated, Store) and evaluated.checksum == trained.store:
        return evaluated
    folder = trained.folder
    if folder is None or not folder.is_dir():
        return None
    found: Store | ModelOptStore
    if is_rolling(folder):
        found = RollingStore(folder)
    else:
        found = ModelOptStore(folder, (), 0) if is_modelopt(folder) else Store(folder)
    return found if found.checksum == trained.store else None


def _chosen(store: Store | ModelOptStore, trained: Trained) -> set[str] | None:
    """Return the ids of the samples that were trained on; None if the split is not the one that was counted then."""
    settings = trained.settings
    found = choose_samples(store, trained.max_tokens, settings["max_samples"], settings["held_out_fraction"])
    if trained.counts not in (None, (len(found.train), len(found.held_out))):
        return None
    places = trained.steps * settings["global_batch_size"]
    if places >= len(found.train):
        return set(found.train)
    order = Order(len(found.train), settings["seed"])
    return {found.train[order.pick(place)] for place in range(places)}


def _begin_alike(tokens: torch.Tensor, others: torch.Tensor) -> bool:
    """Return whether token ids are the same as far as both go: either store may have cut the sample."""
    length = min(len(tokens), len(others))
    return length > 0 and torch.equal(tokens[:length].long(), others[:length].long())
