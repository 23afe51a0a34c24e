"""Watch a folder's stages until they are done: a table that is redrawn on a terminal, else a line for each change."""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from common.progress import LINE_INTERVAL_S
from distributed.stage import RunReader
from distributed.state import RECENT_S, StageStatus
from distributed.status import clean, note_lines, stage_table, summary_line, task_table

IDLE_S = 1800.0
"""A run without a submission ends if nothing changes for so long and only stages that did not begin are left."""
Page = Callable[[list[StageStatus], bool], None]


class Display(Protocol):
    """Shows the stages, again and again."""

    def show(self, stages: list[StageStatus]) -> None: ...


def watch(reader: RunReader, display: Display, every_s: float, page: Page | None = None) -> int:
    """Show the stages every `every_s` seconds until they end; return the exit code.

    `page` is called with the stages, and whether it will be called again.
    """
    while True:
        stages = reader.read()
        ended = verdict(stages, time.time())
        display.show(stages)
        if page is not None:
            page(stages, ended is None)
        if ended is not None:
            code, why = ended
            print(why, flush=True)
            return code
        time.sleep(every_s)


def verdict(stages: Sequence[StageStatus], now: float) -> tuple[int, str] | None:
    """Return exit code and reason if the run has ended: 1 if something failed and nothing works. None: it goes on.

    A failed task may be restarted at once, by its scheduler or a script: it counts after two minutes without a change.
    """
    states = {stage.state for stage in stages}
    if states <= {"done"}:
        return 0, "done"
    quiet_s = now - max(stage.changed for stage in stages)
    if "running" in states:
        return None
    if "failed" in states:
        return (1, "failed: something stopped before its end, and nothing works on it") if quiet_s > RECENT_S else None
    is_unsubmitted = not any(stage.is_submitted for stage in stages)
    if is_unsubmitted and "done" in states and quiet_s > IDLE_S:
        return 0, f"nothing changed for {IDLE_S / 60:.0f} minutes; what has begun is done"
    return None


class Screen:
    """A terminal: the table is redrawn in place."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._height = 0

    def show(self, stages: list[StageStatus]) -> None:
        size = shutil.get_terminal_size()
        lines = [f"{self._folder}  {time.strftime('%Y-%m-%d %H:%M:%S')}", "", *stage_table(stages)]
        for stage in stages:
            lines += stage.window
        lines = [line[: size.columns - 1] for line in lines]
        notes = note_lines(stages, self._folder)  # whole, so that commands can be copied
        lines += ["", *notes] if notes else []
        for stage in stages:
            if len(stage.tasks) > 1 and stage.state != "done":
                lines += ["", f"{stage.label or stage.name}:", *task_table(stage)]
        shown, height = list[str](), 0
        for line in map(clean, lines):
            rows = max(1, -(-len(line) // size.columns))
            if height + rows > size.lines - 2:
                shown, height = [*shown, f"... {len(lines) - len(shown)} more lines"], height + 1
                break
            shown, height = [*shown, line], height + rows
        up = f"\x1b[{self._height}F" if self._height else ""
        sys.stdout.write(f"{up}\x1b[J" + "".join(f"{line}\n" for line in shown))
        sys.stdout.flush()
        self._height = height


class Lines:
    """A file or a pipe: a line for each stage that has changed; growing rows are no change for a minute."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._shown: dict[str, tuple[object, int, float]] = {}
        self._notes: list[str] = []

    def show(self, stages: list[StageStatus]) -> None:
        now = time.monotonic()
        for stage in stages:
            state = (stage.state, stage.states, stage.counts["failed"])
            known = self._shown.get(stage.label)
            grown = known is not None and known[1] != stage.rows and now - known[2] >= LINE_INTERVAL_S
            if known is None or known[0] != state or grown:
                self._print(summary_line(stage))
                self._shown[stage.label] = state, stage.rows, now
        notes = note_lines(stages, self._folder)
        for line in notes:
            if line not in self._notes:
                self._print(line)
        self._notes = notes

    def _print(self, line: str) -> None:
        print(time.strftime("%Y-%m-%d %H:%M:%S"), clean(line), flush=True)


def open_display(folder: Path) -> Display:
    """Return the display for this process's standard output."""
    is_terminal = sys.stdout.isatty() and os.environ.get("TERM", "dumb") != "dumb"
    return Screen(folder) if is_terminal else Lines(folder)
