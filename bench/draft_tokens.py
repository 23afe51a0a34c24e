"""Parse and check `--draft-tokens` (K), and make a recipe serve one of these numbers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from common.errors import UserError
from recipe.recipe import Recipe


def parse_draft_tokens(text: str | None) -> list[int] | None:
    """Parse `1-7`, `3,7` or `7` as numbers. Raises UserError for anything else."""
    if text is None:
        return None
    numbers: list[int] = []
    for part in text.split(","):
        first, separator, last = part.strip().partition("-")
        if not first.isdecimal() or (separator and not last.isdecimal()):
            raise UserError("--draft-tokens", found=text, expected="numbers as in 1-7 or 3,7", fix="Correct it.")
        numbers += range(int(first), int(last if separator else first) + 1)
    if not numbers:
        raise UserError("--draft-tokens", found=text, expected="the smaller number first", fix="Correct it.")
    return numbers


def check_draft_tokens(numbers: Sequence[int], own: int, draft: Path) -> list[int]:
    """Return the numbers ascending, each once. Raises UserError for one that `draft` cannot serve; it drafts `own`."""
    chosen = sorted(set(numbers))
    if not 1 <= chosen[0] <= chosen[-1] <= own:
        raise UserError(
            "--draft-tokens", found=str(chosen), expected=f"from 1 to {own}, as {draft} drafts", fix="Correct it."
        )
    return chosen


def with_draft_tokens(recipe: Recipe, number: int) -> Recipe:
    """Return the recipe with this number of draft tokens for every draft that it serves."""
    speculative = {**recipe.serve.speculative, "num_speculative_tokens": number}
    return recipe.model_copy(update={"serve": recipe.serve.model_copy(update={"speculative": speculative})})
