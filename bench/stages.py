"""Run another stage's command as a user would, since stages never import each other."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from common.errors import IncompleteError


def run_stage(name: str, *words: object, processes: int = 1) -> None:
    """Run a console command of this environment, with several `processes` under torchrun.

    Raises IncompleteError unless it exits with 0.
    """
    command = [str(Path(sys.executable).with_name(name)), *map(str, words)]
    if processes > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        command = [sys.executable, *launcher, "-m", f"{name}.cli", *map(str, words)]
    code = subprocess.run(command, check=False).returncode
    if code:
        raise IncompleteError(
            f"`{name} {words[0]}`: found exit code {code}, expected 0. Its message is above; run the same command "
            "again to resume."
        )
