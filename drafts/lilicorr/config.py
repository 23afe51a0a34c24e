"""LiLiCorr without torch: recipe section, config, export layout and vLLM's speculative config.

Exports are in vLLM's native layout (`LiLiCorrDraftModel`). Source of the defaults: ModelOpt's recipe of the published
drafts (modelopt_recipes/general/speculative_decoding/lilicorr.yaml).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from common.errors import UserError
from contracts.draft import Descriptor, DraftConfig
from drafts.block_config import BlockConfig, BlockMethod, BlockSection
from drafts.block_export import describe_fill_in, fill_in_config, fill_in_keys, read_fill_in
from drafts.method import DraftSection, ExportFacts, SlotWeights
from drafts.proposal import Proposal, Values
from drafts.reading import DraftFolder, Published
from target.target import Target

if TYPE_CHECKING:
    from torch import Tensor, nn

    from drafts.lilicorr.model import LiLiCorr

ARCHITECTURE = "LiLiCorrDraftModel"
HEAD_KEYS = (
    "lilicorr_candidate_topk",
    "lilicorr_hidden_size",
    "lilicorr_num_layers",
    "lilicorr_num_heads",
    "lilicorr_mlp_ratio",
    "lilicorr_factor_dim",
    "lilicorr_vector_eps",
    "lilicorr_logit_scale",
)
CONVOLUTION_KEYS = ("conv_kernel_size", "conv_group_size")
SCORER = "model.lilicorr.forward"
"""The method of vLLM's draft model that scores candidates."""


class LiLiCorrSection(BlockSection):
    method: Literal["lilicorr"] = "lilicorr"
    block_size: int = Field(default=16, ge=2, description="the anchor and the draft tokens: 16 drafts 15 tokens")
    lilicorr_candidate_topk: Literal[2, 4, 8, 16] = Field(default=8, description="candidates of a slot")
    lilicorr_hidden_size: int = Field(default=1024, gt=0, description="hidden size of the head")
    lilicorr_num_layers: int = Field(default=2, gt=0, description="layers of the head")
    lilicorr_num_heads: int = Field(default=8, gt=0, description="attention heads of the head's layers")
    lilicorr_mlp_ratio: float = Field(default=2.0, gt=0, description="width of the head's MLPs over its hidden size")
    lilicorr_factor_dim: int = Field(default=1024, gt=0, description="size of the unit vectors that are compared")
    lilicorr_vector_eps: float = Field(default=1e-4, gt=0, lt=0.5, description="least norm that vectors are divided by")
    lilicorr_logit_scale: float = Field(default=8.0, gt=0, description="score of two equal unit vectors")
    conv_kernel_size: int | None = Field(default=None, gt=0, description="taps of convolutions along the block")
    conv_group_size: int | None = Field(default=None, gt=0, description="channels that share a dynamic kernel")
    candidate_weight: float = Field(default=0.25, ge=0, description="weight of the cross-entropy of the candidates")
    penalty_weight: float = Field(default=0.25, ge=0, description="weight of what the target rejects")
    margin_weight: float = Field(default=0.0, ge=0, description="weight of the margin")
    margin: float = Field(default=2.0, gt=0, description="least distance of the data's token from the next best score")
    slot_weights: SlotWeights = "decay"
    loss_decay: float = Field(
        default=7.0, gt=0, description="slot_weights decay: gamma; draft token k weighs exp(-(k-1)/gamma)"
    )

    @model_validator(mode="after")
    def _sizes_fit(self) -> LiLiCorrSection:
        if self.lilicorr_hidden_size % self.lilicorr_num_heads:
            raise ValueError("lilicorr_hidden_size must be a multiple of lilicorr_num_heads")
        if (self.conv_kernel_size is None) != (self.conv_group_size is None):
            raise ValueError("conv_kernel_size and conv_group_size: give both, or neither")
        if (self.conv_kernel_size or 0) > self.block_size:
            raise ValueError("conv_kernel_size must not exceed block_size: there are no more rows to convolve")
        if not self.candidate_weight + self.penalty_weight + self.margin_weight:
            raise ValueError("candidate_weight, penalty_weight or margin_weight must be above 0 to train the head")
        return self

    @property
    def num_draft_tokens(self) -> int:
        return self.block_size - 1

    @property
    def needs_final_states(self) -> bool:
        return super().needs_final_states or self.penalty_weight > 0

    def lacks_of(self, top_k: int) -> str:
        if self.penalty_weight > 0:
            return "the target's logit of every candidate, for train.draft.penalty_weight"
        return super().lacks_of(top_k)


class LiLiCorrConfig(BlockConfig):
    """`block_size` includes the anchor."""

    method: Literal["lilicorr"] = "lilicorr"
    block_size: int
    lilicorr_candidate_topk: int
    lilicorr_hidden_size: int
    lilicorr_num_layers: int
    lilicorr_num_heads: int
    lilicorr_mlp_ratio: float
    lilicorr_factor_dim: int
    lilicorr_vector_eps: float
    lilicorr_logit_scale: float
    conv_kernel_size: int | None = None
    conv_group_size: int | None = None

    @property
    def num_draft_tokens(self) -> int:
        return self.block_size - 1

    @property
    def convolution(self) -> tuple[int, int] | None:
        if self.conv_kernel_size is None or self.conv_group_size is None:
            return None
        return self.conv_kernel_size, self.conv_group_size


class LiLiCorrMethod(BlockMethod):
    name = "lilicorr"
    section = LiLiCorrSection
    config = LiLiCorrConfig
    served_fields = tuple(f"dflash_config.{key}" for key in (*HEAD_KEYS, *CONVOLUTION_KEYS))
    engine_methods = ("compute_candidates", SCORER)

    def check(self, section: DraftSection, target: Target) -> None:
        assert isinstance(section, LiLiCorrSection)
        if section.conv_group_size is not None and target.hidden_size % section.conv_group_size:
            raise UserError(
                "train.draft.conv_group_size",
                found=str(section.conv_group_size),
                expected=f"a divisor of the hidden size, {target.hidden_size}",
                fix="Set another one.",
            )

    def propose(self, target: Target) -> Proposal:
        size: Values = {"block_size": (16, "the anchor and 15 draft tokens")}
        own: Values = {
            "lilicorr_candidate_topk": (8, "ModelOpt's"),
            "loss_decay": (7.0, "for blocks of 16; 4.0 for 8"),
        }
        return self.propose_blocks(target, size, own, (6e-4, "ModelOpt's for Qwen3-8B"))

    def module(self) -> type[LiLiCorr]:
        from drafts.lilicorr.model import LiLiCorr

        return LiLiCorr

    def export(
        self, config: DraftConfig, weights: Mapping[str, Tensor], layout: str, facts: ExportFacts
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        assert isinstance(config, LiLiCorrConfig)
        assert layout in self.layouts
        own = {"lilicorr_enabled": True, "block_size": config.block_size}
        own |= {key: getattr(config, key) for key in HEAD_KEYS}
        if config.convolution is not None:
            own |= {key: getattr(config, key) for key in CONVOLUTION_KEYS}
        found = fill_in_config(config, facts, ARCHITECTURE, own)
        return {**found, "has_own_lm_head": False}, dict(weights)

    def describe(self, config: Mapping[str, Any]) -> Descriptor | None:
        is_ours = config.get("architectures") == [ARCHITECTURE]
        return describe_fill_in(config, self.name) if is_ours else None

    def read_published(self, folder: DraftFolder) -> Published:
        keys = fill_in_keys(folder)
        if not keys.get("lilicorr_enabled", True):
            raise folder.refuse("lilicorr_enabled", False, "true")
        taps, group = (keys.get(key) or None for key in CONVOLUTION_KEYS)
        if (taps is None) != (group is None):
            raise folder.refuse("conv_kernel_size, conv_group_size", f"{taps} and {group}", "both, or neither")
        found = read_fill_in(folder, [key for key in HEAD_KEYS if key != "lilicorr_hidden_size"])
        width = keys.get("lilicorr_hidden_size") or found.facts["hidden_size"]  # as vLLM reads it
        own = {"lilicorr_hidden_size": width, "conv_kernel_size": taps, "conv_group_size": group}
        return dataclasses.replace(found, facts={**found.facts, **own})

    def speculative_config(self, config: DraftConfig) -> dict[str, Any]:  # noqa: ARG002
        return {"method": "dflash"}

    def engine_taps(self, noted: Mapping[str, list[Tensor]], model: nn.Module) -> dict[str, Tensor]:
        from drafts.candidates import engine_candidates

        return engine_candidates(noted, model, SCORER)
