"""EAGLE3 without torch: recipe section, config, export layouts and vLLM's speculative config.

Layouts: `LlamaForCausalLMEagle3` (EAGLE, SpecForge, vLLM) and speculators' (`eagle3`). Both count captured layers as
vLLM does: `i + 1` for the output of layer i.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, cast

from pydantic import Field

from common.errors import UserError
from contracts.draft import Descriptor, DraftConfig
from drafts.export import describe_transformer, native_config, speculators_config
from drafts.method import (
    NATIVE,
    SPECULATORS,
    DraftMethod,
    DraftSection,
    ExportFacts,
    TransformerConfig,
    TransformerSection,
)
from drafts.proposal import Proposal, propose_dimensions, propose_low_mid_high
from target.target import Target

if TYPE_CHECKING:
    from torch import Tensor

    from drafts.eagle3.model import Eagle3

FREQUENT_TOKENS = 32000
"""Size of the reduced vocabulary of published EAGLE3 drafts."""
LAYER_IDS = "eagle_aux_hidden_state_layer_ids"


class Eagle3Section(TransformerSection):
    method: Literal["eagle3"] = "eagle3"
    num_speculative_tokens: int = Field(default=3, gt=0, description="draft tokens per step in evaluation and serving")
    ttt_length: int = Field(default=7, gt=0, description="steps that training unrolls (training-time test)")
    ttt_step_loss_decay: float = Field(default=0.8, gt=0, le=1, description="step i weighs decay^i")
    draft_vocab_size: int | None = Field(
        default=None, gt=0, description="size of a reduced vocabulary of the most frequent tokens; default: all tokens"
    )

    @property
    def num_draft_tokens(self) -> int:
        return self.num_speculative_tokens


class Eagle3Config(TransformerConfig):
    """`draft_vocab_size`: size of the draft's reduced vocabulary; None if it has the target's."""

    method: Literal["eagle3"] = "eagle3"
    num_layers: int = 1
    num_speculative_tokens: int
    ttt_length: int
    draft_vocab_size: int | None = None

    @property
    def num_draft_tokens(self) -> int:
        return self.num_speculative_tokens


class Eagle3Method(DraftMethod):
    name = "eagle3"
    section = Eagle3Section
    config = Eagle3Config
    layouts = (NATIVE, SPECULATORS)
    autoregressive = True
    renamed = MappingProxyType({"block_size": "num_speculative_tokens (block_size - 1)"})

    def check(self, section: DraftSection, target: Target) -> None:
        assert isinstance(section, Eagle3Section)
        known = section.draft_vocab_size
        if known is not None and known > target.vocab_size:
            raise UserError(
                "train.draft.draft_vocab_size",
                found=str(known),
                expected=f"at most the target's {target.vocab_size} tokens",
                fix="Lower it, or leave it out to keep the whole vocabulary.",
            )

    def propose(self, target: Target) -> Proposal:
        num_frequent = FREQUENT_TOKENS if target.vocab_size >= 2 * FREQUENT_TOKENS else None
        return Proposal(
            draft={
                "num_speculative_tokens": (3, "draft tokens per step"),
                "ttt_length": (7, "steps that training unrolls"),
                "ttt_step_loss_decay": (0.8, ""),
                **propose_dimensions(target),
                "draft_vocab_size": (num_frequent, "the most frequent tokens; null: all"),
                "objective": ("distill", "learn the target's distribution, computed from the stored states"),
            },
            layer_ids=propose_low_mid_high(target),
            train={
                "learning_rate": (1e-4, "SpecForge's for Qwen3-8B"),
                "gradient_checkpointing": (True, "the unrolled steps take much memory"),
            },
            num_epochs=10,
            warmup_share=0.02,
        )

    def build(
        self, config: DraftConfig, section: DraftSection | None = None, *, gradient_checkpointing: bool = False
    ) -> Eagle3:
        from drafts.eagle3.model import Eagle3

        return Eagle3(
            cast(Eagle3Config, config),
            cast("Eagle3Section | None", section),
            gradient_checkpointing=gradient_checkpointing,
        )

    def export(
        self, config: DraftConfig, weights: Mapping[str, Tensor], layout: str, facts: ExportFacts
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        assert isinstance(config, Eagle3Config)
        layer_ids = [layer_id + 1 for layer_id in config.layer_ids]
        own = {
            "architectures": ["LlamaForCausalLMEagle3"],
            "model_type": "llama",
            "draft_vocab_size": config.draft_vocab_size or config.vocab_size,
            "num_aux_hidden_states": len(layer_ids),
            LAYER_IDS: layer_ids,
        }
        native = native_config(config, facts, own)
        if layout == NATIVE:
            return native, dict(weights)
        own = {
            "architectures": ["Eagle3Speculator"],
            LAYER_IDS: layer_ids,
            "norm_before_residual": False,
            "norm_before_fc": False,
            "norm_output": False,
        }
        renamed = {name.replace("midlayer.", "layers.0."): tensor for name, tensor in weights.items()}
        return speculators_config(config, native, facts, own), renamed

    def describe(self, config: Mapping[str, Any]) -> Descriptor | None:
        architectures = config.get("architectures") or [""]
        if config.get("speculators_model_type") != self.name and "Eagle3" not in architectures[0]:
            return None
        # ModelOpt and SpecForge nest 0-based ids; everybody else writes vLLM's at the top level.
        nested = (config.get("eagle_config") or {}).get(LAYER_IDS) or []
        layer_ids = [layer_id - 1 for layer_id in config.get(LAYER_IDS) or []] or list(nested)
        block_size = config.get("block_size")
        return describe_transformer(
            config,
            self.name,
            layer_ids=layer_ids,
            num_tokens=block_size - 1 if block_size else None,
            mask_token_id=None,
        )
