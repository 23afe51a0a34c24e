"""How many rows or steps a submitted stage has when it is finished, as far as that is known beforehand."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from contracts.tally import FailedRows, LedgerTally
from distributed.found import list_shards
from distributed.plan import PLAN_FILE, StagePlan, read_plan
from distributed.state import TaskStatus
from recipe.load import load_recipe


class Expected:
    """The rows of a finished stage, counted again and again: the input's files are read as they grow."""

    def __init__(self, plan: StagePlan) -> None:
        self._plan = plan
        self._fixed: int | None = None
        self._prompts: tuple[tuple[int, int], int] | None = None
        self._ledgers: dict[Path, LedgerTally] = {}
        self._failed: FailedRows = {}
        self._before: Expected | None = None

    def count(self, tasks: Sequence[TaskStatus] = ()) -> int | None:
        """Return the number of rows or steps of the finished stage, or None if it is unknown. A dump needs its `tasks`.

        Raises UserError for a recipe that cannot be read.
        """
        plan = self._plan
        if plan.stage == "train" or (plan.stage == "dump" and plan.window_gib is not None):
            if self._fixed is None:
                section = load_recipe(Path(plan.recipe), plan.overrides).training()
                self._fixed = section.num_steps * (section.global_batch_size if plan.stage == "dump" else 1)
            return self._fixed
        if plan.stage == "dump":
            return self._count_samples(tasks)
        return self._count_conversations()

    def _count_conversations(self) -> int | None:
        path = Path(self._plan.input)
        if path.suffix != ".jsonl" or not path.exists():
            return None
        if self._fixed is None:
            synth = load_recipe(Path(self._plan.recipe), self._plan.overrides).synth
            temperatures = len(synth.temperature) if isinstance(synth.temperature, list) else 1
            self._fixed = synth.num_samples * temperatures
        seen = (path.stat().st_size, path.stat().st_mtime_ns)
        if self._prompts is None or self._prompts[0] != seen:
            with path.open("rb") as file:
                self._prompts = seen, sum(1 for line in file if line.strip())
        return self._prompts[1] * self._fixed

    def _count_samples(self, tasks: Sequence[TaskStatus]) -> int | None:
        """Return the samples of a finished dump, or None if they are unknown.

        A finished shard counts with its rows; any other with one sample per conversation, written or expected.
        """
        folder = Path(self._plan.input)
        is_joined = (folder / "ledger.jsonl").exists()
        for path in [folder] if is_joined else sorted(list_shards(folder).values()):
            if path not in self._ledgers:
                self._ledgers[path] = LedgerTally(path / "ledger.jsonl", self._failed, self._plan.shards)
        ledgers = [ledger for path, ledger in self._ledgers.items() if (path == folder) == is_joined]
        for ledger in ledgers:
            ledger.update()
        written = sum((ledger.by_shard for ledger in ledgers), Counter[int]())
        total = sum(task.rows if task.state == "done" else max(task.rows, written[task.number]) for task in tasks)
        if is_joined or not (folder / PLAN_FILE).exists():
            return total or None
        self._before = self._before or Expected(read_plan(folder))
        expected = self._before.count()
        return None if expected is None else total + expected - sum(ledger.num_rows for ledger in ledgers)
