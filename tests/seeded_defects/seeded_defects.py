"""A vLLM plugin for tests: engines with the defect that SEEDED_DEFECT names. This folder on PYTHONPATH installs it."""

from __future__ import annotations

import os
from typing import Any


def register() -> None:
    if defect := os.environ.get("SEEDED_DEFECT"):
        DEFECTS[defect]()


def shift_layers() -> None:
    """Capture the layer before each one that was asked for, as a reader of other layer ids would."""
    from vllm.model_executor.models.interfaces import EagleModelMixin

    stock = EagleModelMixin._set_aux_hidden_state_layers

    def shifted(self: Any, layers: tuple[int, ...]) -> None:
        stock(self, tuple(layer - 1 if layer < len(self.layers) else layer for layer in layers))

    EagleModelMixin._set_aux_hidden_state_layers = shifted


def norm_final_state() -> None:
    """Capture the final state after the final norm."""
    change_captures(lambda model, index, states: model.norm(states) if index == len(model.layers) else states)


def capture_partial_sums() -> None:
    """Capture before the FFN's all-reduce: each rank adds only its own part. Needs tensor parallelism."""
    from vllm.distributed import tensor_model_parallel_all_reduce
    from vllm.model_executor.models.qwen3 import Qwen3MLP

    stock = Qwen3MLP.forward

    def forward(self: Any, x: Any) -> Any:
        self.down_proj.reduce_results = False
        self.part = stock(self, x)
        self.whole = tensor_model_parallel_all_reduce(self.part.clone())
        return self.whole.clone()

    def before_reduction(model: Any, index: int, states: Any) -> Any:
        if index == 0:
            return states
        mlp = model.layers[index - 1].mlp
        return states - mlp.whole + mlp.part

    Qwen3MLP.forward = forward
    change_captures(before_reduction)


def change_captures(change: Any) -> None:
    """Let `change(model, layers done, states)` replace each captured state."""
    from vllm.model_executor.models.interfaces import EagleModelMixin

    stock = EagleModelMixin._maybe_add_hidden_state

    def changed(self: Any, captured: list[Any], index: int, hidden_states: Any, residual: Any) -> list[Any]:
        before = len(captured)
        captured = stock(self, captured, index, hidden_states, residual)
        captured[before:] = [change(self, index, states) for states in captured[before:]]
        return captured

    EagleModelMixin._maybe_add_hidden_state = changed


def quantize_kv_cache() -> None:
    change_arguments(kv_cache_dtype="fp8")


def serve_other_checkpoint() -> None:
    change_arguments(model=os.environ["SEEDED_CHECKPOINT"])


def shorten_by_prefix_cache() -> None:
    """Turn prefix caching on, and write only the states that were computed for the request."""
    from serve.vllm_cpu.hidden_states_connector import CPUHiddenStatesConnector as Connector

    change_arguments(enable_prefix_caching=True)
    match, finish, cached = Connector.get_num_new_matched_tokens, Connector.request_finished, dict[str, int]()

    def get_num_new_matched_tokens(self: Any, request: Any, num_computed_tokens: int) -> Any:
        cached[request.request_id] = num_computed_tokens
        return match(self, request, num_computed_tokens)

    def request_finished(self: Any, request: Any, block_ids: list[int]) -> Any:
        answer = finish(self, request, block_ids)
        pending, start = self._pending_saves[request.request_id], cached[request.request_id]
        pending.token_ids = pending.token_ids[start:]
        pending.block_ids = pending.block_ids[start // self._block_size :]
        return answer

    Connector.get_num_new_matched_tokens, Connector.request_finished = get_num_new_matched_tokens, request_finished


def change_arguments(**changes: Any) -> None:
    from vllm.engine.arg_utils import EngineArgs

    stock = EngineArgs.create_engine_config

    def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        for name, value in changes.items():
            setattr(self, name, value)
        return stock(self, *args, **kwargs)

    EngineArgs.create_engine_config = create_engine_config


def accept_every_draft_token() -> None:
    """Accept what the draft proposes, whatever the target says: a server without a draft has no defect."""
    import torch
    from vllm.v1.sample import rejection_sampler

    def accept(
        draft_token_ids: Any, num_draft_tokens: list[int], max_spec_len: int, *others: Any, **options: Any
    ) -> Any:
        bonus_token_ids = others[3]
        tokens = torch.full((len(num_draft_tokens), max_spec_len + 1), -1, dtype=torch.int32)
        parts = draft_token_ids.split(num_draft_tokens)
        for row, part, bonus in zip(tokens, parts, bonus_token_ids[:, 0], strict=True):
            row[: len(part)], row[len(part)] = part, bonus
        return tokens

    rejection_sampler.rejection_sample = accept


DEFECTS = {
    "shifted layers": shift_layers,
    "normed final state": norm_final_state,
    "partial sums": capture_partial_sums,
    "fp8 KV cache": quantize_kv_cache,
    "another checkpoint": serve_other_checkpoint,
    "short prefix": shorten_by_prefix_cache,
    "lossy draft": accept_every_draft_token,
}
