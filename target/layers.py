"""Captured layers: which ones, and their ids in vLLM.

Recipes, stores and exported drafts call the output of layer i by the 0-based `i`. vLLM's extraction calls it `i + 1`;
its id `L` is the final state before the final norm. Only this module translates.
"""

from __future__ import annotations

from collections.abc import Sequence

from target.section import TargetSection
from target.target import Target


def spread_layers(num_layers: int, num_captured: int) -> list[int]:
    """Return z-lab's default layers, 0-based: `round(1 + i * (L - 4) / (k - 1))`; k = 1 gives L // 2."""
    if num_captured == 1:
        return [num_layers // 2]
    return [round(1 + i * (num_layers - 4) / (num_captured - 1)) for i in range(num_captured)]


def captured_layers(section: TargetSection, target: Target) -> list[int]:
    """The layers whose outputs a draft reads: those of the recipe, or the default ones. 0-based."""
    return section.aux_layers or spread_layers(target.num_layers, section.num_aux_layers)


def to_vllm_layer_ids(layer_ids: Sequence[int], num_layers: int) -> list[int]:
    """Return vLLM's ids of our layers' outputs, and last that of the final state before the final norm (L).

    vLLM sorts the ids and drops duplicates. Raises ValueError for ids that are not sorted, unique and below the last
    layer, whose output is the final state.
    """
    if list(layer_ids) != sorted(set(layer_ids)) or not all(0 <= i < num_layers - 1 for i in layer_ids):
        raise ValueError(f"layer ids {list(layer_ids)} are not sorted, unique and in [0, {num_layers - 1})")
    return [i + 1 for i in layer_ids] + [num_layers]
