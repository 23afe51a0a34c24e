"""How far a submitted run is: read from the tasks' ledgers and states, whatever the scheduler remembers."""

from __future__ import annotations

import json
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from contracts.files import read_json
from contracts.ledger import read_entries
from contracts.recipe import load_recipe
from contracts.shards import is_at_work
from distributed.plan import PLAN_FILE, StagePlan, read_plan

RECENT_S = 120.0
"""A task on another machine, whose lock may not be seen here, is taken for running while its state is so fresh."""


@dataclass(frozen=True)
class TaskStatus:
    """`state` is done, running, failed (begun, and nobody at work) or waiting; `rows` are those accounted for."""

    number: int
    state: str
    rows: int
    rows_per_s: float
    counts: Counter[str]


def task_status(plan: StagePlan, number: int) -> TaskStatus:
    """The status of one task."""
    folder = plan.task_folder(number)
    state: dict[str, Any] = {}
    if (folder / "run.json").exists():
        state = read_json(folder / "run.json", "a task's state")
    counts: Counter[str] = Counter()
    rows = _train_steps(folder) if plan.stage == "train" else 0
    if plan.stage != "train" and (folder / "ledger.jsonl").exists():
        latest = {_row_of(entry): entry["status"] for entry in read_entries(folder / "ledger.jsonl")}
        counts, rows = Counter(latest.values()), len(latest)
    if state.get("complete"):
        name = "done"
    elif not state:
        name = "waiting"
    else:
        fresh = time.time() - (folder / "run.json").stat().st_mtime < RECENT_S
        name = "running" if is_at_work(folder) or (fresh and not _is_here(folder)) else "failed"
    rate = rows / state["seconds"] if state.get("seconds") else 0.0
    return TaskStatus(number, name, rows, rate, counts)


def show_status(plan: StagePlan, total: int | None) -> list[TaskStatus]:
    """Print a table of all tasks and a line of sums. `total`: rows of the whole input, if it is known."""
    tasks = [task_status(plan, number) for number in range(1 if plan.stage == "train" else plan.shards)]
    unit = "steps" if plan.stage == "train" else "rows"
    print(f"{'task':>6} {'state':8} {unit:>9} {unit + '/s':>9}  {'of them':32}")
    for task in tasks:
        parts = ", ".join(f"{count} {status}" for status, count in sorted(task.counts.items()))
        print(f"{task.number:>6} {task.state:8} {task.rows:>9} {task.rows_per_s:>9.2f}  {parts}")
    states = Counter(task.state for task in tasks)
    rows = sum(task.rows for task in tasks)
    rate = sum(task.rows_per_s for task in tasks if task.state == "running")
    line = ", ".join(f"{states[name]} {name}" for name in ("done", "running", "failed", "waiting") if states[name])
    remaining = "" if total is None else f"; {total - rows} of {total} {unit} remain"
    if total is not None and rate and total > rows:
        remaining += f", about {_duration((total - rows) / rate)} at {rate:.2f} {unit}/s"
    print(f"{plan.stage}: {line}; {rows} {unit}{remaining}")
    return tasks


def count_total(plan: StagePlan) -> int | None:
    """Rows of the whole input, if they can be told. A dump counts on what its synthesis has yet to write."""
    if plan.stage == "train":
        return load_recipe(Path(plan.recipe), plan.overrides).train.num_steps
    if plan.stage == "dump":
        state = Path(plan.input) / "run.json"
        if state.exists():
            summary = read_json(state, "a synthesis").get("summary", {})
            return summary.get("done", 0) + summary.get("truncated", 0) or None
        if not (Path(plan.input) / PLAN_FILE).exists():
            return None
        before = read_plan(Path(plan.input))
        lost = [task_status(before, number).counts for number in range(before.shards)]
        rows = count_total(before)
        return None if rows is None else rows - sum(counts["filtered"] + counts["failed"] for counts in lost)
    if plan.input.endswith(".jsonl") and Path(plan.input).exists():
        synth = load_recipe(Path(plan.recipe), plan.overrides).synth
        temperatures = len(synth.temperature) if isinstance(synth.temperature, list) else 1
        with Path(plan.input).open("rb") as file:
            return sum(1 for line in file if line.strip()) * synth.num_samples * temperatures
    return None


def _row_of(entry: dict[str, Any]) -> Any:
    return (entry["index"], entry["sample"]) if "index" in entry else entry["id"]


def _train_steps(folder: Path) -> int:
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return max((json.loads(line)["step"] for line in lines if line.endswith("}")), default=0)


def _is_here(folder: Path) -> bool:
    """Whether the folder's lock is seen on this machine: not on network file systems."""
    kinds = {line.split()[1]: line.split()[2] for line in Path("/proc/mounts").read_text().splitlines()}
    mount = next((str(parent) for parent in (folder.resolve(), *folder.resolve().parents) if str(parent) in kinds), "/")
    return kinds.get(mount, "") not in ("nfs", "nfs4", "lustre", "gpfs", "beegfs", "cifs", "fuse")


def _duration(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{seconds / 60:.0f} min"
