"""Recipe section, config and method shared by drafts that predict a whole block in one pass; no torch."""

from __future__ import annotations

from typing import Any

from pydantic import Field, model_validator

from contracts.draft import DraftConfig
from drafts.attention_rule import FULL, SLIDING, AttentionRule, LayerType, reach_of, rule_keys, rules_of
from drafts.method import DraftMethod, SlotWeights, TransformerConfig, TransformerSection
from drafts.proposal import Proposal, Values, propose_depth, propose_dimensions, propose_spread
from target.target import Target


class BlockSection(TransformerSection):
    """Keys of `train.draft` that all block drafts have."""

    num_layers: int = Field(default=5, gt=0, description="layers of the draft")
    num_anchors: int = Field(default=512, gt=0, description="most blocks drawn per sample and step")
    slot_weights: SlotWeights = "dpace"
    loss_decay: float = Field(
        default=4.0, gt=0, description="slot_weights decay: gamma; draft token k weighs exp(-(k-1)/gamma)"
    )

    sliding_window: int | None = Field(
        default=None, gt=0, description="keys that a query of a sliding layer sees, its own included, as vLLM counts"
    )
    layer_types: list[LayerType] | None = Field(
        default=None, description="of each layer; by default all are full, or with sliding_window all are sliding"
    )
    is_causal: bool | None = Field(
        default=None,
        description="whether a draft token sees none of those after it, in all layers; by default, as in vLLM, in "
        "sliding layers alone",
    )

    @model_validator(mode="after")
    def _windows_fit(self) -> BlockSection:
        kinds, window = self.layer_types, self.sliding_window
        if kinds is not None and len(kinds) != self.num_layers:
            raise ValueError(f"layer_types has {len(kinds)} entries for num_layers {self.num_layers}")
        if kinds is not None and (SLIDING in kinds) != (window is not None):
            raise ValueError("sliding_window and sliding_attention in layer_types: give both, or neither")
        if window is not None and window <= self.num_draft_tokens:
            raise ValueError(f"sliding_window must hold a block: at least {self.num_draft_tokens + 1}")
        return self

    @property
    def reach(self) -> int | None:
        kinds = self.layer_types or [FULL if self.sliding_window is None else SLIDING] * self.num_layers
        return reach_of(rules_of(kinds, self.sliding_window, self.is_causal))

    def to_save_memory(self) -> dict[str, Any]:
        return {"num_anchors": max(1, self.num_anchors // 2)}


class BlockConfig(TransformerConfig):
    """A draft whose block has K draft tokens; the anchor's own slot predicts the first of them, or nothing."""

    sliding_window: int | None = None
    layer_types: list[LayerType] | None = None
    is_causal: bool | None = None

    @model_validator(mode="before")
    @classmethod
    def _leave_out_defaults(cls, values: Any) -> Any:
        """Write the same rules in one way: what is the default is None."""
        kinds, window = values.get("layer_types"), values.get("sliding_window")
        if kinds and len(set(kinds)) == 1:
            kinds = None
        is_default = kinds is None and values.get("is_causal") == (window is not None)
        return {**values, "layer_types": kinds, **({"is_causal": None} if is_default else {})}

    @property
    def rules(self) -> list[AttentionRule]:
        """What the queries of each layer see."""
        kinds = self.layer_types or [FULL if self.sliding_window is None else SLIDING] * self.num_layers
        return rules_of(kinds, self.sliding_window, self.is_causal)

    @property
    def reach(self) -> int | None:
        return reach_of(self.rules)

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


class BlockMethod(DraftMethod):
    """A method whose drafts are block drafts."""

    uses_mask_token = True
    adjustable: tuple[str, ...] = ("sliding_window", "layer_types", "is_causal")

    def propose_blocks(
        self, target: Target, size: Values, own: Values, learning_rate: tuple[float, str], num_epochs: int = 6
    ) -> Proposal:
        """Return what to train: the keys of the block's `size`, the dimensions of all block drafts, the `own` keys."""
        return Proposal(
            draft={
                **size,
                "num_layers": propose_depth(target),
                **propose_dimensions(target),
                "num_anchors": (512, "most blocks drawn per sample and step"),
                **own,
            },
            layer_ids=propose_spread(target),
            train={"learning_rate": learning_rate},
            num_epochs=num_epochs,
            warmup_share=0.04,
        )

    def served_keys(self, config: DraftConfig) -> dict[str, Any]:
        assert isinstance(config, BlockConfig)
        return {**super().served_keys(config), "sliding_window": None, "is_causal": None, **rule_keys(config.rules)}
