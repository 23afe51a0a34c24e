"""Compare captured layers with transformers' outputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from common.errors import IncompleteError
from common.memory import free_memory
from contracts.store import Manifest, Store
from drafts.moving import find_device
from recipe.recipe import Recipe
from target.target import Target

# Largest relative difference (norm over norm of the reference). Wrong layers differ several times more.
TOLERANCE = {"float32": 1e-3, "bfloat16": 3e-2, "float16": 3e-2, "fp8_e4m3": 8e-2, "int4": 2e-1}
QUANTIZED = 0.5
"""States of the right layer that are less than this off may be rounded; wrong weights differ more."""


def weights_bytes(target: Target) -> int:
    """Return the size of the target's weights."""
    return sum(file.stat().st_size for file in Path(target.path).glob("*.safetensors"))


def fits_memory(target: Target) -> bool:
    """Return whether the target's weights take less than half of the free memory that transformers would load into."""
    free = free_memory()
    if torch.cuda.is_available():
        free = min(free, torch.cuda.mem_get_info()[0])
    return weights_bytes(target) < free / 2


def compare_layers(recipe: Recipe, target: Target, store: Store, manifest: Manifest, sample_ids: list[str]) -> None:
    """Raise IncompleteError for the first sample with other layers than the manifest's; name the layer."""
    reference = Reference(recipe, target, find_device())
    for sample_id in sample_ids:
        sample = store.read_sample(sample_id)
        layers = sample.aux_hidden_states.unflatten(1, (len(manifest.layer_ids), -1))
        stored = sample.has("aux_hidden_states")[:, None].expand(-1, layers.shape[1])
        states = layers
        if sample.hidden_states.shape[1]:
            states = torch.cat([layers, sample.hidden_states[:, None]], dim=1)
            stored = torch.cat([stored, sample.has("hidden_states")[:, None]], dim=1)
        tolerance = TOLERANCE[manifest.dtype]
        ids = sample.input_ids.tolist()
        if defect := reference.find_defect(ids, states, manifest.layer_ids, tolerance, stored):
            raise IncompleteError(
                f"{store.sample_path(sample_id)}: found {defect.found}, expected {defect.expected}. Dump again."
            )


@dataclass(frozen=True)
class LayerDefect:
    """What a slot holds, and what it should hold."""

    found: str
    expected: str


class Found(NamedTuple):
    """One slot's states (t, H) and the outputs of all layers (t, L+1, H) at `rows (t,)`; the distance to each."""

    states: torch.Tensor
    outputs: torch.Tensor
    rows: torch.Tensor
    errors: list[float]


class Reference:
    """The target in transformers, which computes all layers."""

    def __init__(self, recipe: Recipe, target: Target, device: torch.device) -> None:
        """Load the target onto `device`. Raises UserError if its decoder layers cannot be found."""
        from dump.hf import Transformers

        self._num_layers = target.num_layers
        self._model = Transformers(recipe, target, list(range(target.num_layers)), device=device)
        self._ffn = self._model.keep_ffn_outputs()

    def find_defect(
        self,
        token_ids: Sequence[int],
        states: torch.Tensor,
        layer_ids: Sequence[int],
        tolerance: float,
        stored: torch.Tensor | None = None,
    ) -> LayerDefect | None:
        """Return what the first wrong slot of `states (T, n+1, H)` holds; None if all are right.

        The last slot is the final state before the final norm; it may be missing. `stored (T, n+1)`: which states are
        there; default: all.
        """
        outputs, states = self._model.forward(token_ids).float(), states.float().cpu()  # outputs: (T, L + 1, H)
        for slot, layer_id in enumerate([*layer_ids, self._num_layers][: states.shape[1]]):
            rows = torch.arange(len(states)) if stored is None else stored[:, slot].nonzero()[:, 0]
            errors = [distance(states[rows, slot], output[rows]) for output in outputs.unbind(1)]
            if errors[layer_id] <= tolerance:
                continue
            name = "the final state" if layer_id == self._num_layers else f"layer {layer_id}"
            found = Found(states[rows, slot], outputs[rows], rows, errors)
            what = self._describe(found, layer_id, tolerance)
            expected = f"the output of {name}, from which it is {errors[layer_id]:.2g} off (at most {tolerance})"
            return LayerDefect(f"{what} in slot {slot}", expected)
        return None

    def _describe(self, found: Found, layer_id: int, tolerance: float) -> str:
        """Return what states are that are not the output of `layer_id`."""
        errors = found.errors
        nearest = min(range(len(errors)), key=errors.__getitem__)
        if errors[nearest] <= tolerance:
            return f"the output of layer {nearest}"
        last = min(layer_id, self._num_layers - 1)  # the final state is the output of the last layer
        ffn = self._ffn.get(last)
        if ffn is not None and is_partial_sum(found.states, found.outputs[:, layer_id], ffn[found.rows]):
            return (
                f"a partial sum of layer {last}'s FFN, as one rank of tensor parallelism holds before its all-reduce "
                "(docs/tensor-parallel.md)"
            )
        if nearest == layer_id and errors[nearest] < QUANTIZED:
            return "states that are near it, but not exact (a quantized KV cache, or quantized weights)"
        return f"states of no layer (the nearest is {nearest}, {errors[nearest]:.2g} off)"


def is_partial_sum(found: torch.Tensor, output: torch.Tensor, ffn: torch.Tensor) -> bool:
    """Return whether `found` is a layer's `output` with only a part of its `ffn` added. Shapes: (T, H).

    The part of one of n ranks points the way of the whole, with about 1/n of it along that way. Rounding of any size
    leaves that share near 1.
    """
    added = (found - (output - ffn)).flatten()
    ffn = ffn.flatten()
    share = float(added @ ffn / (ffn @ ffn).clamp_min(1e-12))
    cosine = float(torch.nn.functional.cosine_similarity(added, ffn, dim=0))
    return 0.0 < share < 0.8 and cosine > 0.15 and added.norm() < 1.2 * ffn.norm()


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the norm of the difference over the norm of `expected`."""
    return float((found - expected).norm() / expected.norm().clamp_min(1e-12))
