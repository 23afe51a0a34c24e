"""Runs of trackers: readers of what was logged, in each tracker's own files, and a process that logs and is killed."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from common.trackers.identity import read_identity
from common.trackers.tracker import TrackedRun
from common.trackers.tracking import Tracking

Curves = dict[str, list[tuple[int, float]]]
"""(step, value) of each metric, in the order of the file, as often as it is there."""


class Stub:
    """A tracker that keeps what it gets, and fails or hangs at our command."""

    logged: ClassVar[list[tuple[dict[str, float], int]]] = []
    failures = 0
    hangs = threading.Event()

    def __init__(self, run: TrackedRun) -> None: ...

    def start(self) -> dict[str, str]:
        return {"run_id": "stub"}

    def last_step(self, metric: str, /) -> int:
        return -1

    def log(self, values: Mapping[str, float], step: int) -> None:
        if type(self).failures:
            type(self).failures -= 1
            raise ConnectionError("http://user:a-password@localhost is down\nand more")
        type(self).hangs.wait()
        type(self).logged.append((dict(values), step))

    def finish(self, failed: bool, /) -> None: ...


def read_tensorboard(folder: Path) -> tuple[Curves, dict[str, Any]]:
    from tensorboard.backend.event_processing.event_accumulator import SCALARS, EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={SCALARS: 0}).Reload()
    return {name: [(event.step, event.value) for event in events.Scalars(name)] for name in events.Tags()[SCALARS]}, {}


def read_wandb(folder: Path) -> tuple[Curves, dict[str, Any]]:
    """Of all processes: each has a folder of its own. wandb's own process writes on when ours has ended."""
    from common.trackers.wandb import read_offline

    run_id = read_identity(folder)["trackers"]["wandb"]["run_id"]
    last = max((folder / "wandb").glob("offline-run-*"))
    while b"stream: all finished" not in (last / "logs/debug-internal.log").read_bytes():
        time.sleep(0.05)
    time.sleep(0.5)
    curves: Curves = {}
    config: dict[str, Any] = {}
    for record in read_offline(folder, run_id):
        for item in record.history.item:
            name = item.key or "/".join(item.nested_key)
            if not name.startswith("_"):
                curves.setdefault(name, []).append((record.history.step.num, json.loads(item.value_json)))
        for item in record.run.config.update:
            config[item.key] = json.loads(item.value_json)
    return curves, config


def read_mlflow(folder: Path) -> tuple[Curves, dict[str, Any]]:
    os.environ["MLFLOW_ALLOW_FILE_STORE"] = "true"
    from mlflow import MlflowClient

    client, facts = MlflowClient((folder / "mlflow").as_uri()), read_identity(folder)["trackers"]["mlflow"]
    found = client.get_run(facts["run_id"]).data
    curves = {
        name: [(metric.step, metric.value) for metric in client.get_metric_history(facts["run_id"], name)]
        for name in found.metrics
    }
    return curves, found.params


def read_trackio(folder: Path) -> tuple[Curves, dict[str, Any]]:
    from trackio.sqlite_storage import SQLiteStorage

    identity = read_identity(folder)
    facts, project = identity["trackers"]["trackio"], identity["project"]
    curves: Curves = {}
    for row in SQLiteStorage.get_logs(project, facts["name"], run_id=facts["run_id"]):
        for name in row.keys() - {"step", "timestamp"}:
            curves.setdefault(name, []).append((row["step"], row[name]))
    return curves, SQLiteStorage.get_run_config(project, facts["name"], run_id=facts["run_id"]) or {}


READERS = {"tensorboard": read_tensorboard, "wandb": read_wandb, "mlflow": read_mlflow, "trackio": read_trackio}


def begin(folder: Path, first_step: int = 0, **config: Any) -> TrackedRun:
    """The run of `folder` under an id of its own."""
    from common.trackers.identity import begin_identity

    found = begin_identity(folder, f"project-{folder.name}", None, "f" * 64)
    return TrackedRun(found["id"], folder, "train offline", found["project"], found["name"], config, first_step)


def values_at(step: int) -> dict[str, float]:
    return {"loss": 1 / step, "accuracy/1": step / 8}


def main(tracker: str, folder: Path, num_steps: int) -> None:
    """Log some steps, and be killed once the tracker has them."""
    tracking = Tracking(begin(folder), [tracker])
    tracking.__enter__()
    for step in range(1, num_steps + 1):
        tracking.log(values_at(step), step)
    while any(thread._entries for thread in tracking._threads):
        time.sleep(0.01)
    time.sleep(1.0 if tracker in ("trackio", "wandb") else 0.0)  # they write a moment later
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
