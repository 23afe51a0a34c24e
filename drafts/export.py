"""The config.json of exported transformer drafts, in the native and the speculators layout."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common.errors import UserError
from contracts.draft import Descriptor
from drafts.method import ExportFacts, TransformerConfig
from drafts.rope_parameters import rope_parameters

NOT_OF_THE_LAYER = ("architectures", "dtype", "block_size", "dflash_config", "draft_vocab_size")


def native_config(config: TransformerConfig, facts: ExportFacts, own: Mapping[str, Any]) -> dict[str, Any]:
    """Return config.json with transformers' names and the method's keys `own`.

    `rope_parameters` is the schema of transformers 5, `rope_scaling` that of transformers 4.
    """
    rope = rope_parameters(config)
    return {
        **own,
        "dtype": facts.dtype,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "vocab_size": config.vocab_size,
        "hidden_act": "silu",
        "rms_norm_eps": config.rms_norm_eps,
        "max_position_embeddings": config.max_position_embeddings,
        "rope_theta": config.rope_theta,
        "rope_parameters": rope,
        "rope_scaling": rope if config.yarn else None,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": False,
        "bos_token_id": facts.bos_token_id,
        "eos_token_id": facts.eos_token_id,
        "block_size": config.num_draft_tokens + 1,
        "num_target_layers": config.num_target_layers,
    }


def speculators_config(
    config: TransformerConfig, native: Mapping[str, Any], facts: ExportFacts, own: Mapping[str, Any]
) -> dict[str, Any]:
    """Return config.json in speculators 0.9's format (SpeculatorModelConfig), from the native one.

    `own`: the method's keys, with the captured layers, which speculators counts as vLLM does: 0 is the embeddings.
    """
    return {
        "speculators_model_type": config.method,
        "speculators_version": "0.9.0",
        "dtype": facts.dtype,
        "draft_vocab_size": native.get("draft_vocab_size", config.vocab_size),
        **own,
        "transformer_layer_config": {key: value for key, value in native.items() if key not in NOT_OF_THE_LAYER},
        "speculators_config": {
            "algorithm": config.method,
            "default_proposal_method": "greedy",
            "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": config.num_draft_tokens}],
            "verifier": {"name_or_path": facts.target, "architectures": facts.architectures},
        },
    }


def wrong_for_sglang(folder: Path, layout: str) -> UserError:
    """Return the error for a folder in a layout that SGLang does not read."""
    return UserError(
        folder,
        found="a layout that SGLang does not read",
        expected=f"an export in the layout {layout}",
        fix=f"Export the draft again: train export --format {layout}.",
    )


def describe_transformer(
    config: Mapping[str, Any], method: str, *, layer_ids: list[int], num_tokens: int | None, mask_token_id: int | None
) -> Descriptor:
    """Return the descriptor of a config.json in either layout; methods read the keyword arguments."""
    layer = {**config, **(config.get("transformer_layer_config") or {})}
    proposals = (config.get("speculators_config") or {}).get("proposal_methods")
    rope = layer.get("rope_parameters") or layer.get("rope_scaling") or {}
    return Descriptor(
        method=method,
        speculative={"method": method},
        num_speculative_tokens=proposals[0]["speculative_tokens"] if proposals else num_tokens,
        hidden_size=layer["hidden_size"],
        vocab_size=layer["vocab_size"],
        layer_ids=layer_ids,
        num_target_layers=layer.get("num_target_layers"),
        mask_token_id=mask_token_id,
        rms_norm_eps=layer.get("rms_norm_eps"),
        rope_theta=rope.get("rope_theta", layer.get("rope_theta")),
        yarn_factor=rope.get("factor") if rope.get("rope_type", "default") == "yarn" else None,
        max_position_embeddings=layer.get("max_position_embeddings"),
    )
