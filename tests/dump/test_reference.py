"""Claims about what the comparison with transformers calls a wrong layer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dump.hf import Transformers
from dump.reference import Reference
from recipe.load import load_recipe
from target.target import Target

TOKENS, LAYERS = list(range(10, 50)), [1, 3]


@pytest.fixture(scope="module")
def reference(recipe_path: Path) -> Reference:
    recipe = load_recipe(recipe_path)
    return Reference(recipe, Target.read(recipe.target.path), torch.device("cpu"))


@pytest.fixture(scope="module")
def states(recipe_path: Path) -> torch.Tensor:
    """What a right engine captures: `(T, n+1, H)`."""
    recipe = load_recipe(recipe_path)
    return Transformers(recipe, Target.read(recipe.target.path), LAYERS).forward(TOKENS)


@torch.inference_mode()
def part_of_ffn(reference: Reference, layer_id: int, ranks: int) -> torch.Tensor:
    """The part of a layer's FFN that rank 0 of `ranks` computes, minus the whole."""
    model = reference._model
    kept = {}
    layer = model._layers[layer_id]
    handle = layer.mlp.down_proj.register_forward_hook(lambda _, inputs, output: kept.update(x=inputs[0], y=output))
    model.forward(TOKENS)
    handle.remove()
    size = layer.mlp.down_proj.in_features // ranks
    part = kept["x"][0, :, :size] @ layer.mlp.down_proj.weight[:, :size].T
    return part - kept["y"][0]


def test_right_states_have_no_defect(reference: Reference, states: torch.Tensor) -> None:
    assert reference.find_defect(TOKENS, states, LAYERS, 1e-3) is None


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_a_partial_sum_is_named_in_any_slot(reference: Reference, states: torch.Tensor, ranks: int) -> None:
    for slot, layer_id in enumerate([*LAYERS, 4]):
        wrong = states.clone()
        wrong[:, slot] += part_of_ffn(reference, layer_id, ranks)
        defect = reference.find_defect(TOKENS, wrong, LAYERS, 1e-3)
        assert defect is not None
        assert f"a partial sum of layer {layer_id}'s FFN" in defect.found


@pytest.mark.parametrize("size", [0.01, 0.05, 0.2])
def test_rounded_states_are_not_taken_for_a_partial_sum(
    reference: Reference, states: torch.Tensor, size: float
) -> None:
    noise = torch.randn(states.shape, generator=torch.Generator().manual_seed(0))
    defect = reference.find_defect(TOKENS, states * (1 + size * noise), LAYERS, 1e-3)
    assert defect is not None
    assert "near it, but not exact" in defect.found


def test_another_layer_and_no_layer_are_named(reference: Reference, states: torch.Tensor) -> None:
    swapped = states[:, [1, 0, 2]]
    defect = reference.find_defect(TOKENS, swapped, LAYERS, 1e-3)
    assert defect is not None
    assert "the output of layer 3 in slot 0" in defect.found
    random = torch.randn(states.shape, generator=torch.Generator().manual_seed(0))
    defect = reference.find_defect(TOKENS, random, LAYERS, 1e-3)
    assert defect is not None
    assert "states of no layer" in defect.found
