"""Recipe section and config shared by drafts that predict a whole block in one pass; no torch."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from drafts.method import SlotWeights, TransformerConfig, TransformerSection


class BlockSection(TransformerSection):
    """Keys of `train.draft` that all block drafts have."""

    num_layers: int = Field(default=5, gt=0)
    num_anchors: int = Field(default=512, gt=0, description="most blocks drawn per sample and step")
    slot_weights: SlotWeights = "dpace"
    loss_decay: float = Field(default=4.0, gt=0, description="decay: gamma; slot k weighs exp(-(k-1)/gamma)")

    def to_save_memory(self) -> dict[str, Any]:
        return {"num_anchors": max(1, self.num_anchors // 2)}


class BlockConfig(TransformerConfig):
    """A draft whose block has K draft tokens; the anchor's own slot predicts the first of them, or nothing."""

    @property
    def anchor_predicts(self) -> bool:
        """Whether the anchor's slot predicts: slot k then predicts token p+k+1, otherwise p+k."""
        return False

    @property
    def convolution(self) -> tuple[int, int] | None:
        """Taps and group size of the convolutions around the layers' sublayers; None without them."""
        return None

    @property
    def num_queries(self) -> int:
        """Slots of a block, the anchor's included."""
        return self.num_draft_tokens + (not self.anchor_predicts)
