"""A vLLM plugin that records what a draft reads on each tensor-parallel rank, for serve/ranks.py to compare.

It acts only if DRAFTLINE_DRAFT_INPUTS names a folder. The first call of the draft after a file `start` appears there is
written to `rank<R>of<N>.safetensors`: `states` (rows, n*H), the captured states of the target for the first 16 tokens.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from serve.releases import find_draft_model

FOLDER_ENV = "DRAFTLINE_DRAFT_INPUTS"
START_FILE = "start"
NUM_ROWS = 16
"""Rows that are certainly tokens of the prompt: a batch may be padded behind them."""


def register() -> None:
    """Watch the draft of each worker. vLLM's entry point."""
    if not os.environ.get(FOLDER_ENV):
        return
    from vllm.v1.worker.gpu_worker import Worker  # workers of CPUs inherit from it

    stock = Worker.load_model
    if getattr(stock, "_draftline_watch", False):
        return

    def load_model(self: Any, *args: Any, **kwargs: Any) -> None:
        stock(self, *args, **kwargs)
        watch_draft(self.model_runner, Path(os.environ[FOLDER_ENV]))

    load_model._draftline_watch = True  # type: ignore[attr-defined]
    Worker.load_model = load_model


def watch_draft(runner: Any, folder: Path) -> None:
    """Record the next call of the draft's `combine_hidden_states`, which the target's states pass through."""
    from safetensors.torch import save_file
    from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size

    model = find_draft_model(runner)
    if not hasattr(model, "combine_hidden_states"):
        return
    combine = model.combine_hidden_states
    rank, ranks = get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()
    path = folder / f"rank{rank}of{ranks}.safetensors"

    def combine_hidden_states(hidden_states: Any) -> Any:
        if (folder / START_FILE).exists():
            model.combine_hidden_states = combine
            part = path.with_suffix(".part")
            save_file({"states": hidden_states[:NUM_ROWS].detach().cpu().contiguous()}, part)
            part.replace(path)
        return combine(hidden_states)

    model.combine_hidden_states = combine_hidden_states
