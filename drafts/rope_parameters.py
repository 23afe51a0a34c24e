"""A draft's rope in transformers' schema; imports no torch."""

from __future__ import annotations

from drafts.method import TransformerConfig


def rope_parameters(config: TransformerConfig) -> dict[str, str | float | int]:
    """Return the draft's rope in transformers' schema (`rope_parameters`; `rope_scaling` before transformers 5)."""
    if config.yarn is None:
        return {"rope_type": "default", "rope_theta": config.rope_theta}
    return {
        "rope_type": "yarn",
        "rope_theta": config.rope_theta,
        "factor": config.yarn.factor,
        "original_max_position_embeddings": config.yarn.original_max_position_embeddings,
    }
