"""EAGLE3 without torch: recipe section, config, export layouts and vLLM's speculative config.

Layouts of exports: `LlamaForCausalLMEagle3` and speculators' (`eagle3`). Both count captured layers as vLLM does:
`i + 1` for the output of layer i. Also read: EAGLE's (`LlamaForCausalLM` with a `draft_vocab_size`), SpecForge's and
ModelOpt's, which nest 0-based ids in `eagle_config` or leave out the default ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from contracts.draft import Descriptor, DraftConfig
from drafts.export import describe_transformer, native_config, speculators_config, wrong_for_sglang
from drafts.feature_config import (
    BASE,
    LAYER_IDS,
    OF_VOCABULARY,
    REFUSED,
    FeatureConfig,
    check_vocabulary,
    default_layers,
    is_parallel,
    propose_layers,
    propose_vocabulary,
    read_layer_ids,
    read_vocabulary,
)
from drafts.method import NATIVE, SGLANG, SPECULATORS, DraftMethod, DraftSection, ExportFacts, TransformerSection
from drafts.proposal import Proposal, propose_dimensions
from drafts.reading import DraftFolder, LayerIds, Published, read_transformer
from target.target import Target

if TYPE_CHECKING:
    from torch import Tensor

    from drafts.eagle3.model import Eagle3


class Eagle3Section(TransformerSection):
    method: Literal["eagle3"] = "eagle3"
    num_speculative_tokens: int = Field(default=3, gt=0, description="draft tokens per step in evaluation and serving")
    ttt_length: int = Field(default=7, gt=0, description="steps that training unrolls (training-time test)")
    ttt_step_loss_decay: float = Field(default=0.8, gt=0, le=1, description="slot_weights decay: step i weighs decay^i")
    draft_vocab_size: int | None = Field(
        default=None, gt=0, description="size of a reduced vocabulary of the most frequent tokens; default: all tokens"
    )

    @property
    def num_draft_tokens(self) -> int:
        return self.num_speculative_tokens


class Eagle3Config(FeatureConfig):
    method: Literal["eagle3"] = "eagle3"
    num_layers: int = 1
    num_speculative_tokens: int
    ttt_length: int

    @property
    def num_draft_tokens(self) -> int:
        return self.num_speculative_tokens


class Eagle3Method(DraftMethod):
    name = "eagle3"
    section = Eagle3Section
    config = Eagle3Config
    layouts = (NATIVE, SPECULATORS, SGLANG)
    autoregressive = True
    normalizes_embeddings = True
    adjustable = ("num_speculative_tokens", "ttt_length")
    optional_tensors = OF_VOCABULARY
    renamed = MappingProxyType({"block_size": "num_speculative_tokens (block_size - 1)"})

    def check(self, section: DraftSection, target: Target) -> None:
        assert isinstance(section, Eagle3Section)
        check_vocabulary(section.draft_vocab_size, target)

    def propose(self, target: Target) -> Proposal:
        return Proposal(
            draft={
                "num_speculative_tokens": (3, "draft tokens per step"),
                "ttt_length": (7, "steps that training unrolls"),
                "ttt_step_loss_decay": (0.8, ""),
                **propose_dimensions(target),
                **propose_vocabulary(target),
                "objective": ("distill", "learn the target's distribution, computed from the stored states"),
            },
            layer_ids=propose_layers(target),
            train={
                "learning_rate": (1e-4, "SpecForge's for Qwen3-8B"),
                "gradient_checkpointing": (True, "the unrolled steps take much memory"),
            },
            num_epochs=10,
            warmup_share=0.02,
        )

    def module(self) -> type[Eagle3]:
        from drafts.eagle3.model import Eagle3

        return Eagle3

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
        if layout == SGLANG:
            # SGLang reads nested 0-based ids, and shares the target's lm_head if there is no size of a vocabulary.
            nested = {"use_aux_hidden_state": True, LAYER_IDS: config.layer_ids, BASE: 0}
            del native[LAYER_IDS]
            return {**native, "draft_vocab_size": config.draft_vocab_size, "eagle_config": nested}, dict(weights)
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
        architecture = (config.get("architectures") or [""])[0]
        if is_parallel(config):
            return None
        is_eagles = architecture == "LlamaForCausalLM" and "draft_vocab_size" in config
        if config.get("speculators_model_type") != self.name and "Eagle3" not in architecture and not is_eagles:
            return None
        block_size, layers = config.get("block_size"), read_layer_ids(config, config.get("num_target_layers"))
        return describe_transformer(
            config,
            self.name,
            layer_ids=layers.ids if layers else [],
            num_tokens=block_size - 1 if block_size else None,
            mask_token_id=None,
        )

    def sglang_flags(self, folder: Path, config: Mapping[str, Any], num_tokens: int) -> dict[str, Any]:
        if LAYER_IDS not in (config.get("eagle_config") or {}):
            raise wrong_for_sglang(folder, SGLANG)
        return {
            "speculative-algorithm": "EAGLE3",
            "speculative-num-steps": num_tokens,
            "speculative-eagle-topk": 1,
            "speculative-num-draft-tokens": num_tokens + 1,
        }

    def read_published(self, folder: DraftFolder) -> Published:
        nested = {**(folder.config.get("eagle_config") or {}), **folder.layer}
        for key in (*REFUSED, "parallel_drafting"):
            if nested.get(key):
                raise folder.refuse(key, True, "false: an EAGLE3 draft without further norms")
        length = folder.num_target_layers
        layers = read_layer_ids(folder.config, length) or LayerIds(
            default_layers(length), f"config.json lists no layers: EAGLE3's default for {length} layers"
        )
        found = self.describe(folder.config)
        tokens = found.num_speculative_tokens if found else None
        own = {} if tokens is None else {"num_speculative_tokens": tokens}
        return read_vocabulary(folder, read_transformer(folder, layers, _our_name, own))


def _our_name(name: str) -> str:
    return name.replace("layers.0.", "midlayer.", 1) if name.startswith("layers.0.") else name
