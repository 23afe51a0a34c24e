"""vLLM's arguments for handing out hidden states: its `extract_hidden_states` method and a connector that writes files.

The same for an engine inside a process and for a server; a server's clients name no paths, it writes into `staging`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from contracts.check import check_kv_dtype
from contracts.recipe import Recipe
from contracts.target import Target, to_vllm_layer_ids
from serve.engine import is_cpu_engine

JSON_ARGS = ("speculative_config", "kv_transfer_config")


def longest_sample(recipe: Recipe, target: Target) -> int:
    """Tokens that one sample may have: the engine generates one more after each prefill, which needs a place too."""
    positions = target.config.get("max_position_embeddings")
    limit = recipe.target.max_model_len
    return min(limit, int(positions) - 1) if positions else limit


def extraction_args(recipe: Recipe, target: Target, layer_ids: Sequence[int], staging: Path) -> dict[str, Any]:
    """Engine arguments (flags with underscores): the recipe's `serve.args`, `dump.args` over them, and extraction.

    Raises UserError for a quantized KV cache, through which the states pass: they would come out quantized.
    """
    args: dict[str, Any] = {
        key.replace("-", "_"): value for key, value in {**recipe.serve.args, **recipe.dump.args}.items()
    }
    check_kv_dtype(str(args.get("kv_cache_dtype", "auto")))
    connector = {"kv_connector": "ExampleHiddenStatesConnector"}
    if is_cpu_engine():
        connector = {
            "kv_connector": "CPUHiddenStatesConnector",
            "kv_connector_module_path": "serve.vllm_cpu.hidden_states_connector",
        }
    layers = {"eagle_aux_hidden_state_layer_ids": to_vllm_layer_ids(layer_ids, target.num_layers)}
    return {
        "max_model_len": longest_sample(recipe, target) + 1,
        "enable_prefix_caching": False,  # states of cached tokens would never be computed
        "speculative_config": {
            "method": "extract_hidden_states",
            "num_speculative_tokens": 1,
            "draft_model_config": {"hf_config": layers},
        },
        "kv_transfer_config": {
            **connector,
            "kv_role": "kv_producer",
            "kv_connector_extra_config": {"shared_storage_path": str(staging)},
        },
        **args,
    }


def to_server_args(args: Mapping[str, Any]) -> dict[str, str | int | float | bool]:
    """The same as `vllm serve` takes them: dashes, and JSON for what is nested."""
    return {key.replace("_", "-"): json.dumps(value) if key in JSON_ARGS else value for key, value in args.items()}
