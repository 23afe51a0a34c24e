"""Determine a target's final norm and its epsilon from its config.

| kind | output for the normalized states x, weight w, bias b |
|---|---|
| `rms` | RMSNorm, x * w |
| `gemma` | RMSNorm, x * (1 + w): the weight is stored as the difference from one |
| `layer` | LayerNorm, x * w + b; b may be missing |
| `layer1p` | LayerNorm, x * (1 + w) + b |

A wrong kind raises no error: the loss looks fine and the served acceptance is poor. `dump verify` checks the kind with
the target's own tokens, and `target.final_norm` of the recipe overrides it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

FinalNorm = Literal["rms", "gemma", "layer", "layer1p"]

KIND_BY_MODEL_TYPE: dict[str, FinalNorm] = {
    "falcon_mamba": "rms",
    "gemma": "gemma",
    "gemma2": "gemma",
    "gemma3": "gemma",
    "gemma3_text": "gemma",
    "mamba": "rms",
    "mamba2": "rms",
    "minimax_m3_vl": "gemma",
    "minimax_m3_vl_text": "gemma",
    "nemotron": "layer1p",
    "nemotron_h": "rms",
    "qwen3_5": "gemma",
    "qwen3_5_moe": "gemma",
    "qwen3_5_moe_text": "gemma",
    "qwen3_5_text": "gemma",
    "qwen3_next": "gemma",
    "recurrent_gemma": "gemma",
    "step3p5": "gemma",
    "step3p7": "gemma",
    "vaultgemma": "gemma",
}
"""Model types whose norm adds one to its weight, and RMSNorms whose epsilon is named `layer_norm_epsilon`.

Source: the final norm's class in `transformers/models/*/modeling_*.py` (5.19). Not all Gemmas add one: gemma3n, gemma4
and embedding_gemma2 multiply by the weight itself.
"""

RMS_NORM_EPS = "rms_norm_eps"
LAYER_NORM_EPS = ("layer_norm_eps", "layer_norm_epsilon", "norm_epsilon")
OTHER_EPS = "norm_eps"
"""Used by families with an RMSNorm (Lfm2) and with a LayerNorm (Nemotron)."""


def find_final_norm(config: Mapping[str, Any]) -> FinalNorm:
    """Return the kind of final norm that a text model's config describes."""
    if "use_gemma_norm" in config:  # MiniMax-M3's own key
        return "gemma" if config["use_gemma_norm"] else "rms"
    if kind := KIND_BY_MODEL_TYPE.get(str(config.get("model_type"))):
        return kind
    if RMS_NORM_EPS not in config and any(key in config for key in LAYER_NORM_EPS):
        return "layer"
    return "rms"


def find_norm_eps(config: Mapping[str, Any]) -> float:
    """Return the epsilon of the final norm; 1e-6 if the config has none."""
    keys = (RMS_NORM_EPS, *LAYER_NORM_EPS, OTHER_EPS)
    return float(next((config[key] for key in keys if key in config), 1e-6))
