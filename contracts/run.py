"""The run of a stage in its output folder: lock, settings, inputs, time and completion.

Writes: `run.json` (stage, settings, inputs, software and machine that began it, seconds, whether
        complete), `resolved.yaml` (the
        recipe with defaults), `command.txt` (all command lines of the run), `run.lock` (locked while a process works).
        Secrets are redacted (common/redact.py).

A folder belongs to one set of settings and inputs. Resuming with others is an error that names the difference.
"""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from common.errors import UserError
from common.files import explain_unwritable, hash_json, lock_file, read_json, write_atomic, write_json
from common.redact import redact, redact_words
from common.versions import read_environment
from contracts.shards import next_generation

LOCK_TRIES, LOCK_WAIT_S = 5, 0.05
"""A reader that asks whether a process is at work (contracts/shards.py) holds the lock for an instant."""


class Run:
    """The run of a stage in `folder`; use `Run.open`."""

    def __init__(self, folder: Path, state: dict[str, Any], lock: IO[str]) -> None:
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
        """Lock `folder` for this process and return its run, new, unfinished or complete.

        Raises UserError if the folder cannot be written, another process works there, or it holds a run with other
        settings or inputs.
        """
        lock = _lock(folder)
        fresh = {"stage": stage, "settings": redact(settings), "inputs": dict(inputs)}
        path = folder / "run.json"
        if path.exists():
            state = read_json(path, "a run's state")
            _refuse_changes(folder, state, fresh)
        else:
            begun = {"environment": read_environment(), "seconds": 0.0, "complete": False, "summary": {}}
            state = {**fresh, **begun}  # a resume compares what is fresh
        run = cls(folder, state, lock)
        if not run.complete:
            run._begin()
            write_atomic(folder / "resolved.yaml", recipe_yaml)
            with (folder / "command.txt").open("a") as file:
                file.write(shlex.join([Path(sys.argv[0]).name, *redact_words(sys.argv[1:])]) + "\n")
        return run

    @property
    def complete(self) -> bool:
        return bool(self.state["complete"])

    @property
    def fingerprint(self) -> str:
        """The hash of what the output follows from: stage, settings and inputs."""
        return hash_json({key: self.state[key] for key in ("stage", "settings", "inputs")})

    @property
    def seconds(self) -> float:
        """Seconds of work on this run, summed over all processes."""
        return self._earlier_seconds + time.monotonic() - self._started

    def tick(self, interval_s: float = 2.0) -> None:
        """Save the elapsed time, at most every `interval_s`, so that a killed run loses little of it."""
        if time.monotonic() - self._last_tick >= interval_s:
            self._last_tick = time.monotonic()
            self._save()

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Mark the run complete and save its summary (counts, tokens)."""
        self.state["complete"] = True
        self.state["summary"] = dict(summary)
        self._save()

    def reopen(self) -> None:
        """Mark the run unfinished, to retry failed rows."""
        self.state["complete"] = False
        self._begin()

    def _begin(self) -> None:
        """Save the run's state when work begins; a shard joins the latest generation."""
        generation = next_generation(self.folder)
        if generation is not None:
            self.state["generation"] = generation
        self._save()

    def _save(self) -> None:
        self.state["seconds"] = round(self.seconds, 1)
        write_json(self.folder / "run.json", self.state)


def _lock(folder: Path) -> IO[str]:
    """Create `folder` and lock it for this process; closing the returned file releases the lock."""
    with explain_unwritable(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / "run.lock").open("a")
    for _ in range(LOCK_TRIES):
        if lock_file(lock, folder, wait=False):
            return lock
        time.sleep(LOCK_WAIT_S)
    raise UserError(
        folder,
        found="another process at work in this folder",
        expected="one writer a folder",
        fix="Wait for it, stop it, or choose another --output.",
    )


def is_complete(folder: Path) -> bool:
    """Return whether a folder holds a complete run."""
    path = folder / "run.json"
    return path.exists() and bool(read_json(path, "a run's state").get("complete"))


def read_run(folder: Path, stage: str) -> dict[str, Any]:
    """Return the state of a complete run of `stage` in `folder`. Raises UserError if there is none."""
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
    """Flatten nested dictionaries; keys are joined by dots."""
    if not isinstance(value, Mapping):
        return {name: value}
    return {key: leaf for inner, part in value.items() for key, leaf in _flatten(part, f"{name}.{inner}").items()}
