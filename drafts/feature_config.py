"""What drafts that extend the target's features have in common: layers, reduced vocabulary, layer ids; no torch.

Such a draft reads a low, a middle and a high layer, and may know the target's most frequent tokens only.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from common.errors import UserError
from drafts.method import TransformerConfig
from drafts.proposal import Values
from drafts.reading import DraftFolder, LayerIds, Published, vllm_ids, zero_based
from target.target import Target

FREQUENT_TOKENS = 32000
"""Size of the reduced vocabulary of published drafts."""
LAYER_IDS = "eagle_aux_hidden_state_layer_ids"
BASE = "layer_id_base"
"""A key of our own beside nested ids, whose base other tools leave to be guessed."""
OF_VOCABULARY = ("lm_head.weight", "d2t", "t2d")
"""Tensors of a reduced vocabulary."""
REFUSED = ("norm_before_residual", "norm_before_fc", "norm_output", "fc_norm")
"""Keys of config.json that add norms, or move them."""


class FeatureConfig(TransformerConfig):
    """`draft_vocab_size`: size of the draft's reduced vocabulary; None if it has the target's."""

    draft_vocab_size: int | None = None


def is_parallel(config: Mapping[str, Any]) -> bool:
    """Return whether a config.json has vLLM's name of the mask token of drafts that run once for all tokens."""
    return "pard_token" in config or "ptd_token_id" in config


def default_layers(num_layers: int) -> list[int]:
    """Return the usual captured layers, 0-based: a low, a middle and a high one."""
    return [1, num_layers // 2 - 1, num_layers - 4]


def propose_layers(target: Target) -> tuple[list[int], str]:
    """Return the default layers that a target has."""
    length = target.num_layers
    layer_ids = sorted({i for i in default_layers(length) if 0 <= i < length - 1}) or [0]
    return layer_ids, f"0-based; EAGLE3's rule for {length} layers"


def propose_vocabulary(target: Target) -> Values:
    """Return the size of the reduced vocabulary: none for a target with few tokens."""
    num_frequent = FREQUENT_TOKENS if target.vocab_size >= 2 * FREQUENT_TOKENS else None
    return {"draft_vocab_size": (num_frequent, "the most frequent tokens; null: all")}


def check_vocabulary(size: int | None, target: Target) -> None:
    """Raise UserError for a reduced vocabulary that is larger than the target's."""
    if size is not None and size > target.vocab_size:
        raise UserError(
            "train.draft.draft_vocab_size",
            found=str(size),
            expected=f"at most the target's {target.vocab_size} tokens",
            fix="Lower it, or leave it out to keep the whole vocabulary.",
        )


def read_layer_ids(config: Mapping[str, Any], num_target_layers: int | None) -> LayerIds | None:
    """Return the captured layers; None if the config has no list.

    SpecForge and ModelOpt nest 0-based ids; everybody else writes vLLM's at the top level. Some heads nest vLLM's: then
    the first id is 2 where 0-based ids begin with 1, or the last one is the number of layers.
    """
    if ids := list(config.get(LAYER_IDS) or []):
        return vllm_ids(LAYER_IDS, ids)
    nested = config.get("eagle_config") or {}
    ids = list(nested.get(LAYER_IDS) or [])
    if not ids:
        return None
    if nested.get(BASE) == 0:
        return zero_based(f"eagle_config.{LAYER_IDS}", ids)
    counts_as_vllm = ids[0] == 2 or (num_target_layers is not None and ids[-1] >= num_target_layers)
    return (vllm_ids if counts_as_vllm else zero_based)(f"eagle_config.{LAYER_IDS}", ids)


def read_vocabulary(folder: DraftFolder, draft: Published) -> Published:
    """Return the draft with its vocabulary: lm_head, d2t and t2d if it is reduced, else none of them.

    Raises UserError if d2t holds no offsets of ascending tokens, or does not fit t2d.
    """
    from drafts.vocabulary import complete

    d2t, t2d = draft.weights.get("d2t"), draft.weights.get("t2d")
    said = folder.config.get("draft_vocab_size") or draft.facts["vocab_size"]
    if d2t is None:
        if t2d is not None or said != draft.facts["vocab_size"]:
            raise folder.refuse(
                "draft_vocab_size", f"{said} tokens, but no d2t", "d2t, the offsets of the draft's tokens"
            )
        facts = {**draft.facts, "draft_vocab_size": None}
        return dataclasses.replace(draft, facts=facts)
    shared = dict(draft.shared)
    lm_head = shared.pop("lm_head.weight", None)
    if lm_head is None or len(lm_head) != len(d2t):
        rows = "no lm_head" if lm_head is None else f"an lm_head of {len(lm_head)} rows"
        raise folder.refuse("draft_vocab_size", f"{rows} and {len(d2t)} offsets in d2t", "an lm_head row for each")
    known, reason = complete(d2t, t2d, draft.facts["vocab_size"])
    if reason:
        raise UserError(
            folder.path,
            found=f"d2t {reason}",
            expected="offsets: the target's token id minus the draft's, ids ascending",
            fix="Convert it: d2t[i] = token id - i.",
        )
    facts = {**draft.facts, "draft_vocab_size": len(d2t)}
    weights = {**draft.weights, "lm_head.weight": lm_head, "d2t": d2t.long(), "t2d": known}
    return dataclasses.replace(draft, facts=facts, weights=weights, shared=shared)
