"""vLLM's hidden-state connector for CPUs.

Failure without it: the stock `ExampleHiddenStatesConnector` copies through a CUDA stream into pinned memory and dies
with `pin_memory=True requires a CUDA or other accelerator backend`. vLLM loads it by `kv_connector_module_path`. GPUs
use serve/vllm_plugins/hidden_states_connector.py, which this class extends.

The connector's threads copy from the KV cache while the engine takes its next step; a request's blocks are kept until
the copy is done.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import threading
from functools import partial
from typing import Any

import torch

from common.tensor_file import plan_file
from serve.vllm_plugins.hidden_states_connector import HiddenStatesConnector


class _Copied:
    """A replacement for the CUDA event of a copy."""

    def __init__(self) -> None:
        self._done = threading.Event()

    def set(self) -> None:
        self._done.set()

    def synchronize(self) -> None:
        self._done.wait()

    def query(self) -> bool:
        return self._done.is_set()


class CPUHiddenStatesConnector(HiddenStatesConnector):
    """The connector, with copies in ordinary memory."""

    def _submit_async_write(self, pending: Any) -> None:
        self.write_own_states(pending)
        if not self._is_tp_rank_zero:
            return
        lock = self._lock_fds.pop(pending.req_id, None)
        if lock is None and self.use_lock:
            lock = os.open(pending.filename + ".lock", os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o644)
            fcntl.flock(lock, fcntl.LOCK_EX)
        copied = _Copied()
        future = self._executor.submit(self._copy, pending, copied, lock)
        self._req_copy_events[pending.req_id] = copied
        self._req_futures[pending.req_id] = future
        future.add_done_callback(partial(self._on_write_done, pending.req_id))

    def _copy(self, pending: Any, copied: _Copied, lock: int | None) -> None:
        """Copy a request's states from their blocks to their file. Runs in a thread.

        Uses numpy, because torch would start OpenMP threads for this thread. If a process has more of them than
        processors, the engine's own sleep between any two operations.
        """
        try:
            os.makedirs(os.path.dirname(pending.filename), exist_ok=True)
            num_tokens = len(pending.token_ids)
            blocks = self._kv_cache.transpose(1, 2)  # [blocks, tokens of a block, layers, H]
            source = blocks.view(torch.uint8).numpy()
            whole, rest = divmod(num_tokens, self._block_size)
            shape = (num_tokens, *blocks.shape[2:])
            layout = plan_file({"hidden_states": (blocks.dtype, shape), "token_ids": (torch.int64, (num_tokens,))})
            with open(pending.filename, "w+b") as file:
                file.truncate(layout.size)
                with mmap.mmap(file.fileno(), layout.size) as memory:
                    memory[: len(layout.header)] = layout.header
                    states, ids = (layout.slots[name].view(memory) for name in ("hidden_states", "token_ids"))
                    room = states.view(torch.uint8).numpy()
                    for place, block in enumerate(pending.block_ids[: whole + (rest > 0)]):
                        first = place * self._block_size
                        length = min(self._block_size, num_tokens - first)
                        room[first : first + length] = source[block, :length]
                    copied.set()
                    ids.copy_(pending.token_ids)
                    del states, ids, room  # they hold the mapping open
        finally:
            copied.set()
            if lock is not None:
                os.close(lock)
