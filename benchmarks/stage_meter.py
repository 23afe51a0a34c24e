"""Run the stages of a side once each, and measure their time, memory and disk.

Writes: FOLDER/stages/NAME.json when a stage has ended. A stage that was interrupted starts afresh, so that its seconds
        are of one piece. FOLDER/logs/NAME.log has the output of its commands.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import psutil

from benchmarks.end_to_end_report import GIB, MIB, Stage
from common.files import read_json, write_json

MEMORY_INTERVAL_S, DISK_INTERVAL_S, PROGRESS_INTERVAL_S = 0.25, 1.0, 30.0


class Meter:
    """The largest resident memory of this process's descendants and the largest size of folders, in a block."""

    def __init__(self, folders: Sequence[Path], name: str) -> None:
        self.memory = self.disk = 0
        self._folders, self._name, self._end = folders, name, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Meter:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()
        self._look()

    def _look(self) -> None:
        self.disk = max(self.disk, sum(map(folder_bytes, self._folders)))

    def _watch(self) -> None:
        started = looked = told = time.monotonic()
        while not self._end.wait(MEMORY_INTERVAL_S):
            self.memory = max(self.memory, descendants_bytes())
            now = time.monotonic()
            if now - looked > DISK_INTERVAL_S:
                looked = now
                self._look()
            if now - told > PROGRESS_INTERVAL_S:
                told = now
                print(
                    f"  {self._name}: {now - started:.0f} s, {self.memory / GIB:.2f} GiB, {self.disk / MIB:.0f} MiB",
                    flush=True,
                )


class Stages:
    """The stages of a side, whose files are in `folder`. `inputs`: folders that count towards its disk, too."""

    def __init__(self, folder: Path, label: str, inputs: Sequence[Path] = ()) -> None:
        self.folder, self.label, self._inputs = folder, label, inputs

    def run(self, name: str, outputs: Sequence[Path], work: Callable[[], None]) -> Stage:
        """Do `work`, unless it has ended before; return its figures. Deletes what is at `outputs` first."""
        record = self.folder / "stages" / f"{name}.json"
        if record.exists():
            print(f"{self.label}: {name} is finished, skipped", flush=True)
            return Stage(**read_json(record, "a stage's figures"))
        for path in outputs:
            assert path.is_relative_to(self.folder)
            shutil.rmtree(path, ignore_errors=True)
        self.folder.mkdir(parents=True, exist_ok=True)
        print(f"{self.label}: {name} ...", flush=True)
        started, clock = time.time(), time.monotonic()
        with Meter([self.folder, *self._inputs], name) as meter:
            work()
            seconds = time.monotonic() - clock
        stage = Stage(name, started, round(seconds, 2), meter.memory, meter.disk)
        write_json(record, asdict(stage))
        print(f"{self.label}: {name} took {seconds:.0f} s", flush=True)
        return stage

    def call(self, log: str, command: Sequence[object], environment: Mapping[str, str] | None = None) -> None:
        """Run a command to its end, with its output in a log. Exits if it fails."""
        path = self.folder / "logs" / f"{log}.log"
        path.parent.mkdir(parents=True, exist_ok=True)
        words = [str(word) for word in command]
        with path.open("ab") as file:
            ended = subprocess.run(
                words, check=False, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT,
                env={**os.environ, **(environment or {})},
            )  # fmt: skip
        if ended.returncode:
            lines = path.read_text(errors="replace").strip().splitlines() or ["no output"]
            raise SystemExit(f"{self.label}: exit code {ended.returncode} ({path}): {lines[-1].strip()[-300:]}")


def descendants_bytes() -> int:
    """Return the resident bytes of all processes that this one started, with their own children."""
    total = 0
    for process in psutil.Process().children(recursive=True):
        try:
            total += int(process.memory_info().rss)
        except psutil.NoSuchProcess:
            continue
    return total


def folder_bytes(folder: Path) -> int:
    """Return the bytes of a folder's files; some may be deleted meanwhile."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                total += Path(parent, name).lstat().st_size
            except FileNotFoundError:
                continue
    return total
