"""The recipe's `target` section: folder, thinking modes, captured layers, mask token, training template."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from common.section import Section
from target.final_norm import FinalNorm


class FactsSection(Section):
    """Facts about a target. They are checked against its files, and used instead on machines without the files.

    Names and meanings are those of transformers' configs.
    """

    architecture: str = Field(description="class of the model, in transformers")
    hidden_size: int = Field(gt=0, description="width of a hidden state")
    num_hidden_layers: int = Field(gt=0, description="decoder layers")
    vocab_size: int = Field(gt=0, description="rows of the embedding")
    rope_theta: float = Field(gt=0, description="base of the rotary embedding")
    final_norm: FinalNorm | None = Field(default=None, description="default: rms, or from the config")
    highest_token_id: int = Field(gt=0, description="of the tokenizer, added tokens included")
    sparse_block_size: int | None = Field(default=None, gt=0, description="block size of a sparse attention")
    num_parameters: float | None = Field(default=None, gt=0, description="for plans; default: from the config")
    num_active_parameters: float | None = Field(
        default=None, gt=0, description="for plans: those that compute one token; default: all"
    )
    kv_bytes_per_token: float | None = Field(default=None, gt=0, description="for plans: of the KV cache, in bf16")


class TargetSection(Section):
    path: Path = Field(
        description="folder or hub name of the target: config, safetensors, tokenizer, chat template. Its embedding "
        "and lm_head may be plain, fp8, MXFP8 or NVFP4"
    )
    max_model_len: int = Field(default=8192, gt=0, description="tokens of prompt and reply together, in every stage")
    thinking_mode_name: str = Field(default="thinking_mode", description="the chat template's variable for the mode")
    thinking_mode_values: dict[str, str | int | bool | None] = Field(
        default={}, description="the variable's value for a mode, instead of its name; null: do not set it"
    )
    thinking_tags: tuple[str, str] | None = Field(
        default=None, description="around the reasoning in a reply; default: those in the chat template"
    )
    num_aux_layers: int = Field(default=5, gt=0, description="captured layers, spread over the depth")
    aux_layers: list[int] | None = Field(default=None, description="captured layers, 0-based; overrides num_aux_layers")
    mask_token_id: int | None = Field(
        default=None,
        description="a free row of the embedding, or a special token that never occurs; default: the first free row, "
        "else the last reserved token, else the last special token that the chat template never renders",
    )
    training_template: Path | None = Field(
        default=None, description="renders as the target's chat template does, with {% generation %} tags"
    )
    training_template_sha256: str | None = Field(default=None, description="sha256 of that file")
    final_norm: FinalNorm | None = Field(
        default=None,
        description="rms: x * w, gemma: x * (1 + w), layer: LayerNorm, layer1p: LayerNorm with 1 + w; default: from "
        "the target's config",
    )
    facts: FactsSection | None = Field(
        default=None, description="checked against the target's files, if this machine has them"
    )
