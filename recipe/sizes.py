"""The bytes that a sample takes in the store that a recipe describes."""

from __future__ import annotations

from contracts.sample_file import sample_bytes
from recipe.recipe import Recipe
from target.layers import captured_layers
from target.target import Target

FILE_OVERHEAD_BYTES = 1024
"""A sample's header and its ledger line."""


def stored_bytes(recipe: Recipe, target: Target, num_tokens: int) -> int:
    """Return the bytes that a sample takes, with its header and ledger line."""
    num_layers, section = len(captured_layers(recipe.target, target)), recipe.dump
    keeps = section.final_states == "keep"
    return FILE_OVERHEAD_BYTES + sample_bytes(
        num_tokens, target.hidden_size, num_layers, section.dtype, final_states=keeps
    )
