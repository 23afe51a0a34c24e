"""Choose the captured layers and translate their ids to vLLM's.

Recipes, stores and draftline.json use the 0-based id `i` for the output of layer i. vLLM's extraction uses `i + 1`; its
id `L` is the final state before the final norm.
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
    """Return the 0-based layers whose outputs a draft reads: the recipe's, or the default ones."""
    return section.aux_layers or spread_layers(target.num_layers, section.num_aux_layers)


def can_be_captured(layer_ids: Sequence[int], num_layers: int) -> bool:
    """Return whether a store can hold the outputs of these layers in this order.

    They must be sorted and unique, since vLLM sorts and deduplicates them, and below the last layer, whose output is
    the final state.
    """
    return list(layer_ids) == sorted(set(layer_ids)) and all(0 <= i < num_layers - 1 for i in layer_ids)


def to_vllm_layer_ids(layer_ids: Sequence[int], num_layers: int) -> list[int]:
    """Return vLLM's ids of the layers' outputs, then that of the final state before the final norm (L).

    Raises ValueError for layers that cannot be captured.
    """
    if not can_be_captured(layer_ids, num_layers):
        raise ValueError(f"layer ids {list(layer_ids)} are not sorted, unique and in [0, {num_layers - 1})")
    return [i + 1 for i in layer_ids] + [num_layers]
