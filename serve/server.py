"""Start a vLLM server, wait until it is healthy, and stop it.

Writes: the server's output to a log file; its last lines are printed when the server fails.
"""

from __future__ import annotations

import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from common.errors import UserError
from common.files import explain_unwritable
from serve.client import ask
from serve.command import SERVER_MODULE, ServeCommand
from serve.releases import check_release
from serve.vllm_main import PARENT_ENV

STOP_TIMEOUT_S = 20.0
POLL_INTERVAL_S = 0.25
PROGRESS_INTERVAL_S = 15.0
FREE_PORTS = range(20000, 32768)
"""Ports to choose from. A server binds its port seconds later: the kernel gives the ports above to connections."""


@dataclass(frozen=True)
class Server:
    """A healthy server, its URL without /v1, and its startup time."""

    url: str
    log_path: Path
    startup_s: float
    process: subprocess.Popen[bytes]

    def wait(self) -> None:
        """Block while the server runs. Raises UserError when it exits."""
        code = self.process.wait()
        raise UserError(
            self.log_path,
            found=f"a server that exited with code {code}: {find_error(self.log_path)}",
            expected="a server that runs until it is stopped",
            fix="Read the log, then start it again.",
        )


def find_port(host: str, port: int | None) -> int:
    """Return `port`, or a random free one of `FREE_PORTS` for None. Raises UserError if `port` is in use."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    for candidate in [port] if port else random.SystemRandom().sample(FREE_PORTS, 20):
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, candidate))
                return candidate
            except OSError as error:
                reason = error.strerror or "an unusable address"
    raise UserError(
        f"{host}:{port}",
        found=reason,
        expected="a free port",
        fix="Stop the process that listens there, or set serve.port to another port (null: any free one).",
    )


@contextmanager
def run_server(command: ServeCommand, *, log_path: Path, startup_timeout_s: float) -> Iterator[Server]:
    """Run the command's server during the block; it is healthy when the block begins.

    Raises UserError if the port is in use, if the installed vLLM does not work, if the server exits before it is
    healthy, or if it is not healthy within `startup_timeout_s`.
    """
    if command.module == SERVER_MODULE:
        check_release()
    find_port(command.host, command.port)
    started = time.monotonic()
    with _open_log(log_path) as log:
        process = subprocess.Popen(
            command.argv,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, **command.env, PARENT_ENV: str(os.getpid())},
            start_new_session=True,
        )
    try:
        url = f"http://{command.host}:{command.port}"
        _wait_until_healthy(process, url, log_path, started + startup_timeout_s)
        startup_s = time.monotonic() - started
        print(f"server: healthy after {startup_s:.0f} s at {url}, log {log_path}", file=sys.stderr)
        yield Server(url, log_path, startup_s, process)
    finally:
        _stop(process)


def _open_log(path: Path) -> IO[bytes]:
    with explain_unwritable(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        return path.open("wb")


def _wait_until_healthy(process: subprocess.Popen[bytes], url: str, log_path: Path, deadline: float) -> None:
    started = last_printed = time.monotonic()
    while not ask(lambda client: client.is_healthy(url)):
        code = process.poll()
        if code is not None:
            print(_tail(log_path), file=sys.stderr)
            raise UserError(
                log_path,
                found=f"a server that exited with code {code} during startup: {find_error(log_path)}",
                expected="a healthy server",
                fix="Read the log, then correct serve.args or target.path.",
            )
        if time.monotonic() > deadline:
            print(_tail(log_path), file=sys.stderr)
            raise UserError(
                log_path,
                found=f"a server that is not healthy yet: {find_error(log_path)}",
                expected="a healthy server within serve.startup_timeout_s",
                fix="Read the log, or raise serve.startup_timeout_s.",
            )
        if time.monotonic() - last_printed > PROGRESS_INTERVAL_S:
            last_printed = time.monotonic()
            seconds = time.monotonic() - started
            last_line = _tail(log_path, 1).strip()[:100] or "no output yet"
            print(f"server: starting, {seconds:.0f} s so far; last log line: {last_line}", file=sys.stderr)
        time.sleep(POLL_INTERVAL_S)


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Send SIGTERM, then SIGKILL, to the process group; return when the server has exited."""
    for signal_number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, signal_number)
        except ProcessLookupError:
            break
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            continue
    process.wait()


def find_error(log_path: Path, max_chars: int = 300) -> str:
    """Return the last line of a log that names an error, else its last line."""
    lines = _read_lines(log_path)
    errors = [line for line in lines if re.search(r"error[:,]", line, re.IGNORECASE)]
    return (errors or lines or ["no output"])[-1].strip()[-max_chars:]


def _tail(log_path: Path, num_lines: int = 15) -> str:
    return "\n".join(_read_lines(log_path)[-num_lines:])


def _read_lines(log_path: Path) -> list[str]:
    """Return a log's non-empty lines."""
    return [line for line in log_path.read_text(errors="replace").splitlines() if line.strip()]
