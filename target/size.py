"""The size of a target: bytes of its weights, parameters, and bytes of KV cache, from its files, facts or config.

Reads: `*.safetensors` or `model.safetensors.index.json` in the target's folder, if they are there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from common.files import read_json
from target.target import Target

INDEX = "model.safetensors.index.json"
NUM_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")


@dataclass(frozen=True)
class Size:
    """Parameters, those that compute one token, and bytes of KV cache for one token (bf16). `source`: where from."""

    parameters: float
    active: float
    kv_bytes: float
    source: str


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
    return int(2 * _estimate(target).parameters)


def find_size(target: Target) -> Size:
    """Return a target's size: the recipe's `target.facts` where they have it, else estimated from its config."""
    facts, found = target.facts, _estimate(target)
    if facts is None or facts.num_parameters is None:
        return found
    active = facts.num_active_parameters or facts.num_parameters
    return Size(facts.num_parameters, active, facts.kv_bytes_per_token or found.kv_bytes, "target.facts")


def _estimate(target: Target) -> Size:
    """Count a transformer with the config's dimensions; keys that it lacks have usual values."""
    config, hidden = target.config, target.hidden_size
    heads = int(config.get("num_attention_heads") or max(1, hidden // 128))
    head_dim = int(config.get("head_dim") or hidden // heads)
    kv_heads = int(config.get("num_key_value_heads") or heads)
    attention = 2 * hidden * head_dim * (heads + kv_heads)
    experts = num_experts(config)
    dense = int(config.get("dense_intermediate_size") or config.get("intermediate_size") or 4 * hidden)
    width = int(config.get("moe_intermediate_size") or config.get("intermediate_size") or hidden)
    mlp, used = 3 * hidden * dense, 3 * hidden * dense
    if experts:
        chosen = int(config.get("num_experts_per_tok") or 1) + int(config.get("n_shared_experts") or 0)
        mlp, used = 3 * hidden * experts * width, 3 * hidden * chosen * width
    head = target.vocab_size * hidden
    return Size(
        parameters=head * (1 if target.is_tied else 2) + target.num_layers * (attention + mlp),
        active=head + target.num_layers * (attention + used),
        kv_bytes=target.num_layers * 2 * kv_heads * head_dim * 2,
        source="an estimate from its config",
    )
