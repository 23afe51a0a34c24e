"""One or several training processes: torchrun's environment, DDP or FSDP2, sums and full states across processes."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from common.progress import track
from drafts.draft import Draft
from recipe.train import TrainSection
from train.optimizer import read_plain_state

Item = TypeVar("Item")
TIMEOUT = timedelta(minutes=60)
"""How long processes wait for one another: the first one may write a checkpoint or read a whole store meanwhile."""


@dataclass(frozen=True)
class Processes:
    """This process's rank, the number of processes and the device; a single process is rank 0 of 1.

    `control`: a gloo group for values on the CPU; None where gloo is the default group's backend. `writers`: a gloo
    group of the threads that write checkpoints, whose messages must not mix with those of the steps. `bf16`: whether
    products are computed in bf16; None: on GPUs.
    """

    rank: int
    world: int
    device: torch.device
    control: Any = None
    writers: Any = None
    bf16: bool | None = None

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of products; weights are in fp32."""
        bf16 = self.device.type == "cuda" if self.bf16 is None else self.bf16
        return torch.bfloat16 if bf16 else torch.float32

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

    def track(self, items: Sequence[Item], desc: str) -> Iterable[Item]:
        """Return this process's share of samples, with a progress bar on the first process."""
        share = items[self.rank :: self.world]
        return track(share, desc=desc, unit="sample") if self.is_first else share

    def gather(self, shares: list[Item]) -> list[Item]:
        """Return the items of all processes in their order before `track` shared them out."""
        if self.world == 1:
            return shares
        parts: list[list[Item]] = [[] for _ in range(self.world)]
        dist.all_gather_object(parts, shares, group=self.control)
        return [item for row in itertools.zip_longest(*parts, fillvalue=None) for item in row if item is not None]

    def from_first(self, value: float) -> float:
        """Return the first process's value, on every process."""
        if self.world == 1:
            return value
        shared = torch.tensor(value, dtype=torch.float64)
        dist.broadcast(shared, src=0, group=self.control)
        return float(shared)

    def autocast(self) -> AbstractContextManager[Any]:
        """Return the context of forward passes."""
        return nullcontext() if self.dtype == torch.float32 else torch.autocast(self.device.type, self.dtype)

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
        bf16 = self.dtype == torch.bfloat16
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if bf16 else MixedPrecisionPolicy()
        for layer in model.layers_to_shard():
            fully_shard(layer, mesh=mesh, mp_policy=policy)
        fully_shard(model, mesh=mesh, mp_policy=policy)  # in place
        return model

    def read_state(
        self, model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the states by names of parameters, sharded under FSDP2; every process must call it.

        Optimizers that have made no step get an empty state first.
        """
        if self.world == 1 and all(optimizer.state for optimizer in optimizers):
            return read_plain_state(model, optimizers)
        return get_model_state_dict(model), get_optimizer_state_dict(model, list(optimizers))

    def write_state(
        self,
        model: nn.Module,
        optimizers: Sequence[torch.optim.Optimizer],
        weights: dict[str, Any],
        moments: dict[str, Any],
    ) -> None:
        """Set states of the form that `read_state` returns."""
        set_model_state_dict(model, weights)
        set_optimizer_state_dict(model, list(optimizers), moments)

    def share_of(self, entries: dict[str, Any]) -> dict[str, Any]:
        """Return this process's share of a state that all processes have; sharded tensors are shares already.

        Otherwise each process would copy all of it to the CPU.
        """
        mine = set([name for name in entries if not _is_sharded(entries[name])][self.rank :: self.world])
        return {name: value for name, value in entries.items() if name in mine or _is_sharded(value)}


def _is_sharded(value: Any) -> bool:
    return isinstance(value, DTensor) or (isinstance(value, dict) and any(map(_is_sharded, value.values())))


@contextmanager
def start_processes(bf16: bool | None = None) -> Iterator[Processes]:
    """Join torchrun's process group, if there is one: nccl with one process per GPU, gloo on CPUs.

    `bf16`: whether products are computed in bf16; None: on GPUs.
    """
    world, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    if world == 1:
        yield Processes(0, 1, device, bf16=bf16)
        return
    on_gpu = device.type == "cuda"
    dist.init_process_group("nccl" if on_gpu else "gloo", timeout=TIMEOUT, device_id=device if on_gpu else None)
    try:
        control = dist.new_group(backend="gloo", timeout=TIMEOUT) if on_gpu else None
        yield Processes(rank, world, device, control, dist.new_group(backend="gloo", timeout=TIMEOUT), bf16)
    finally:
        dist.destroy_process_group()
