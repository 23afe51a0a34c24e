"""Progress, metrics.jsonl, trackers and curves of a training run, written by the first process."""

from __future__ import annotations

import itertools
import json
import math
import time
from collections import defaultdict
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from common.files import write_atomic
from common.progress import Progress
from common.trackers.tracking import Tracking
from contracts.draft import DraftRun
from recipe.train import TrainSection
from train.curves import draw_curves
from train.processes import Processes
from train.schedule import learning_rate

LOG_EVERY = 10
DRAW_EVERY_S = 60.0  # drawing takes the time of several small steps


class Log:
    """Progress, metrics.jsonl, trackers and curves of a run; every process calls it, the first one writes.

    `tracking` is None in all processes but the first.
    """

    def __init__(
        self, run: DraftRun, section: TrainSection, processes: Processes, first_step: int, tracking: Tracking | None
    ) -> None:
        self._run, self._section, self._processes, self._first_step = run, section, processes, first_step
        self._tracking = tracking
        self._clock = DeviceClock() if processes.device.type == "cuda" else Clock()
        self._tokens = self._steps = 0
        self._drawn = time.perf_counter()

    def __enter__(self) -> Log:
        if self._processes.is_first:
            self._progress = Progress(self._section.num_steps, "train", "step", self._first_step)
            self._progress.__enter__()
            self._metrics = self._run.metrics_path.open("a")
        if self._tracking is not None:
            self._tracking.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        if self._processes.is_first:
            self._progress.__exit__()
            self._metrics.close()
        if self._tracking is not None:
            self._tracking.__exit__(*error)

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
            self._write_line({"step": step + 1, "held_out_acceptance": round(length, 4)})

    def _write_line(self, line: dict[str, Any]) -> None:
        self._metrics.write(json.dumps(line) + "\n")
        self._metrics.flush()
        if self._tracking is not None:
            self._tracking.log(scalars_of(line), line["step"])

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
        self._write_line(line)
        self._progress.set_note(f"loss {loss:.3f}, accepted {line['blocks_accepted']:.2f}")
        self._tokens = self._steps = 0
        return loss

    def draw(self, *, at_once: bool) -> None:
        """Draw the curves if `at_once`, or if the last picture is older than a minute."""
        now = time.perf_counter()
        if self._processes.is_first and find_spec("matplotlib") and (at_once or now - self._drawn > DRAW_EVERY_S):
            draw_curves(self._run.metrics_path, self._run.folder / "curves.png")
            self._drawn = now


SCALARS = ("loss", "grad_norm", "learning_rate", "blocks_accepted", "tokens_per_s", "held_out_acceptance")


def scalars_of(line: dict[str, Any]) -> dict[str, float]:
    """Return what trackers get of a line of metrics.jsonl; the accuracy by draft token as `accuracy/1`, ..."""
    places = enumerate(line.get("accuracy", []), start=1)
    return {name: line[name] for name in SCALARS if name in line} | {f"accuracy/{at}": value for at, value in places}


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


def cut_metrics(path: Path, first_step: int) -> list[dict[str, Any]]:
    """Drop lines of steps to be repeated and a torn last line; return the lines left."""
    if not path.exists():
        return []
    whole = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
    kept = [line for line in whole if first_step and json.loads(line)["step"] <= first_step]
    write_atomic(path, "".join(kept))
    return [json.loads(line) for line in kept]


def last_loss(lines: Sequence[dict[str, Any]]) -> float:
    """Return the last loss of lines of metrics.jsonl; nan: none."""
    return next((float(line["loss"]) for line in reversed(lines) if "loss" in line), math.nan)
