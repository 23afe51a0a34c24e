"""Requests to the servers of one target: least loaded first, retried with backoff, a failing server set aside.

Requests go through `openai`'s aiohttp transport, one connection pool for all. Its own layers are passed by: they take
more than half of a request's time (docs/measured.md).
"""

from __future__ import annotations

import asyncio
import contextlib
import email.utils
import os
import random
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import httpx2
import openai
import orjson

from contracts.errors import IncompleteError, UserError
from contracts.recipe import SynthSection

MAX_BACKOFF_S = 60.0
FAILURES_TO_SET_ASIDE = 3
PROBE_TIMEOUT_S = 10.0
LARGE_ANSWER_BYTES = 1 << 19  # parsing it would hold up the others for milliseconds
CONNECTION_ERRORS = (httpx2.HTTPError, aiohttp.ClientError, TimeoutError, OSError)
# The last is vLLM's answer to a prompt that fills its context to the last token.
TOO_LONG = re.compile(r"maximum context length|context_length_exceeded|max_tokens must be at least 1, got 0", re.I)
GAUGES = {"vllm:num_requests_running": "running", "vllm:num_requests_waiting": "waiting"}


class RequestError(Exception):
    """A request that failed for good; the message is the reason."""


class PromptTooLongError(Exception):
    """A prompt that does not fit into the server's context."""


class _RetryError(Exception):
    """A try that failed and may be repeated."""

    def __init__(self, reason: str, wait_s: float = 0.0) -> None:
        super().__init__(reason)
        self.wait_s = wait_s


def api_key() -> str:
    """The endpoints' key, from OPENAI_API_KEY; servers of our own ask for none. It goes into no log and no record."""
    return os.environ.get("OPENAI_API_KEY", "EMPTY")


@dataclass
class Endpoint:
    """One server: what it serves, how loaded and how well it is."""

    url: str
    model: str = ""
    in_flight: int = 0
    failures: int = 0
    resting_until: float = 0.0
    """Asked to wait until then (Retry-After)."""
    times_aside: int = 0
    """How often it was set aside since it last gave an answer."""
    probe: asyncio.Task[None] | None = field(default=None, repr=False)
    """Waits for its return while it is set aside."""
    running: float | None = None
    waiting: float | None = None
    others: float = 0.0
    """Requests of other clients, when last asked."""

    @property
    def usable(self) -> bool:
        return self.probe is None and bool(self.model)

    @property
    def load(self) -> float:
        return self.in_flight + self.others


class Endpoints:
    """The servers of a run; use as an async context manager.

    `is_gone` tells that a server of our own has ended and will not come back.
    """

    def __init__(
        self, urls: Sequence[str], settings: SynthSection, is_gone: Callable[[], bool] = lambda: False
    ) -> None:
        self.endpoints = [Endpoint(url.rstrip("/")) for url in urls]
        self.num_retries = 0
        self._settings = settings
        self._is_gone = is_gone
        self._returned = asyncio.Event()
        self._all_gone_since = 0.0

    async def __aenter__(self) -> Endpoints:
        """Ask every server for its model. Raises UserError when none answers; those that do not are set aside."""
        limit = max(self._settings.max_concurrency, self._settings.concurrency or 0) + 16
        self._http = openai.DefaultAioHttpClient(
            # vLLM closes a connection that was idle for 5 s: let it go before.
            limits=httpx2.Limits(max_connections=limit, max_keepalive_connections=limit, keepalive_expiry=4),
            timeout=httpx2.Timeout(None, connect=30),
            headers={"Authorization": f"Bearer {api_key()}", "Content-Type": "application/json"},
        )
        try:
            errors = await asyncio.gather(*(self._ask_model(endpoint) for endpoint in self.endpoints))
            if all(errors):
                raise UserError(
                    ", ".join(endpoint.url for endpoint in self.endpoints),
                    found=f"no model list ({errors[0]})",
                    expected="an OpenAI-compatible server",
                    fix="Correct --endpoint (it ends in /v1), or leave it out to have a server started.",
                )
        except BaseException:
            await self._http.aclose()
            raise
        for endpoint, error in zip(self.endpoints, errors, strict=True):
            if error:
                self._set_aside(endpoint, error)
        return self

    async def __aexit__(self, *_: object) -> None:
        for endpoint in self.endpoints:
            if endpoint.probe is not None:
                endpoint.probe.cancel()
        await self._http.aclose()

    async def complete(
        self, body: Mapping[str, Any], prefer: Endpoint | None = None
    ) -> tuple[dict[str, Any], Endpoint]:
        """The answer to one chat completion, and the server that gave it; `prefer` is asked first while it is well.

        Raises RequestError after `max_attempts` tries or a refusal, PromptTooLongError, UserError for a key or a route
        that will never work, and IncompleteError when no server came back within `patience_s`.
        """
        settings = self._settings
        avoid: Endpoint | None = None
        for attempt in range(1, settings.max_attempts + 1):
            endpoint = await self._choose(prefer, avoid)
            endpoint.in_flight += 1
            try:
                answer = await self._post(endpoint, body)
            except _RetryError as error:
                fault = error
            else:
                endpoint.failures = endpoint.times_aside = 0
                return answer, endpoint
            finally:
                endpoint.in_flight -= 1
            if attempt == settings.max_attempts:
                raise RequestError(f"{fault} ({attempt} tries)")
            prefer, avoid = None, endpoint
            self.num_retries += 1
            await asyncio.sleep(max(fault.wait_s, self._backoff_s(attempt)))
        raise AssertionError("unreachable")

    def _backoff_s(self, times: int) -> float:
        return min(MAX_BACKOFF_S, self._settings.backoff_s * 2 ** (times - 1)) * random.uniform(0.5, 1.0)

    async def read_gauges(self) -> tuple[float, float] | None:
        """Requests that all servers together are running and have waiting; None where none tells."""
        await asyncio.gather(*(self._read_gauges(endpoint) for endpoint in self.endpoints if endpoint.usable))
        told = [e for e in self.endpoints if e.usable and e.running is not None and e.waiting is not None]
        return (sum(e.running or 0 for e in told), sum(e.waiting or 0 for e in told)) if told else None

    async def _choose(self, prefer: Endpoint | None, avoid: Endpoint | None) -> Endpoint:
        """The preferred or the least loaded usable endpoint, another than `avoid` if possible; waits for one."""
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
        """Raise IncompleteError when nobody is left to wait for: the rows have not failed, another run takes them."""
        patience = self._settings.patience_s
        if self._is_gone() or time.monotonic() - self._all_gone_since > patience:
            urls = ", ".join(endpoint.url for endpoint in self.endpoints)
            waited = "" if self._is_gone() else f" for {patience:.0f} s (synth.patience_s)"
            raise IncompleteError(
                f"{urls}: found no healthy server any more{waited}, expected one until the end. Look at its log, then "
                "run the same command again: what was finished is kept."
            )

    async def _post(self, endpoint: Endpoint, body: Mapping[str, Any]) -> dict[str, Any]:
        try:
            content = orjson.dumps({"model": endpoint.model, **body})
        except TypeError as error:  # such as an integer of more than 64 bits
            raise RequestError(f"a request that is no JSON: {error}") from None
        try:
            async with asyncio.timeout(self._settings.request_timeout_s):
                response = await self._http.post(f"{endpoint.url}/chat/completions", content=content)
        except CONNECTION_ERRORS as error:
            reason = f"{type(error).__name__}: {error}"[:200]
            self._note_failure(endpoint, reason)
            raise _RetryError(reason) from None
        if response.status_code == 200:
            if len(response.content) < LARGE_ANSWER_BYTES:
                return _parse_answer(response.content)
            return await asyncio.to_thread(_parse_answer, response.content)
        reason = f"HTTP {response.status_code}: {_error_message(response.content)}"
        if response.status_code == 429:
            wait_s = _retry_after(response.headers.get("retry-after"))
            endpoint.resting_until = max(endpoint.resting_until, time.monotonic() + wait_s)
            raise _RetryError(reason, wait_s)
        if response.status_code in (408, 409) or response.status_code >= 500:
            self._note_failure(endpoint, reason)
            raise _RetryError(reason, _retry_after(response.headers.get("retry-after")))
        _refuse_wrong_server(endpoint, response.status_code, reason)
        if TOO_LONG.search(reason):
            raise PromptTooLongError(f"the prompt does not fit into the context ({reason})")
        raise RequestError(reason)

    def _note_failure(self, endpoint: Endpoint, reason: str) -> None:
        endpoint.failures += 1
        if endpoint.failures >= FAILURES_TO_SET_ASIDE and endpoint.usable:
            self._set_aside(endpoint, reason)

    def _set_aside(self, endpoint: Endpoint, reason: str) -> None:
        """Send it nothing for a while that grows with every time, and then until it says that it is healthy."""
        if not any(other.usable for other in self.endpoints if other is not endpoint):
            self._all_gone_since = time.monotonic()
        endpoint.times_aside += 1
        endpoint.probe = asyncio.create_task(self._wait_for_return(endpoint, reason))

    async def _wait_for_return(self, endpoint: Endpoint, reason: str) -> None:
        wait_s, told = self._backoff_s(endpoint.times_aside), False
        await asyncio.sleep(wait_s)
        while await self._ask_model(endpoint):
            if not told:
                print(f"\nsynth: {endpoint.url} is set aside ({reason}), asked again until it is back", flush=True)
                told = True
            wait_s = min(MAX_BACKOFF_S / 2, max(0.1, wait_s * 2))
            await asyncio.sleep(wait_s * random.uniform(0.5, 1.0))
        if told:
            print(f"\nsynth: {endpoint.url} is back", flush=True)
        endpoint.failures, endpoint.probe = 0, None
        self._returned.set()

    async def _ask_model(self, endpoint: Endpoint) -> str:
        """Learn what the endpoint serves; the reason if it does not answer well."""
        try:
            async with asyncio.timeout(PROBE_TIMEOUT_S):
                health = await self._http.get(f"{endpoint.url.removesuffix('/v1')}/health")
                models = await self._http.get(f"{endpoint.url}/models")
            if health.status_code >= 500 or models.status_code != 200:
                return f"HTTP {max(health.status_code, models.status_code)}: {_error_message(models.content)}"
            endpoint.model = str(orjson.loads(models.content)["data"][0]["id"])
        except (*CONNECTION_ERRORS, ValueError, LookupError, TypeError) as error:
            return f"{type(error).__name__}: {error}"[:200]
        return ""

    async def _read_gauges(self, endpoint: Endpoint) -> None:
        try:
            async with asyncio.timeout(PROBE_TIMEOUT_S):
                response = await self._http.get(f"{endpoint.url.removesuffix('/v1')}/metrics")
            values = await asyncio.to_thread(_parse_gauges, response.text) if response.status_code == 200 else {}
        except (*CONNECTION_ERRORS, ValueError):
            values = {}
        endpoint.running, endpoint.waiting = values.get("running"), values.get("waiting")
        endpoint.others = max(0.0, sum(values.values()) - endpoint.in_flight)


def _parse_answer(content: bytes) -> dict[str, Any]:
    try:
        answer: dict[str, Any] = orjson.loads(content)
        choice = answer["choices"][0]
        if isinstance(choice["message"], dict) and isinstance(choice["finish_reason"], str):
            return answer
    except (ValueError, LookupError, TypeError):
        pass
    raise _RetryError(f"an answer that is no chat completion: {content[:100]!r}")


def _error_message(content: bytes) -> str:
    try:
        body = orjson.loads(content)
        error = body.get("error", body)
        return str(error.get("message", error))[:300]
    except (ValueError, AttributeError):
        return content[:200].decode(errors="replace")


def _refuse_wrong_server(endpoint: Endpoint, status: int, reason: str) -> None:
    """Raise UserError for refusals that every request would meet."""
    if status in (401, 403):
        raise UserError(
            endpoint.url, found=reason, expected="a server that takes our key", fix="Set OPENAI_API_KEY to its key."
        )
    if status == 404:
        raise UserError(
            endpoint.url, found=reason, expected="chat completions", fix="Correct --endpoint (it ends in /v1)."
        )
    if "--enable-auto-tool-choice" in reason:
        raise UserError(
            endpoint.url,
            found="prompts with tools and a server that parses no tool calls",
            expected="a tool call parser",
            fix="Serve with --enable-auto-tool-choice --tool-call-parser NAME (serve.args).",
        )


def _retry_after(value: str | None) -> float:
    """Seconds that a Retry-After header asks for: a number, or a date (RFC 9110)."""
    if not value:
        return 0.0
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return 0.0


def _parse_gauges(text: str) -> dict[str, float]:
    from prometheus_client.parser import text_string_to_metric_families

    lines = [line for line in text.splitlines() if "vllm:num_requests_" in line]  # the whole page takes 10 ms
    values: dict[str, float] = {}
    for family in text_string_to_metric_families("\n".join(lines) + "\n"):
        for sample in family.samples:
            if sample.name in GAUGES:
                values[GAUGES[sample.name]] = values.get(GAUGES[sample.name], 0.0) + sample.value
    return values
