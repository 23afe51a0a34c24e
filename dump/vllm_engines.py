"""Capture with several vLLM engines on this machine, each in a process of its own on its own GPUs.

The stage sends samples to the engine with the fewest requests in flight, so engines of different speed stay busy.
The processes run dump/engine_process.py.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from common.errors import IncompleteError
from dump.capture import Staged, Staging
from dump.gpus import VISIBLE, divide_gpus
from recipe.recipe import Recipe
from serve.engine import engine_env
from serve.extraction import extraction_args, identify_engine
from serve.vllm_main import PARENT_ENV
from target.target import Target

POLL_INTERVAL_S = 0.05
STOP_TIMEOUT_S = 15.0
NUM_LAST_LINES = 5


@dataclass(frozen=True)
class EngineJob:
    """What an engine's process needs; the first message to it."""

    recipe: Recipe
    target: Target
    layer_ids: Sequence[int]
    folder: Path


@dataclass(frozen=True)
class Ready:
    """The first message of an engine's process, once the target is loaded."""

    token_bytes: int
    max_requests: int


class VllmEngines:
    """All engines of a dump. A preflight must see each of `engines`."""

    name = "vLLM"
    is_reference = False

    def __init__(self, recipe: Recipe, target: Target, layer_ids: Sequence[int], staging: Staging) -> None:
        """Load the target in all engines at the same time. Raises IncompleteError if one of them ends."""
        gpus_of_engines = divide_gpus(recipe)
        args = extraction_args(recipe, target, layer_ids, staging.folder)
        # Other engines or GPUs need a preflight of their own.
        self.settings = {**identify_engine(recipe, args), "engines": gpus_of_engines}
        self.engines: list[Engine] = []
        try:
            for number, gpus in enumerate(gpus_of_engines):
                # Of its own, because all engines name the states of their dummy requests alike.
                folder = staging.folder / f"engine-{number}"
                folder.mkdir()
                name = f"engine {number}" + ("" if gpus is None else f" (GPUs {gpus})")
                self.engines.append(Engine(name, EngineJob(_assign(recipe, gpus), target, layer_ids, folder)))
            loading = list(self.engines)
            while loading:
                for engine in _wait(loading, None):
                    engine.note_ready()
                    loading.remove(engine)
        except BaseException:
            self.close()
            raise
        self.token_bytes = self.engines[0].token_bytes

    def capture(self, samples: Iterator[tuple[str, list[int]]], staging: Staging) -> Iterator[Staged]:
        """Run one prefill for each `(sample id, token ids)`. Raises IncompleteError if an engine ends."""
        return _capture(self.engines, samples, staging)

    def close(self) -> None:
        """End all engines."""
        for engine in self.engines:
            engine.disconnect()
        for engine in self.engines:
            engine.close()


class Engine:
    """One engine's process, which starts at once. Its output is printed here, each line after the engine's name."""

    is_reference = False

    def __init__(self, name: str, job: EngineJob) -> None:
        self.name = name
        self.token_bytes = self.num_running = self._max_requests = 0
        self.connection, theirs = Pipe()
        environment = engine_env({**job.recipe.serve.env, **job.recipe.dump.env})
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "dump.engine_process", str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env={**os.environ, **environment, PARENT_ENV: str(os.getpid())},
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        self._last_lines = deque[str](maxlen=NUM_LAST_LINES)
        self._printer = threading.Thread(target=self._print_output, name=name, daemon=True)
        self._printer.start()
        self._send(job)

    @property
    def has_room(self) -> bool:
        """Whether the engine takes another request."""
        return self.num_running < self._max_requests

    def note_ready(self) -> None:
        """Take the message that the target is loaded."""
        ready = self._receive()
        self.token_bytes, self._max_requests = ready.token_bytes, ready.max_requests

    def capture(self, samples: Iterator[tuple[str, list[int]]], staging: Staging) -> Iterator[Staged]:
        """Capture `samples` with this engine alone, while no others are in flight."""
        return _capture([self], samples, staging)

    def add(self, sample_id: str, token_ids: list[int]) -> None:
        """Start a request. Raises IncompleteError if the process has ended."""
        self._send((sample_id, token_ids))
        self.num_running += 1

    def take(self) -> Staged:
        """Return a sample that was captured; wait for one. Raises IncompleteError if the process has ended."""
        staged: Staged = self._receive()
        self.num_running -= 1
        return staged

    def disconnect(self) -> None:
        """Let the process end by itself, without waiting for it."""
        self.connection.close()

    def close(self) -> None:
        """End the process and those that vLLM started in it."""
        self.disconnect()
        if self._max_requests:  # it has loaded the target, and listens
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(STOP_TIMEOUT_S)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _send(self, message: Any) -> None:
        try:
            self.connection.send(message)
        except OSError:
            raise self._explain_end() from None

    def _receive(self) -> Any:
        try:
            return self.connection.recv()
        except (EOFError, OSError):
            raise self._explain_end() from None

    def _explain_end(self) -> IncompleteError:
        """Return the error for a process that closed its connection."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(STOP_TIMEOUT_S)
        self._printer.join(1.0)  # a process that vLLM started may still hold the pipe
        lines = " / ".join(self._last_lines) or "no output"
        hint = " (was it out of memory?)" if self._process.returncode == -signal.SIGKILL else ""
        return IncompleteError(
            f"{self.name}: found a process that ended with exit code {self._process.returncode}{hint}, expected it to "
            f"live as long as the run. Its last lines: {lines}. Run the same command again: what was finished is kept."
        )

    def _print_output(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            text = line.decode(errors="replace").rstrip()
            self._last_lines.append(text)
            print(f"{self.name}: {text}", file=sys.stderr, flush=True)


def _assign(recipe: Recipe, gpus: str | None) -> Recipe:
    """Return the recipe of an engine that sees only `gpus`."""
    if gpus is None:
        return recipe
    section = recipe.dump.model_copy(update={"env": {**recipe.dump.env, VISIBLE: gpus}})
    return recipe.model_copy(update={"dump": section})


def _capture(engines: Sequence[Engine], samples: Iterator[tuple[str, list[int]]], staging: Staging) -> Iterator[Staged]:
    for sample_id, token_ids in samples:
        yield from _take_captured(engines, 0)
        while (engine := _find_room(engines)) is None or not staging.take(len(token_ids) * engine.token_bytes):
            if any(other.num_running for other in engines):
                yield from _take_captured(engines, POLL_INTERVAL_S)
            else:
                staging.wait()
        engine.add(sample_id, token_ids)
    while any(engine.num_running for engine in engines):
        yield from _take_captured(engines, None)


def _find_room(engines: Sequence[Engine]) -> Engine | None:
    """Return the engine with the fewest requests in flight, or None if all have enough."""
    return min((engine for engine in engines if engine.has_room), key=lambda engine: engine.num_running, default=None)


def _take_captured(engines: Sequence[Engine], timeout_s: float | None) -> Iterator[Staged]:
    for engine in _wait(engines, timeout_s):
        yield engine.take()


def _wait(engines: Sequence[Engine], timeout_s: float | None) -> list[Engine]:
    """Wait until engines have sent something or have ended, and return these."""
    by_connection = {engine.connection: engine for engine in engines}
    return [by_connection[connection] for connection in wait(list(by_connection), timeout_s)]  # type: ignore[index]
