"""The mask token of a recipe's draft method."""

from __future__ import annotations

from drafts import METHODS
from recipe.recipe import Recipe
from target.mask_token import choose_mask_token
from target.target import Target


def mask_token_of(recipe: Recipe, target: Target) -> int | None:
    """Return the mask token of the recipe's draft; None without a draft or if its method has none.

    Raises: see `choose_mask_token`.
    """
    if recipe.train is None or not METHODS[recipe.train.draft.method].uses_mask_token:
        return None
    return choose_mask_token(recipe.target, target)
