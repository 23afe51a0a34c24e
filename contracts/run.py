"""One stage's run in its output folder: who may write, with which settings, on which input, for how long.

Writes: `run.json` (stage, settings, inputs, seconds, whether complete), `resolved.yaml` (the whole recipe as used),
        `command.txt` (every command line that worked here), `run.lock` (held while a process is at work).

A folder belongs to one set of settings and inputs: coming back with others is an error that names the difference.
"""

from __future__ import annotations

import fcntl
import shlex
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from contracts.errors import UserError
from contracts.files import read_json, write_atomic, write_json


class Run:
    """The run of a stage in `folder`; use `Run.open`."""

    def __init__(self, folder: Path, state: dict[str, Any], lock: Any) -> None:
        self.folder = folder
        self.state = state
        self._lock = lock
        self._earlier_seconds = float(state["seconds"])
        self._started = time.monotonic()
        self._last_tick = self._started

    @classmethod
    def open(
        cls,
        folder: Path,
        stage: str,
        *,
        settings: Mapping[str, Any],
        inputs: Mapping[str, str],
        recipe_yaml: str,
    ) -> Run:
        """Claim `folder` for this process, or find it complete.

        Raises UserError when another process works there, or when it holds a run with other settings or inputs.
        """
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / "run.lock").open("a")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(
                folder,
                found="another process at work in this folder",
                expected="one writer a folder",
                fix="Wait for it, stop it, or choose another --output.",
            ) from None
        fresh = {"stage": stage, "settings": dict(settings), "inputs": dict(inputs)}
        path = folder / "run.json"
        if path.exists():
            state = read_json(path, "a run's state")
            _refuse_changes(folder, state, fresh)
        else:
            state = {**fresh, "seconds": 0.0, "complete": False, "summary": {}}
        run = cls(folder, state, lock)
        if not run.complete:
            run._save()
            write_atomic(folder / "resolved.yaml", recipe_yaml)
            with (folder / "command.txt").open("a") as file:
                file.write(shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]) + "\n")
        return run

    @property
    def complete(self) -> bool:
        return bool(self.state["complete"])

    @property
    def seconds(self) -> float:
        """Seconds that all processes together have worked on this run."""
        return self._earlier_seconds + time.monotonic() - self._started

    def tick(self, interval_s: float = 2.0) -> None:
        """Note the time spent so far, at most every `interval_s`, so that a kill forgets little of it."""
        if time.monotonic() - self._last_tick >= interval_s:
            self._last_tick = time.monotonic()
            self._save()

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Mark the run complete, with its summary (counts, tokens)."""
        self.state["complete"] = True
        self.state["summary"] = dict(summary)
        self._save()

    def reopen(self) -> None:
        """Take back the completion, for retries of failed rows."""
        self.state["complete"] = False
        self._save()

    def _save(self) -> None:
        self.state["seconds"] = round(self.seconds, 1)
        write_json(self.folder / "run.json", self.state)


def read_run(folder: Path, stage: str) -> dict[str, Any]:
    """The state of a complete run of `stage` in `folder`. Raises UserError when there is none."""
    path = folder / "run.json"
    state = read_json(path, f"the output of `{stage}`")
    if state.get("stage") != stage:
        raise UserError(
            path,
            found=f"the output of `{state.get('stage')}`",
            expected=f"that of `{stage}`",
            fix="Give the folder that the right stage wrote.",
        )
    if not state["complete"]:
        raise UserError(
            folder, found=f"an unfinished `{stage}`", expected="a finished one", fix=f"Run `{stage}` again to finish."
        )
    return state


def _refuse_changes(folder: Path, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    if old["stage"] != new["stage"]:
        raise UserError(
            folder,
            found=f"the output of `{old['stage']}`",
            expected=f"an empty folder or one of `{new['stage']}`",
            fix="Choose another --output.",
        )
    for part in ("settings", "inputs"):
        before, now = _flatten(old[part], part), _flatten(new[part], part)
        for key in sorted({*before, *now}):
            if before.get(key) != now.get(key):
                raise UserError(
                    f"{folder} ({key})",
                    found=str(now.get(key)),
                    expected=f"{before.get(key)} as when this output was begun",
                    fix="Go on with the old value, choose another --output, or delete this folder to start afresh.",
                )


def _flatten(value: Any, name: str) -> dict[str, Any]:
    """Nested dictionaries as one, keys joined by dots."""
    if not isinstance(value, Mapping):
        return {name: value}
    return {key: leaf for inner, part in value.items() for key, leaf in _flatten(part, f"{name}.{inner}").items()}
