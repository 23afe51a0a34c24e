"""Run a stage's command as a user would: stages never import each other, and shared code imports none."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

from common.errors import IncompleteError, UserError


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


def ask_stage(name: str, *words: object) -> str:
    """Return what a console command of this environment prints. Raises UserError with its message if it fails."""
    command = [str(Path(sys.executable).with_name(name)), *map(str, words)]
    answer = subprocess.run(command, check=False, capture_output=True, text=True)
    if answer.returncode:
        told = answer.stderr.strip().splitlines() or [f"exit code {answer.returncode}"]
        raise UserError(
            f"{name} {words[0]}", found=told[-1].removeprefix("error: "), expected="its output", fix="Correct that."
        )
    return answer.stdout


def become_stage(name: str, *words: str) -> NoReturn:
    """Replace this process by a console command of this environment, which then gets signals and sets the exit code."""
    path = str(Path(sys.executable).with_name(name))
    os.execv(path, [path, *words])  # noqa: S606
