"""Capture with vLLM inside this process: one prefill a sample, its states staged by the engine's connector."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from contracts.recipe import Recipe
from contracts.target import Target
from dump.capture import Staged, Staging, discard
from serve.engine import engine_env
from serve.extraction import extraction_args

FLUSH = "flush"
REQUESTS_AHEAD = 2
"""Requests in the engine for each that it runs at a time: enough to fill every batch."""


class VllmOffline:
    """vLLM, set up to hand out hidden states. One per process."""

    def __init__(self, recipe: Recipe, target: Target, layer_ids: Sequence[int], staging: Staging) -> None:
        """Load the target."""
        # The engine works inside this process: its warnings about itself would bury what the stage says.
        quiet = {"VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "ERROR")}
        os.environ.update({**quiet, **engine_env({**recipe.serve.env, **recipe.dump.env})})
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"vllm\.")
        from vllm import LLM, SamplingParams

        args = extraction_args(recipe, target, layer_ids, staging.folder)
        self._llm = LLM(model=str(target.path), use_tqdm_on_load=False, **args)
        self._engine = self._llm.llm_engine
        config = self._engine.vllm_config
        self._max_requests = REQUESTS_AHEAD * config.scheduler_config.max_num_seqs
        # Bytes of a token's states as they wait: in the engine's dtype.
        self.token_bytes = (len(layer_ids) + 1) * target.hidden_size * config.model_config.dtype.itemsize
        self._parameters = SamplingParams(max_tokens=1, temperature=0.0, detokenize=False)

    def capture(self, samples: Iterator[tuple[str, list[int]]], staging: Staging) -> Iterator[Staged]:
        """Run one prefill for each `(sample id, token ids)`; the engine's batches stay full while there are samples."""
        running: set[str] = set()
        self._held: list[Staged] = []
        for sample_id, token_ids in samples:
            while len(running) >= self._max_requests or not staging.take(len(token_ids) * self.token_bytes):
                if running or self._held:
                    yield from self._step(running)
                else:
                    staging.wait()
            running.add(sample_id)
            self._add(sample_id, token_ids)
        while running or self._held:
            yield from self._step(running)

    def close(self) -> None:
        """The engine ends with its process."""

    def _add(self, request_id: str, token_ids: list[int]) -> None:
        self._engine.add_request(request_id, {"prompt_token_ids": token_ids}, self._parameters)

    def _step(self, running: set[str]) -> Iterator[Staged]:
        """One step of the engine; what finished in the step before.

        Inside one process a request's states are written at the step after its last. Handed out before, they would
        only block the thread that waits for them; after the last one a request of no use gives the engine a step.
        """
        if not running:
            self._add(FLUSH, [0])
        ready, self._held = self._held, []
        for output in self._engine.step():
            if output.request_id == FLUSH:
                discard(path_of(output.kv_transfer_params))
            elif output.finished:
                running.remove(output.request_id)
                self._held.append(Staged(output.request_id, path_of(output.kv_transfer_params)))
        yield from ready


def path_of(kv_transfer_params: dict[str, Any] | None) -> Path | None:
    """Where an answer of vLLM's says that its states are."""
    path = (kv_transfer_params or {}).get("hidden_states_path")
    return Path(path) if path else None
