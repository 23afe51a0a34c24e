"""Claims about servers: a taken port and a server that dies are told in one line, and no server outlives its stage."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest
from conftest import ROOT, command, run

from serve.server import find_error, find_port


def test_a_port_in_use_is_one_line_and_exit_code_2(recipe_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = run("serve", "start", "--recipe", recipe_path, "--port", port, check=False)
    assert result.returncode == 2
    assert f"127.0.0.1:{port}: found Address already in use, expected a free port" in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.vllm
def test_a_server_that_dies_at_its_start_is_one_line_with_its_last_error(
    recipe_path: Path, prompts_path: Path, tmp_path: Path
) -> None:
    flag = "serve.args.no-such-flag=1"
    args = ("--recipe", recipe_path, "--prompts", prompts_path, "--output", tmp_path / "out", "--set", flag)
    result = run("synth", "generate", *args, check=False)
    assert result.returncode == 2
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert "server.log: found a server that exited with code 2 during startup" in line
    assert "--no-such-flag" in line
    assert "Traceback" not in result.stderr


@pytest.mark.vllm
def test_no_server_outlives_a_stage_that_was_killed(recipe_path: Path, tmp_path: Path) -> None:
    args = command("serve", "start", "--recipe", recipe_path, "--log", tmp_path / "serve.log")
    stage = subprocess.Popen(args, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=ROOT)
    server = None
    deadline = time.monotonic() + 300
    while server is None and time.monotonic() < deadline:
        time.sleep(0.2)
        children = Path(f"/proc/{stage.pid}/task/{stage.pid}/children").read_text().split()
        if children and b"serve.vllm_main" in Path(f"/proc/{children[0]}/cmdline").read_bytes():
            server = int(children[0])
    assert server is not None
    time.sleep(1.5)  # past its first lines, where it asks to die with its parent
    os.kill(stage.pid, signal.SIGKILL)
    stage.wait()
    deadline = time.monotonic() + 30
    while _is_alive(server) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not _is_alive(server)


def _is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_the_last_error_of_a_log_is_preferred_to_its_last_line(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("starting\nValueError: no such model\nshutting down\n")
    assert find_error(log) == "ValueError: no such model"
    log.write_text("")
    assert find_error(log) == "no output"


def test_free_ports_differ_and_are_none_that_linux_gives_to_connections() -> None:
    ports = [find_port("127.0.0.1", None) for _ in range(8)]
    assert len(set(ports)) > 1
    assert max(ports) < 32768  # net.ipv4.ip_local_port_range begins there
