"""Propose a draft for a target from its config alone: dimensions, captured layers and optimizer, each with its reason.

`recipe init` writes them into a recipe. Sources: SpecForge's examples/run_qwen3_8b_{dflash,eagle3}_online.sh and
configs/*.json, and the config.json of published drafts of Qwen3 and MiniMax-M3.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from target.layers import can_be_captured, spread_layers
from target.size import num_experts
from target.target import Target

Values = dict[str, tuple[Any, str]]
"""Keys of a recipe's section: value, and why; "" for a value that needs no comment."""

USUAL_HEAD_DIM, USUAL_KV_HEADS = 128, 8
USUAL_MLP_FACTOR = 3
"""Width of the MLP over that of the hidden state, as in Qwen3-8B."""


@dataclass(frozen=True)
class Proposal:
    """What to train: keys of `train.draft`, 0-based captured layers, keys of `train`, and passes over the data.

    `warmup_share`: of all steps.
    """

    draft: Values
    layer_ids: tuple[list[int], str]
    train: Values
    num_epochs: int
    warmup_share: float


def propose_dimensions(target: Target) -> Values:
    """Return the keys of a draft's transformer layers: those of the target's own layers where a draft can have them."""
    config, hidden = target.config, target.hidden_size
    mlp = _propose_mlp(config, hidden)
    if "kv_lora_rank" in config or "num_attention_heads" not in config:
        heads = max(1, hidden // USUAL_HEAD_DIM)
        why = "multi-head latent attention is not drafted: usual heads of 128"
        return {
            "num_attention_heads": (heads, why),
            "num_key_value_heads": (USUAL_KV_HEADS if heads % USUAL_KV_HEADS == 0 else heads, ""),
            "head_dim": (USUAL_HEAD_DIM, ""),
            **mlp,
        }
    heads = target.get("num_attention_heads")
    return {
        "num_attention_heads": (heads, "attention as in the target's layers"),
        "num_key_value_heads": (int(config.get("num_key_value_heads") or heads), ""),
        "head_dim": (int(config.get("head_dim") or hidden // heads), ""),
        **mlp,
    }


def _propose_mlp(config: Mapping[str, Any], hidden: int) -> Values:
    """Return the MLP's width. An expert is too narrow for a draft, and its width is often called intermediate_size."""
    width = config.get("dense_intermediate_size") or config.get("intermediate_size")
    names_an_expert = "dense_intermediate_size" not in config and "moe_intermediate_size" not in config
    if not isinstance(width, int) or (names_an_expert and num_experts(config)):
        why = f"{USUAL_MLP_FACTOR} x the hidden size: the config has the width of an expert only"
        return {"intermediate_size": (USUAL_MLP_FACTOR * hidden, why)}
    return {"intermediate_size": (width, "width of the target's dense MLP")}


def propose_depth(target: Target, most: int = 5) -> tuple[int, str]:
    """Return the number of draft layers: `most`, as published drafts have, or a sixth of a shallow target's."""
    depth = min(most, max(1, target.num_layers // 6))
    return depth, f"at most {most}, and at most a sixth of the target's {target.num_layers}"


def propose_spread(target: Target, most: int = 5) -> tuple[list[int], str]:
    """Return up to `most` layers spread over the depth by z-lab's rule."""
    options = (spread_layers(target.num_layers, number) for number in range(most, 0, -1))
    found = next((layer_ids for layer_ids in options if can_be_captured(layer_ids, target.num_layers)), [0])
    return found, f"0-based; DFlash's rule for {target.num_layers} layers"
