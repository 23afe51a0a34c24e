"""DSpark without torch: recipe section, config, export layouts and vLLM's speculative config.

Layouts of exports: DeepSpec's (`Qwen3DSparkModel`, all keys at the top level) and speculators'. Also read: ModelOpt's
and SpecForge's, which nest the keys in `dflash_config` and name the heads' tensors otherwise.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from common.errors import UserError
from contracts.draft import Descriptor, DraftConfig
from drafts.attention_rule import read_rules, rule_keys
from drafts.block_config import BlockConfig, BlockMethod, BlockSection
from drafts.export import describe_transformer, native_config, speculators_config, wrong_for_sglang
from drafts.method import (
    NATIVE,
    SPECULATORS,
    ExportFacts,
    Objective,
    ObjectiveName,
    SlotWeights,
)
from drafts.proposal import Proposal, Values
from drafts.reading import DraftFolder, LayerIds, Published, read_transformer, vllm_ids, zero_based
from target.target import Target

if TYPE_CHECKING:
    from torch import Tensor, nn

    from drafts.dspark.model import DSpark

HEADS = (
    "markov_head.markov_w1.weight",
    "markov_head.markov_w2.weight",
    "confidence_head.proj.weight",
    "confidence_head.proj.bias",
)
RENAMED = (("^markov_w([12])\\.", "markov_head.markov_w\\1."), ("^confidence_proj\\.", "confidence_head.proj."))
"""ModelOpt's names of the heads' tensors, as patterns, and ours."""
PAPERS_LOSS: dict[ObjectiveName, float] = {"tokens": 0.1, "tv": 1.8}
"""0.1 * CE + 0.9 * ||d - t||_1 (arXiv 2607.05147, equation 12); the L1 distance is twice the total variation."""


class DSparkSection(BlockSection):
    method: Literal["dspark"] = "dspark"
    num_speculative_tokens: int = Field(default=7, gt=0, description="draft tokens of a block")
    sample_from_anchor: bool = Field(
        default=True,
        description="the anchor's slot predicts the first draft token; false: DFlash's layout, with whose weights a "
        "training may start",
    )
    markov_rank: int = Field(default=256, gt=0, description="rank of the Markov head")
    confidence_head: bool = Field(default=True, description="predict how likely each draft token is accepted")
    confidence_weight: float = Field(default=1.0, ge=0, description="weight of the confidence head's loss")
    objective: Objective = PAPERS_LOSS
    slot_weights: SlotWeights = "decay"

    @property
    def num_draft_tokens(self) -> int:
        return self.num_speculative_tokens

    @property
    def needs_final_states(self) -> bool:
        return super().needs_final_states or self.confidence_head


class DSparkConfig(BlockConfig):
    method: Literal["dspark"] = "dspark"
    num_speculative_tokens: int
    sample_from_anchor: bool
    markov_rank: int
    confidence_head: bool

    @property
    def num_draft_tokens(self) -> int:
        return self.num_speculative_tokens

    @property
    def anchor_predicts(self) -> bool:
        return self.sample_from_anchor


class DSparkMethod(BlockMethod):
    name = "dspark"
    section = DSparkSection
    config = DSparkConfig
    layouts = (NATIVE, SPECULATORS)
    autoregressive = True
    adjustable = ("num_speculative_tokens", *BlockMethod.adjustable)
    optional_tensors = HEADS
    starts_from = ("dflash",)
    served_fields = ("sample_from_anchor", "markov_rank")
    fp32_tensors = ("confidence_head.",)
    engine_methods = ("compute_draft_logits", "markov_embed", "markov_bias")

    def propose(self, target: Target) -> Proposal:
        size: Values = {"num_speculative_tokens": (7, "draft tokens of a block")}
        own: Values = {
            "markov_rank": (256, "DeepSpec's"),
            "loss_decay": (4.0, "DeepSpec's"),
        }
        return self.propose_blocks(target, size, own, (6e-4, "DeepSpec's for Qwen3-8B"), num_epochs=10)

    def module(self) -> type[DSpark]:
        from drafts.dspark.model import DSpark

        return DSpark

    def export(
        self, config: DraftConfig, weights: Mapping[str, Tensor], layout: str, facts: ExportFacts
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        assert isinstance(config, DSparkConfig)
        # vLLM has no defaults, or others, for some of these keys: all are written.
        heads = {
            "markov_rank": config.markov_rank,
            "markov_head_type": "vanilla",
            "enable_confidence_head": config.confidence_head,
            "confidence_head_with_markov": True,
            "sample_from_anchor": config.sample_from_anchor,
            "mask_token_id": config.mask_token_id,
            "draft_vocab_size": config.vocab_size,
        }
        own = {
            "architectures": ["Qwen3DSparkModel"],
            "model_type": "qwen3",
            **rule_keys(config.rules),
        }
        native = {**native_config(config, facts, own), "block_size": config.num_queries}
        if layout == NATIVE:
            return {**native, **heads, "target_layer_ids": config.layer_ids}, dict(weights)
        own = {
            **heads,
            "architectures": ["DSparkSpeculator"],
            "block_size": config.num_queries,
            "aux_hidden_state_layer_ids": [layer_id + 1 for layer_id in config.layer_ids],
        }
        return speculators_config(config, native, facts, own), dict(weights)

    def describe(self, config: Mapping[str, Any]) -> Descriptor | None:
        keys = _keys(config)
        if config.get("speculators_model_type") != self.name and "markov_rank" not in keys:
            return None
        return describe_transformer(
            config,
            self.name,
            layer_ids=_layer_ids(config).ids,
            num_tokens=_num_tokens(config),
            mask_token_id=keys.get("mask_token_id"),
        )

    def read_published(self, folder: DraftFolder) -> Published:
        keys = _keys(folder.config)
        for key, wanted in (("markov_head_type", "vanilla"), ("logit_scale", 1.0)):
            if keys.get(key, wanted) != wanted:
                raise folder.refuse(key, keys[key], str(wanted))
        if keys.get("draft_vocab_size") not in (None, keys["vocab_size"]):
            raise folder.refuse("draft_vocab_size", keys["draft_vocab_size"], "the whole vocabulary of the target")
        has_confidence = bool(keys.get("enable_confidence_head") or keys.get("use_confidence_head"))
        if has_confidence and not keys.get("confidence_head_with_markov", "shift_label" in keys):
            raise folder.refuse("confidence_head_with_markov", False, "true")
        own = {
            "num_speculative_tokens": _num_tokens(folder.config),
            "sample_from_anchor": _sample_from_anchor(keys),
            "markov_rank": keys["markov_rank"],
            "confidence_head": has_confidence,
            "mask_token_id": keys.get("mask_token_id"),
        }
        for key, value in own.items():
            if value is None:
                raise folder.refuse(key, "none", "one")
        return read_transformer(folder, _layer_ids(folder.config), _our_name, {**own, **read_rules(folder, keys)})

    def calibrate(self, weights: Mapping[str, Tensor], scale: float, shift: float) -> dict[str, Tensor]:
        weight, bias = weights["confidence_head.proj.weight"], weights["confidence_head.proj.bias"]
        return {
            **weights,
            "confidence_head.proj.weight": weight * scale,
            "confidence_head.proj.bias": bias * scale + shift,
        }

    def adapt(self, method: str, draft: Published) -> Published:
        assert method == "dflash"
        facts = {key: value for key, value in draft.facts.items() if key != "block_size"}
        return dataclasses.replace(draft, facts={**facts, "sample_from_anchor": False})

    def sglang_flags(self, folder: Path, config: Mapping[str, Any], num_tokens: int) -> dict[str, Any]:
        if "target_layer_ids" not in config:
            raise wrong_for_sglang(folder, NATIVE)
        if not _sample_from_anchor(config):
            raise UserError(
                f"{folder / 'config.json'} (sample_from_anchor)",
                found="false",
                expected="true: SGLang reads DSpark blocks in the anchor layout alone",
                fix="Train with sample_from_anchor: true, or serve it with vLLM.",
            )
        return {"speculative-algorithm": "DSPARK", "speculative-dspark-block-size": num_tokens}

    def engine_taps(self, noted: Mapping[str, list[Tensor]], model: nn.Module) -> dict[str, Tensor]:
        import torch

        biases, embedded = torch.cat(noted["markov_bias"]), torch.cat(noted["markov_embed"])
        base, states = noted["compute_draft_logits"][0], noted["compute_draft_logits.input"][0]
        num_tokens = len(base)
        found = {
            "mask_token": noted["slots"][0][1].long(),
            "mask_embedding": noted["embeddings"][0][1],
            "markov_bias": biases[:num_tokens],
            "draft_logits": base + biases[:num_tokens],
        }
        head = getattr(getattr(model, "model", None), "confidence_head", None)
        if head is not None:  # vLLM itself computes it only for adaptive verification
            device = next(head.parameters()).device
            found["confidence"] = model.compute_confidence(  # type: ignore[operator]
                states.to(device), embedded[:num_tokens].to(device)
            ).cpu()
        return found


def _keys(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys of any layout, nested ones at the top level."""
    return {
        **config,
        **(config.get("transformer_layer_config") or {}),
        **(config.get("dflash_config") or {}),
        **{key: config[key] for key in ("block_size", "mask_token_id") if config.get(key) is not None},
    }


def _sample_from_anchor(keys: Mapping[str, Any]) -> bool:
    """Return the blocks' layout. Without a key, vLLM takes the anchor's, for speculators' format the fill-in one."""
    default = "speculators_model_type" not in keys
    return bool(keys.get("sample_from_anchor", keys.get("shift_label", default)))


def _num_tokens(config: Mapping[str, Any]) -> int | None:
    keys = _keys(config)
    block_size = keys.get("block_size") or keys.get("dspark_block_size")
    return None if block_size is None else block_size - (not _sample_from_anchor(keys))


def _layer_ids(config: Mapping[str, Any]) -> LayerIds:
    """Return the captured layers in the order in which vLLM looks for them."""
    for key in ("eagle_aux_hidden_state_layer_ids", "aux_hidden_state_layer_ids"):
        if ids := config.get(key):
            return vllm_ids(key, list(ids))
    inner = config.get("dflash_config") or {}
    if ids := inner.get("target_layer_ids"):
        return zero_based("dflash_config.target_layer_ids", list(ids))
    key = "dspark_target_layer_ids" if "dspark_target_layer_ids" in config else "target_layer_ids"
    return zero_based(key, list(config.get(key) or []))


def _our_name(name: str) -> str:
    for pattern, ours in RENAMED:
        name = re.sub(pattern, ours, name)
    return name
