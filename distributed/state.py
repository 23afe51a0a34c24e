"""The state of tasks and stages, read from their files; the scheduler is not asked.

Reads: run.json, ledger.jsonl, metrics.jsonl, capture.json of each task. Readers keep what they have read, so that a
       second look costs only what is new.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common.watched import JsonFile
from contracts.shards import is_at_work
from contracts.tally import FailedRows, LedgerTally
from distributed.logs import Curves, SynthLog, number

RECENT_S = 120.0
"""A task counts as running while its state is this fresh, where the lock of another machine cannot be seen."""
MIN_OBSERVED_S, MAX_OBSERVED_S = 20.0, 300.0
"""A rate is that of the last minutes, if they were watched; else that of the whole run."""
KINDS = {"synth generate": "synth", "dump run": "dump", "train offline": "train"}
"""The kind of a stage by the name in its run.json. Other stages have no rows to count."""


@dataclass(frozen=True)
class TaskStatus:
    """`state` is done, running, failed (begun, and no process works on it) or waiting; `rows` have a ledger line.

    `changed`: when a file of its folder was written last, as time.time(); 0: never.
    """

    number: int
    state: str
    rows: int
    rows_per_s: float
    counts: Counter[str]
    folder: Path
    seconds: float = 0.0
    changed: float = 0.0
    note: str = ""


@dataclass(frozen=True)
class StageStatus:
    """A stage and its tasks. `label`: its folder in the folder that was asked for; `total`: rows of the finished stage.

    `failed` are the reasons of failed rows by id, `filtered` counts those of filtered ones. `is_joined`: whether the
    outputs of its shards were joined, where they must be.
    """

    name: str
    kind: str
    label: str
    folder: Path
    tasks: tuple[TaskStatus, ...]
    total: int | None = None
    is_estimate: bool = False
    is_joined: bool = True
    is_submitted: bool = False
    window: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    failed: tuple[tuple[str, str], ...] = ()
    filtered: Counter[str] = field(default_factory=Counter)
    summary: dict[str, Any] = field(default_factory=dict)
    curves: Curves | None = None

    @property
    def unit(self) -> str:
        return "steps" if self.kind == "train" else "rows"

    @property
    def rows(self) -> int:
        return sum(task.rows for task in self.tasks)

    @property
    def rows_per_s(self) -> float:
        """Rows per second of the tasks that run."""
        return sum(task.rows_per_s for task in self.tasks if task.state == "running")

    @property
    def counts(self) -> Counter[str]:
        """Rows by status."""
        return sum((task.counts for task in self.tasks), Counter[str]())

    @property
    def states(self) -> Counter[str]:
        """Tasks by state."""
        return Counter(task.state for task in self.tasks)

    @property
    def state(self) -> str:
        """The state of the whole: running if a task is, done if all are and their outputs are joined."""
        if self.states["running"]:
            return "running"
        if self.states["done"] == len(self.tasks):
            return "done" if self.is_joined else "waiting"
        return "failed" if self.states["failed"] else "waiting"

    @property
    def changed(self) -> float:
        return max((task.changed for task in self.tasks), default=0.0)

    @property
    def seconds(self) -> float:
        return sum(task.seconds for task in self.tasks)

    @property
    def seconds_left(self) -> float | None:
        """Seconds until the last row at the present rate; None: unknown."""
        if self.total is None or not self.rows_per_s or self.total <= self.rows:
            return None
        return (self.total - self.rows) / self.rows_per_s


class TaskReader:
    """Reads a task's folder; `update` before `status`."""

    def __init__(self, folder: Path, number: int = 0, failed: FailedRows | None = None) -> None:
        self.folder, self.number = folder, number
        self.is_superseded = False  # the rest of its rows went to shards of another number
        self.state = JsonFile(folder / "run.json")
        self.capture = JsonFile(folder / "capture.json")
        self.ledger = LedgerTally(folder / "ledger.jsonl", failed)
        self.curves = Curves(folder / "metrics.jsonl")
        self.log = SynthLog(folder / "metrics.jsonl")
        self._seen: deque[tuple[float, int]] = deque()

    @property
    def stage(self) -> str:
        """The name of the stage in its state; "" if it is unknown."""
        return str(self.state.value.get("stage", ""))

    @property
    def generation(self) -> int:
        found = self.state.value.get("generation", 0)
        return found if isinstance(found, int) else 0

    def update(self, kind: str) -> None:
        """Read what is new in the task's files."""
        self.state.update()
        if kind == "train":
            self.curves.update()
        elif kind == "synth":
            self.log.update()
        if kind != "train":
            self.ledger.update()
        if kind == "dump":
            self.capture.update()

    def problems(self) -> list[str]:
        """Name what is broken in the task's files."""
        files = (self.state, self.capture, self.ledger, self.curves, self.log)
        found = [f"{file.path.name}: {file.problem}" for file in files if file.problem]
        state, counts = self.state.value, self.ledger.counts
        summary = state.get("summary")
        if state.get("complete") is True and isinstance(summary, dict) and self.ledger.num_lines:
            # Not those that failed: a shard of another number may have made them good.
            said = {status: summary[status] for status in ("done", "truncated", "filtered") if status in summary}
            if said and not self.ledger.problem and any(counts[status] != count for status, count in said.items()):
                told = ", ".join(f"{count} {status}" for status, count in said.items())
                had = ", ".join(f"{counts[status]} {status}" for status in said)
                found.append(f"ledger.jsonl has {had}, and run.json says {told}")
        return found

    def status(self, kind: str, num_tasks: int = 1) -> TaskStatus:
        """Return the status; of a capture, task `number` of `num_tasks` for a rolling store."""
        state, counts = self.state.value, Counter(self.ledger.counts)
        rows = self.curves.num_steps if kind == "train" else self.ledger.num_rows
        next_place = self.capture.value.get("next_place")
        if kind == "dump" and isinstance(next_place, int):
            rows, counts = len(range(self.number, next_place, num_tasks)), Counter()
        name = self._name_state()
        seconds = _seconds(state)
        return TaskStatus(
            self.number, name, rows, self._rate(kind, name, rows, seconds), counts, self.folder, seconds,
            newest_change(self.folder), self._note(kind),
        )  # fmt: skip

    def _name_state(self) -> str:
        if self.state.value.get("complete") is True:
            return "done"
        if not self.state.exists:
            return "waiting"
        try:
            fresh = time.time() - self.state.path.stat().st_mtime < RECENT_S
            at_work = is_at_work(self.folder)
        except OSError:  # deleted meanwhile, or not ours to read
            fresh = at_work = False
        if at_work or (fresh and not _is_here(self.folder)):
            return "running"
        return "done" if self.is_superseded else "failed"

    def _rate(self, kind: str, state: str, rows: int, seconds: float) -> float:
        now = time.monotonic()
        if self._seen and self._seen[-1][1] > rows:
            self._seen.clear()
        self._seen.append((now, rows))
        while now - self._seen[0][0] > MAX_OBSERVED_S:
            self._seen.popleft()
        since, first = self._seen[0]
        if state == "running" and now - since >= MIN_OBSERVED_S:
            return (rows - first) / (now - since)
        last = self.curves.last
        if kind == "train" and state == "running" and last is not None and last.step_s > 0:
            return 1 / last.step_s
        return rows / seconds if seconds else 0.0

    def _note(self, kind: str) -> str:
        if kind == "train" and (last := self.curves.last):
            accepted = f"{1 + last.blocks_accepted:.2f} tokens per block"
            return f"loss {last.loss:.3f}, {accepted}, {last.tokens_per_s:.0f} tokens/s"
        if kind == "synth" and (line := self.log.last):
            retries = f", {line['retries']} retries" if line["retries"] else ""
            return f"{line['tokens_per_s']:.0f} tokens/s, {line['in_flight']} in flight{retries}"
        return ""


def newest_change(folder: Path) -> float:
    """Return when a file directly in `folder` was written last, as time.time(); 0.0 without one."""
    newest = 0.0
    try:
        for path in folder.iterdir():
            if not path.name.startswith(".") and path.suffix not in (".lock", ".html") and path.is_file():
                newest = max(newest, path.stat().st_mtime)
    except OSError:  # it is not there yet, or a file was deleted meanwhile
        pass
    return newest


def _seconds(state: dict[str, Any]) -> float:
    try:
        return max(0.0, number(state.get("seconds", 0.0)))
    except TypeError:
        return 0.0


def _is_here(folder: Path) -> bool:
    """Return whether locks in this folder are visible here: they may not be on network file systems."""
    kinds = {line.split()[1]: line.split()[2] for line in Path("/proc/mounts").read_text().splitlines()}
    mount = next((str(parent) for parent in (folder.resolve(), *folder.resolve().parents) if str(parent) in kinds), "/")
    return kinds.get(mount, "") not in ("nfs", "nfs4", "lustre", "gpfs", "beegfs", "cifs", "fuse")
