"""What the queries of a block draft's layer see, and the keys of config.json that say so; no torch.

A sliding layer's query sees the keys that are fewer than `sliding_window` places away from it. vLLM counts from each
query (model_executor/models/qwen3_dflash.py); speculators' training counts from the block's anchor instead.

Whether a query sees the later places of its own block, vLLM takes from `is_causal` for all layers, else from
`dflash_config.causal` for all layers, else from each layer's type: sliding layers are causal, full ones are not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

if TYPE_CHECKING:
    from drafts.reading import DraftFolder

LayerType = Literal["full_attention", "sliding_attention"]
FULL: LayerType = "full_attention"
SLIDING: LayerType = "sliding_attention"


class AttentionRule(NamedTuple):
    """What a block's queries see of the context before the anchor, and of their own block.

    `causal`: the keys of their block up to their own place, otherwise all of them. `window`: only keys fewer than so
    many places before the query; None: all. A window is at least as long as a block.
    """

    causal: bool = False
    window: int | None = None


WHOLE = AttentionRule()


def rules_of(layer_types: Sequence[LayerType], window: int | None, is_causal: bool | None) -> list[AttentionRule]:
    """Return the rule of each layer."""
    return [
        AttentionRule(kind == SLIDING if is_causal is None else is_causal, window if kind == SLIDING else None)
        for kind in layer_types
    ]


def reach_of(rules: Sequence[AttentionRule]) -> int | None:
    """Return how many tokens before an anchor its block sees at most; None: all.

    The context's features do not change from layer to layer, so windows do not add up.
    """
    windows = [rule.window for rule in rules]
    return None if None in windows else max(window - 1 for window in windows if window is not None)


def rule_keys(rules: Sequence[AttentionRule]) -> dict[str, Any]:
    """Return the keys of config.json. `is_causal` is written wherever one value is right for all layers."""
    windows, causal = {rule.window for rule in rules} - {None}, {rule.causal for rule in rules}
    return {
        "use_sliding_window": bool(windows),
        "layer_types": [FULL if rule.window is None else SLIDING for rule in rules],
        **({"sliding_window": windows.pop()} if windows else {}),
        **({"is_causal": causal.pop()} if len(causal) == 1 else {}),
    }


def read_rules(folder: DraftFolder, keys: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config's fields `layer_types`, `sliding_window` and `is_causal`, from config.json's flat `keys`.

    They mean what vLLM takes them for. Raises UserError for what the layers do not implement.
    """
    kinds = list(keys.get("layer_types") or [])
    if unknown := set(kinds) - {FULL, SLIDING}:
        raise folder.refuse("layer_types", ", ".join(sorted(unknown)), f"{FULL} or {SLIDING}")
    if keys.get("add_swa_attention_sink_bias"):
        raise folder.refuse("add_swa_attention_sink_bias", True, "false: attention has no sinks")
    is_causal = keys.get("is_causal")
    is_causal = keys.get("causal") if is_causal is None else is_causal
    if keys.get("use_swa") and SLIDING not in kinds:
        # vLLM then slides every layer, but takes the causality from the types, which are full ones or none.
        is_causal = bool(is_causal)
        kinds = [SLIDING] * keys["num_hidden_layers"]
    if SLIDING not in kinds:
        return {"layer_types": None, "sliding_window": None, "is_causal": is_causal or None}
    window = keys.get("swa_window_size") or keys.get("sliding_window")
    if not window:
        raise folder.refuse("sliding_window", "none", "a number: layers are sliding")
    return {"layer_types": kinds, "sliding_window": window, "is_causal": is_causal}
