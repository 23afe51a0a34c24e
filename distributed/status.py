"""Progress of a submitted run, read from the ledgers and states of its tasks; the scheduler is not asked."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.files import read_json
from contracts.ledger import read_entries
from contracts.mooncake import MooncakeShelf
from contracts.rolling import CaptureState, Position, RollingStore, is_rolling
from contracts.shards import is_at_work, shard_of
from distributed.plan import PLAN_FILE, StagePlan, read_plan
from recipe.load import load_recipe

RECENT_S = 120.0
"""A task counts as running while its state is this fresh, where the lock of another machine cannot be seen."""


@dataclass(frozen=True)
class TaskStatus:
    """`state` is done, running, failed (begun, and no process works on it) or waiting; `rows` have a ledger line."""

    number: int
    state: str
    rows: int
    rows_per_s: float
    counts: Counter[str]


def task_status(plan: StagePlan, number: int) -> TaskStatus:
    """Return the status of one task."""
    folder = plan.task_folder(number)
    state: dict[str, Any] = {}
    if (folder / "run.json").exists():
        state = read_json(folder / "run.json", "a task's state")
    counts: Counter[str] = Counter()
    rows = _train_steps(folder) if plan.stage == "train" else 0
    if plan.window_gib is not None and (folder / "capture.json").exists():
        captured = CaptureState.model_validate(read_json(folder / "capture.json", "a capture's state"))
        rows = len(range(number, captured.next_place, plan.shards))
    elif plan.stage != "train" and (folder / "ledger.jsonl").exists():
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


def show_status(plan: StagePlan) -> None:
    """Print a table of all tasks, and a line with their sums and what remains."""
    tasks = [task_status(plan, number) for number in plan.numbers]
    unit = "steps" if plan.stage == "train" else "rows"
    print(f"{'task':>6} {'state':8} {unit:>9} {unit + '/s':>9}  {'of them':32}")
    for task in tasks:
        parts = ", ".join(f"{count} {status}" for status, count in sorted(task.counts.items()))
        print(f"{task.number:>6} {task.state:8} {task.rows:>9} {task.rows_per_s:>9.2f}  {parts}")
    states = Counter(task.state for task in tasks)
    rows, total = sum(task.rows for task in tasks), count_total(plan, tasks)
    rate = sum(task.rows_per_s for task in tasks if task.state == "running")
    line = ", ".join(f"{states[name]} {name}" for name in ("done", "running", "failed", "waiting") if states[name])
    remaining = "" if total is None else f"; {total - rows} of {total} {unit} remain"
    if total is not None and rate and total > rows:
        remaining += f", about {_duration((total - rows) / rate)} at {rate:.2f} {unit}/s"
    print(f"{plan.stage}: {line}; {rows} {unit}{remaining}")
    if plan.stage == "train" and is_rolling(Path(plan.input)):
        shelf = None if plan.mooncake is None else MooncakeShelf(plan.mooncake, segment_bytes=0)
        show_window(RollingStore(Path(plan.input), shelf))


def show_window(store: RollingStore) -> None:
    """Print where capture and training of a rolling store are, their rates, and which of them waits for the other."""
    position, window = store.read_position() or Position(first_place=0, next_place=0), store.window
    states = [
        CaptureState.model_validate(read_json(path, "a capture's state"))
        for path in store.folder.glob("shards/*/capture.json")
    ]
    total = window.order["train.num_steps"] * window.order["train.global_batch_size"]
    held = sum(path.stat().st_size for path in store.folder.rglob("*.safetensors")) / 2**30
    size = f"{window.num_bytes / 2**30:.2f} GiB"
    filled = f"{size} of memory" if store.shelf.in_memory else f"{held:.2f} of {size}"
    captured = min((state.next_place for state in states), default=0)
    print(
        f"window: {filled}; of {total} places, {position.first_place} are "
        f"behind the last checkpoint, {position.next_place} trained, {captured} captured"
    )
    busy = sum(max(state.seconds - state.waited_s, 1e-3) for state in states)
    rate = len(states) * sum(state.tokens for state in states) / busy if states else 0.0
    idle = 1 - busy / max(sum(state.seconds for state in states), 1e-3) if states else 0.0
    waits = position.waited_s / max(position.seconds, 1e-3)
    print(f"capture: {len(states)} processes, {rate:.0f} tokens/s at work; {max(idle, 0.0):.0%} of the time they wait")
    print(f"train: {waits:.0%} of the time it waits for samples")


def count_total(plan: StagePlan, tasks: Sequence[TaskStatus] = ()) -> int | None:
    """Return the number of rows or steps of the finished stage, or None if it is unknown. A dump needs its `tasks`."""
    if plan.stage == "train":
        return load_recipe(Path(plan.recipe), plan.overrides).training().num_steps
    if plan.stage == "dump" and plan.window_gib is not None:
        section = load_recipe(Path(plan.recipe), plan.overrides).training()
        return section.num_steps * section.global_batch_size
    if plan.stage == "dump":
        return _count_samples(plan, tasks)
    if plan.input.endswith(".jsonl") and Path(plan.input).exists():
        synth = load_recipe(Path(plan.recipe), plan.overrides).synth
        temperatures = len(synth.temperature) if isinstance(synth.temperature, list) else 1
        with Path(plan.input).open("rb") as file:
            return sum(1 for line in file if line.strip()) * synth.num_samples * temperatures
    return None


def _count_samples(plan: StagePlan, tasks: Sequence[TaskStatus]) -> int | None:
    """Return the samples of a finished dump, or None if they are unknown.

    A finished shard counts with its rows; any other with one sample per conversation, written or expected.
    """
    folder = Path(plan.input)
    ledgers = [folder / "ledger.jsonl"] if (folder / "ledger.jsonl").exists() else folder.glob("shards/*/ledger.jsonl")
    latest = {_row_of(entry): entry for ledger in ledgers for entry in read_entries(ledger)}
    written = Counter(
        shard_of(entry["id"], plan.shards) for entry in latest.values() if entry["status"] in ("done", "truncated")
    )
    total = sum(task.rows if task.state == "done" else max(task.rows, written[task.number]) for task in tasks)
    if (folder / "ledger.jsonl").exists() or not (folder / PLAN_FILE).exists():
        return total or None
    expected = count_total(read_plan(folder))
    return None if expected is None else total + expected - len(latest)


def _row_of(entry: dict[str, Any]) -> Any:
    return (entry["index"], entry["sample"]) if "index" in entry else entry["id"]


def _train_steps(folder: Path) -> int:
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return max((json.loads(line)["step"] for line in lines if line.endswith("}")), default=0)


def _is_here(folder: Path) -> bool:
    """Return whether locks in this folder are visible here: they may not be on network file systems."""
    kinds = {line.split()[1]: line.split()[2] for line in Path("/proc/mounts").read_text().splitlines()}
    mount = next((str(parent) for parent in (folder.resolve(), *folder.resolve().parents) if str(parent) in kinds), "/")
    return kinds.get(mount, "") not in ("nfs", "nfs4", "lustre", "gpfs", "beegfs", "cifs", "fuse")


def _duration(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{seconds / 60:.0f} min"
