"""Read the stages of a folder again and again: their tasks, how many rows they have to do, and what is wrong."""

from __future__ import annotations

from collections import Counter
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.errors import DraftlineError
from contracts.draft import DESCRIPTOR_FILE
from contracts.shards import shard_folder
from contracts.tally import FailedRows
from distributed.expected import Expected
from distributed.found import EXPORT, Found, find_stages, is_exported, list_shards
from distributed.plan import StagePlan
from distributed.state import KINDS, StageStatus, TaskReader, TaskStatus

if TYPE_CHECKING:
    from distributed.window import WindowReader

MAX_SHARDS = 100_000
"""Of a larger number, a name of a folder, only the shards that exist are listed."""
MAX_FAILED = 1000
"""Failed rows whose reasons are kept for the reader."""


class RunReader:
    """The stages of a folder. `read` costs little when it is called again: see `common.watched`."""

    def __init__(self, folder: Path) -> None:
        """Raises UserError if there is no stage in `folder`."""
        self.folder = folder
        self._stages: dict[Path, StageReader] = {}
        find_stages(folder)

    def read(self) -> list[StageStatus]:
        """Return the status of every stage, in the order of a run."""
        found = find_stages(self.folder)
        statuses: list[StageStatus] = []
        for stage in found:
            known = self._stages.get(stage.folder)
            if known is None or known.found != stage:
                self._stages[stage.folder] = StageReader(stage)
            statuses.append(self._stages[stage.folder].read(statuses))
        return statuses


class StageReader:
    """One stage's folder."""

    def __init__(self, found: Found) -> None:
        self.found = found
        self.kind = KINDS.get(found.name, "")
        self._failed: FailedRows = {}
        self._tasks: dict[tuple[int, int], TaskReader] = {}
        self._whole = TaskReader(found.folder)
        self._expected = Expected(found.plan) if found.plan else None
        self._window: WindowReader | None = None

    def read(self, before: list[StageStatus]) -> StageStatus:
        """Return the status. `before`: the stages before this one, of which a dump's input may be one."""
        found, plan = self.found, self.found.plan
        self._whole.state.update()
        is_whole = self._whole.state.value.get("complete") is True
        shards = {} if plan and plan.stage == "train" else list_shards(found.folder)
        tasks: tuple[TaskStatus, ...]
        if found.name == EXPORT:
            tasks, readers, count = (self._read_export(),), list[TaskReader](), 1
        elif (plan and plan.stage != "train") or (shards and not is_whole):
            readers, count = self._open_shards(shards, plan)
            tasks = tuple(reader.status(self.kind, count) for reader in readers)
        else:
            self._whole.update(self.kind)
            tasks, readers, count = (self._whole.status(self.kind),), [self._whole], 1
        warnings = [found.problem] if found.problem else []
        rolls = self.kind == "dump" and any(reader.capture.exists for reader in readers)
        failed = self._whole.ledger.failed if self._whole in readers else self._failed
        total, is_estimate = self._count(tasks, before, rolls, warnings)
        for reader in readers:
            where = "" if reader is self._whole else f"{reader.folder.name}/"
            warnings += [f"{where}{problem}" for problem in reader.problems()]
        return StageStatus(
            name=found.name or "unknown stage",
            kind=self.kind,
            label=found.label,
            folder=found.folder,
            tasks=tasks,
            total=total,
            is_estimate=is_estimate,
            is_joined=rolls or is_whole or not shards or bool(plan),
            is_submitted=plan is not None,
            window=self._describe_window(rolls, warnings),
            warnings=tuple(warnings),
            failed=tuple((id_, reason) for _, id_, reason in islice(failed.values(), MAX_FAILED)),
            filtered=sum((reader.ledger.filtered for reader in readers), Counter[str]()),
            summary=_summary(self._whole.state.value),
            curves=self._whole.curves if self.kind == "train" else None,
        )

    def _open_shards(self, shards: dict[tuple[int, int], Path], plan: StagePlan | None) -> tuple[list[TaskReader], int]:
        """Return readers of the shards, updated, and their number; with those of earlier numbers without a plan."""
        for place, path in shards.items():
            self._reader(place, path).state.update()
        latest = max(shards, key=lambda place: (self._tasks[place].generation, place[1]), default=(0, 1))[1]
        count = plan.shards if plan else latest
        for number in range(count if count <= MAX_SHARDS else 0):
            self._reader((number, count), shard_folder(self.found.folder, number, count))
        places = [place for place in self._tasks if place[1] == count or (plan is None and place in shards)]
        generations = Counter[int]()
        for place in places:
            generations[place[1]] = max(generations[place[1]], self._tasks[place].generation)
        # Earlier shards first: a later one may have made their failed rows good.
        places.sort(key=lambda place: (generations[place[1]], place[1], place[0]))
        readers = [self._tasks[place] for place in places]
        for place, reader in zip(places, readers, strict=True):
            reader.is_superseded = place[1] != count
            reader.update(self.kind)
        return readers, count

    def _reader(self, place: tuple[int, int], path: Path) -> TaskReader:
        if place not in self._tasks:
            self._tasks[place] = TaskReader(path, place[0], self._failed)
        return self._tasks[place]

    def _read_export(self) -> TaskStatus:
        folder = self.found.folder
        state = "done" if is_exported(folder) else "waiting"
        changed = (folder / DESCRIPTOR_FILE).stat().st_mtime if state == "done" else 0.0
        return TaskStatus(0, state, 0, 0.0, Counter(), folder, changed=changed)

    def _count(
        self, tasks: tuple[TaskStatus, ...], before: list[StageStatus], rolls: bool, warnings: list[str]
    ) -> tuple[int | None, bool]:
        """Return the rows or steps of the finished stage, None if unknown, and whether they are an estimate."""
        if self._expected is not None:
            try:
                return self._expected.count(tasks), False
            except (DraftlineError, OSError) as error:  # the recipe or the input has moved
                warnings.append(str(error))
                return None, False
        rows = sum(task.rows for task in tasks)
        if all(task.state == "done" for task in tasks):
            return rows or None, False
        settings = self._settings()
        if self.kind == "train":
            return _whole(settings.get("train", {}).get("num_steps")), False
        if rolls:
            window = settings.get("window", {})
            steps, size = _whole(window.get("train.num_steps")), _whole(window.get("train.global_batch_size"))
            return (steps * size if steps and size else None), False
        if self.kind == "synth":
            lines = [reader.log.last for reader in (self._tasks.values() or [self._whole])]
            known = [int(line["rows_expected"]) for line in lines if line]
            return (sum(known) if known and len(known) == len(tasks) else None), False
        if self.kind == "dump":
            estimate = self._estimate_samples(before)
            return None if estimate is None else max(estimate, rows), True
        return None, False

    def _estimate_samples(self, before: list[StageStatus]) -> int | None:
        """Return about how many samples the synthesis beside this dump gives: one for each conversation."""
        name = self.found.label.replace("store", "synth", 1)
        for stage in before:
            if stage.kind == "synth" and stage.label == name != self.found.label:
                usable = stage.counts["done"] + stage.counts["truncated"]
                return (usable if stage.state == "done" else stage.total) or None
        return None

    def _settings(self) -> dict[str, Any]:
        """Return the settings of the run, or of its first shard."""
        states = [self._whole.state, *(reader.state for reader in self._tasks.values())]
        found: Any = next((state.value["settings"] for state in states if state.value.get("settings")), {})
        return (
            {key: value for key, value in found.items() if isinstance(value, dict)} if isinstance(found, dict) else {}
        )

    def _describe_window(self, rolls: bool, warnings: list[str]) -> tuple[str, ...]:
        plan = self.found.plan
        reads = plan is not None and plan.stage == "train" and plan.window_gib is not None
        if not (reads or (rolls and plan is None)):
            return ()
        from distributed.window import WindowReader, is_rolling  # contracts.rolling imports torch

        folder = Path(plan.input) if plan else self.found.folder
        try:
            if not is_rolling(folder):
                return ()
            self._window = self._window or WindowReader(folder, plan.mooncake if plan else None)
            return self._window.describe()
        except (DraftlineError, OSError, ValueError, KeyError, TypeError) as error:
            warnings.append(f"window: {error}")
            return ()


def task_status(plan: StagePlan, number: int) -> TaskStatus:
    """Return the status of one task of a submission. Raises UserError if its state cannot be read."""
    reader = TaskReader(plan.task_folder(number), number)
    reader.update(plan.stage)
    return reader.status(plan.stage, plan.shards)


def _summary(state: dict[str, Any]) -> dict[str, Any]:
    found = state.get("summary")
    return found if isinstance(found, dict) else {}


def _whole(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None
