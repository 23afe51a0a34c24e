"""Compare what a served draft reads on each tensor-parallel rank, before its acceptance is measured.

With partial sums (docs/tensor-parallel.md) each rank's part of the draft reads other features. Nothing fails then, and
acceptance is low.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from common.errors import UserError
from serve.command import ServeCommand
from serve.flags import parse_flags
from serve.vllm_plugins.draft_inputs import FOLDER_ENV, START_FILE

TIMEOUT_S = 60.0
"""For all ranks to write their states."""
TOLERANCE = 1e-2
"""Relative difference of two ranks' states; other orders of a reduction differ by rounding only."""


def partial_sums(where: str, found: str) -> UserError:
    """Return the error for ranks that hold different states."""
    return UserError(
        where,
        found=found,
        expected="the same on all ranks: partial sums of tensor parallelism are captured before their all-reduce",
        fix="Start vLLM where Draftline is installed, whose plugin completes the reduction for the releases in "
        "docs/tensor-parallel.md, or use a tensor-parallel size of 1.",
    )


@dataclass(frozen=True)
class Ranks:
    """A server's command, changed so that its ranks record what the draft reads, and the folder that they write to."""

    command: ServeCommand
    count: int
    folder: Path

    @contextmanager
    def compared(self) -> Iterator[None]:
        """Let each rank record the draft's next input, and compare the ranks at the end of the block.

        At least one request must be answered in it. Raises UserError if two ranks read different states.
        """
        if self.count == 1:
            yield
            return
        (self.folder / START_FILE).touch()
        yield
        self._compare()

    def _compare(self) -> None:
        from safetensors.torch import load_file

        names = [self.folder / f"rank{rank}of{self.count}.safetensors" for rank in range(self.count)]
        deadline = time.monotonic() + TIMEOUT_S
        while not all(name.exists() for name in names) and time.monotonic() < deadline:
            time.sleep(0.05)
        if not all(name.exists() for name in names):
            print("preflight: the tensor-parallel ranks did not record what the draft reads; they are not compared")
            return
        first, *others = [load_file(name)["states"].float() for name in names]
        for rank, states in enumerate(others, start=1):
            apart = float((states - first).norm() / first.norm())
            if not apart <= TOLERANCE:
                raise partial_sums(
                    f"the draft's input on tensor-parallel rank {rank}", f"states {apart:.2g} off those of rank 0"
                )
        print(f"preflight: the draft reads the same states on {self.count} tensor-parallel ranks", flush=True)


@contextmanager
def watch_ranks(command: ServeCommand) -> Iterator[Ranks]:
    """Change `command` so that the ranks of its server can be compared; nothing changes without tensor parallelism."""
    flags = parse_flags(command.args[2:])
    count = int(flags.get("tensor-parallel-size", 1)) if "speculative-config" in flags else 1
    folder = Path(tempfile.mkdtemp(prefix="draftline-ranks-"))
    try:
        watched = replace(command, env={**command.env, FOLDER_ENV: str(folder)}) if count > 1 else command
        yield Ranks(watched, count, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
