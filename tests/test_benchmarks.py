"""Claims about `benchmarks/`: those that need nothing but this project still run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT


def run_benchmark(name: str, *args: str, **environment: str) -> str:
    result = subprocess.run(
        [sys.executable, f"benchmarks/{name}.py", *args],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **environment},
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


@pytest.mark.long
def test_the_gpu_check_runs_dry_on_a_cpu_with_little_more_than_torch_and_transformers(tmp_path: Path) -> None:
    missing = ("vllm", "openai", "aiohttp", "datasets", "matplotlib", "tensorboard", "submitit", "ijson", "orjson",
               "pyarrow", "prometheus_client")  # fmt: skip
    (tmp_path / "sitecustomize.py").write_text(f"import sys\nfor name in {missing}:\n    sys.modules[name] = None\n")
    args = ("--device", "cpu", "--small", "--output", str(tmp_path / "out"))
    printed = run_benchmark("gpu/check", *args, PYTHONPATH=str(tmp_path))
    report = json.loads((tmp_path / "out/gpu-check.json").read_text())
    assert report["failed"] == []
    assert report["checks"]["losses"]["dflash"]["largest relative difference"] == 0.0
    assert "step        ok" in printed
