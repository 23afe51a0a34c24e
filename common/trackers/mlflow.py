"""MLflow. Writes: FOLDER/mlflow/ (a file store), unless MLFLOW_TRACKING_URI names another place.

Server and credentials come from MLFLOW_TRACKING_URI, MLFLOW_TRACKING_USERNAME, MLFLOW_TRACKING_PASSWORD and
MLFLOW_TRACKING_TOKEN.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Mapping
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Metric, Param

from common.redact import redact_url
from common.trackers.tracker import TrackedRun

MAX_PARAMS = 100  # of one request
MAX_PARAM_CHARACTERS = 6000
FORBIDDEN = re.compile(r"[^\w\-. /]", re.ASCII)
"""Characters that names of metrics and parameters must not have, on any of MLflow's systems."""


class MLflow:
    """Implements `Tracker` with MLflow's client, which keeps no state in the process and reads no command line."""

    def __init__(self, run: TrackedRun) -> None:
        self._run = run
        self._last_steps: dict[str, int] = {}

    def start(self) -> dict[str, str]:
        run, uri = self._run, os.environ.get("MLFLOW_TRACKING_URI")
        if not uri:
            uri = (run.folder / "mlflow").resolve().as_uri()
        if uri.startswith("file:"):
            os.environ.setdefault(
                "MLFLOW_ALLOW_FILE_STORE", "true"
            )  # MLflow asks for it; its small package has no other
        self._client = MlflowClient(uri)
        if "run_id" in run.known:
            self._id = run.known["run_id"]
            found = self._client.get_run(self._id)
            self._client.update_run(self._id, status="RUNNING")
            for name in found.data.metrics:
                history = self._client.get_metric_history(self._id, name)
                self._last_steps[name] = max((metric.step for metric in history), default=-1)
        else:
            found = self._create(run)
            self._id = found.info.run_id
        url = redact_url(uri).rstrip("/")
        if uri.startswith("http"):
            url = f"{url}/#/experiments/{found.info.experiment_id}/runs/{self._id}"
        return {"run_id": self._id, "url": url}

    def _create(self, run: TrackedRun) -> Any:
        experiment = self._client.get_experiment_by_name(run.project)
        experiment_id = experiment.experiment_id if experiment else self._client.create_experiment(run.project)
        tags = {"draftline.id": run.id, "draftline.stage": run.stage}
        created = self._client.create_run(experiment_id, run_name=run.name, tags=tags)
        params = [Param(_name(key), str(value)[:MAX_PARAM_CHARACTERS]) for key, value in flatten(run.config).items()]
        for start in range(0, len(params), MAX_PARAMS):
            self._client.log_batch(created.info.run_id, params=params[start : start + MAX_PARAMS])
        return created

    def last_step(self, metric: str, /) -> int:
        return self._last_steps.get(_name(metric), -1)

    def log(self, values: Mapping[str, float], step: int) -> None:
        now = int(time.time() * 1000)
        self._client.log_batch(self._id, [Metric(_name(name), value, now, step) for name, value in values.items()])

    def finish(self, failed: bool, /) -> None:
        self._client.set_terminated(self._id, "FAILED" if failed else "FINISHED")


def _name(text: str) -> str:
    return FORBIDDEN.sub("_", text)


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return a nested mapping as one, with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        flat |= flatten(value, f"{name}.") if isinstance(value, Mapping) else {name: value}
    return flat
