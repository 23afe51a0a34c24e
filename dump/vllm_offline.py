"""Capture with vLLM in this process: one prefill per sample; the engine's connector stages the states."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dump.capture import Staged, Staging, discard, staged_path
from recipe.recipe import Recipe
from serve.captures import check_captures
from serve.engine import engine_env
from serve.extraction import extraction_args, identify_engine
from serve.releases import check_release
from target.target import Target

if TYPE_CHECKING:
    from vllm import RequestOutput

FLUSH = "flush"
REQUESTS_AHEAD = 2
"""Requests in the engine per request that it can run concurrently, enough to fill every batch."""


class VllmOffline:
    """A vLLM engine with extraction on. One per process."""

    name = "vLLM"
    is_reference = False

    def __init__(self, recipe: Recipe, target: Target, layer_ids: Sequence[int], staging: Staging) -> None:
        """Load the target.

        Raises UserError if the installed vLLM does not work (`check_release`) or cannot hand out the target's states.
        """
        check_release()
        # The engine logs to this process's terminal, so show only its errors.
        quiet = {"VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "ERROR")}
        os.environ.update({**quiet, **engine_env({**recipe.serve.env, **recipe.dump.env})})
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"vllm\.")
        from vllm import LLM, SamplingParams

        args = extraction_args(recipe, target, layer_ids, staging.folder)
        check_captures(target, args)
        self._folder = staging.folder
        self.settings = identify_engine(recipe, args)
        self._llm = LLM(model=str(target.path), use_tqdm_on_load=False, **args)
        self._engine = self._llm.llm_engine
        config = self._engine.vllm_config
        self.max_requests = REQUESTS_AHEAD * config.scheduler_config.max_num_seqs
        # Bytes of one token's staged states, which have the engine's dtype.
        self.token_bytes = (len(layer_ids) + 1) * target.hidden_size * config.model_config.dtype.itemsize
        self._parameters = SamplingParams(max_tokens=1, temperature=0.0, detokenize=False)
        self._running: set[str] = set()
        self._held: list[Staged] = []

    @property
    def is_busy(self) -> bool:
        """Whether samples were added that `step` has not returned."""
        return bool(self._running or self._held)

    def capture(self, samples: Iterator[tuple[str, list[int]]], staging: Staging) -> Iterator[Staged]:
        """Run one prefill for each `(sample id, token ids)`, keeping the engine's batches full."""
        for sample_id, token_ids in samples:
            while len(self._running) >= self.max_requests or not staging.take(len(token_ids) * self.token_bytes):
                if self.is_busy:
                    yield from self.step()
                else:
                    staging.wait()
            self.add(sample_id, token_ids)
        while self.is_busy:
            yield from self.step()

    @property
    def engines(self) -> list[VllmOffline]:
        return [self]

    def close(self) -> None:
        """Do nothing: the engine ends with the process."""

    def add(self, sample_id: str, token_ids: list[int]) -> None:
        """Start one prefill."""
        self._running.add(sample_id)
        self._request(sample_id, token_ids)

    def step(self) -> list[Staged]:
        """Run one step of the engine; return the samples that finished in the step before.

        The engine writes a request's states one step after its last: yielded earlier, the sample would only block the
        writer that waits for them. After the last sample a dummy request forces one more step.
        """
        if not self._running:
            self._request(FLUSH, [0])
        ready, self._held = self._held, []
        for output in self._engine.step():
            if output.request_id == FLUSH:
                discard(self._path(output))
            elif output.finished:
                self._running.remove(output.request_id)
                self._held.append(Staged(output.request_id, self._path(output)))
        return ready

    def _request(self, request_id: str, token_ids: list[int]) -> None:
        self._engine.add_request(request_id, {"prompt_token_ids": token_ids}, self._parameters)

    def _path(self, output: RequestOutput) -> Path | None:
        return staged_path(output.kv_transfer_params, self._folder, "the engine")
