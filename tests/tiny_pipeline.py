"""The tiny recipe's run.sh on a target that was trained briefly: every stage once, on real vLLM."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from conftest import ROOT

RECIPE = ROOT / "recipes/Tiny-DFlash/recipe.yaml"
OVERRIDES = ["train.num_steps=80", "train.checkpoint_every=20", "synth.max_tokens=128", "bench.num_prompts={1: 4}"]


def overrides(folder: Path) -> list[str]:
    return [word for value in [f"target.path={folder}/target", *OVERRIDES] for word in ("--set", value)]


def run_script(folder: Path) -> str:
    """run.sh on `folder`; what it printed."""
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    words = [word for value in OVERRIDES for word in ("--set", value)]
    script = [str(ROOT / "recipes/Tiny-DFlash/run.sh"), str(folder), *words]
    result = subprocess.run(script, capture_output=True, text=True, env=env, check=False)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    return result.stdout
