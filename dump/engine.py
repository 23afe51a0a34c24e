"""Capture hidden states with vLLM: one prefill a sample, the outputs of the chosen layers written by the engine.

Uses: vLLM's `extract_hidden_states` speculative method with a hidden-state connector, which writes one file a request
into a staging folder. A failed write is only logged by vLLM, so every answer is checked here: presence, token ids,
number of layers and tokens, finite values.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from contracts.recipe import Recipe
from contracts.target import Target, to_vllm_layer_ids
from serve.engine import engine_env, is_cpu_engine


@dataclass(frozen=True)
class Captured:
    """One sample's states: `layers (T, n, H)` in the recipe's order and `final (T, H)` before the final norm."""

    layers: torch.Tensor
    final: torch.Tensor


class CaptureError(Exception):
    """The engine's answer for one sample is not what was asked for; the message is the reason."""


class CaptureEngine:
    """vLLM offline, set up to hand out hidden states. One per process; `close` ends it."""

    def __init__(self, recipe: Recipe, target: Target, layer_ids: Sequence[int], staging: Path) -> None:
        """Load the target. `staging` is an empty folder of ours; files stay in it only until they are read."""
        # The engine works inside this process: its warnings about itself would bury what the stage says.
        quiet = {"VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "ERROR")}
        os.environ.update({**quiet, **engine_env(recipe.serve.env)})
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"vllm\.")
        from vllm import LLM

        self._staging = staging
        self._layer_ids = list(layer_ids)
        self._hidden_size = target.hidden_size
        vllm_ids = to_vllm_layer_ids(layer_ids, target.num_layers)
        self._llm = LLM(**_engine_args(recipe, target, vllm_ids, staging))
        self._connector = _connector_module()

    def capture(self, samples: Mapping[str, Sequence[int]]) -> Iterator[tuple[str, Captured | CaptureError]]:
        """Run one prefill for each `{sample id: token ids}` and yield every sample once, in order."""
        from vllm import SamplingParams

        parameters = SamplingParams(max_tokens=1, temperature=0.0, detokenize=False)
        prompts = [{"prompt_token_ids": list(ids)} for ids in samples.values()]
        outputs = self._llm.generate(prompts, parameters, use_tqdm=False)
        # Inside one process the last request's states are written at the next engine step only: give it one.
        flush = self._llm.generate([{"prompt_token_ids": [0]}], parameters, use_tqdm=False)
        for (sample_id, token_ids), output in zip(samples.items(), outputs, strict=True):
            try:
                yield sample_id, self._collect(output, token_ids)
            except CaptureError as error:
                yield sample_id, error
        self._discard(flush[0])

    def _path_of(self, output: Any) -> Path | None:
        parameters = output.kv_transfer_params or {}
        path = parameters.get("hidden_states_path")
        return Path(path) if path else None

    def _collect(self, output: Any, token_ids: Sequence[int]) -> Captured:
        path = self._path_of(output)
        if path is None:
            raise CaptureError("the engine named no file of hidden states")
        try:
            tensors = self._connector.load_hidden_states(str(path))
        except Exception as error:  # whatever a missing or torn file raises, the sample is not there
            raise CaptureError(f"its hidden states cannot be read: {error}") from None
        finally:
            self._connector.cleanup_hidden_states(str(path))
        states = tensors["hidden_states"]
        expected = (len(token_ids), len(self._layer_ids) + 1, self._hidden_size)
        if tuple(states.shape) != expected:
            raise CaptureError(f"hidden states of shape {tuple(states.shape)}, expected {expected}")
        if tensors["token_ids"].tolist() != list(token_ids):
            raise CaptureError("hidden states of other token ids than were asked for")
        if not bool(torch.isfinite(states).all()):
            raise CaptureError("hidden states that are not finite")
        return Captured(layers=states[:, :-1], final=states[:, -1])

    def _discard(self, output: Any) -> None:
        path = self._path_of(output)
        if path is not None:
            self._connector.cleanup_hidden_states(str(path))


def longest_sample(recipe: Recipe, target: Target) -> int:
    """Tokens that one sample may have: the engine generates one more after each prefill, which needs a place too."""
    positions = target.config.get("max_position_embeddings")
    limit = recipe.target.max_model_len
    return min(limit, int(positions) - 1) if positions else limit


def _engine_args(recipe: Recipe, target: Target, vllm_layer_ids: list[int], staging: Path) -> dict[str, Any]:
    # An engine argument is its flag with underscores.
    args = {key.replace("-", "_"): value for key, value in {**recipe.serve.args, **recipe.dump.args}.items()}
    connector = {"kv_connector": "ExampleHiddenStatesConnector"}
    if is_cpu_engine():
        connector = {
            "kv_connector": "CPUHiddenStatesConnector",
            "kv_connector_module_path": "serve.vllm_cpu.hidden_states_connector",
        }
    layers = {"hf_config": {"eagle_aux_hidden_state_layer_ids": vllm_layer_ids}}
    return {
        "model": str(target.path),
        "max_model_len": longest_sample(recipe, target) + 1,
        "use_tqdm_on_load": False,
        "enable_prefix_caching": False,  # states of cached tokens would never be computed
        "speculative_config": {
            "method": "extract_hidden_states",
            "num_speculative_tokens": 1,
            "draft_model_config": layers,
        },
        "kv_transfer_config": {
            **connector,
            "kv_role": "kv_producer",
            "kv_connector_extra_config": {"shared_storage_path": str(staging)},
        },
        **args,
    }


def _connector_module() -> Any:
    from vllm.distributed.kv_transfer.kv_connector.v1 import example_hidden_states_connector

    return example_hidden_states_connector
