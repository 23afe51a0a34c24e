"""One or several training processes: torchrun's environment, DDP or FSDP2, sums and full states across processes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from drafts.draft import Draft
from recipe.train import TrainSection

WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


@dataclass(frozen=True)
class Processes:
    """This process's rank, the number of processes and the device; a single process is rank 0 of 1."""

    rank: int
    world: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Return the sum over all processes, on the CPU."""
        if self.world > 1:
            values = values.to(self.device)
            dist.all_reduce(values)
        return values.cpu()

    def from_first(self, value: float) -> float:
        """Return the first process's value on every process."""
        if self.world == 1:
            return value
        shared = torch.tensor(value, dtype=torch.float64, device=self.device)
        dist.broadcast(shared, src=0)
        return float(shared)

    def wait(self) -> None:
        if self.world > 1:
            dist.barrier()

    def wrap(self, model: Draft, section: TrainSection) -> nn.Module:
        """Return the module that the loop calls: the model, its DDP wrapper, or the model sharded by FSDP2."""
        if self.world == 1:
            return model
        if section.parallel == "ddp":
            wrapped: nn.Module = nn.parallel.DistributedDataParallel(model)
            return wrapped
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(self.device.type, (self.world,))
        for layer in model.layers_to_shard():
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)  # in place
        return model

    def read_state(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the full states of both on the CPU; every process must call it."""
        if self.world == 1:
            return model.state_dict(), optimizer.state_dict()
        return (
            get_model_state_dict(model, options=WHOLE),
            get_optimizer_state_dict(model, optimizer, options=WHOLE),
        )

    def load_state(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, weights: dict[str, Any], state: dict[str, Any]
    ) -> None:
        """Load full states, as `read_state` returns them; every process must call it."""
        if self.world == 1:
            model.load_state_dict(weights)
            optimizer.load_state_dict(state)
            return
        set_model_state_dict(model, weights, options=WHOLE)
        set_optimizer_state_dict(model, optimizer, state, options=WHOLE)


@contextmanager
def start_processes() -> Iterator[Processes]:
    """Join torchrun's process group, if there is one: nccl with one process per GPU, gloo on CPUs."""
    world, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    if world == 1:
        yield Processes(0, 1, device)
        return
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield Processes(rank, world, device)
    finally:
        dist.destroy_process_group()
