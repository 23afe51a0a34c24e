"""vLLM's hidden-state connector, with the states of every tensor-parallel rank where a preflight asks for them.

The stock connector writes the states of rank 0. Ranks that hold other states (partial sums, docs/tensor-parallel.md)
look whole from there. For a request whose id contains PREFLIGHT, each rank also writes its own states beside the file
of rank 0: `<file>.rank<R>of<N>`, safetensors with `hidden_states` (T, n+1, H).

vLLM loads the class by `kv_connector_module_path`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.distributed.kv_transfer.kv_connector.v1.example_hidden_states_connector import (
    ExampleHiddenStatesConnector,
    extract_from_kv_cache,
)

from contracts.rank_states import PREFLIGHT, rank_file


class HiddenStatesConnector(ExampleHiddenStatesConnector):
    """The stock connector; see the module."""

    def _submit_async_write(self, pending: Any) -> None:
        self.write_own_states(pending)
        super()._submit_async_write(pending)

    def write_own_states(self, pending: Any) -> None:
        """Write this rank's states of a preflight's request; do nothing for other requests.

        The engine waits for it: a preflight has a handful of requests.
        """
        if PREFLIGHT not in pending.req_id:
            return
        offsets = torch.arange(self._block_size)
        slots = (torch.tensor(pending.block_ids)[:, None] * self._block_size + offsets).flatten()
        states = extract_from_kv_cache(self._kv_cache, slots.to(self._kv_cache.device), len(pending.token_ids))
        rank, ranks = get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()
        path = rank_file(Path(pending.filename), rank, ranks)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f"{path.name}.part")
        save_file({"hidden_states": states.cpu().contiguous()}, part)
        part.replace(path)
