"""One or several training processes: torchrun's environment, DDP or FSDP2, sums and full states across processes."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
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
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from drafts.draft import Draft
from recipe.train import TrainSection

TIMEOUT = timedelta(minutes=60)
"""How long processes wait for one another: the first one may write a checkpoint or read a whole store meanwhile."""
WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


@dataclass(frozen=True)
class Processes:
    """This process's rank, the number of processes and the device; a single process is rank 0 of 1.

    `control`: a gloo group for values on the CPU; None where gloo is the default group's backend.
    """

    rank: int
    world: int
    device: torch.device
    control: Any = None

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Return the sum over all processes, on the CPU. Values on the CPU are summed without waiting for GPUs."""
        if self.world == 1:
            return values.cpu()
        summed = values.detach().to("cpu", copy=True)
        dist.all_reduce(summed, group=self.control)
        return summed

    def from_first(self, value: float) -> float:
        """Return the first process's value, on every process."""
        if self.world == 1:
            return value
        shared = torch.tensor(value, dtype=torch.float64)
        dist.broadcast(shared, src=0, group=self.control)
        return float(shared)

    def autocast(self) -> AbstractContextManager[Any]:
        """Return the context for products in bf16 on GPUs."""
        return torch.autocast("cuda", torch.bfloat16) if self.device.type == "cuda" else nullcontext()

    @contextmanager
    def accumulate(self, model: nn.Module, *, is_last: bool) -> Iterator[None]:
        """Let only the last accumulated batch exchange gradients between processes."""
        if isinstance(model, FSDPModule):
            model.set_requires_gradient_sync(is_last)
        if isinstance(model, nn.parallel.DistributedDataParallel) and not is_last:
            with model.no_sync():
                yield
        else:
            yield

    @staticmethod
    def whole(value: torch.Tensor) -> torch.Tensor:
        """Return a value that FSDP2 may hold in parts as one tensor; every process must call it."""
        whole: torch.Tensor = value.full_tensor() if isinstance(value, DTensor) else value
        return whole

    def wait(self) -> None:
        if self.world > 1:
            dist.barrier(group=self.control)

    def wrap(self, model: Draft, section: TrainSection) -> nn.Module:
        """Return the module that the loop calls: the model, its DDP wrapper, or the model sharded by FSDP2."""
        if self.world == 1:
            return model
        if section.parallel == "ddp":
            wrapped: nn.Module = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
            return wrapped
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        mesh = init_device_mesh(self.device.type, (self.world,))
        on_gpu = self.device.type == "cuda"
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if on_gpu else MixedPrecisionPolicy()
        for layer in model.layers_to_shard():
            fully_shard(layer, mesh=mesh, mp_policy=policy)
        fully_shard(model, mesh=mesh, mp_policy=policy)  # in place
        return model

    def read_state(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the whole states of both on the CPU, by names of parameters; every process must call it.

        They have the same form for every number of processes, so that a run can go on with another one.
        """
        if self.world == 1:
            return model.state_dict(), _rename(optimizer.state_dict(), dict(enumerate(_names(model))))
        return (
            get_model_state_dict(model, options=WHOLE),
            get_optimizer_state_dict(model, optimizer, options=WHOLE),
        )

    def load_state(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, weights: dict[str, Any], state: dict[str, Any]
    ) -> None:
        """Load states from `read_state`."""
        if self.world == 1:
            model.load_state_dict(weights)
            optimizer.load_state_dict(_rename(state, {name: number for number, name in enumerate(_names(model))}))
            return
        set_model_state_dict(model, weights, options=WHOLE)
        set_optimizer_state_dict(model, optimizer, state, options=WHOLE)


def _names(model: nn.Module) -> list[str]:
    """Return the names of the parameters in the optimizer's order."""
    return [name for name, _ in model.named_parameters()]


def _rename(state: dict[str, Any], names: Mapping[Any, Any]) -> dict[str, Any]:
    """Return an optimizer's state with other names of its parameters."""
    groups = [{**group, "params": [names[key] for key in group["params"]]} for group in state["param_groups"]]
    return {"state": {names[key]: value for key, value in state["state"].items()}, "param_groups": groups}


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
    on_gpu = device.type == "cuda"
    dist.init_process_group("nccl" if on_gpu else "gloo", timeout=TIMEOUT, device_id=device if on_gpu else None)
    try:
        yield Processes(rank, world, device, dist.new_group(backend="gloo", timeout=TIMEOUT) if on_gpu else None)
    finally:
        dist.destroy_process_group()
