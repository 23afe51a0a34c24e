"""Checkpoints of a training run: written in shards beside the next steps, kept: the last few and the best.

    step-000500/state/               weights and optimizer, as torch.distributed.checkpoint writes them
                weights.safetensors  the weights alone, which `train eval` and `train export` read
                position.json, recipe.yaml

Each process copies its share of the state to the CPU and goes on; threads write it. The folder gets its name once all
shares are on disk, so a kill never leaves half a checkpoint. Any number of processes can resume from it.

Only tensors are in the shards: torch unpickles anything else without limits when it reads them.
"""

from __future__ import annotations

import os
import pickle
import shutil
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn
from torch.distributed.checkpoint import metadata as checkpoint_metadata
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, _StorageInfo
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save

from common.errors import IncompleteError, UserError
from common.files import read_json, write_json
from contracts.draft import DraftRun
from train.processes import Processes

if TYPE_CHECKING:
    from train.offline import Training

STATE = "state"
"""The folder of torch.distributed.checkpoint within a checkpoint."""


class Checkpoints:
    """Writes the checkpoints of a run; every process has one and calls its methods at the same steps."""

    def __init__(self, training: Training, on_saved: Callable[[int], None] = lambda _: None) -> None:
        """`on_saved` is called with the step on the first process, by a thread, once a checkpoint is on disk."""
        # For a single process torch warns that it has no process group, from a thread.
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        self._training, self._on_saved = training, on_saved
        self._pool = ThreadPoolExecutor(1, "checkpoint")
        self._pending: Future[None] | None = None
        steps = training.run.steps()
        self.last_step = steps[-1] if steps else 0

    def save(self, step: int, best_length: float | None = None) -> None:
        """Begin to write step-<number>; wait for the one before.

        `best_length`: the predicted acceptance length if this checkpoint is the best so far.
        """
        self.finish()
        self.last_step = step
        training, processes = self._training, self._training.processes
        temporary = _temporary(training.run.step_folder(step))
        if processes.is_first:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        processes.wait()
        weights, moments = processes.read_state(training.model, training.optimizers)
        state = {"model": processes.share_of(weights), "moments": processes.share_of(moments["state"])}
        alone = processes.world == 1
        written = async_save(state, checkpoint_id=temporary / STATE, process_group=processes.writers, no_dist=alone)
        assert isinstance(written, Future)
        self._pending = self._pool.submit(self._complete, written, step, best_length)

    def finish(self) -> None:
        """Wait until the checkpoint that is being written is complete, on every process.

        Raises IncompleteError if it could not be written; the checkpoints before stay as they are.
        """
        if self._pending is not None:
            try:
                self._pending.result()
            except (CheckpointException, OSError, SafetensorError) as error:
                failures = error.failures.values() if isinstance(error, CheckpointException) else [(error,)]
                reasons = "; ".join(sorted({str(failure[0]) for failure in failures}))
                raise IncompleteError(
                    f"{self._training.run.folder}: found no way to write a checkpoint ({reasons}), expected space for "
                    "16 bytes a parameter. Make room, then run again: it goes on from the checkpoint before."
                ) from None
            self._pending = None
            self._training.processes.wait()

    def _complete(self, written: Future[Any], step: int, best_length: float | None) -> None:
        """Wait for all shares; then the first process completes the folder and deletes older ones."""
        written.result()
        training, run = self._training, self._training.run
        if not training.processes.is_first:
            return
        folder = run.step_folder(step)
        temporary = _temporary(folder)
        save_file(_read_weights(temporary / STATE), temporary / "weights.safetensors")
        position = {
            "step": step,
            "seed": training.section.seed,
            "target": training.config.target_fingerprint,
            "store": training.config.store,
        }
        write_json(temporary / "position.json", position)
        (temporary / "recipe.yaml").write_text(training.recipe.to_yaml())
        for path in filter(Path.is_file, temporary.rglob("*")):
            with path.open("rb") as file:
                os.fsync(file.fileno())
        shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)
        if best_length is not None:
            run.write_best(step, best_length)
        best = run.best_step()
        for old in run.steps()[: -training.section.keep_checkpoints]:
            if old != best:
                shutil.rmtree(run.step_folder(old))
        self._on_saved(step)


def load_checkpoint(
    run: DraftRun, processes: Processes, model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]
) -> int:
    """Load the last checkpoint, if any, into all processes; return the step to resume from.

    Deletes what a killed run left of an unfinished one. Raises UserError for a checkpoint of an earlier version, which
    has no shards.
    """
    if processes.is_first:
        for unfinished in run.folder.glob(".step-*.tmp"):
            shutil.rmtree(unfinished)
    steps = run.steps()
    if not steps:
        return 0
    folder = run.step_folder(steps[-1])
    if not (folder / STATE).exists():
        raise UserError(
            folder,
            found="a checkpoint of an earlier version",
            expected=f"{STATE}/, as this version writes it",
            fix="Finish the run with the version that began it, or choose another --output.",
        )
    weights, moments = processes.read_state(model, optimizers)
    _refuse_code(folder / STATE)
    load(
        {"model": weights, "moments": moments["state"]},
        checkpoint_id=folder / STATE,
        process_group=processes.writers,
        no_dist=processes.world == 1,
    )
    processes.write_state(model, optimizers, weights, moments)
    if processes.is_first:
        print(f"train: going on from step {steps[-1]}")
    return int(read_json(folder / "position.json", "a checkpoint's position")["step"])


def _refuse_code(folder: Path) -> None:
    """Raise UserError if the shards' metadata names anything but tensors and files: unpickled, it could run code."""
    path = folder / ".metadata"
    try:
        with path.open("rb") as file:
            _MetadataUnpickler(file).load()
    except (pickle.UnpicklingError, EOFError, ValueError, OSError) as error:
        raise UserError(
            path,
            found=f"unexpected content ({error})",
            expected="metadata of tensors, as torch.distributed.checkpoint writes it",
            fix="Delete this checkpoint; the run then goes on from the one before.",
        ) from None


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        """Return a class that metadata may name. Raises pickle.UnpicklingError for any other."""
        if module == checkpoint_metadata.__name__:
            return getattr(checkpoint_metadata, name)
        if module == "torch" and (name == "Size" or isinstance(getattr(torch, name, None), torch.dtype)):
            return getattr(torch, name)
        if (module, name) == ("torch.serialization", "_get_layout"):
            return super().find_class(module, name)
        if (module, name) == (_StorageInfo.__module__, _StorageInfo.__name__):
            return _StorageInfo
        if module.startswith("pathlib") and name in ("PosixPath", "PurePosixPath"):
            return Path
        raise pickle.UnpicklingError(f"{module}.{name}")


def _read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Read the whole weights from all shards."""
    weights = {
        name.removeprefix("model."): torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in FileSystemReader(folder).read_metadata().state_dict_metadata.items()
        if name.startswith("model.") and isinstance(entry, TensorStorageMetadata)
    }
    load({"model": weights}, checkpoint_id=folder, no_dist=True)
    return weights


def _temporary(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.tmp")
