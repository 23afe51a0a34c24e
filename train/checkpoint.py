"""Checkpoints of a training run: written atomically; the last few and the best are kept."""

from __future__ import annotations

import os
import shutil
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from common.files import read_json, write_json
from contracts.draft import DraftRun
from train.processes import Processes

if TYPE_CHECKING:
    from train.offline import Training


def save_checkpoint(training: Training, step: int, best_length: float | None = None) -> None:
    """Write step-<number>; delete all but the last `train.keep_checkpoints` and the best.

    Every process calls it. `best_length`: the predicted acceptance length if this checkpoint is the best so far.
    """
    run, processes, config = training.run, training.processes, training.config
    weights, state = processes.read_state(training.model, training.optimizer)
    if not processes.is_first:
        return processes.wait()
    folder = run.step_folder(step)
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, temporary / "weights.safetensors")
    # No method uses torch's global generator today; the state is there for one that does.
    torch.save({"optimizer": state, "rng": torch.get_rng_state()}, temporary / "state.pt")
    position = {"step": step, "seed": training.section.seed, "target": config.target_fingerprint, "store": config.store}
    write_json(temporary / "position.json", position)
    (temporary / "recipe.yaml").write_text(training.recipe.to_yaml())
    for path in temporary.iterdir():
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
    return processes.wait()


def load_checkpoint(run: DraftRun, processes: Processes, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Load the last checkpoint, if any, into all processes; return the step to resume from."""
    steps = run.steps()
    if not steps:
        return 0
    folder = run.step_folder(steps[-1])
    state: dict[str, Any] = torch.load(folder / "state.pt", weights_only=True)
    processes.load_state(model, optimizer, load_file(folder / "weights.safetensors"), state["optimizer"])
    torch.set_rng_state(state["rng"])
    if processes.is_first:
        print(f"train: going on from step {steps[-1]}")
    return int(read_json(folder / "position.json", "a checkpoint's position")["step"])
