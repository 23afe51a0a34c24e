"""Run speculators' trainer on a CPU: `PEER_PYTHON benchmarks/speculators_cpu.py` + arguments of `speculators train`.

Its code asks for an accelerator in five places, which return the CPU here; training is unchanged. Runs in speculators'
environment and imports nothing from this project.
"""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import torch
from torch.utils import data

CPU = torch.device("cpu")
torch.set_num_threads(2)
torch.accelerator.current_accelerator = lambda *_, **__: CPU  # type: ignore[assignment]
torch.accelerator.synchronize = lambda *_, **__: None  # type: ignore[assignment]
torch.accelerator.memory_allocated = lambda *_, **__: 0  # type: ignore[assignment]
torch.accelerator.is_available = lambda: False
torch.get_device_module = lambda *_, **__: SimpleNamespace(empty_cache=lambda: None)  # type: ignore[assignment]


def main() -> None:
    from speculators.train import cli, dataloader, trainer
    from speculators.train.config import TrainConfig

    def unpinned(*args: Any, **kwargs: Any) -> Any:
        return data.DataLoader(*args, **{**kwargs, "pin_memory": False})

    trainer.get_local_rank = lambda: CPU
    dataloader.DataLoader = unpinned
    sys.argv[0] = "train"
    cli.main(TrainConfig.resolve())


if __name__ == "__main__":
    main()
