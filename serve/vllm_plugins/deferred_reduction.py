"""A vLLM plugin that completes a deferred all-reduce before a layer's output is captured (docs/tensor-parallel.md).

With tensor parallelism a decoder layer may leave its FFN's output as a partial sum on each rank, so that one kernel
does the all-reduce and the next norm. vLLM captures `hidden_states + residual` between the two. Without this plugin,
the hidden states of a dump are then the partial sums of rank 0, and a served draft reads other features on each rank.

vLLM loads the plugin in each of its processes (entry point group `vllm.general_plugins`). It acts only on models whose
layers say that they defer, and only with releases whose code was checked.
"""

from __future__ import annotations

from typing import Any

from serve.releases import CAPTURES_BEFORE_REDUCTION, parse_release


def register() -> None:
    """Complete the captures of models that are told which layers to capture from now on. vLLM's entry point."""
    from vllm.model_executor.models.interfaces import EagleModelMixin

    stock = EagleModelMixin._set_aux_hidden_state_layers
    if getattr(stock, "_draftline_fix", False):
        return

    def set_aux_hidden_state_layers(self: Any, layers: tuple[int, ...]) -> None:
        stock(self, layers)
        complete_captures(self)

    set_aux_hidden_state_layers._draftline_fix = True  # type: ignore[attr-defined]
    EagleModelMixin._set_aux_hidden_state_layers = set_aux_hidden_state_layers


def deferring_layers(model: Any) -> frozenset[int]:
    """Return the indices of the layers that say that their FFN's all-reduce is left to the next norm."""
    layers = enumerate(getattr(model, "layers", ()))
    return frozenset(index for index, layer in layers if getattr(layer, "ffn_all_reduce_deferred", False))


def complete_captures(model: Any) -> None:
    """Make `model` reduce the output of a deferring layer before it captures it.

    Does nothing with one tensor-parallel rank or a model that does not defer. Prints a warning, and changes nothing,
    with a release that was not checked.
    """
    import vllm
    from vllm.distributed import get_tensor_model_parallel_world_size, tensor_model_parallel_all_reduce
    from vllm.logger import init_logger

    deferring = deferring_layers(model)
    if not deferring or get_tensor_model_parallel_world_size() == 1 or "_maybe_add_hidden_state" in vars(model):
        return
    logger = init_logger("vllm.draftline")  # below "vllm", whose level and format it shares
    if parse_release(vllm.__version__) not in CAPTURES_BEFORE_REDUCTION:
        logger.warning(
            "vLLM %s: found layers with a deferred all-reduce. Captured hidden states may be partial sums of tensor "
            "parallelism; this release was not checked, so they are left as they are. Draftline's preflight compares "
            "the ranks.",
            vllm.__version__,
        )
        return
    stock = model._maybe_add_hidden_state

    def add_reduced(captured: list[Any], layer_id: int, hidden_states: Any, residual: Any) -> list[Any]:
        # vLLM's layer_id counts layers done: k is the output of layer k - 1.
        if layer_id in model.aux_hidden_state_layers and layer_id - 1 in deferring:
            # Some communicators reduce in place, and the next norm reduces the original.
            hidden_states = tensor_model_parallel_all_reduce(hidden_states.clone())
        return stock(captured, layer_id, hidden_states, residual)

    model._maybe_add_hidden_state = add_reduced
    logger.info("Draftline completes the deferred all-reduce of the captured layers of %s", type(model).__name__)
