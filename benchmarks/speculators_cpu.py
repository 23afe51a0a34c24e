"""Run speculators' trainer on a CPU: `PEER_PYTHON benchmarks/speculators_cpu.py` + arguments of `speculators train`.

Its code asks for an accelerator in five places, which return the CPU here. Its eager losses keep several fp32 copies of
the logits for the backward pass; here each chunk of rows is computed again instead, with the same values. Training is
unchanged. Runs in speculators' environment and imports nothing from this project.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch.utils import data
from torch.utils.checkpoint import checkpoint

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
CHUNK_ELEMENTS = 1 << 24
"""Logits of a chunk: 64 MiB in fp32."""
CPU = torch.device("cpu")
torch.set_num_threads(2)
torch.accelerator.current_accelerator = lambda *_, **__: CPU  # type: ignore[assignment]
torch.accelerator.synchronize = lambda *_, **__: None  # type: ignore[assignment]
torch.accelerator.memory_allocated = lambda *_, **__: 0  # type: ignore[assignment]
torch.accelerator.is_available = lambda: False
torch.get_device_module = lambda *_, **__: SimpleNamespace(empty_cache=lambda: None)  # type: ignore[assignment]


def in_chunks(loss: Loss) -> Loss:
    """Return a loss `(1, T, V), (1, T, V) -> (1, T)` that keeps nothing but its arguments for the backward pass."""

    def chunked(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        rows = max(1, CHUNK_ELEMENTS // logits.shape[-1])
        parts = zip(logits.split(rows, 1), targets.split(rows, 1), strict=True)
        return torch.cat([checkpoint(loss, *part, use_reentrant=False) for part in parts], dim=1)

    return chunked


def main() -> None:
    from speculators.losses import utils
    from speculators.train import cli, dataloader, trainer
    from speculators.train.config import TrainConfig

    def unpinned(*args: Any, **kwargs: Any) -> Any:
        return data.DataLoader(*args, **{**kwargs, "pin_memory": False})

    losses = utils._LOSS_FN_MAPS["eager"]
    losses.update({name: in_chunks(loss) for name, loss in losses.items()})
    trainer.get_local_rank = lambda: CPU
    dataloader.DataLoader = unpinned
    sys.argv[0] = "train"
    cli.main(TrainConfig.resolve())


if __name__ == "__main__":
    main()
