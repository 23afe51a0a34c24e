"""Find the stages in a folder: that of one stage, of a submission, or of a recipe's whole run.

Reads: run.json, distributed.json and shards/ of the folders below; the layout of recipes/stages.sh.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from common.errors import UserError
from common.watched import JsonFile
from contracts.draft import DESCRIPTOR_FILE
from contracts.shards import SHARD_NAME
from distributed.plan import PLAN_FILE, StagePlan, read_plan

SKIPPED = {"samples", "places", "index", "shards", "jobs", "tensorboard", "target", "packages", "prompts", "work"}
"""Folders of a stage's own files, which may be many."""
MAX_DEPTH, MAX_FOLDERS = 3, 2000
EXPORT = "train export"
LAYOUT = {
    "synth/train": "synth generate",
    "synth/held_out": "synth generate",
    "store/train": "dump run",
    "store/held_out": "dump run",
    "draft": "train offline",
    "export": EXPORT,
    "bench": "bench acceptance",
}
"""The stages of every recipe's run.sh, in their order."""
ORDER = ("synth prepare", "synth generate", "dump run", "bench gate", "train offline", EXPORT, "bench acceptance")


@dataclass(frozen=True)
class Found:
    """A stage's folder. `label`: its path below the folder that was searched, "" if it is that folder itself.

    `name` is that of its run.json, or the expected one; "" if it cannot be read. `problem`: why its plan cannot.
    """

    folder: Path
    label: str
    name: str
    plan: StagePlan | None = None
    problem: str = ""


def find_stages(folder: Path) -> list[Found]:
    """Return the stages in `folder` in the order of a run; in a recipe's run, those that did not begin, too.

    Raises UserError if there is none.
    """
    found = [_look(path, folder) for path in _walk(folder) if _is_stage(path)]
    if not any(stage.label == "" for stage in found):
        found += _list_missing(folder, found)
    if not found:
        raise UserError(
            folder,
            found="no run.json and no distributed.json" if folder.is_dir() else "no such folder",
            expected="the output of a stage, of a `distributed submit` or of a recipe's run.sh",
            fix="Correct the folder.",
        )
    return sorted(found, key=_place)


def list_shards(folder: Path) -> dict[tuple[int, int], Path]:
    """Return the shard folders by (number, count). No file is read."""
    try:
        paths = list((folder / "shards").iterdir())
    except OSError:  # none
        return {}
    matches = ((path, SHARD_NAME.fullmatch(path.name)) for path in paths)
    return {(int(match[1]), int(match[2])): path for path, match in matches if match}


def _look(path: Path, folder: Path) -> Found:
    label = "" if path == folder else path.relative_to(folder).as_posix()
    plan, problem = None, ""
    if (path / PLAN_FILE).exists():
        try:
            plan = read_plan(path)
        except UserError as error:
            problem = str(error)
    names = {"synth": "synth generate", "dump": "dump run", "train": "train offline"}
    name = names.get(plan.stage, plan.stage) if plan else _read_name(path)
    return Found(path, label, name, plan, problem)


def _read_name(path: Path) -> str:
    """Return the stage in the run.json of a folder, or in that of a shard."""
    for folder in (path, *list_shards(path).values()):
        state = JsonFile(folder / "run.json")
        state.update()
        if name := state.value.get("stage"):
            return str(name)
    return ""


def _is_stage(path: Path) -> bool:
    return (path / "run.json").exists() or (path / PLAN_FILE).exists() or bool(list_shards(path))


def _walk(folder: Path) -> Iterator[Path]:
    """Yield `folder` and the folders below it that may be a stage's."""
    todo = [(folder, 0)]
    for count, (path, depth) in enumerate(todo):
        if count == MAX_FOLDERS:
            return
        yield path
        if depth == MAX_DEPTH:
            continue
        try:
            below = sorted(child for child in path.iterdir() if child.is_dir())
        except OSError:  # not ours to read, or gone
            continue
        names = (child for child in below if child.name not in SKIPPED and not child.name.startswith((".", "step-")))
        todo += [(child, depth + 1) for child in names]


def _list_missing(folder: Path, found: list[Found]) -> list[Found]:
    """Return the stages of a recipe's run that are not there yet, if `folder` is that of one."""
    if not any((folder / name).exists() for name in ("synth/train", "store/train", "prompts/train.jsonl")):
        return []
    labels = [stage.label for stage in found]
    missing = [label for label in LAYOUT if label not in labels and not _is_below(label, labels)]
    return [Found(folder / label, label, LAYOUT[label]) for label in missing]


def _is_below(label: str, labels: list[str]) -> bool:
    """Return whether a stage is there in parts, such as bench/held_out and bench/public."""
    return any(other.startswith(f"{label}/") for other in labels)


def is_exported(folder: Path) -> bool:
    """Return whether a folder holds an exported draft."""
    return (folder / DESCRIPTOR_FILE).exists()


def _place(stage: Found) -> tuple[int, int, str]:
    layout = list(LAYOUT)
    order = ORDER.index(stage.name) if stage.name in ORDER else len(ORDER)
    return order, layout.index(stage.label) if stage.label in layout else len(layout), stage.label
