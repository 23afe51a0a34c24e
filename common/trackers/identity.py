"""What identifies a folder's run at its trackers: `trackers.json`.

Writes: `trackers.json` in the run's folder: our id, project and name, and for each tracker what `Tracker.start`
        returned (run id, URL). It holds no key and no credentials.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common.files import read_json, write_json

IDENTITY_FILE = "trackers.json"


def read_identity(folder: Path) -> dict[str, Any]:
    """Return the content of a folder's `trackers.json`; without one, no trackers. Raises UserError for a broken one."""
    path = folder / IDENTITY_FILE
    if not path.exists():
        return {"trackers": {}}
    found: dict[str, Any] = read_json(path, "the runs at trackers")
    return found


def begin_identity(folder: Path, project: str, name: str | None, fingerprint: str) -> dict[str, Any]:
    """Return the content of `trackers.json`, written with a new id if there is none yet.

    A run keeps the project and name that it began with. `name` None: the last two parts of the folder's path.
    `fingerprint`: of the settings and inputs.
    """
    found = read_identity(folder)
    if "id" not in found:
        name = name or "-".join(part for part in folder.resolve().parts[-2:] if part != "/")
        id_ = uuid.uuid4().hex[:12]
        found = {"id": id_, "project": project, "name": name, "fingerprint": fingerprint, "trackers": {}}
        write_json(folder / IDENTITY_FILE, found)
    return found


def note_tracker(folder: Path, tracker: str, facts: Mapping[str, Any]) -> None:
    """Add facts of one tracker's run. Only one thread at a time may write."""
    found = read_identity(folder)
    found["trackers"][tracker] = {**found["trackers"].get(tracker, {}), **facts}
    write_json(folder / IDENTITY_FILE, found)
