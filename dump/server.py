"""Capture with servers that run elsewhere with extraction on (`serve command --extract FOLDER`).

The servers write each sample's states into a folder that this machine has under the same path; their answers name the
files.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import itertools
import threading
import time
import uuid
from collections.abc import Coroutine, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError, safe_open

from common.errors import UserError
from contracts.rank_states import PREFLIGHT
from dump.capture import Staged, Staging, discard, staged_path
from recipe.dump import DumpSection
from recipe.recipe import Recipe
from serve.endpoints import Endpoint, Endpoints, PromptTooLongError, RequestError
from target.target import Target

T = TypeVar("T")
STOP_TIMEOUT_S = 5.0
FLUSH_INTERVAL_S = 0.2
FIRST_POLL_S, MAX_POLL_S = 0.005, 0.1


class Servers:
    """Servers of one target; requests run in the event loop of a separate thread."""

    name = "the servers"
    is_reference = False
    settings = None
    """Nothing is known of the flags that the servers were started with."""

    def __init__(self, recipe: Recipe, target: Target, layer_ids: Sequence[int], _: Staging | None = None) -> None:
        """Ask each server for its model. Raises UserError for missing keys or if no server answers."""
        section = recipe.dump
        folder = find_server_folder(section)
        num_requests = section.concurrency * len(section.endpoints)
        self.token_bytes = (len(layer_ids) + 1) * target.hidden_size * 4
        # An answered sample waits for its file without delaying the next request.
        self._max_samples = 2 * num_requests
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="dump-servers", daemon=True)
        self._thread.start()
        endpoints = Endpoints(section.endpoints, section, stage="dump", max_connections=num_requests + 8)
        self._requests = Requests(endpoints, section, num_requests, folder)
        try:
            self._run(endpoints.__aenter__()).result()
        except BaseException:
            self._stop_loop()
            raise

    def capture(self, samples: Iterator[tuple[str, list[int]]], staging: Staging) -> Iterator[Staged]:
        """Yield each of `samples`, `(sample id, token ids)`, once its file is complete or it has failed.

        Waits for lost servers. Raises IncompleteError if none comes back within `dump.patience_s`.
        """
        return self.capture_by(None, samples, staging)

    @property
    def engines(self) -> list[OneServer]:
        return [OneServer(self, endpoint) for endpoint in self._requests.endpoints.endpoints if endpoint.usable]

    def capture_by(
        self, endpoint: Endpoint | None, samples: Iterator[tuple[str, list[int]]], staging: Staging
    ) -> Iterator[Staged]:
        """`capture`; a healthy `endpoint` is preferred to the others."""
        running: set[Future[Staged]] = set()
        for sample_id, token_ids in samples:
            while len(running) >= self._max_samples or not staging.take(len(token_ids) * self.token_bytes):
                if running:
                    yield from _collect(running)
                else:
                    staging.wait()
            running.add(self._run(self._requests.capture(sample_id, token_ids, endpoint)))
        while running:
            yield from _collect(running)

    def close(self) -> None:
        """Cancel the requests in flight and delete the remaining files."""
        if self._loop.is_closed():
            return
        with contextlib.suppress(TimeoutError):
            self._run(self._requests.close()).result(STOP_TIMEOUT_S)
        self._stop_loop()

    def _run(self, coroutine: Coroutine[Any, Any, T]) -> Future[T]:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def _stop_loop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(STOP_TIMEOUT_S)
        if not self._thread.is_alive():
            self._loop.close()


@dataclass(frozen=True)
class OneServer:
    """One of the servers, for a preflight."""

    servers: Servers
    endpoint: Endpoint
    is_reference = False

    @property
    def name(self) -> str:
        return self.endpoint.url

    @property
    def token_bytes(self) -> int:
        return self.servers.token_bytes

    def capture(self, samples: Iterator[tuple[str, list[int]]], staging: Staging) -> Iterator[Staged]:
        return self.servers.capture_by(self.endpoint, samples, staging)


class Requests:
    """The requests of one dump: everything that runs in the event loop."""

    def __init__(self, endpoints: Endpoints, section: DumpSection, num_requests: int, folder: Path) -> None:
        self.endpoints = endpoints
        self._section = section
        self._slots = asyncio.Semaphore(num_requests)
        self._folder = folder
        # vLLM names a sample's file after the request's id.
        self._prefix = f"dump-{uuid.uuid4().hex}"
        self._numbers = itertools.count()
        self._flushes: dict[str, tuple[float, Path | None]] = {}

    async def capture(self, sample_id: str, token_ids: list[int], prefer: Endpoint | None = None) -> Staged:
        """Send a sample to a server, again if needed, until the file of its states is complete.

        A healthy `prefer` is asked before others. A server that dies after its answer leaves a torn file or none, so
        the sample is sent again. Raises UserError and IncompleteError (see `Endpoints.complete`).
        """
        for attempt in range(1, self._section.max_attempts + 1):
            try:
                async with self._slots:
                    path, endpoint = await self._ask(token_ids, prefer, PREFLIGHT if PREFLIGHT in sample_id else "")
            except (RequestError, PromptTooLongError) as error:
                return Staged(sample_id, None, f"the server did not answer: {error}")
            if path is None:
                return Staged(sample_id, None, "the server named no file of hidden states")
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._section.request_timeout_s):
                    await self._wait_for_writer(path, endpoint)
                    if await asyncio.to_thread(is_whole, path, token_ids):
                        return Staged(sample_id, path)
            discard(path)
            await asyncio.sleep(self.endpoints.backoff_s(attempt))
        return Staged(sample_id, None, f"the server wrote no whole file of hidden states ({attempt} tries)")

    async def close(self) -> None:
        """Cancel all tasks, close the connections, delete this dump's files."""
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self.endpoints.__aexit__()
        for path in self._folder.glob(f"*{self._prefix}*"):
            path.unlink(missing_ok=True)

    async def _ask(
        self, token_ids: list[int], prefer: Endpoint | None = None, mark: str = ""
    ) -> tuple[Path | None, Endpoint]:
        """Request one prefill; return where its states will be, and the server. `mark` begins the request's id."""
        body = {
            "prompt": token_ids,
            "max_tokens": 1,
            "temperature": 0,
            "request_id": f"{mark}{self._prefix}-{next(self._numbers)}",
        }
        answer, endpoint = await self.endpoints.complete(body, prefer)
        return staged_path(answer.get("kv_transfer_params"), self._folder, endpoint.url), endpoint

    async def _wait_for_writer(self, path: Path, endpoint: Endpoint) -> None:
        """Return once no process holds the lock of a staged file.

        A server writes a request's states at its next step. A dummy request forces one if no other request does.
        """
        answered_at, pause_s = time.monotonic(), FIRST_POLL_S
        while is_locked(path):
            flushed_at, _ = self._flushes.get(endpoint.url, (0.0, None))
            is_due = flushed_at < answered_at or time.monotonic() - flushed_at > FLUSH_INTERVAL_S
            if is_due and not endpoint.in_flight and endpoint.usable:
                await self._flush(endpoint)
            await asyncio.sleep(pause_s)
            pause_s = min(MAX_POLL_S, 2 * pause_s)

    async def _flush(self, endpoint: Endpoint) -> None:
        """Force one more step of a server; delete the states of the previous dummy request, written by now."""
        _, last = self._flushes.get(endpoint.url, (0.0, None))
        self._flushes[endpoint.url] = (time.monotonic(), None)
        discard(last)
        with contextlib.suppress(RequestError, PromptTooLongError):
            path, _ = await self._ask([0], prefer=endpoint)
            self._flushes[endpoint.url] = (time.monotonic(), path)


def find_server_folder(section: DumpSection) -> Path:
    """Return the servers' output folder. Raises UserError unless the recipe names it and the servers."""
    if not section.endpoints:
        raise UserError(
            "dump.endpoints",
            found="none",
            expected="the URLs of servers with extraction on, ending in /v1",
            fix="Start one with the command that `serve command --extract FOLDER` prints.",
        )
    folder = section.server_staging_dir or section.staging_dir
    if folder is None:
        raise UserError(
            "dump.server_staging_dir",
            found="none",
            expected="the folder that the servers write hidden states to",
            fix="Set it to the FOLDER of their `serve command --extract FOLDER`.",
        )
    return folder.absolute()


def is_locked(path: Path) -> bool:
    """Return whether the writer of a staged file still holds its lock."""
    try:
        with Path(f"{path}.lock").open() as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # no lock: nobody writes it
        return False
    return False


def is_whole(path: Path, token_ids: Sequence[int]) -> bool:
    """Return whether a staged file was written to its end, where its token ids are."""
    try:
        with safe_open(path, framework="np") as file:
            return bool(file.get_tensor("token_ids").tolist() == list(token_ids))
    except (OSError, SafetensorError):
        return False


def _collect(running: set[Future[Staged]]) -> Iterator[Staged]:
    done, _ = wait(running, return_when=FIRST_COMPLETED)
    for future in done:
        running.remove(future)
        yield future.result()
