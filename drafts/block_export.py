"""The config.json of block drafts of the fill-in layout: what DFlash and the methods on its layout share.

Layouts: z-lab's, with a `dflash_config`, in which vLLM reads all of them (method `dflash`), and speculators'. The first
counts captured layers from 0, speculators as vLLM does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from common.errors import UserError
from contracts.draft import Descriptor
from drafts.attention_rule import read_rules, rule_keys
from drafts.block_config import BlockConfig
from drafts.export import describe_transformer, native_config
from drafts.method import ExportFacts
from drafts.reading import DraftFolder, LayerIds, Published, read_transformer, vllm_ids, zero_based

OTHER_LAYOUTS = ("sample_from_anchor", "shift_label")


def fill_in_config(
    config: BlockConfig, facts: ExportFacts, architecture: str, inner: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Return config.json in the native layout. `inner`: the method's own keys of `dflash_config`."""
    own = {
        "architectures": [architecture],
        "model_type": "qwen3",
        **rule_keys(config.rules),
        "dflash_config": {
            "mask_token_id": config.mask_token_id,
            "target_layer_ids": config.layer_ids,
            **(inner or {}),
        },
    }
    return native_config(config, facts, own)


def mixed_causality() -> UserError:
    """Return the error for layers of both kinds in speculators' format, which has one key for all of them."""
    return UserError(
        "train.draft.layer_types",
        found="layers that are causal in the block, and layers that are not",
        expected="one kind: vLLM reads speculators' DFlash format as causal in all layers or in none",
        fix="Export with --format native, or train with is_causal: true or false.",
    )


def describe_fill_in(config: Mapping[str, Any], method: str) -> Descriptor:
    """Return the descriptor of a config.json in either layout."""
    inner = config.get("dflash_config") or {}
    block_size = config.get("block_size", inner.get("block_size"))
    found = describe_transformer(
        config,
        method,
        layer_ids=_layer_ids(config).ids,
        num_tokens=block_size - 1 if block_size else None,
        mask_token_id=inner.get("mask_token_id", config.get("mask_token_id")),
    )
    return found.model_copy(update={"speculative": {"method": "dflash"}})


def read_fill_in(folder: DraftFolder, keys: Sequence[str] = ()) -> Published:
    """Return the draft of a folder in either layout. `keys`: the method's own, all required.

    Raises UserError for what the backbone does not implement, and for a missing key.
    """
    both = fill_in_keys(folder)
    for key in OTHER_LAYOUTS:
        if both.get(key):
            raise folder.refuse(key, True, "false: slot k predicts token p+k")
    own = {key: both.get(key) for key in ("block_size", "mask_token_id", *keys)}
    for key, value in own.items():
        if value is None:
            raise folder.refuse(key, "none", "one")
    return read_transformer(folder, _layer_ids(folder.config), own={**own, **read_rules(folder, both)})


def fill_in_keys(folder: DraftFolder) -> dict[str, Any]:
    """Return the keys of config.json, nested ones at the top level."""
    keys = {**folder.layer, **(folder.config.get("dflash_config") or {})}
    if "speculators_model_type" in folder.config:
        # vLLM's reader: in this format the key decides, not the types of the layers.
        keys["causal"] = not keys.get("sliding_window_non_causal", True)
    return keys


def _layer_ids(config: Mapping[str, Any]) -> LayerIds:
    """Return the captured layers of either layout."""
    if "speculators_model_type" in config:
        return vllm_ids("aux_hidden_state_layer_ids", list(config.get("aux_hidden_state_layer_ids") or []))
    inner = config.get("dflash_config") or {}
    return zero_based("dflash_config.target_layer_ids", list(inner.get("target_layer_ids") or []))
