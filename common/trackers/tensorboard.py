"""TensorBoard: event files in the run's folder. Writes: FOLDER/tensorboard/."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import SCALARS, EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from common.trackers.tracker import TrackedRun


class TensorBoard:
    """Implements `Tracker`. A resume makes readers drop the events of steps that are done again."""

    def __init__(self, run: TrackedRun) -> None:
        self._first_step = run.first_step
        self._folder = run.folder / "tensorboard"
        self._last_steps: dict[str, int] = {}

    def start(self) -> dict[str, str]:
        if self._first_step:
            self._last_steps = _last_steps(self._folder, self._first_step)
        purge_step = self._first_step + 1 if self._first_step else 0  # events of this step and later ones are dropped
        self._writer = SummaryWriter(str(self._folder), purge_step=purge_step)
        return {"folder": self._folder.name}

    def last_step(self, metric: str, /) -> int:
        return self._last_steps.get(metric, -1)

    def log(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def finish(self, _failed: bool, /) -> None:
        self._writer.close()


def _last_steps(folder: Path, limit: int) -> dict[str, int]:
    """Return the last step of each metric up to `limit`. The writer holds events back, which a killed process loses."""
    events = EventAccumulator(str(folder), size_guidance={SCALARS: 0}).Reload()
    steps = {name: [event.step for event in events.Scalars(name)] for name in events.Tags()[SCALARS]}
    return {name: max((step for step in found if step <= limit), default=-1) for name, found in steps.items()}
