"""The draft of a recipe or of a training run: its config, its module, and its config in serving."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from common.errors import UserError
from contracts.draft import DraftConfig, DraftRun
from contracts.store import Manifest
from drafts import METHODS
from drafts.draft import Draft
from drafts.method import DraftSection
from drafts.published import read_config
from recipe.mask import mask_token_of
from recipe.recipe import Recipe
from target.layers import captured_layers
from target.target import Target


def make_config(recipe: Recipe, target: Target, manifest: Manifest) -> DraftConfig:
    """Return the config of the draft to train, from the recipe, the target and the store.

    Raises UserError if the store holds other layers than the recipe names, or normed final states where the objective
    needs un-normed ones.
    """
    section = recipe.training()
    if recipe.target.aux_layers is not None and recipe.target.aux_layers != manifest.layer_ids:
        raise UserError(
            manifest.target,
            found=f"a store of layers {manifest.layer_ids}",
            expected=f"layers {recipe.target.aux_layers} as in the recipe",
            fix="Correct target.aux_layers, or dump again.",
        )
    if section.draft.needs_final_states:
        _refuse_final_states(section.draft, manifest)
    source = {"target_fingerprint": target.fingerprint, "store": manifest.conversations}
    config = _make(recipe, target, manifest.layer_ids, source)
    refuse_unseen(config, manifest, "train.draft")
    return config


def _refuse_final_states(section: DraftSection, manifest: Manifest) -> None:
    """Raise UserError if a store lacks what the objective needs of the target's distribution."""
    if manifest.final_state == "top-k" and (lacking := section.lacks_of(manifest.top_k or 0)):
        raise UserError(
            manifest.target,
            found=f"a store of the {manifest.top_k} most likely tokens of each position (dump.final_states=top-k)",
            expected=lacking,
            fix="Change it, or dump again with dump.final_states=keep or a larger dump.top_k.",
        )
    if manifest.final_state not in ("pre-norm", "top-k"):
        raise UserError(
            manifest.target,
            found=f"final states that are {manifest.final_state}",
            expected="the states before the final norm, from which the target's distribution is computed",
            fix="Dump them so (dump.final_states=keep), or set train.draft.objective to tokens.",
        )


def refuse_unseen(config: DraftConfig, manifest: Manifest, where: str | Path) -> None:
    """Raise UserError if a draft would see states that a store left out."""
    reach = manifest.seen_reach
    if manifest.unseen_states is None or reach is None or (config.reach is not None and config.reach <= reach):
        return
    sees = "all tokens" if config.reach is None else f"{config.reach} tokens"
    raise UserError(
        where,
        found=f"a draft that sees {sees} before an anchor",
        expected=f"at most {reach}: the store has no other states (dump.unseen_states=drop)",
        fix="Set the sliding_window of that dump, or dump again for this draft.",
    )


def suppose_config(recipe: Recipe, target: Target) -> DraftConfig:
    """Return the config of the draft that a recipe would train, for plans: no store or weights are needed."""
    return _make(recipe, target, captured_layers(recipe.target, target), {"target_fingerprint": "", "store": ""})


def _make(recipe: Recipe, target: Target, layer_ids: list[int], source: dict[str, str]) -> DraftConfig:
    section = recipe.training()
    method = METHODS[section.draft.method]
    method.check(section.draft, target)
    shared: dict[str, Any] = {
        "hidden_size": target.hidden_size,
        "vocab_size": target.vocab_size,
        "num_target_layers": target.num_layers,
        "layer_ids": layer_ids,
        "mask_token_id": mask_token_of(recipe, target),
        "rms_norm_eps": target.norm_eps,
        "rope_theta": target.rope_theta,
        "max_position_embeddings": recipe.target.max_model_len,
        "yarn": recipe.export.yarn if section.yarn else None,
        **source,
    }
    return method.make_config(section.draft, shared)


def served_config(config: DraftConfig, recipe: Recipe) -> DraftConfig:
    """Return the config in serving: with export's context length, and its YaRN if training had none.

    Raises UserError if YaRN's window is not the context length.
    """
    yarn = config.yarn or recipe.export.yarn
    length = recipe.export.max_position_embeddings or config.max_position_embeddings
    if yarn and yarn.window != length:
        raise UserError(
            "export.yarn",
            found=f"{yarn.original_max_position_embeddings} x {yarn.factor:g} = {yarn.window:g} positions",
            expected=f"export.max_position_embeddings (default: target.max_model_len) = {length}",
            fix="Choose a factor or a length that give it.",
        )
    return config.model_copy(update={"yarn": yarn, "max_position_embeddings": length})


def load_served(run: DraftRun, recipe: Recipe) -> Draft:
    """Load a run's chosen checkpoint in evaluation mode, with the rope of its export."""
    config = served_config(read_config(run), recipe)
    draft = METHODS[config.method].build(config)
    draft.load_state_dict(load_file(run.chosen_weights()))
    return draft.eval()
