"""Claims about `benchmarks/`: those that need nothing but this project still run."""

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
    ("name", "args", "told"),
    [
        ("synth_client", ("--rows", "100"), "ratio"),
        ("preemption", ("--rows", "20000"), "lost rows"),
        ("first_calls", ("--waves", "1"), "with settled functions: 0 of 24"),
    ],
)
def test_a_benchmark_that_needs_nothing_else_runs(name: str, args: tuple[str, ...], told: str) -> None:
    assert told in run_benchmark(name, *args)
