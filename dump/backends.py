"""The capture backends, by the value of `dump.backend` in the recipe."""

from __future__ import annotations

from pkgutil import resolve_name

from dump.capture import CaptureBackend, Staging
from dump.gpus import divide_gpus
from recipe.recipe import Recipe
from serve.flags import normalize
from target.target import Target

BACKENDS = {
    "vllm": "dump.vllm_offline:VllmOffline",
    "server": "dump.server:Servers",
    "hf": "dump.hf:Transformers",
}
OWN_PROCESSES = "dump.vllm_engines:VllmEngines"
"""Classes that implement `dump.capture.CaptureBackend`; imported when needed, since each imports an engine."""


def make_backend(recipe: Recipe, target: Target, layer_ids: list[int], staging: Staging) -> CaptureBackend:
    """Start the recipe's capture backend. `layer_ids` are captured in this order, then the final state.

    Raises UserError for more engines than the GPUs allow; see also the backends.
    """
    name = OWN_PROCESSES if _needs_own_process(recipe) else BACKENDS[recipe.dump.backend]
    backend: CaptureBackend = resolve_name(name)(recipe, target, layer_ids, staging)
    return backend


def _needs_own_process(recipe: Recipe) -> bool:
    """Whether engines run in processes of their own: several do, and one that runs the code of transformers.

    vLLM changes the classes of transformers then, and the preflight could not compare with them.
    """
    args = normalize({**recipe.serve.args, **recipe.dump.args})
    runs_transformers = recipe.dump.backend == "vllm" and args.get("model-impl") == "transformers"
    return runs_transformers or len(divide_gpus(recipe)) > 1
