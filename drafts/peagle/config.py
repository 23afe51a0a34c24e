"""P-EAGLE without torch: recipe section, config, export layouts and vLLM's speculative config.

vLLM serves it as EAGLE3 with `parallel_drafting`. Layouts of exports: `LlamaForCausalLMEagle3`, the only kind of name
that vLLM loads with this method, and speculators' (`peagle`). Both count captured layers as vLLM does.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from contracts.draft import Descriptor, DraftConfig
from drafts.export import describe_transformer, native_config, speculators_config
from drafts.feature_config import (
    LAYER_IDS,
    OF_VOCABULARY,
    REFUSED,
    FeatureConfig,
    check_vocabulary,
    is_parallel,
    propose_layers,
    propose_vocabulary,
    read_layer_ids,
    read_vocabulary,
)
from drafts.method import NATIVE, SPECULATORS, DraftMethod, DraftSection, ExportFacts, Objective, TransformerSection
from drafts.proposal import Proposal, propose_dimensions
from drafts.reading import DraftFolder, Published, read_transformer
from target.target import Target

if TYPE_CHECKING:
    from torch import Tensor, nn

    from drafts.peagle.model import PEagle

MASK_KEYS = ("mask_token_id", "pard_token", "ptd_token_id")
"""Names of the mask token, in the order in which vLLM looks for them."""
NORMS = {"norm_before_residual": False, "norm_before_fc": False, "norm_output": False, "fc_norm": False}
SERVED = {"method": "eagle3", "parallel_drafting": True}
"""vLLM's speculative config."""


class PEagleSection(TransformerSection):
    method: Literal["peagle"] = "peagle"
    num_speculative_tokens: int = Field(default=7, ge=2, description="draft tokens per step")
    num_layers: int = Field(default=4, gt=0, description="layers of the draft")
    num_anchors: int = Field(
        default=1024, gt=0, description="most positions per sample and step after which more than one token is drafted"
    )
    depth_share: float = Field(
        default=0.7, gt=0, le=1, description="draft token k is trained after a share of depth_share^(k-1) of them"
    )
    min_depth_share: float = Field(default=0.2, ge=0, le=1, description="the share is at least this")
    depth_loss_decay: float = Field(
        default=1.0, gt=0, le=1, description="slot_weights decay: draft token k weighs decay^(k-1)"
    )
    draft_vocab_size: int | None = Field(
        default=None, gt=0, description="size of a reduced vocabulary of the most frequent tokens; default: all tokens"
    )
    objective: Objective = "distill"

    @property
    def num_draft_tokens(self) -> int:
        return self.num_speculative_tokens

    def to_save_memory(self) -> dict[str, Any]:
        return {"num_anchors": max(1, self.num_anchors // 2)}


class PEagleConfig(FeatureConfig):
    method: Literal["peagle"] = "peagle"
    num_speculative_tokens: int

    @property
    def num_draft_tokens(self) -> int:
        return self.num_speculative_tokens


class PEagleMethod(DraftMethod):
    name = "peagle"
    section = PEagleSection
    config = PEagleConfig
    layouts = (NATIVE, SPECULATORS)
    uses_mask_token = True
    normalizes_embeddings = True
    adjustable = ("num_speculative_tokens",)
    optional_tensors = (*OF_VOCABULARY, "mask_hidden")
    starts_from = ("eagle3",)

    def check(self, section: DraftSection, target: Target) -> None:
        assert isinstance(section, PEagleSection)
        check_vocabulary(section.draft_vocab_size, target)

    def propose(self, target: Target) -> Proposal:
        return Proposal(
            draft={
                "num_speculative_tokens": (7, "draft tokens per step"),
                "num_layers": (4, "speculators' and SpecForge's"),
                **propose_dimensions(target),
                "depth_share": (0.7, "speculators'"),
                "min_depth_share": (0.2, "speculators'"),
                **propose_vocabulary(target),
            },
            layer_ids=propose_layers(target),
            train={"learning_rate": (1e-4, "SpecForge's")},
            num_epochs=10,
            warmup_share=0.02,
        )

    def module(self) -> type[PEagle]:
        from drafts.peagle.model import PEagle

        return PEagle

    def speculative_config(self, config: DraftConfig) -> dict[str, Any]:  # noqa: ARG002 (the same for all drafts)
        return dict(SERVED)

    def export(
        self, config: DraftConfig, weights: Mapping[str, Tensor], layout: str, facts: ExportFacts
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        assert isinstance(config, PEagleConfig)
        layer_ids = [layer_id + 1 for layer_id in config.layer_ids]
        vocabulary = {"draft_vocab_size": config.draft_vocab_size or config.vocab_size}
        own = {"architectures": ["LlamaForCausalLMEagle3"], "model_type": "llama", **vocabulary}
        native = native_config(config, facts, {**own, "num_aux_hidden_states": len(layer_ids)})
        if layout == NATIVE:
            mask = {"mask_token_id": config.mask_token_id, "pard_token": config.mask_token_id}
            return {**native, LAYER_IDS: layer_ids, **NORMS, **mask}, dict(weights)
        own = {
            "architectures": ["PEagleSpeculator"],
            LAYER_IDS: layer_ids,
            "mask_token_id": config.mask_token_id,
            **NORMS,
        }
        return speculators_config(config, native, facts, own), dict(weights)

    def describe(self, config: Mapping[str, Any]) -> Descriptor | None:
        architecture = (config.get("architectures") or [""])[0]
        is_native = architecture.lower().startswith("peagle") or ("Eagle3" in architecture and is_parallel(config))
        if config.get("speculators_model_type", self.name if is_native else None) != self.name:
            return None
        block_size, layers = config.get("block_size"), read_layer_ids(config, config.get("num_target_layers"))
        found = describe_transformer(
            config,
            self.name,
            layer_ids=layers.ids if layers else [],
            num_tokens=block_size - 1 if block_size else None,
            mask_token_id=next((config[key] for key in MASK_KEYS if config.get(key) is not None), None),
        )
        return found.model_copy(update={"speculative": dict(SERVED)})

    def read_published(self, folder: DraftFolder) -> Published:
        nested = {**(folder.config.get("eagle_config") or {}), **folder.layer}
        for key in REFUSED:
            if nested.get(key):
                raise folder.refuse(key, True, "false: a draft without further norms")
        layers = read_layer_ids(folder.config, folder.num_target_layers)
        if layers is None:
            raise folder.refuse(LAYER_IDS, "none", "the captured layers")
        found = self.describe(folder.config)
        own = {
            "num_speculative_tokens": found.num_speculative_tokens if found else None,
            "mask_token_id": found.mask_token_id if found else None,
        }
        for key, value in own.items():
            if value is None:
                raise folder.refuse(key, "none", "one")
        draft = read_vocabulary(folder, read_transformer(folder, layers, _our_name, own))
        if "mask_hidden" not in draft.weights:
            raise folder.refuse("mask_hidden", "none in the weights", "the features of the mask token")
        weights = {**draft.weights, "mask_hidden": draft.weights["mask_hidden"].view(1, 1, -1)}
        return dataclasses.replace(draft, weights=weights)

    def adapt(self, method: str, draft: Published) -> Published:
        assert method == "eagle3"
        facts = {key: value for key, value in draft.facts.items() if key not in ("ttt_length", "mask_token_id")}
        weights = {_our_name(name): tensor for name, tensor in draft.weights.items()}
        renamed = {ours: name for name in draft.weights if (ours := _our_name(name)) != name}
        return dataclasses.replace(draft, facts=facts, weights=weights, renamed={**renamed, **draft.renamed})

    def engine_taps(self, noted: Mapping[str, list[Tensor]], model: nn.Module) -> dict[str, Tensor]:  # noqa: ARG002
        # The masks are the last slots of the prompt's pass.
        return {"mask_token": noted["slots"][0][-1].long(), "mask_embedding": noted["embeddings"][0][-1]}


def _our_name(name: str) -> str:
    return name.replace("midlayer.", "layers.0.", 1) if name.startswith("midlayer.") else name
