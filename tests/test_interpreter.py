"""The V2 tests' additions to Triton's interpreter compute what a GPU does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT

KERNEL = """
import json
import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice
from triton_interpreter.plugin import register

register()

@triton.jit
def kernel(source, result, size: tl.constexpr):
    places = tl.arange(0, size)
    values = tl.load(source + places)
    tl.store(result + places, values + libdevice.log1p(-values))

values = torch.tensor([0.0, 1e-6, 0.5, 0.999])
result = torch.empty(4)
kernel[(1,)](values, result, 4)
print(json.dumps(result.tolist()))
"""


def test_log1p_is_computed_as_vllms_resampling_uses_it(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    (tmp_path / "kernel.py").write_text(KERNEL)
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT / "tests/v2_runner")}
    done = subprocess.run(
        [sys.executable, tmp_path / "kernel.py"], env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    values = np.array([0.0, 1e-6, 0.5, 0.999], dtype=np.float32)
    assert json.loads(done.stdout.splitlines()[-1]) == pytest.approx((values + np.log1p(-values)).tolist(), abs=1e-7)
