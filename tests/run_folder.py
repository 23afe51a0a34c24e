"""A run's folder with stages in all states, written by what stages write with."""

from __future__ import annotations

import json
import os
import sys
import time
import zlib
from dataclasses import dataclass, field
from pathlib import Path

from contracts.ledger import LedgerWriter
from contracts.run import Run
from distributed.stage import RunReader
from distributed.state import StageStatus

NAMES = {"synth": "synth generate", "store": "dump run", "draft": "train offline", "bench": "bench acceptance"}


@dataclass
class RunFolder:
    """A run's folder, filled by what stages write with. Runs that were opened are at work until they are closed."""

    path: Path
    runs: dict[str, Run] = field(default_factory=dict)

    def begin(self, label: str, argv: str = "", **settings: object) -> Run:
        stage = NAMES[label.split("/")[0]]
        before = sys.argv
        sys.argv = (argv or f"{stage} --output {label}").split()
        try:
            run = Run.open(self.path / label, stage, settings=settings, inputs={}, recipe_yaml="")
        finally:
            sys.argv = before
        self.runs[label] = run
        return run

    def stop(self, label: str, **summary: int) -> None:
        """End the process of a run: finished with a summary, dead without one."""
        run = self.runs.pop(label)
        if summary:
            run.finish(summary)
        run._lock.close()

    def write_rows(self, label: str, *statuses: str, reason: str = "HTTP 500 after 3 tries") -> None:
        writer = LedgerWriter(self.path / label / "ledger.jsonl")
        first = (zlib.crc32(label.encode()) << 32) + sum(1 for _ in writer.read())
        writer.append(
            {"id": f"{first + number:032x}", "status": status, "reason": reason}
            for number, status in enumerate(statuses)
        )
        writer.close()

    def write_steps(self, label: str, *steps: int, loss: float = 1.5) -> None:
        with (self.path / label / "metrics.jsonl").open("a") as file:
            for step in steps:
                line = {
                    "step": step, "loss": loss, "grad_norm": 1.0, "learning_rate": 1e-3 / step,
                    "accuracy": [0.7, 0.5, 0.3], "blocks_accepted": 1.2, "tokens_per_s": 900.0,
                    "seconds": {"forward": 0.3, "backward": 0.2},
                }  # fmt: skip
                file.write(json.dumps(line) + "\n")
                file.write(json.dumps({"step": step, "held_out_acceptance": 2.5}) + "\n")

    def read(self) -> dict[str, StageStatus]:
        return {stage.label: stage for stage in RunReader(self.path).read()}

    def age(self, seconds: float) -> None:
        """Set the time of all files back."""
        then = time.time() - seconds
        for path in self.path.rglob("*"):
            os.utime(path, (then, then))


def fill(folder: RunFolder) -> RunFolder:
    """A recipe's run with stages in all states."""
    folder.begin("synth/train", "/bin/synth generate --prompts p.jsonl --output runs/synth/train")
    folder.write_rows("synth/train", *["done"] * 6, "truncated", "filtered", "failed")
    folder.stop("synth/train", done=6, truncated=1, filtered=1, failed=1, tokens=1234)
    folder.begin("synth/held_out")
    folder.write_rows("synth/held_out", "done", "done")
    folder.stop("synth/held_out", done=2)
    folder.begin("store/train")
    folder.write_rows("store/train", "done", "done", "done")
    folder.begin("store/held_out", "dump run --set serve.env.HF_TOKEN=secret --output x/store/held_out")
    folder.stop("store/held_out")
    folder.begin("draft", "train offline --output draft", train={"num_steps": 100})
    folder.write_steps("draft", 10, 20, 30)
    return folder
