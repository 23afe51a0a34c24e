"""Capture with servers that run elsewhere with extraction on (`serve command --extract FOLDER`).

The servers write each sample's states into a folder that this machine sees as well; their answers name the files.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any

import httpx2

from contracts.errors import UserError
from contracts.recipe import Recipe
from contracts.target import Target
from dump.capture import Staged, Staging, discard
from dump.vllm_offline import path_of

TIMEOUT_S = 1800.0
TRIES = 3


class Servers:
    """Servers of one target, asked in turn."""

    def __init__(self, recipe: Recipe, target: Target, layer_ids: Sequence[int]) -> None:
        """Ask each server for its model. Raises UserError when one does not answer."""
        if not recipe.dump.endpoints:
            raise UserError(
                "dump.endpoints",
                found="none",
                expected="the URLs of servers with extraction on, ending in /v1",
                fix="Start one with the command that `serve command --extract FOLDER` prints.",
            )
        self._num_requests = recipe.dump.requests_in_flight * len(recipe.dump.endpoints)
        limits = httpx2.Limits(max_connections=self._num_requests + 8, keepalive_expiry=4)
        self._http = httpx2.Client(timeout=TIMEOUT_S, limits=limits)
        self._models = [(url.rstrip("/"), self._ask_model(url.rstrip("/"))) for url in recipe.dump.endpoints]
        self._turn = itertools.count()
        self.token_bytes = (len(layer_ids) + 1) * target.hidden_size * 4

    def capture(self, samples: Iterator[tuple[str, list[int]]], staging: Staging) -> Iterator[Staged]:
        """Send one prefill for each `(sample id, token ids)`, many at a time."""
        with ThreadPoolExecutor(self._num_requests) as pool:
            running: dict[Future[dict[str, Any]], str] = {}
            for sample_id, token_ids in samples:
                while len(running) >= self._num_requests or not staging.take(len(token_ids) * self.token_bytes):
                    if running:
                        yield from self._collect(running)
                    else:
                        self._flush()
                        staging.wait()
                running[pool.submit(self._ask, token_ids)] = sample_id
            while running:
                yield from self._collect(running)
            self._flush()

    def close(self) -> None:
        self._http.close()

    def _collect(self, running: dict[Future[dict[str, Any]], str]) -> Iterator[Staged]:
        done, _ = wait(running, return_when=FIRST_COMPLETED)
        for future in done:
            sample_id = running.pop(future)
            try:
                yield Staged(sample_id, path_of(future.result().get("kv_transfer_params")))
            except (httpx2.HTTPError, ValueError, LookupError) as error:
                yield Staged(sample_id, None, f"the server did not answer: {error}")

    def _ask(self, token_ids: list[int], turn: int | None = None) -> dict[str, Any]:
        """The server's answer to one prefill; a broken connection or a 5xx is tried again at the next server."""
        for attempt in range(TRIES):
            url, model = self._models[(next(self._turn) if turn is None else turn) % len(self._models)]
            body = {"model": model, "prompt": token_ids, "max_tokens": 1, "temperature": 0}
            try:
                response = self._http.post(f"{url}/completions", json=body)
                response.raise_for_status()
                return dict(response.json())
            except httpx2.HTTPError:
                if attempt == TRIES - 1:
                    raise
        raise AssertionError("unreachable")

    def _flush(self) -> None:
        """A server writes its last requests' states at its next step: give each one.

        The states of that request, one token, stay in the folder.
        """
        for turn in range(len(self._models)):
            with contextlib.suppress(httpx2.HTTPError, ValueError):  # a server that is gone holds nothing back
                discard(path_of(self._ask([0], turn).get("kv_transfer_params")))

    def _ask_model(self, url: str) -> str:
        try:
            return str(self._http.get(f"{url}/models").raise_for_status().json()["data"][0]["id"])
        except (httpx2.HTTPError, ValueError, LookupError) as error:
            raise UserError(
                url, found=f"no model list ({error})", expected="a server of vLLM", fix="Correct dump.endpoints."
            ) from None
