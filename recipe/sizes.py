"""The bytes that a sample takes in the store that a recipe describes."""

from __future__ import annotations

from contracts.sample_file import SampleForm
from recipe.recipe import Recipe
from target.layers import captured_layers
from target.target import Target


def form_of(recipe: Recipe, target: Target) -> SampleForm:
    """Return the form of the samples that a `dump` section asks for."""
    section, is_top = recipe.dump, recipe.dump.final_states == "top-k"
    return SampleForm(
        target.hidden_size,
        len(captured_layers(recipe.target, target)),
        section.dtype,
        section.final_state,
        section.top_k if is_top else None,
        target.vocab_size if is_top else None,
        has_spans=section.unseen_states != "keep",
    )


def stored_bytes(recipe: Recipe, target: Target, num_tokens: int) -> int:
    """Return the bytes that a sample takes at most, with its header and ledger line."""
    form = form_of(recipe, target)
    return form.header_bytes + form.num_bytes(num_tokens)
