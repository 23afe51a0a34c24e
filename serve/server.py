"""A vLLM server that is started, waited for and stopped.

Writes: the server's whole output to a log file, whose last lines are told when it fails.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from contracts.errors import UserError
from serve.command import ServeCommand
from serve.vllm_main import PARENT_ENV

STOP_TIMEOUT_S = 20.0


@dataclass(frozen=True)
class Server:
    """A healthy server and how long its start took."""

    url: str
    log_path: Path
    startup_s: float
    process: subprocess.Popen[bytes]

    def wait(self) -> None:
        """Wait until the server ends, which it should not. Raises UserError then."""
        code = self.process.wait()
        raise UserError(
            self.log_path,
            found=f"a server that ended with code {code}: {last_words(self.log_path)}",
            expected="a server until it is stopped",
            fix="Read the log and start it again.",
        )


def find_port(host: str, port: int | None) -> int:
    """`port` if it is free, or any free one for None. Raises UserError when it is taken."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port or 0))
        except OSError as error:
            raise UserError(
                f"{host}:{port}",
                found=error.strerror or "it cannot be used",
                expected="a free port",
                fix="Stop what listens there, or set serve.port to another one (none: a free one is taken).",
            ) from None
        return int(probe.getsockname()[1])


@contextmanager
def run_server(command: ServeCommand, *, log_path: Path, startup_timeout_s: float) -> Iterator[Server]:
    """Start the command's server, wait until it is healthy, and stop it whatever happens inside.

    Raises UserError when the port is taken, when the server ends before it is healthy, or when it is not healthy
    within `startup_timeout_s`.
    """
    find_port(command.host, command.port)
    log_path.parent.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    with log_path.open("wb") as log:
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


def is_healthy(url: str) -> bool:
    """Whether GET /health answers 200."""
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as response:  # noqa: S310 (http to our own server)
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def _wait_until_healthy(process: subprocess.Popen[bytes], url: str, log_path: Path, deadline: float) -> None:
    started = last_told = time.monotonic()
    while not is_healthy(url):
        code = process.poll()
        if code is not None:
            print(_tail(log_path), file=sys.stderr)
            raise UserError(
                log_path,
                found=f"a server that ended at its start with code {code}: {last_words(log_path)}",
                expected="a healthy server",
                fix="Read the log, then mend serve.args or target.path.",
            )
        if time.monotonic() > deadline:
            print(_tail(log_path), file=sys.stderr)
            raise UserError(
                log_path,
                found=f"a server that is not healthy in time: {last_words(log_path)}",
                expected="health before serve.startup_timeout_s is over",
                fix="Read the log, or raise serve.startup_timeout_s.",
            )
        if time.monotonic() - last_told > 15:
            last_told = time.monotonic()
            passed = time.monotonic() - started
            print(f"server: starting for {passed:.0f} s ... {_last_line(log_path)}", file=sys.stderr)
        time.sleep(0.25)


def _stop(process: subprocess.Popen[bytes]) -> None:
    """SIGTERM, then SIGKILL to the whole process group; returns when it is gone."""
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


def _last_line(log_path: Path, max_chars: int = 100) -> str:
    return (_tail(log_path, 1).strip() or "it said nothing yet")[:max_chars]


def _tail(log_path: Path, num_lines: int = 15) -> str:
    """The last lines of a log that are not empty."""
    lines = [line for line in log_path.read_text(errors="replace").splitlines() if line.strip()]
    return "\n".join(lines[-num_lines:])


def last_words(log_path: Path, max_chars: int = 300) -> str:
    """The last line of a log that names an error, else its last line."""
    lines = [line.strip() for line in log_path.read_text(errors="replace").splitlines() if line.strip()]
    telling = [line for line in lines if re.search(r"error[:,]", line, re.IGNORECASE)]
    return (telling or lines or ["it said nothing"])[-1][-max_chars:]
