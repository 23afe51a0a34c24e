"""Progress, metrics.jsonl, TensorBoard and curves of a training run, written by the first process."""

from __future__ import annotations

import itertools
import json
import math
import time
from collections import defaultdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from common.files import write_atomic
from common.progress import Progress
from contracts.draft import DraftRun
from recipe.train import TrainSection
from train.curves import draw_curves
from train.processes import Processes
from train.schedule import learning_rate

LOG_EVERY = 10
DRAW_EVERY_S = 60.0  # drawing takes the time of several small steps


class Log:
    """Progress, metrics.jsonl, TensorBoard and curves of a run; every process calls it, the first one writes."""

    def __init__(self, run: DraftRun, section: TrainSection, processes: Processes, first_step: int) -> None:
        self._run, self._section, self._processes, self._first_step = run, section, processes, first_step
        self._clock = DeviceClock() if processes.device.type == "cuda" else Clock()
        self._tokens = self._steps = 0
        self._drawn = time.perf_counter()

    def __enter__(self) -> Log:
        if self._processes.is_first:
            self._progress = Progress(self._section.num_steps, "train", "step", self._first_step)
            self._progress.__enter__()
            self._metrics = self._run.metrics_path.open("a")
            self._board = _open_board(self._run.folder / "tensorboard", self._first_step)
        return self

    def __exit__(self, *_: object) -> None:
        if self._processes.is_first:
            self._progress.__exit__()
            self._metrics.close()
            if self._board is not None:
                self._board.close()

    def start(self, part: str) -> None:
        """Count the time from here on for `part` of the step."""
        self._clock.start(part)

    def count_tokens(self, number: int) -> None:
        self._tokens += number

    def count(self) -> None:
        """Count one step."""
        self._steps += 1
        if self._processes.is_first:
            self._progress.update()

    def note_acceptance(self, step: int, length: float) -> None:
        if self._processes.is_first:
            print(f"\ntrain: step {step + 1}: predicted acceptance length {length:.3f} on the held-out part")
        self._write_acceptance(step, length)

    def note_start(self, length: float) -> None:
        """Write the acceptance before the first step, as that of step 0."""
        self._write_acceptance(-1, length)

    def _write_acceptance(self, step: int, length: float) -> None:
        if self._processes.is_first:
            line = {"step": step + 1, "held_out_acceptance": round(length, 4)}
            self._metrics.write(json.dumps(line) + "\n")
            self._metrics.flush()
            self._show("held_out_acceptance", length, step)

    def write(self, step: int, counts: torch.Tensor, normalizer: float, norm: torch.Tensor) -> float:
        """Write a line of metrics from `StepLoss.counts()` summed over the step; return the loss."""
        loss = float(counts[0]) / normalizer
        if not self._processes.is_first:
            return loss
        width = (len(counts) - 4) // 2
        right, total = counts[2 : 2 + width], counts[2 + width : 2 + 2 * width]
        parts = self._clock.take()
        seconds = sum(parts.values())
        line: dict[str, Any] = {
            "step": step + 1,
            "loss": round(loss, 5),
            "grad_norm": round(float(norm), 4),
            "learning_rate": learning_rate(self._section, step),
            "accuracy": [round(x, 4) for x in (right / total.clamp(min=1)).tolist()],
            "blocks_accepted": round(float(counts[-2] / counts[-1].clamp(min=1)), 4),
            "tokens_per_s": round(self._processes.world * self._tokens / max(seconds, 1e-9), 1),
            "seconds": {part: round(value / self._steps, 5) for part, value in parts.items()},
        }
        self._metrics.write(json.dumps(line) + "\n")
        self._metrics.flush()
        for name in ("loss", "grad_norm", "learning_rate", "blocks_accepted", "tokens_per_s"):
            self._show(name, line[name], step)
        for place, value in enumerate(line["accuracy"], start=1):
            self._show(f"accuracy/{place}", value, step)
        self._progress.set_note(f"loss {loss:.3f}, accepted {line['blocks_accepted']:.2f}")
        self._tokens = self._steps = 0
        return loss

    def _show(self, name: str, value: float, step: int) -> None:
        if self._board is not None:
            self._board.add_scalar(name, value, step + 1)

    def draw(self, *, at_once: bool) -> None:
        """Draw the curves if `at_once`, or if the last picture is older than a minute."""
        now = time.perf_counter()
        if self._processes.is_first and find_spec("matplotlib") and (at_once or now - self._drawn > DRAW_EVERY_S):
            draw_curves(self._run.metrics_path, self._run.folder / "curves.png")
            self._drawn = now


def _open_board(folder: Path, first_step: int) -> Any:
    """Return TensorBoard's writer, or None where it is not installed: metrics.jsonl has the same figures."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        print("train: tensorboard is not installed; metrics.jsonl has all figures")
        return None
    return SummaryWriter(str(folder), purge_step=first_step)


class Clock:
    """Seconds by part of a step, on the CPU's clock."""

    def __init__(self) -> None:
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._part, self._since = "rest", time.perf_counter()

    def start(self, part: str) -> None:
        """Count the time from here on for `part`."""
        now = time.perf_counter()
        self._seconds[self._part] += now - self._since
        self._part, self._since = part, now

    def take(self) -> dict[str, float]:
        """Return the seconds by part since the last call."""
        taken, self._seconds = dict(self._seconds), defaultdict(float)
        return taken


class DeviceClock(Clock):
    """Seconds by part of a step, on the GPU's clock: events are recorded and read later, so that no step waits."""

    def __init__(self) -> None:
        self._events: list[tuple[str, torch.cuda.Event]] = []
        self.start("rest")

    def start(self, part: str) -> None:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._events.append((part, event))

    def take(self) -> dict[str, float]:
        self._events[-1][1].synchronize()
        taken: defaultdict[str, float] = defaultdict(float)
        for (part, event), (_, following) in itertools.pairwise(self._events):
            taken[part] += event.elapsed_time(following) / 1000
        self._events = self._events[-1:]
        return dict(taken)


def cut_metrics(path: Path, first_step: int) -> float:
    """Drop lines of steps to be repeated and a torn last line; return the last loss left (nan: none)."""
    if not path.exists():
        return math.nan
    whole = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
    kept = [line for line in whole if first_step and json.loads(line)["step"] <= first_step]
    write_atomic(path, "".join(kept))
    losses = [entry["loss"] for entry in map(json.loads, kept) if "loss" in entry]
    return float(losses[-1]) if losses else math.nan
