"""A pool of servers of one target: choose the least loaded, retry with back-off, set failing servers aside."""

from __future__ import annotations

import asyncio
import contextlib
import random
import re
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from common.errors import IncompleteError, UserError
from recipe.retries import Retries
from serve.client import AnswerError, Client

MAX_BACKOFF_S = 60.0
FAILURES_TO_SET_ASIDE = 3
# The last alternative is vLLM's answer to a prompt that fills its context completely.
TOO_LONG = re.compile(r"maximum context length|context_length_exceeded|max_tokens must be at least 1, got 0", re.I)


class RequestError(Exception):
    """A request that failed and is not tried again; the message is the reason."""


class PromptTooLongError(Exception):
    """A prompt that does not fit into the server's context."""


@dataclass
class Endpoint:
    """One server: its model, its load and its health."""

    url: str
    model: str = ""
    in_flight: int = 0
    failures: int = 0
    resting_until: float = 0.0
    """End of its Retry-After (monotonic time)."""
    times_aside: int = 0
    """Times it was set aside since its last answer."""
    probe: asyncio.Task[None] | None = field(default=None, repr=False)
    """Task that probes its health while it is set aside."""
    load_told: tuple[float, float] | None = None
    """Its running and waiting requests at the last query."""
    others: float = 0.0
    """Requests of other clients at the last query."""

    @property
    def usable(self) -> bool:
        return self.probe is None and bool(self.model)

    @property
    def load(self) -> float:
        return self.in_flight + self.others


class Endpoints:
    """The servers of a run; use as an async context manager.

    `stage` is the prefix of messages and the recipe's section. `is_gone` returns whether the stage's own server has
    exited and will not come back.
    """

    def __init__(
        self,
        urls: Sequence[str],
        retries: Retries,
        *,
        stage: str,
        max_connections: int,
        is_gone: Callable[[], bool] = lambda: False,
    ) -> None:
        self.endpoints = [Endpoint(url.rstrip("/")) for url in urls]
        self.num_retries = 0
        self._retries = retries
        self._stage = stage
        self._is_gone = is_gone
        self._client = Client(max_connections)
        self._returned = asyncio.Event()
        self._all_gone_since = 0.0

    async def __aenter__(self) -> Endpoints:
        """Ask every server for its model; set silent ones aside. Raises UserError if none answers."""
        async with contextlib.AsyncExitStack() as stack:
            await stack.enter_async_context(self._client)
            errors = await asyncio.gather(*(self._ask_model(endpoint) for endpoint in self.endpoints))
            if all(errors):
                raise UserError(
                    ", ".join(endpoint.url for endpoint in self.endpoints),
                    found=f"no model list ({errors[0]})",
                    expected="an OpenAI-compatible server",
                    fix=f"Start it, or correct {self._stage}.endpoints (a URL ends in /v1).",
                )
            stack.pop_all()
        for endpoint, error in zip(self.endpoints, errors, strict=True):
            if error:
                self._set_aside(endpoint, error)
        return self

    async def __aexit__(self, *_: object) -> None:
        for endpoint in self.endpoints:
            if endpoint.probe is not None:
                endpoint.probe.cancel()
        await self._client.__aexit__()

    async def chat(self, body: Mapping[str, Any], prefer: Endpoint | None = None) -> tuple[dict[str, Any], Endpoint]:
        """Return the answer to a chat completion and its server; a healthy `prefer` is asked first.

        Raises RequestError after `max_attempts` tries or a refusal, PromptTooLongError, UserError for a wrong API key
        or route, and IncompleteError if no server came back within `patience_s`.
        """
        return await self._send(self._client.chat, body, prefer)

    async def complete(
        self, body: Mapping[str, Any], prefer: Endpoint | None = None
    ) -> tuple[dict[str, Any], Endpoint]:
        """Return the answer to a completion and the server that gave it. Raises: see `chat`."""
        return await self._send(self._client.complete, body, prefer)

    async def read_load(self) -> tuple[float, float] | None:
        """Return the running and waiting requests of all servers together; None if no server reports them."""
        await asyncio.gather(*(self._read_load(endpoint) for endpoint in self.endpoints if endpoint.usable))
        told = [e.load_told for e in self.endpoints if e.usable and e.load_told is not None]
        return (sum(running for running, _ in told), sum(waiting for _, waiting in told)) if told else None

    def backoff_s(self, times: int) -> float:
        """Return the jittered wait after failure number `times`, from 1."""
        return min(MAX_BACKOFF_S, self._retries.backoff_s * 2 ** (times - 1)) * random.uniform(0.5, 1.0)

    async def _send(
        self,
        request: Callable[[str, Mapping[str, Any], float], Awaitable[dict[str, Any]]],
        body: Mapping[str, Any],
        prefer: Endpoint | None,
    ) -> tuple[dict[str, Any], Endpoint]:
        avoid: Endpoint | None = None
        for attempt in range(1, self._retries.max_attempts + 1):
            endpoint = await self._choose(prefer, avoid)
            endpoint.in_flight += 1
            try:
                answer = await request(endpoint.url, {"model": endpoint.model, **body}, self._retries.request_timeout_s)
            except AnswerError as error:
                fault = error
            else:
                endpoint.failures = endpoint.times_aside = 0
                return answer, endpoint
            finally:
                endpoint.in_flight -= 1
            self._take_fault(endpoint, fault)
            if attempt == self._retries.max_attempts:
                raise RequestError(f"{fault} ({attempt} tries)")
            prefer, avoid = None, endpoint
            self.num_retries += 1
            await asyncio.sleep(max(fault.wait_s, self.backoff_s(attempt)))
        raise AssertionError("unreachable")

    def _take_fault(self, endpoint: Endpoint, fault: AnswerError) -> None:
        """Update the server's state after a fault; return if the request may be tried again, else raise."""
        if fault.status == 200:  # a broken answer
            return
        if fault.status == 429:
            endpoint.resting_until = max(endpoint.resting_until, time.monotonic() + fault.wait_s)
            return
        if fault.status in (0, 408, 409) or fault.status >= 500:
            endpoint.failures += 1
            if endpoint.failures >= FAILURES_TO_SET_ASIDE and endpoint.usable:
                self._set_aside(endpoint, str(fault))
            return
        self._refuse_wrong_server(endpoint, fault)
        if TOO_LONG.search(str(fault)):
            raise PromptTooLongError(f"the prompt does not fit into the context ({fault})")
        raise RequestError(str(fault))

    def _refuse_wrong_server(self, endpoint: Endpoint, fault: AnswerError) -> None:
        """Raise UserError for a refusal that all requests would get."""
        if fault.status in (401, 403):
            raise UserError(
                endpoint.url,
                found=str(fault),
                expected="a server that takes our key",
                fix="Set OPENAI_API_KEY to its key.",
            )
        if fault.status == 404:
            raise UserError(
                endpoint.url,
                found=str(fault),
                expected="an OpenAI-compatible server",
                fix=f"Correct {self._stage}.endpoints (a URL ends in /v1).",
            )

    async def _choose(self, prefer: Endpoint | None, avoid: Endpoint | None) -> Endpoint:
        """Wait for a usable endpoint: the preferred one, else the least loaded, not `avoid` if possible."""
        while True:
            now = time.monotonic()
            usable = [endpoint for endpoint in self.endpoints if endpoint.usable]
            rested = [endpoint for endpoint in usable if endpoint.resting_until <= now]
            if prefer in rested:
                return prefer
            if rested:
                return min(rested, key=lambda endpoint: (endpoint is avoid, endpoint.load))
            if usable:
                await asyncio.sleep(min(endpoint.resting_until for endpoint in usable) - now)
                continue
            self._refuse_lost_servers()
            self._returned.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._returned.wait(), 1.0)

    def _refuse_lost_servers(self) -> None:
        """Raise IncompleteError if no server can be waited for any longer; open rows are left to the next run."""
        patience = self._retries.patience_s
        if self._is_gone() or time.monotonic() - self._all_gone_since > patience:
            urls = ", ".join(endpoint.url for endpoint in self.endpoints)
            waited = "" if self._is_gone() else f" for {patience:.0f} s ({self._stage}.patience_s)"
            raise IncompleteError(
                f"{urls}: found no healthy server any more{waited}, expected one until the end. Look at its log, then "
                "run the same command again: what was finished is kept."
            )

    def _set_aside(self, endpoint: Endpoint, reason: str) -> None:
        """Send the server no request until a probe finds it healthy; the first probe comes later each time."""
        if not any(other.usable for other in self.endpoints if other is not endpoint):
            self._all_gone_since = time.monotonic()
        endpoint.times_aside += 1
        endpoint.probe = asyncio.create_task(self._wait_for_return(endpoint, reason))

    async def _wait_for_return(self, endpoint: Endpoint, reason: str) -> None:
        wait_s, told = self.backoff_s(endpoint.times_aside), False
        await asyncio.sleep(wait_s)
        while await self._ask_model(endpoint):
            if not told:
                print(f"\n{self._stage}: {endpoint.url} is set aside until it is healthy again ({reason})", flush=True)
                told = True
            wait_s = min(MAX_BACKOFF_S / 2, max(0.1, wait_s * 2))
            await asyncio.sleep(wait_s * random.uniform(0.5, 1.0))
        if told:
            print(f"\n{self._stage}: {endpoint.url} is back", flush=True)
        endpoint.failures, endpoint.probe = 0, None
        self._returned.set()

    async def _ask_model(self, endpoint: Endpoint) -> str:
        """Ask which model the endpoint serves; return the reason if it does not answer, else ""."""
        try:
            endpoint.model = await self._client.read_model(endpoint.url)
        except AnswerError as error:
            return str(error)
        return ""

    async def _read_load(self, endpoint: Endpoint) -> None:
        try:
            endpoint.load_told = await self._client.read_load(endpoint.url)
        except AnswerError:
            endpoint.load_told = None
        endpoint.others = max(0.0, sum(endpoint.load_told or ()) - endpoint.in_flight)
