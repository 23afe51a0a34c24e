"""Recipe section and config shared by drafts that predict a whole block in one pass; no torch."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from drafts.method import TransformerConfig, TransformerSection


class BlockSection(TransformerSection):
    """Keys of `train.draft` that all block drafts have."""

    num_layers: int = Field(default=5, gt=0)
    num_anchors: int = Field(default=512, gt=0, description="most blocks drawn per sample and step")
    slot_weights: Literal["decay", "dpace", "e2e_tv"] = Field(
        default="dpace", description="D-PACE, static decay by slot, or end-to-end total variation"
    )
    dpace_smoothing: float = Field(default=0.5, ge=0, le=1, description="D-PACE: a of q~ = (1-a)*q + a")
    loss_decay: float = Field(default=4.0, gt=0, description="decay: gamma; slot k weighs exp(-(k-1)/gamma)")

    @model_validator(mode="after")
    def _weights_fit(self) -> BlockSection:
        if self.slot_weights == "e2e_tv" and self.objective != "tv":
            raise ValueError("slot_weights e2e_tv needs objective tv: the weights follow from its losses")
        return self

    def to_save_memory(self) -> dict[str, Any]:
        return {"num_anchors": max(1, self.num_anchors // 2)}


class BlockConfig(TransformerConfig):
    """A draft whose block has K draft tokens; the anchor's own slot predicts the first of them, or nothing."""

    @property
    def anchor_predicts(self) -> bool:
        """Whether the anchor's slot predicts: slot k then predicts token p+k+1, otherwise p+k."""
        return False

    @property
    def num_queries(self) -> int:
        """Slots of a block, the anchor's included."""
        return self.num_draft_tokens + (not self.anchor_predicts)
