"""The status of a folder's stages as text: tables, one line for each stage, warnings, and how to go on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from distributed.next_steps import list_next_steps
from distributed.state import StageStatus

STATES = ("done", "running", "failed", "waiting")


def show_status(stages: list[StageStatus], folder: Path) -> None:
    """Print the tasks of submitted stages, a line for each stage, warnings, and how to go on."""
    for stage in stages:
        if stage.is_submitted:
            print("\n".join(task_table(stage)))
        print(clean(summary_line(stage)))
        print("".join(f"{line}\n" for line in stage.window), end="")
    print("".join(f"{line}\n" for line in note_lines(stages, folder)), end="")


def task_table(stage: StageStatus) -> list[str]:
    """Return the lines of a table of a stage's tasks."""
    lines = [f"{'task':>6} {'state':8} {stage.unit:>9} {stage.unit + '/s':>9}  {'of them':32}"]
    for task in stage.tasks:
        parts = count_text(task.counts)
        lines.append(f"{task.number:>6} {task.state:8} {task.rows:>9} {task.rows_per_s:>9.2f}  {parts}")
    return lines


def summary_line(stage: StageStatus) -> str:
    """Return a line with a stage's tasks by state, its rows, what remains, and for how long."""
    states = ", ".join(f"{stage.states[name]} {name}" for name in STATES if stage.states[name])
    name = stage.label or stage.kind or stage.name
    if not stage.kind:
        return f"{name}: {states}"
    rows, total, unit = stage.rows, stage.total, stage.unit
    remaining = ""
    if total is not None:
        about = "about " if stage.is_estimate else ""
        remaining = f"; {about}{max(0, total - rows)} of {total} {unit} remain"
    if (left := stage.seconds_left) is not None:
        remaining += f", about {duration(left)} at {stage.rows_per_s:.2f} {unit}/s"
    failed = f"; {count} failed" if (count := stage.counts["failed"]) else ""
    return f"{name}: {states}; {rows} {unit}{remaining}{failed}"


def stage_table(stages: Sequence[StageStatus]) -> list[str]:
    """Return the lines of a table of stages."""
    width = max(len("folder"), *(len(stage.label or stage.name) for stage in stages))
    lines = [f"{'folder':{width}}  {'state':8} {'rows':>9} {'of':>9} {'per s':>9} {'left':>8}  {'':32}".rstrip()]
    for stage in stages:
        rows, of, rate, left = (str(stage.rows), "", "", "") if stage.kind else ("", "", "", "")
        if stage.total is not None:
            of = f"{'~' if stage.is_estimate else ''}{stage.total}"
        if stage.rows_per_s:
            rate = f"{stage.rows_per_s:.2f}"
        if (seconds := stage.seconds_left) is not None:
            left = duration(seconds)
        parts = [count_text(stage.counts)]
        if len(stage.tasks) > 1:
            parts.insert(
                0, "tasks: " + ", ".join(f"{stage.states[name]} {name}" for name in STATES if stage.states[name])
            )
        if len(stage.tasks) == 1 and stage.state == "running":
            parts.append(stage.tasks[0].note)
        text = "; ".join(part for part in parts if part)
        label = stage.label or stage.name
        lines.append(f"{label:{width}}  {stage.state:8} {rows:>9} {of:>9} {rate:>9} {left:>8}  {text}".rstrip())
    return lines


def note_lines(stages: list[StageStatus], folder: Path) -> list[str]:
    """Return a line for each warning, and how to go on."""
    lines = [f"warning: {stage.label or stage.name}: {text}" for stage in stages for text in stage.warnings]
    for step in list_next_steps(stages, folder):
        lines.append(step.why + (":" if step.command else ""))
        if step.command:
            lines.append(f"    {step.command}")
    return [clean(line) for line in lines]


def count_text(counts: Counter[str]) -> str:
    """Return rows by status, as in `7 done, 1 failed`."""
    return ", ".join(f"{count} {status}" for status, count in sorted(counts.items()) if count)


def duration(seconds: float) -> str:
    """Return a time in its fitting unit, as in `12 s`, `5 min`, `2.5 h`."""
    if seconds >= 3600:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 60:.0f} min" if seconds >= 60 else f"{seconds:.0f} s"


def clean(text: str) -> str:
    """Return a line of text without control characters, which a terminal may obey."""
    return "".join(char if char.isprintable() else "?" for char in text)
