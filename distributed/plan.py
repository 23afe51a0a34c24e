"""What a submission is: which stages, into how many shards, with which arguments. Kept beside the output.

Writes: OUTPUT/distributed.json, from which `distributed status` and `distributed retry` know what belongs to the run.
"""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict

from contracts.errors import UserError
from contracts.files import read_json, write_json
from contracts.shards import shard_folder
from distributed.tasks import Task, TorchrunTask, stage_words, worker_words

PLAN_FILE = "distributed.json"
STAGES = ("synth", "dump", "train")


class StagePlan(BaseModel):
    """One stage of a run: `shards` tasks that write into `output`, reading `input`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    stage: str
    recipe: str
    overrides: list[str]
    input: str
    output: str
    shards: int = 1
    processes_per_node: int = 1
    env: dict[str, str] = {}

    @property
    def folder(self) -> Path:
        return Path(self.output)

    def task_folder(self, number: int) -> Path:
        """Where task `number` keeps its ledger and state."""
        return self.folder if self.stage == "train" else shard_folder(self.folder, number, self.shards)

    def task(self, number: int) -> Task:
        """What task `number` runs."""
        sets = [word for value in self.overrides for word in ("--set", value)]
        args = ["--recipe", self.recipe, *sets]
        shard = f"{number}/{self.shards}"
        if self.stage == "synth":
            words = worker_words([self.recipe, self.input, self.output, *sets])
            return Task(words, {**self.env, "SHARD": shard})
        if self.stage == "dump":
            words = stage_words("dump", "run", *args, "--conversations", self.input, "--output", self.output)
            return Task((*words, "--shard", shard), self.env)
        words = ("-m", "train.cli", "offline", *args, "--store", self.input, "--output", self.output)
        return TorchrunTask(words, self.env, processes_per_node=self.processes_per_node)

    def merge_task(self) -> Task:
        """What comes once after all tasks of a synthesis. The last shard of a dump joins them by itself."""
        return Task(stage_words("synth", "merge", self.output), self.env)

    def save(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.folder / PLAN_FILE, self.model_dump())


def read_plan(folder: Path) -> StagePlan:
    """Raises UserError when nothing was submitted for that folder."""
    path = folder / PLAN_FILE
    if not path.exists():
        raise UserError(
            path, found="no such file", expected="the output of a `distributed submit`", fix="Correct the folder."
        )
    return StagePlan.model_validate(read_json(path, "a submission"))
