"""The protocol of a tracker: a run of a stage at TensorBoard, wandb, MLflow or trackio."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol


@dataclass(frozen=True)
class TrackedRun:
    """A run of a stage, as trackers know it.

    `id` is ours, drawn when the folder was first tracked. `config` holds no secrets. A resumed run logs steps after
    `first_step`; 0: it begins. `known`: what `start` returned to an earlier process; {} if there was none.
    """

    id: str
    folder: Path
    stage: str
    project: str
    name: str
    config: Mapping[str, Any]
    first_step: int = 0
    known: Mapping[str, str] = field(default_factory=dict)


class Tracker(Protocol):
    """One tracker's run. All methods are called from one thread and may raise anything: see tracking.py.

    Addresses, accounts and keys are read by the library from its own environment variables.
    """

    def __init__(self, run: TrackedRun) -> None: ...

    def start(self) -> dict[str, str]:
        """Begin the run, or continue the known one; return what identifies it: `run_id`, and `url` if it has one."""

    def last_step(self, metric: str, /) -> int:
        """Return the last step that this run had of a metric when it started; -1: none."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Log values of one step; steps never decrease."""

    def finish(self, failed: bool, /) -> None:
        """Send what is left, and mark the run as finished or failed."""
