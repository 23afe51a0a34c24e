"""Compare a store's layers with transformers' outputs."""

from __future__ import annotations

from pathlib import Path

import torch

from common.errors import IncompleteError
from common.memory import free_memory
from contracts.store import Manifest, Store
from recipe.recipe import Recipe
from target.target import Target

# Largest relative difference (norm over norm of the reference). Wrong layers differ several times more.
TOLERANCE = {"float32": 1e-3, "bfloat16": 3e-2, "fp8_e4m3": 8e-2}


def fits_memory(target: Target) -> bool:
    """Return whether the target's weights take less than half of the free memory that transformers would load into."""
    size = sum(file.stat().st_size for file in Path(target.path).glob("*.safetensors"))
    free = free_memory()
    if torch.cuda.is_available():
        free = min(free, torch.cuda.mem_get_info()[0])
    return size < free / 2


def compare_layers(recipe: Recipe, target: Target, store: Store, manifest: Manifest, sample_ids: list[str]) -> None:
    """Raise IncompleteError for the first sample with other layers than the manifest's; name the layer."""
    from dump.hf import Transformers

    reference = Transformers(recipe, target, list(range(target.num_layers)))
    tolerance, wanted = TOLERANCE[manifest.dtype], manifest.layer_ids
    for sample_id in sample_ids:
        sample = store.read_sample(sample_id)
        outputs = reference.forward(sample.input_ids.tolist()).float()  # (T, L + 1, H)
        stored = sample.aux_hidden_states.float().unflatten(1, (len(wanted), -1))
        stored = torch.cat([stored, sample.hidden_states.float()[:, None]], dim=1)
        for slot, layer_id in enumerate([*wanted, target.num_layers]):
            errors = [_distance(stored[:, slot], outputs[:, layer]) for layer in range(target.num_layers + 1)]
            if errors[layer_id] > tolerance:
                name = "the final state" if layer_id == target.num_layers else f"layer {layer_id}"
                nearest = min(range(len(errors)), key=errors.__getitem__)
                what = (
                    f"the output of layer {nearest}"
                    if errors[nearest] <= tolerance
                    else f"states of no layer (the nearest is {nearest}, {errors[nearest]:.2g} off)"
                )
                raise IncompleteError(
                    f"{store.sample_path(sample_id)} (slot {slot}): found {what}, expected the output of {name}, from "
                    f"which it is {errors[layer_id]:.2g} off (at most {tolerance}). Dump again."
                )


def _distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm().clamp_min(1e-12))
