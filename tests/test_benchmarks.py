"""Claims about `benchmarks/`: each is a command that says what it does; those that need nothing else still run."""

from __future__ import annotations

import subprocess
import sys

import pytest
from conftest import ROOT


def run_benchmark(name: str, *args: str) -> str:
    result = subprocess.run(
        [sys.executable, f"benchmarks/{name}.py", *args], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout


@pytest.mark.parametrize(
    "name", ["dump_prefill", "preemption", "served_peer", "synth_client", "synth_server", "train_step"]
)
def test_a_benchmark_tells_its_command(name: str) -> None:
    assert f"python benchmarks/{name}.py" in run_benchmark(name, "--help")


@pytest.mark.parametrize(
    ("name", "args", "told"),
    [
        ("synth_client", ("--rows", "100"), "ratio"),
        ("synth_client", ("--layers",), "transport"),
        ("preemption", ("--rows", "20000"), "lost rows"),
    ],
)
def test_a_benchmark_that_needs_nothing_else_runs(name: str, args: tuple[str, ...], told: str) -> None:
    assert told in run_benchmark(name, *args)
