"""The bytes of a target's weights: from its files or their index, or estimated from its config.

Reads: `*.safetensors` or `model.safetensors.index.json` in the target's folder, if they are there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from common.files import read_json
from target.target import Target

INDEX = "model.safetensors.index.json"
NUM_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")


def weights_bytes(target: Target) -> tuple[int, str]:
    """Return the bytes of a target's weights, and where the number is from."""
    if (target.path / INDEX).exists():  # before the files: a download may have brought only some of them
        index = read_json(target.path / INDEX, "the index of a target's weights")
        total = (index.get("metadata") or {}).get("total_size")
        if isinstance(total, int):
            return total, INDEX
    if target.has_weights:
        return sum(file.stat().st_size for file in target.path.glob("*.safetensors")), "its weight files"
    return estimate_bytes(target), "an estimate from its config, in bfloat16"


def num_experts(config: Mapping[str, Any]) -> int:
    """Return the number of routed experts of a layer; 0 for a model without any."""
    return next((int(config[key]) for key in NUM_EXPERTS if config.get(key)), 0)


def estimate_bytes(target: Target) -> int:
    """Return the bytes of a transformer of this config in bfloat16: embeddings, attention, gated MLPs or experts."""
    config, hidden = target.config, target.hidden_size
    heads = int(config.get("num_attention_heads") or max(1, hidden // 128))
    head_dim = int(config.get("head_dim") or hidden // heads)
    kv_heads = int(config.get("num_key_value_heads") or heads)
    attention = 2 * hidden * head_dim * (heads + kv_heads)
    experts = num_experts(config)
    dense = int(config.get("dense_intermediate_size") or config.get("intermediate_size") or 4 * hidden)
    expert = int(config.get("moe_intermediate_size") or config.get("intermediate_size") or hidden)
    mlp = 3 * hidden * (experts * expert if experts else dense)
    embeddings = target.vocab_size * hidden * (1 if target.is_tied else 2)
    return 2 * (embeddings + target.num_layers * (attention + mlp))
