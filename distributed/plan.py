"""The plan of a submitted stage: its command's arguments, number of shards and resources. Kept beside the output.

Writes: OUTPUT/distributed.json, from which `distributed status` and `distributed retry` know the run.
"""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from common.errors import UserError
from common.files import read_json, write_json
from contracts.mooncake import Mooncake
from contracts.shards import shard_folder
from distributed.resources import DEFAULTS, Resources
from distributed.tasks import Task, TorchrunTask, TurnsTask, stage_words, worker_words

PLAN_FILE = "distributed.json"
STAGES = ("synth", "dump", "train")


class StagePlan(BaseModel):
    """One stage of a run: `shards` tasks that read `input` and write to `output`.

    `overrides` are the `--set` words, without secrets (distributed/secrets.py). `window_gib`: of the rolling store that
    a dump fills or a training reads; `mooncake`: where its samples are, if not in files. A training with
    `conversations` fills its store itself, in turns.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    stage: str
    recipe: str
    overrides: list[str]
    input: str
    output: str
    shards: int = 1
    window_gib: float | None = None
    mooncake: Mooncake | None = None
    conversations: str = ""
    resources: Resources = DEFAULTS

    @property
    def folder(self) -> Path:
        return Path(self.output)

    @property
    def numbers(self) -> range:
        """The numbers of the tasks. A training is one task, on all its nodes."""
        return range(1 if self.stage == "train" else self.shards)

    def task_folder(self, number: int) -> Path:
        """Return the folder of task `number`'s ledger and state."""
        return self.folder if self.stage == "train" else shard_folder(self.folder, number, self.shards)

    def task(self, number: int) -> Task:
        """Return what task `number` runs."""
        sets = [word for value in self.overrides for word in ("--set", value)]
        recipe, shard = ["--recipe", self.recipe, *sets], f"{number}/{self.shards}"
        if self.stage == "synth":
            return Task(worker_words([self.recipe, self.input, self.output, *sets]), {"SHARD": shard})
        if self.stage == "dump":
            return Task(self._capture(self.input, self.output, ("--shard", shard)))
        words = ("-m", "train.cli", "offline", *recipe, "--store", self.input, "--output", self.output)
        if self.window_gib is not None:
            words += ("--follow", *self._mooncake_words)
        # A checkpoint must fit between SLURM's warning and the time limit; torchrun's own default is 30 s.
        patience_s = max(30, (self.resources.signal_delay_s or 0) - 30)
        env = {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(patience_s)}
        processes = self.resources.gpus_per_node or 1
        if self.conversations:
            capture = self._capture(self.conversations, self.input, ("--until-full",))
            words += ("--until-empty",)
            return TurnsTask(words, env, processes_per_node=processes, capture=capture, output=self.output)
        return TorchrunTask(words, env, processes_per_node=processes)

    def _capture(self, conversations: str, store: str, more: tuple[str, ...]) -> tuple[str, ...]:
        """Return the words of a dump."""
        sets = [word for value in self.overrides for word in ("--set", value)]
        window = () if self.window_gib is None else ("--window", f"{self.window_gib:g}")
        places = ("--conversations", conversations, "--output", store, *window, *self._mooncake_words, *more)
        # As many engines as fit on the task's GPUs, unless `--set` says otherwise.
        return stage_words("dump", "run", "--recipe", self.recipe, "--set", "dump.engines=0", *sets, *places)

    @property
    def _mooncake_words(self) -> tuple[str, ...]:
        return self.mooncake.words if self.mooncake else ()

    def merge_task(self) -> Task:
        """Return what runs once after all tasks of a synthesis. The last shard of a dump joins its shards itself."""
        return Task(stage_words("synth", "merge", self.output))

    def save(self) -> None:
        """Write the plan. Raises UserError when the folder cannot be written."""
        write_json(self.folder / PLAN_FILE, self.model_dump(mode="json"))


def read_plan(folder: Path) -> StagePlan:
    """Read the plan of a stage's folder. Raises UserError when nothing was submitted for it."""
    path = folder / PLAN_FILE
    if not path.exists():
        raise UserError(
            path, found="no such file", expected="the output of a `distributed submit`", fix="Correct the folder."
        )
    try:
        return StagePlan.model_validate(read_json(path, "a submission"))
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(
            f"{path} ({'.'.join(map(str, first['loc']))})",
            found=first["msg"].lower(),
            expected="the plan of a submission by this version",
            fix="Run `distributed submit` again for this folder: finished work is kept.",
        ) from None
