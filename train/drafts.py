"""The draft that a recipe or a config names."""

from __future__ import annotations

from torch import nn

from contracts.draft import DraftConfig
from contracts.errors import UserError
from contracts.mask_token import choose_mask_token
from contracts.recipe import Recipe, TrainSection
from contracts.store import Manifest
from contracts.target import Target
from train.dflash import DFlash
from train.eagle3 import Eagle3

Draft = DFlash | Eagle3


def make_draft(config: DraftConfig, section: TrainSection | None = None) -> Draft:
    """The draft that a config names."""
    return DFlash(config, section) if config.method == "dflash" else Eagle3(config, section)


def layers_of(draft: Draft) -> list[nn.Module]:
    """The layers, which torch.compile takes one by one."""
    return list(draft.layers) if isinstance(draft, DFlash) else [draft.midlayer]


def served_config(config: DraftConfig, recipe: Recipe) -> DraftConfig:
    """The config that a draft is exported and evaluated with: its context length, and YaRN where it trained without.

    Raises UserError when YaRN's window is not the context length.
    """
    yarn = config.yarn or recipe.export.yarn
    length = recipe.export.max_position_embeddings or config.max_position_embeddings
    window = yarn.factor * yarn.original_max_position_embeddings if yarn else length
    if yarn and window != length:
        raise UserError(
            "export.yarn",
            found=f"{yarn.original_max_position_embeddings} x {yarn.factor:g} = {window:g} positions",
            expected=f"export.max_position_embeddings (default: target.max_model_len) = {length}",
            fix="Choose a factor or a length that give it.",
        )
    return config.model_copy(update={"yarn": yarn, "max_position_embeddings": length})


def make_draft_config(recipe: Recipe, target: Target, manifest: Manifest) -> DraftConfig:
    """The draft's config: the recipe's dimensions, and from target and store what must match them.

    Raises UserError when the store holds other layers than the recipe names, or normed states where un-normed ones are
    needed.
    """
    section = recipe.train
    if recipe.target.aux_layers is not None and recipe.target.aux_layers != manifest.layer_ids:
        raise UserError(
            manifest.target,
            found=f"a store of layers {manifest.layer_ids}",
            expected=f"layers {recipe.target.aux_layers} as in the recipe",
            fix="Correct target.aux_layers, or dump again.",
        )
    if section.objective == "distill" and manifest.final_state != "pre-norm":
        raise UserError(
            manifest.target,
            found=f"final states that are {manifest.final_state}",
            expected="the states before the final norm, from which the target's distribution is computed",
            fix="Dump them un-normed, or set train.objective to tokens.",
        )
    dflash = section.method == "dflash"
    if section.draft_vocab_size is not None and section.draft_vocab_size > target.vocab_size:
        raise UserError(
            "train.draft_vocab_size",
            found=str(section.draft_vocab_size),
            expected=f"at most the target's {target.vocab_size} tokens",
            fix="Lower it, or leave it out: then the draft knows all of them.",
        )
    return DraftConfig(
        method=section.method,
        hidden_size=target.hidden_size,
        vocab_size=target.vocab_size,
        num_target_layers=target.num_layers,
        layer_ids=manifest.layer_ids,
        block_size=section.block_size,
        mask_token_id=choose_mask_token(target, recipe.target.mask_token_id) if dflash else None,
        ttt_steps=None if dflash else section.ttt_steps,
        draft_vocab_size=None if dflash else section.draft_vocab_size,
        num_layers=section.num_layers if dflash else 1,
        num_attention_heads=section.num_attention_heads,
        num_key_value_heads=section.num_key_value_heads,
        head_dim=section.head_dim,
        intermediate_size=section.intermediate_size,
        rms_norm_eps=target.norm_eps,
        rope_theta=target.rope_theta,
        max_position_embeddings=recipe.target.max_model_len,
        yarn=recipe.export.yarn if section.yarn else None,
        target_fingerprint=target.fingerprint,
        store=manifest.conversations,
    )
