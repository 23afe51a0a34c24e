"""The capture backends, by the value of `dump.backend` in the recipe."""

from __future__ import annotations

from pkgutil import resolve_name

from dump.capture import CaptureBackend, Staging
from dump.gpus import divide_gpus
from recipe.recipe import Recipe
from target.target import Target

BACKENDS = {
    "vllm": "dump.vllm_offline:VllmOffline",
    "server": "dump.server:Servers",
    "hf": "dump.hf:Transformers",
}
SEVERAL_ENGINES = "dump.vllm_engines:VllmEngines"
"""Classes that implement `dump.capture.CaptureBackend`; imported when needed, since each imports an engine."""


def make_backend(recipe: Recipe, target: Target, layer_ids: list[int], staging: Staging) -> CaptureBackend:
    """Start the recipe's capture backend. `layer_ids` are captured in this order, then the final state.

    Raises UserError for more engines than the GPUs allow; see also the backends.
    """
    name = SEVERAL_ENGINES if len(divide_gpus(recipe)) > 1 else BACKENDS[recipe.dump.backend]
    backend: CaptureBackend = resolve_name(name)(recipe, target, layer_ids, staging)
    return backend
