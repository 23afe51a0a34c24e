"""DFlash2 without torch: recipe section, config, export layout and vLLM's speculative config.

Exports are in vLLM's native layout (`DFlash2DraftModel`); speculators' format is read, too. Source of the defaults:
speculators 0.9 (speculators/models/dflash2/config.py, and its training arguments).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from common.errors import UserError
from contracts.draft import Descriptor, DraftConfig
from drafts.block_config import BlockConfig, BlockMethod, BlockSection
from drafts.block_export import describe_fill_in, fill_in_config, fill_in_keys, read_fill_in
from drafts.method import DraftSection, ExportFacts, Objective, SlotWeights
from drafts.proposal import Proposal, Values
from drafts.reading import DraftFolder, Published
from target.target import Target

if TYPE_CHECKING:
    from torch import Tensor, nn

    from drafts.dflash2.model import DFlash2

ARCHITECTURE = "DFlash2DraftModel"
OWN_KEYS = ("conv_kernel_size", "conv_group_size", "selector_rank", "selector_top_k")
SCORER = "model.candidate_selector.forward"
"""The method of vLLM's draft model that scores candidates."""


class DFlash2Section(BlockSection):
    method: Literal["dflash2"] = "dflash2"
    block_size: int = Field(default=8, ge=2, description="the anchor and the draft tokens: 8 drafts 7 tokens")
    conv_kernel_size: int = Field(default=2, gt=0, description="taps of the convolutions along the block")
    conv_group_size: int = Field(default=16, gt=0, description="channels that share a dynamic kernel")
    selector_rank: int = Field(default=256, gt=0, description="rank of the candidate selector")
    selector_top_k: int = Field(default=16, gt=0, description="candidates of a slot, its most likely tokens")
    selector_weight: float = Field(default=1.0, ge=0, description="weight of the selector's loss")
    objective: Objective = "distill"
    slot_weights: SlotWeights = "decay"

    @model_validator(mode="after")
    def _taps_fit(self) -> DFlash2Section:
        if self.conv_kernel_size > self.block_size:
            raise ValueError("conv_kernel_size must not exceed block_size: there are no more rows to convolve")
        return self

    @property
    def num_draft_tokens(self) -> int:
        return self.block_size - 1


class DFlash2Config(BlockConfig):
    """`block_size` includes the anchor."""

    method: Literal["dflash2"] = "dflash2"
    block_size: int
    conv_kernel_size: int
    conv_group_size: int
    selector_rank: int
    selector_top_k: int

    @property
    def num_draft_tokens(self) -> int:
        return self.block_size - 1

    @property
    def convolution(self) -> tuple[int, int]:
        return self.conv_kernel_size, self.conv_group_size


class DFlash2Method(BlockMethod):
    name = "dflash2"
    section = DFlash2Section
    config = DFlash2Config
    adjustable = ("block_size", *BlockMethod.adjustable)
    served_fields = tuple(f"dflash_config.{key}" for key in OWN_KEYS)
    engine_methods = ("compute_candidates", SCORER)

    def check(self, section: DraftSection, target: Target) -> None:
        assert isinstance(section, DFlash2Section)
        if target.hidden_size % section.conv_group_size:
            raise UserError(
                "train.draft.conv_group_size",
                found=str(section.conv_group_size),
                expected=f"a divisor of the hidden size, {target.hidden_size}",
                fix="Set another one.",
            )
        if section.selector_top_k > target.vocab_size:
            raise UserError(
                "train.draft.selector_top_k",
                found=str(section.selector_top_k),
                expected=f"at most the vocabulary's {target.vocab_size} tokens",
                fix="Set a smaller one.",
            )

    def propose(self, target: Target) -> Proposal:
        size: Values = {"block_size": (8, "the anchor and 7 draft tokens")}
        own: Values = {
            "selector_rank": (256, "speculators'"),
            "selector_top_k": (16, "speculators'"),
            "loss_decay": (4.0, "for blocks of 8; 7.0 for 16"),
        }
        return self.propose_blocks(target, size, own, (6e-4, "SpecForge's of DFlash for Qwen3-8B"))

    def module(self) -> type[DFlash2]:
        from drafts.dflash2.model import DFlash2

        return DFlash2

    def export(
        self, config: DraftConfig, weights: Mapping[str, Tensor], layout: str, facts: ExportFacts
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        assert isinstance(config, DFlash2Config)
        assert layout in self.layouts
        own = {key: getattr(config, key) for key in OWN_KEYS}
        return fill_in_config(config, facts, ARCHITECTURE, own), dict(weights)

    def describe(self, config: Mapping[str, Any]) -> Descriptor | None:
        is_ours = config.get("architectures") == [ARCHITECTURE] or config.get("speculators_model_type") == self.name
        return describe_fill_in(config, self.name) if is_ours else None

    def read_published(self, folder: DraftFolder) -> Published:
        keys = fill_in_keys(folder)
        for key in ("input_embedding_scale", "output_multiplier"):
            if keys.get(key, 1.0) != 1.0:
                raise folder.refuse(key, keys[key], "1.0")
        if keys.get("final_logit_softcapping"):
            raise folder.refuse("final_logit_softcapping", keys["final_logit_softcapping"], "none")
        if keys.get("draft_vocab_size") not in (None, keys["vocab_size"]):
            raise folder.refuse("draft_vocab_size", keys["draft_vocab_size"], "the whole vocabulary of the target")
        return read_fill_in(folder, OWN_KEYS)

    def speculative_config(self, config: DraftConfig) -> dict[str, Any]:  # noqa: ARG002
        return {"method": "dflash"}

    def engine_taps(self, noted: Mapping[str, list[Tensor]], model: nn.Module) -> dict[str, Tensor]:
        from drafts.candidates import engine_candidates

        return engine_candidates(noted, model, SCORER)
