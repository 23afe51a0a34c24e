"""Claims about what waits for what, without a scheduler: which tasks are submitted, in which order, after which job."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from distributed import submit as module
from distributed.plan import StagePlan
from distributed.submit import Resources, Submitted, submit
from distributed.tasks import Task

Job = tuple[str, list[str], str]


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch) -> list[Job]:
    """What was submitted: the job's name, the shards of its tasks in their order, what it waits for."""
    found: list[Job] = []

    def note(name: str, tasks: Sequence[Task], plan: StagePlan, resources: Resources, after: str = "") -> str:
        if not tasks:
            return ""
        shards = [task.env.get("SHARD") or task.words[-1] for task in tasks]
        found.append((name, shards if name in ("synth", "dump") else [], after))
        return str(len(found))

    monkeypatch.setattr(module, "_submit", note)
    return found


def submit_all(folder: Path, synth_done: set[int], dump_done: set[int], shards: int = 4) -> None:
    submitted = Submitted()
    for stage, done in (("synth", synth_done), ("dump", dump_done), ("train", set[int]())):
        plan = StagePlan(stage=stage, recipe="r", overrides=[], input="i", output=str(folder / stage), shards=shards)
        for number in done:
            task_folder = plan.task_folder(number)
            task_folder.mkdir(parents=True)
            (task_folder / "run.json").write_text(json.dumps({"complete": True, "seconds": 1.0}))
        submitted = submit(plan, Resources(), submitted)


def test_each_shard_is_dumped_after_its_own_synthesis_and_training_comes_last(jobs: list[Job], tmp_path: Path) -> None:
    submit_all(tmp_path, set(), set())
    every = ["0/4", "1/4", "2/4", "3/4"]
    assert jobs == [
        ("synth", every, ""), ("synth-merge", [], "afterok:1"), ("dump", every, "aftercorr:1"),
        ("train", [], "afterok:2:3"),
    ]  # fmt: skip


def test_dumps_of_finished_shards_wait_for_nothing_and_the_others_stand_as_their_syntheses_do(
    jobs: list[Job], tmp_path: Path
) -> None:
    # Shard 3 was dumped before its synthesis was taken up again: it stands in both arrays all the same.
    submit_all(tmp_path, synth_done={0, 2}, dump_done={0, 3})
    assert jobs == [
        ("synth", ["1/4", "3/4"], ""), ("synth-merge", [], "afterok:1"), ("dump", ["1/4", "3/4"], "aftercorr:1"),
        ("dump", ["2/4"], ""), ("train", [], "afterok:2:3:4"),
    ]  # fmt: skip


def test_a_single_task_is_no_array_and_is_waited_for_as_a_job(jobs: list[Job], tmp_path: Path) -> None:
    submit_all(tmp_path, synth_done={0, 1, 3}, dump_done={0, 1, 3})
    assert jobs[:3] == [("synth", ["2/4"], ""), ("synth-merge", [], "afterok:1"), ("dump", ["2/4"], "afterok:1")]
