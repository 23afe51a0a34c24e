"""Experiment trackers behind one protocol (tracker.py), logged to without ever holding up a run (tracking.py).

`TRACKERS` is the one list of trackers: a new one is a module beside this and an entry. Importing this package imports
none of their libraries.
"""

from __future__ import annotations

from collections.abc import Iterable
from importlib.util import find_spec

from common.errors import UserError

TRACKERS = {
    "tensorboard": "common.trackers.tensorboard:TensorBoard",
    "wandb": "common.trackers.wandb:Wandb",
    "mlflow": "common.trackers.mlflow:MLflow",
    "trackio": "common.trackers.trackio:Trackio",
}
"""Classes that implement `common.trackers.tracker.Tracker`. A tracker has the name of its library's module and of the
extra that installs it."""


def installed_trackers(names: Iterable[str]) -> list[str]:
    """Return those of the trackers that can be used: all, or all but TensorBoard, whose figures other files have too.

    Raises UserError if the library of another one is not installed.
    """
    missing = [name for name in names if find_spec(name) is None]
    for name in missing:
        if name != "tensorboard":
            raise UserError(
                f"tracking ({name})",
                found=f"{name}, whose library is not installed",
                expected="an installed one",
                fix=f"Run: pip install -e '.[{name}]', or remove it from the recipe.",
            )
    return [name for name in names if name not in missing]
