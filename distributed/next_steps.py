"""How to go on with a stage: the commands that resume it, or that try its failed rows again.

Reads: command.txt of the stage's folders (contracts/run.py), whose last line began the run last.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path

from common.redact import REDACTED
from distributed.found import list_shards
from distributed.state import StageStatus

MAX_COMMANDS = 8
RETRY = "--retry-failed"
MAX_COMMAND_BYTES = 1 << 20


@dataclass(frozen=True)
class NextStep:
    """Why something is to be done, and the command; "" if none is known."""

    why: str
    command: str = ""


def list_next_steps(stages: list[StageStatus], folder: Path) -> list[NextStep]:
    """Return what to do about failed stages, failed rows and outputs that were not joined."""
    steps: list[NextStep] = []
    submitted = [stage for stage in stages if stage.is_submitted and stage.state == "failed"]
    for stage in submitted:
        # `distributed retry` takes the folder of a stage, or that of a pipeline for all of its stages.
        where = folder if "/" not in stage.label else stage.folder
        step = NextStep("Submit what is unfinished again", shlex.join(["distributed", "retry", str(where)]))
        steps += [step] if step not in steps else []
    for stage in stages:
        steps += _steps_of(stage)
    waiting = [
        stage.label for stage in stages if stage.state == "waiting" and not (stage.is_submitted or stage.changed)
    ]
    if waiting and not any(stage.state in ("running", "failed") for stage in stages):
        steps.append(
            NextStep(f"Not begun: {', '.join(waiting)}. Run the recipe's run.sh again: it skips what is done.")
        )
    return steps


def _steps_of(stage: StageStatus) -> list[NextStep]:
    name = stage.label or stage.name
    steps = []
    failed = [task for task in stage.tasks if task.state == "failed"]
    if not stage.is_submitted:
        steps += [_step(f"{name} stopped before its end: go on", stage, task.folder) for task in failed]
    if stage.states["done"] == len(stage.tasks) and not stage.is_joined:
        if stage.kind == "synth":
            words = ["synth", "merge", str(stage.folder)]
            steps.append(NextStep(f"{name}: all shards are done, join them", shlex.join(words)))
        else:
            steps.append(_step(f"{name}: all shards are done, join them", stage, stage.tasks[-1].folder))
    if stage.kind in ("synth", "dump"):
        with_failed = [task.folder for task in stage.tasks if task.counts["failed"] and task.state == "done"]
        if with_failed == [stage.folder] and not _last_command(stage.folder, stage.name):
            with_failed = sorted(list_shards(stage.folder).values())  # they were joined, and have the commands
        steps += [_step(f"{name}: try the failed rows again", stage, folder, RETRY) for folder in with_failed]
    if len(steps) > MAX_COMMANDS:
        steps[MAX_COMMANDS:] = [NextStep(f"{name}: the same for {len(steps) - MAX_COMMANDS} more shards")]
    return steps


def _step(why: str, stage: StageStatus, folder: Path, *more: str) -> NextStep:
    words = _last_command(folder, stage.name)
    if not words:
        return NextStep(f"{why} with the command that began it (command.txt does not tell)")
    words += [word for word in more if word not in words]
    if any(REDACTED in word for word in words):
        why += f" (put in what {REDACTED} stands for)"
    return NextStep(why, shlex.join(words))


def _last_command(folder: Path, stage: str) -> list[str]:
    """Return the words of the last command of `stage` in a folder's command.txt; [] if there is none."""
    try:
        with (folder / "command.txt").open("rb") as file:
            file.seek(0, 2)
            file.seek(max(0, file.tell() - MAX_COMMAND_BYTES))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return []
    program, _, command = stage.partition(" ")
    for first in range(len(lines) - 1, -1, -1):
        try:
            words = shlex.split("\n".join(lines[first:]))  # a quoted word may hold a line break
        except ValueError:
            continue
        if words[1:2] == [command] and words[0] in (program, "cli.py"):
            return _name_program(program, words)
        lines = lines[:first]
    return []


def _name_program(program: str, words: list[str]) -> list[str]:
    """Return the words as they were typed: torchrun's processes know themselves as cli.py."""
    if words[0] != "cli.py":
        return words
    return ["torchrun", "--standalone", "--nproc-per-node", "GPUS", "-m", f"{program}.cli", *words[1:]]
