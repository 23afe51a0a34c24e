"""DFlash without torch: recipe section, config, export layouts and vLLM's speculative config.

Layouts: z-lab's (`DFlashDraftModel` with a `dflash_config`), which ModelOpt writes too, and speculators'
(`speculators_model_type: dflash`). The first counts captured layers from 0, speculators as vLLM does.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from contracts.draft import Descriptor, DraftConfig
from drafts.block_config import BlockConfig, BlockMethod, BlockSection
from drafts.block_export import describe_fill_in, fill_in_config, mixed_causality, read_fill_in
from drafts.export import speculators_config, wrong_for_sglang
from drafts.method import NATIVE, SPECULATORS, ExportFacts
from drafts.proposal import Proposal, Values
from drafts.reading import DraftFolder, Published
from target.target import Target

if TYPE_CHECKING:
    from torch import Tensor, nn

    from drafts.dflash.model import DFlash

OF_OTHERS = {"markov_rank", "DFlash2DraftModel", "LiLiCorrDraftModel"}
"""A key of `dflash_config` and architectures of drafts with DFlash's layout that have further heads."""


class DFlashSection(BlockSection):
    method: Literal["dflash"] = "dflash"
    block_size: int = Field(default=8, ge=2, description="the anchor and the draft tokens: 8 drafts 7 tokens")

    @property
    def num_draft_tokens(self) -> int:
        return self.block_size - 1


class DFlashConfig(BlockConfig):
    """`block_size` includes the anchor."""

    method: Literal["dflash"] = "dflash"
    block_size: int

    @property
    def num_draft_tokens(self) -> int:
        return self.block_size - 1


class DFlashMethod(BlockMethod):
    name = "dflash"
    section = DFlashSection
    config = DFlashConfig
    layouts = (NATIVE, SPECULATORS)
    adjustable = ("block_size", *BlockMethod.adjustable)

    def propose(self, target: Target) -> Proposal:
        size: Values = {"block_size": (8, "the anchor and 7 draft tokens")}
        own: Values = {
            "objective": ("distill", "learn the target's distribution, computed from the stored states"),
            "slot_weights": ("decay", ""),
            "loss_decay": (4.0, "for blocks of 8; 7.0 for 16"),
        }
        return self.propose_blocks(target, size, own, (6e-4, "SpecForge's for Qwen3-8B"))

    def module(self) -> type[DFlash]:
        from drafts.dflash.model import DFlash

        return DFlash

    def export(
        self, config: DraftConfig, weights: Mapping[str, Tensor], layout: str, facts: ExportFacts
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        assert isinstance(config, DFlashConfig)
        native = fill_in_config(config, facts, "DFlashDraftModel")
        if layout == NATIVE:
            return native, dict(weights)
        if "is_causal" not in native:
            raise mixed_causality()
        own = {
            "architectures": ["DFlashSpeculator"],
            "block_size": config.block_size,
            "aux_hidden_state_layer_ids": [layer_id + 1 for layer_id in config.layer_ids],
            "mask_token_id": config.mask_token_id,
            "sample_from_anchor": False,
            "sliding_window_non_causal": not native["is_causal"],
        }
        return speculators_config(config, native, facts, own), dict(weights)

    def describe(self, config: Mapping[str, Any]) -> Descriptor | None:
        inner = config.get("dflash_config") or {}
        if OF_OTHERS & {*inner, *(config.get("architectures") or [])}:
            return None
        is_ours = config.get("architectures") == ["DFlashDraftModel"] or inner
        if config.get("speculators_model_type") != self.name and not is_ours:
            return None
        return describe_fill_in(config, self.name)

    def read_published(self, folder: DraftFolder) -> Published:
        return read_fill_in(folder)

    def sglang_flags(self, folder: Path, config: Mapping[str, Any], num_tokens: int) -> dict[str, Any]:
        if "dflash_config" not in config:
            raise wrong_for_sglang(folder, NATIVE)
        return {"speculative-algorithm": "DFLASH", "speculative-num-draft-tokens": num_tokens + 1}

    def engine_taps(self, noted: Mapping[str, list[Tensor]], model: nn.Module) -> dict[str, Tensor]:  # noqa: ARG002
        # Slot 0 is the anchor, slot 1 the first mask token.
        return {"mask_token": noted["slots"][0][1].long(), "mask_embedding": noted["embeddings"][0][1]}
