"""A process that runs our commands one after another, so that torch and vLLM are imported once for all of them.

For commands whose engine lives in their own process, and only a part of a test's claim: where a process of its own
matters, conftest's `run` starts one.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from conftest import ROOT, raise_failed, run_here


class Warm:
    """The process, seen from the tests."""

    def __init__(self, process: subprocess.Popen[str], answers: int) -> None:
        self._process, self._answers = process, os.fdopen(answers)

    def run(self, *args: object, check: bool = True) -> subprocess.CompletedProcess[str]:
        """As conftest's `run_here`, over there."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([str(arg) for arg in args]) + "\n")
        self._process.stdin.flush()
        answer = self._answers.readline()
        assert answer, f"the process that ran {args} ended with exit code {self._process.wait()}"
        result = subprocess.CompletedProcess(**json.loads(answer))
        return raise_failed(result) if check else result


@contextmanager
def start_warm(log: Path) -> Iterator[Warm]:
    read, write = os.pipe()
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, __file__, str(write)], stdin=subprocess.PIPE, stdout=file, stderr=file, text=True,
            pass_fds=[write], cwd=ROOT,
        )  # fmt: skip
        os.close(write)
        try:
            yield Warm(process, read)
        finally:
            process.kill()
            process.wait()


def main(answers: str) -> None:
    with os.fdopen(int(answers), "w") as file:
        for line in sys.stdin:
            result = run_here(*json.loads(line), check=False)
            if transfer := sys.modules.get("vllm.distributed.kv_transfer.kv_transfer_state"):
                transfer.ensure_kv_transfer_shutdown()  # or the next engine would find this one's connector
            file.write(json.dumps(vars(result)) + "\n")
            file.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])
