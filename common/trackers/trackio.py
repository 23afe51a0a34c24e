"""trackio. Writes: its database on this machine (TRACKIO_DIR), or sends to TRACKIO_SPACE_ID or TRACKIO_SERVER_URL."""

from __future__ import annotations

from collections.abc import Mapping

import trackio
from trackio.sqlite_storage import SQLiteStorage

from common.trackers.tracker import TrackedRun


class Trackio:
    """Implements `Tracker`. trackio finds a run by its name, which therefore ends with our id."""

    def __init__(self, run: TrackedRun) -> None:
        self._run = run
        self._last_steps: dict[str, int] = {}

    def start(self) -> dict[str, str]:
        run = self._run
        name = f"{run.name}-{run.id}"
        self._trackio = trackio.init(run.project, name, config=dict(run.config), resume="allow", embed=False)
        self._next_step = self._trackio._next_step  # asked of the server, if it is one
        if self._trackio.url is None:
            for row in SQLiteStorage.get_logs(run.project, name, run_id=self._trackio.id):
                for metric in row.keys() - {"step", "timestamp"}:
                    self._last_steps[metric] = max(row["step"], self._last_steps.get(metric, -1))
        found = {"run_id": self._trackio.id, "name": name}
        return found if self._trackio.url is None else {**found, "url": self._trackio.url}

    def last_step(self, metric: str, /) -> int:
        return self._last_steps.get(metric, -1) if self._trackio.url is None else self._next_step - 1

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._trackio.log(dict(values), step=step)

    def finish(self, _failed: bool, /) -> None:
        self._trackio.finish()
