"""HTTP client of vLLM servers: models, health, metrics, chat completions and completions.

Requests go through `openai`'s aiohttp transport and bypass its higher layers, which take more than half of a request's
time (docs/measured.md). A server is named by its base URL, which ends in /v1.
"""

from __future__ import annotations

import asyncio
import email.utils
import os
import time
from collections.abc import Callable, Coroutine, Mapping
from typing import Any, TypeVar

import aiohttp
import httpx2
import openai
import orjson

PROBE_TIMEOUT_S = 10.0
LARGE_ANSWER_BYTES = 1 << 19  # parsed in a thread, since parsing blocks the event loop for milliseconds
FINISH_REASONS = ("stop", "length", "tool_calls")
LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
COUNTERS = ("num_drafts", "num_draft_tokens", "num_accepted_tokens")
T = TypeVar("T")
_CONNECTION_ERRORS = (httpx2.HTTPError, httpx2.InvalidURL, aiohttp.ClientError, TimeoutError, OSError)


class AnswerError(Exception):
    """A request without a usable answer; the message is the reason.

    `status` is the HTTP status, 0 if there was none. `wait_s` is the server's Retry-After.
    """

    def __init__(self, reason: str, status: int = 0, wait_s: float = 0.0) -> None:
        super().__init__(reason)
        self.status = status
        self.wait_s = wait_s


def api_key() -> str:
    """Return the servers' API key, from OPENAI_API_KEY. It is never logged or recorded."""
    return os.environ.get("OPENAI_API_KEY", "EMPTY")


class Client:
    """A connection pool for requests to any number of servers; use as an async context manager.

    Every method raises AnswerError unless it says otherwise.
    """

    def __init__(self, max_connections: int = 16) -> None:
        self._max_connections = max_connections

    async def __aenter__(self) -> Client:
        limit = self._max_connections
        self._http = openai.DefaultAioHttpClient(
            # vLLM closes connections that are idle for 5 s; a request on a closed one fails.
            limits=httpx2.Limits(max_connections=limit, max_keepalive_connections=limit, keepalive_expiry=4),
            timeout=httpx2.Timeout(None, connect=30),
            mounts={f"all://{host}": None for host in LOOPBACK},  # bypass a proxy set in the environment
            headers={"Authorization": f"Bearer {api_key()}", "Content-Type": "application/json"},
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.aclose()

    async def chat(self, url: str, body: Mapping[str, Any], timeout_s: float) -> dict[str, Any]:
        """Request one chat completion. `body` names the model."""
        return await self._post(f"{url}/chat/completions", body, timeout_s, _parse_chat)

    async def complete(self, url: str, body: Mapping[str, Any], timeout_s: float) -> dict[str, Any]:
        """Request one completion. `body` names the model; its prompt may be token ids."""
        return await self._post(f"{url}/completions", body, timeout_s, _parse_completion)

    async def tokenize(self, url: str, body: Mapping[str, Any], timeout_s: float) -> list[int]:
        """Return the token ids of a prompt or of messages, as the server renders them."""
        return await self._post(f"{_root(url)}/tokenize", body, timeout_s, _parse_tokens)

    async def is_healthy(self, url: str) -> bool:
        """Return whether GET /health answers 200. Raises nothing."""
        try:
            return (await self._get(f"{_root(url)}/health")).status_code == 200
        except AnswerError:
            return False

    async def read_model(self, url: str) -> str:
        """Return the name of the served model. Raises AnswerError also if the server reports bad health."""
        health = await self._get(f"{_root(url)}/health")
        if health.status_code >= 500:  # servers other than vLLM may lack the route
            raise AnswerError(f"HTTP {health.status_code}: {_error_message(health.content)}", health.status_code)
        models = await self._get(f"{url}/models")
        if models.status_code != 200:
            raise AnswerError(f"HTTP {models.status_code}: {_error_message(models.content)}", models.status_code)
        try:
            return str(orjson.loads(models.content)["data"][0]["id"])
        except (ValueError, LookupError, TypeError) as error:
            raise AnswerError(f"no model list ({type(error).__name__}: {error})"[:200], 200) from None

    async def read_load(self, url: str) -> tuple[float, float]:
        """Return the numbers of running and waiting requests, summed over the server's engines."""
        values = await self._read_metrics(url, "num_requests_")
        try:
            return values["running"], values["waiting"]
        except KeyError:
            raise AnswerError("no gauges of running and waiting requests", 200) from None

    async def read_counters(self, url: str) -> dict[str, float]:
        """Return vLLM's speculative decoding counters, summed over engines (see `to_counters`)."""
        return to_counters(await self._read_metrics(url, "spec_decode_"))

    async def read_cache_counters(self, url: str) -> dict[str, float]:
        """Return the prompt tokens that vLLM looked up in its prefix cache (`queries`) and found there (`hits`)."""
        return await self._read_metrics(url, "prefix_cache_")

    async def read_metrics(self, url: str) -> str:
        """Return the text of /metrics."""
        response = await self._get(f"{_root(url)}/metrics")
        if response.status_code != 200:
            raise AnswerError(f"HTTP {response.status_code}", response.status_code)
        return str(response.text)

    async def _read_metrics(self, url: str, prefix: str) -> dict[str, float]:
        text = await self.read_metrics(url)
        try:
            return await asyncio.to_thread(parse_metrics, text, prefix)
        except ValueError as error:
            raise AnswerError(f"metrics that cannot be parsed: {error}"[:200], 200) from None

    async def _get(self, url: str) -> httpx2.Response:
        try:
            async with asyncio.timeout(PROBE_TIMEOUT_S):
                return await self._http.get(url)
        except _CONNECTION_ERRORS as error:
            raise AnswerError(f"{type(error).__name__}: {error}"[:200]) from None

    async def _post(self, url: str, body: Mapping[str, Any], timeout_s: float, parse: Callable[[bytes], T]) -> T:
        try:
            content = orjson.dumps(body)
        except TypeError as error:  # such as an integer of more than 64 bits
            raise AnswerError(f"a request that is not JSON: {error}", 400) from None
        try:
            async with asyncio.timeout(timeout_s):
                response = await self._http.post(url, content=content)
        except _CONNECTION_ERRORS as error:
            raise AnswerError(f"{type(error).__name__}: {error}"[:200]) from None
        if response.status_code != 200:
            raise AnswerError(
                f"HTTP {response.status_code}: {_error_message(response.content)}",
                response.status_code,
                _retry_after(response.headers.get("retry-after")),
            )
        if len(response.content) < LARGE_ANSWER_BYTES:
            return parse(response.content)
        return await asyncio.to_thread(parse, response.content)


class Connection:
    """A client for code without an event loop; use as a context manager."""

    def __enter__(self) -> Connection:
        self._runner = asyncio.Runner()
        self._client = self._runner.run(Client().__aenter__())
        return self

    def __exit__(self, *_: object) -> None:
        self._runner.run(self._client.__aexit__())
        self._runner.close()

    def ask(self, request: Callable[[Client], Coroutine[Any, Any, T]]) -> T:
        """Run one request: `ask(lambda client: client.read_model(url))`."""
        return self._runner.run(request(self._client))


def ask(request: Callable[[Client], Coroutine[Any, Any, T]]) -> T:
    """Run one request on a new connection (see `Connection.ask`)."""
    with Connection() as connection:
        return connection.ask(request)


def parse_metrics(text: str, prefix: str) -> dict[str, float]:
    """Sum the metrics `vllm:<prefix><name>` of a Prometheus text over engines; return them by `<name>`.

    A metric with a `position` label has a key per position: `<name>_<position>`.
    """
    from prometheus_client.parser import text_string_to_metric_families

    lines = [line for line in text.splitlines() if f"vllm:{prefix}" in line]  # parsing the whole page takes 10 ms
    values: dict[str, float] = {}
    for family in text_string_to_metric_families("\n".join(lines) + "\n"):
        for sample in family.samples:
            if sample.name.endswith("_created"):  # a counter's start time
                continue
            name = sample.name.removeprefix(f"vllm:{prefix}").removesuffix("_total")
            if "position" in sample.labels:
                name = f"{name}_{sample.labels['position']}"
            values[name] = values.get(name, 0.0) + sample.value
    return values


def to_counters(metrics: Mapping[str, float]) -> dict[str, float]:
    """Rename `spec_decode_` metrics: num_drafts, num_draft_tokens, num_accepted_tokens, accepted_at_<i>.

    The position i is from 0. The first three are 0 on a server without a draft.
    """
    per_position = "num_accepted_tokens_per_pos_"
    positions = {
        f"accepted_at_{name.removeprefix(per_position)}": value
        for name, value in metrics.items()
        if name.startswith(per_position)
    }
    return {name: metrics.get(name, 0.0) for name in COUNTERS} | positions


def _root(url: str) -> str:
    """Return a server's URL without /v1, the base of health and metrics."""
    return url.rstrip("/").removesuffix("/v1")


def _parse_chat(content: bytes) -> dict[str, Any]:
    try:
        answer: dict[str, Any] = orjson.loads(content)
        choice = answer["choices"][0]
        is_whole = isinstance(choice["message"], dict) and isinstance(choice["finish_reason"], str)
    except (ValueError, LookupError, TypeError):
        is_whole = False
    if not is_whole:
        raise AnswerError(f"an answer that is not a chat completion: {content[:100]!r}", 200)
    return _check_finish_reason(answer)


def _parse_completion(content: bytes) -> dict[str, Any]:
    try:
        answer: dict[str, Any] = orjson.loads(content)
        is_whole = isinstance(answer["choices"][0]["finish_reason"], str)
    except (ValueError, LookupError, TypeError):
        is_whole = False
    if not is_whole:
        raise AnswerError(f"an answer that is not a completion: {content[:100]!r}", 200)
    return _check_finish_reason(answer)


def _check_finish_reason(answer: dict[str, Any]) -> dict[str, Any]:
    """Return the answer. Raises AnswerError if the server aborted the reply (abort, error, repetition)."""
    reason = answer["choices"][0]["finish_reason"]
    if reason not in FINISH_REASONS:
        raise AnswerError(f"a reply that the server broke off (finish_reason {reason!r})", 200)
    return answer


def _parse_tokens(content: bytes) -> list[int]:
    try:
        return list(orjson.loads(content)["tokens"])
    except (ValueError, LookupError, TypeError):
        raise AnswerError(f"an answer without token ids: {content[:100]!r}", 200) from None


def _error_message(content: bytes) -> str:
    try:
        body = orjson.loads(content)
        error = body.get("error", body)
        return str(error.get("message", error))[:300]
    except (ValueError, AttributeError):
        return content[:200].decode(errors="replace")


def _retry_after(value: str | None) -> float:
    """Return the seconds to wait by a Retry-After header, which is a number or a date (RFC 9110)."""
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
