"""Claims about exported heads: vLLM's own modules take all of their tensors and compute the same."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from conftest import ROOT


@pytest.mark.vllm
def test_vllms_modules_load_the_exported_heads_and_compute_what_training_does() -> None:
    script = [sys.executable, str(ROOT / "tests/drafts/vllm_heads_probe.py")]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}  # or it takes tests/drafts for our package
    result = subprocess.run(script, capture_output=True, text=True, env=env, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-3:] == ["convolution: equal", "selector: equal", "lattice: equal"]
