"""The mask token of a recipe's draft method, and how it is told."""

from __future__ import annotations

from drafts import METHODS
from recipe.recipe import Recipe
from target.mask_token import choose_mask_token, explain_mask_token
from target.target import Target


def mask_token_of(recipe: Recipe, target: Target) -> int | None:
    """Return the mask token of the recipe's draft; None without a draft or if its method has none.

    Raises: see `choose_mask_token`.
    """
    return choose_mask_token(recipe.target, target) if _uses_one(recipe) else None


def note_mask_token(recipe: Recipe, target: Target) -> str:
    """Return the draft's mask token and why it is one, in one line; "" for a draft without one.

    Raises: see `choose_mask_token`.
    """
    if not _uses_one(recipe):
        return ""
    token, why = explain_mask_token(recipe.target, target)
    return f"mask token: {token}, {why}"


def _uses_one(recipe: Recipe) -> bool:
    return recipe.train is not None and METHODS[recipe.train.draft.method].uses_mask_token
