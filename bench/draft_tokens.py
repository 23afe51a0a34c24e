"""Parse and check `--draft-tokens` (K) and `--concurrency`, and make a recipe serve one K."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from common.errors import UserError
from contracts.schedule import SCHEDULE_KEY
from recipe.recipe import Recipe
from serve.flags import with_speculation


def parse_draft_tokens(text: str | None) -> list[int] | None:
    """Parse `1-7`, `3,7` or `7` as numbers. Raises UserError for anything else."""
    return parse_numbers(text, "--draft-tokens", "1-7 or 3,7")


def parse_concurrency(text: str | None) -> list[int] | None:
    """Parse `1,2,4,8` as numbers of requests in flight, ascending. Raises UserError for anything else, and for 0."""
    numbers = parse_numbers(text, "--concurrency", "1,2,4,8")
    if numbers is not None and min(numbers) < 1:
        raise UserError("--concurrency", found=str(text), expected="at least 1", fix="Correct it.")
    return None if numbers is None else sorted(set(numbers))


def parse_numbers(text: str | None, option: str, example: str) -> list[int] | None:
    """Parse numbers and ranges, separated by commas. Raises UserError for anything else."""
    if text is None:
        return None
    numbers: list[int] = []
    for part in text.split(","):
        first, separator, last = part.strip().partition("-")
        if not first.isdecimal() or (separator and not last.isdecimal()):
            raise UserError(option, found=text, expected=f"numbers as in {example}", fix="Correct it.")
        numbers += range(int(first), int(last if separator else first) + 1)
    if not numbers:
        raise UserError(option, found=text, expected="the smaller number first", fix="Correct it.")
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
    """Return the recipe with this number of draft tokens for every draft that it serves, at every batch size."""
    return with_speculation(recipe, **{"num_speculative_tokens": number, SCHEDULE_KEY: None})
