"""The protocol of a draft method: what the recipe, the trainer, serving and `bench parity` ask of it.

A method is a folder with `config.py` (light: no torch; its recipe section, its config and the `DraftMethod`) and its
torch module, which is a `drafts.draft.Draft`. `drafts/__init__.py` lists the methods; no other code names one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

from pydantic import Field, field_validator, model_validator

from common.errors import UserError
from common.section import Section
from contracts.draft import Descriptor, DraftConfig
from drafts.proposal import Proposal, propose_depth, propose_dimensions, propose_spread
from drafts.reading import DraftFolder, Published, zero_based
from target.target import Target

if TYPE_CHECKING:
    from torch import Tensor, nn

    from drafts.draft import Draft

ObjectiveName = Literal["tokens", "distill", "reverse_kl", "tv", "nla", "lk_hybrid", "top_k_kl"]
"""A term of the training objective; drafts/loss_terms.py computes them."""

Objective = ObjectiveName | dict[ObjectiveName, Annotated[float, Field(gt=0)]]
"""`train.draft.objective`: one term, or a weighted sum."""

SlotWeights = Literal["decay", "dpace", "e2e_tv"]
"""How the draft tokens of a block weigh in the loss; drafts/slot_weights.py computes them."""

TOKENS: ObjectiveName = "tokens"
NATIVE = "native"
SPECULATORS = "speculators"
SGLANG = "sglang"


class DraftSection(Section):
    """The recipe's `train.draft`: keys of the draft itself. Each method has its own."""

    method: str
    objective: Objective = Field(
        default=TOKENS,
        description="tokens: cross-entropy on the generated tokens; distill: on the target's own distribution; others, "
        "and weighted sums of several: docs/draft-methods.md",
    )
    objective_top_k: int = Field(default=10, gt=0, description="top_k_kl: the target's most likely tokens")
    lk_eta: float = Field(default=3.0, gt=0, description="lk_hybrid: eta of the share exp(-eta * a) of KL")

    @field_validator("objective")
    @classmethod
    def _has_terms(cls, value: Any) -> Any:
        if value == {}:
            raise ValueError(f"no term; known: {', '.join(get_args(ObjectiveName))}")
        return value

    @property
    def objective_weights(self) -> dict[ObjectiveName, float]:
        """The terms of the objective and their weights."""
        return self.objective if isinstance(self.objective, dict) else {self.objective: 1.0}

    @property
    def num_draft_tokens(self) -> int:
        """Tokens that the draft proposes in one step, K."""
        raise NotImplementedError

    @property
    def needs_final_states(self) -> bool:
        """Whether training reads the target's final states, from which its distribution is computed."""
        return set(self.objective_weights) != {TOKENS}

    @property
    def reach(self) -> int | None:
        """How many tokens before an anchor the draft sees at most; None: all."""
        return None

    def lacks_of(self, top_k: int) -> str:
        """Return what training needs of the target's distribution beyond its `top_k` most likely tokens, or ""."""
        if "top_k_kl" in self.objective_weights and self.objective_top_k > top_k:
            return f"the {self.objective_top_k} tokens of train.draft.objective_top_k"
        return ""

    def to_save_memory(self) -> dict[str, Any]:
        """Return other values of the section's keys with which a step takes less memory; empty: none."""
        return {}


class TransformerSection(DraftSection):
    """Dimensions of a draft that is made of transformer layers."""

    num_attention_heads: int = Field(
        gt=0, description="query heads of a draft layer; a multiple of num_key_value_heads"
    )
    num_key_value_heads: int = Field(gt=0, description="key and value heads of a draft layer")
    head_dim: int = Field(default=128, gt=0, description="width of a head")
    intermediate_size: int = Field(gt=0, description="width of the draft's MLP")
    slot_weights: SlotWeights = Field(
        default="decay",
        description="weights of a block's draft tokens in the loss: decay (static), dpace (D-PACE), or e2e_tv "
        "(end-to-end total variation; needs objective: tv)",
    )
    dpace_smoothing: float = Field(default=0.5, ge=0, le=1, description="D-PACE: a of q~ = (1-a)*q + a")

    @model_validator(mode="after")
    def _weights_fit(self) -> TransformerSection:
        if self.slot_weights == "e2e_tv" and self.objective != "tv":
            raise ValueError("slot_weights e2e_tv needs objective tv: the weights follow from its losses")
        return self

    @model_validator(mode="after")
    def _heads_divide(self) -> TransformerSection:
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError("num_attention_heads must be a multiple of num_key_value_heads")
        return self


class TransformerConfig(DraftConfig):
    """Dimensions of a draft that is made of transformer layers, in elements."""

    num_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int


class DraftMethod(ABC):
    """A draft method. Recipes, draft.json and draftline.json refer to it by `name`.

    `layouts`: values of `train export --format`, the default first. `uses_mask_token`: the target needs a token that
    never occurs in text. `autoregressive`: each draft token is an input of the next one, so one that differs between
    trainer and engine changes all after it. `normalizes_embeddings`: a factor of all embeddings changes nothing.
    `adjustable`: fields of the config that no weight depends on, which a warm start may change. `optional_tensors`:
    those that a warm start may initialize anew. `starts_from`: other methods whose drafts a training may start from,
    see `adapt`. `fp32_tensors`: prefixes of tensors that an export keeps in fp32. `engine_methods`: methods of vLLM's
    draft model, or of its modules, whose calls `engine_taps` needs. `served_fields`: fields of the config that vLLM
    reads from config.json under the same name; of a nested one, the path. `renamed`: keys of `train` in older recipes,
    mapped to their name in this method's section.
    """

    name: str
    section: type[DraftSection]
    config: type[DraftConfig]
    layouts: tuple[str, ...] = (NATIVE,)
    uses_mask_token: bool = False
    autoregressive: bool = False
    normalizes_embeddings: bool = False
    adjustable: tuple[str, ...] = ()
    optional_tensors: tuple[str, ...] = ()
    starts_from: tuple[str, ...] = ()
    fp32_tensors: tuple[str, ...] = ()
    engine_methods: tuple[str, ...] = ()
    served_fields: tuple[str, ...] = ()
    renamed: Mapping[str, str] = MappingProxyType({})

    def check(self, section: DraftSection, target: Target) -> None:  # noqa: B027 (most methods have no more rules)
        """Raise UserError for a section that does not fit the target."""

    def propose(self, target: Target) -> Proposal:
        """Return what to train for a target whose config is known, as `recipe init` writes it.

        Here: the dimensions that the section has. A method overrides it with the values of published drafts.
        """
        proposed = {**propose_dimensions(target), "num_layers": propose_depth(target)}
        draft = {key: value for key, value in proposed.items() if key in self.section.model_fields}
        return Proposal(draft, propose_spread(target), {}, num_epochs=6, warmup_share=0.04)

    def make_config(self, section: DraftSection, shared: Mapping[str, Any]) -> DraftConfig:
        """Return the config of a new draft: the section's dimensions and the fields shared by all methods."""
        own = {key: value for key, value in section.model_dump().items() if key in self.config.model_fields}
        return self.config(**{**shared, **own})

    def served_keys(self, config: DraftConfig) -> dict[str, Any]:
        """Return the keys that vLLM reads from config.json, as dotted paths, and their values for this draft."""
        return {path: getattr(config, path.rpartition(".")[2]) for path in self.served_fields}

    @abstractmethod
    def module(self) -> Callable[..., Draft]:
        """Return the torch module's class, with the parameters of `build`."""

    def build(
        self, config: DraftConfig, section: DraftSection | None = None, *, gradient_checkpointing: bool = False
    ) -> Draft:
        """Return the torch module. `section` says how to train it; None if it only drafts."""
        return self.module()(config, section, gradient_checkpointing=gradient_checkpointing)

    @abstractmethod
    def export(
        self, config: DraftConfig, weights: Mapping[str, Tensor], layout: str, facts: ExportFacts
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return config.json and the tensors of an export in one of `layouts`, as vLLM loads them."""

    @abstractmethod
    def describe(self, config: Mapping[str, Any]) -> Descriptor | None:
        """Return the descriptor of a draft with this config.json; None if it is of another method."""

    def read_published(self, folder: DraftFolder) -> Published:
        """Return the draft of a folder in any layout that `describe` recognizes: the inverse of `export`.

        Raises UserError for what the module does not implement.
        """
        found = self.describe(folder.config)
        assert found is not None
        facts = {
            key: value
            for key, value in {**folder.config, **found.model_dump(exclude_none=True)}.items()
            if key in self.config.model_fields and key not in ("layer_ids", "method", "store", "target_fingerprint")
        }
        return Published(folder.path, zero_based("layer_ids", found.layer_ids), facts, dict(folder.tensors))

    def calibrate(self, weights: Mapping[str, Tensor], scale: float, shift: float) -> dict[str, Tensor]:
        """Return weights with a scale and a shift of the confidences' logits folded in."""
        raise NotImplementedError(f"{self.name} has no confidences to calibrate")

    def adapt(self, method: str, draft: Published) -> Published:
        """Return a draft of another method, one of `starts_from`, in this method's terms."""
        raise NotImplementedError(f"{self.name} starts from no {method} draft")

    def describe_trained(self, config: DraftConfig) -> Descriptor:
        """Return the descriptor of a draft trained here, without the fields that its export adds."""
        return Descriptor(
            method=self.name,
            speculative=self.speculative_config(config),
            num_speculative_tokens=config.num_draft_tokens,
            hidden_size=config.hidden_size,
            vocab_size=config.vocab_size,
            layer_ids=config.layer_ids,
            num_target_layers=config.num_target_layers,
            mask_token_id=config.mask_token_id,
            rms_norm_eps=config.rms_norm_eps,
            rope_theta=config.rope_theta,
            yarn_factor=config.yarn.factor if config.yarn else None,
            max_position_embeddings=config.max_position_embeddings,
            target_fingerprint=config.target_fingerprint,
            store=config.store,
        )

    def speculative_config(self, config: DraftConfig) -> dict[str, Any]:  # noqa: ARG002 (a method may need it)
        """Return vLLM's speculative config without the model and the number of draft tokens."""
        return {"method": self.name}

    def sglang_flags(self, folder: Path, config: Mapping[str, Any], num_tokens: int) -> dict[str, Any]:  # noqa: ARG002
        """Return SGLang's flags for a draft's folder with this config.json, without the model's path.

        Raises UserError if SGLang does not serve the method or the folder's layout.
        """
        raise UserError(
            folder,
            found=f"a {self.name} draft for SGLang",
            expected="a draft of a method that it serves",
            fix="Serve it with vLLM.",
        )

    def engine_taps(self, noted: Mapping[str, list[Tensor]], model: nn.Module) -> dict[str, Tensor]:  # noqa: ARG002
        """Return the engine's tensors that `bench parity` compares in addition to layers and logits.

        `noted`: slots (input ids) and embeddings of the first call of vLLM's draft model since the trace began;
        draft_logits, if the engine computes them in one go; for each of `engine_methods`, the results of all its
        calls, of several results the first, and as `<name>.input` their first arguments. Called on every rank.
        """
        return {}


class ExportFacts(Section):
    """Fields of config.json that the draft's config lacks: the dtype, and the target's names and end tokens."""

    dtype: str
    target: str
    architectures: list[str]
    bos_token_id: int | list[int] | None
    eos_token_id: int | list[int] | None
