"""Submit a plan's tasks to SLURM through submitit: arrays, dependencies of stages, a signal before the time limit.

A task of a dump waits only for the task of the synthesis that writes its shard (SLURM's `aftercorr`). A training waits
for all jobs before it, unless it follows a rolling store, which is filled at the same time.

Writes: OUTPUT/distributed.json (distributed/plan.py) and OUTPUT/jobs/, submitit's folder with the log of each task.

On "local" every task is a process of this machine, on "debug" all run in this process, and stages run one by one: there
a rolling store needs --in-turns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import submitit

from common.errors import IncompleteError
from contracts.run import is_complete
from distributed.plan import StagePlan
from distributed.resources import Resources
from distributed.tasks import Task

MAX_REQUEUES = 1000


@dataclass(frozen=True)
class Submitted:
    """The jobs of the stage before: all that training waits for, and the one that writes `shards`, in their order."""

    jobs: tuple[str, ...] = ()
    job_of_shards: str = ""
    shards: tuple[int, ...] = ()


NOTHING = Submitted()


def submit(plan: StagePlan, before: Submitted = NOTHING) -> Submitted:
    """Save a plan and submit its unfinished tasks, to run after the stage before it.

    Raises UserError when the output cannot be written, IncompleteError when a task fails on "local" or "debug".
    """
    plan.save()
    todo = tuple(number for number in plan.numbers if not is_complete(plan.task_folder(number)))
    print(f"{plan.stage}: {len(todo)} of {len(plan.numbers)} tasks to do -> {plan.output}")
    if plan.stage == "synth":
        return _submit_synth(plan, todo)
    if plan.stage == "dump":
        return _submit_dump(plan, todo, before)
    rolls = plan.window_gib is not None  # it is filled meanwhile
    after = ":".join(("afterok", *before.jobs)) if before.jobs and not rolls else ""
    _submit("train", [plan.task(number) for number in todo], plan, plan.resources, after)
    return NOTHING


def _submit_synth(plan: StagePlan, todo: tuple[int, ...]) -> Submitted:
    """Submit the shards, and the merge after all of them."""
    job = _submit("synth", [plan.task(number) for number in todo], plan, plan.resources.one_node())
    after = f"afterok:{job}" if job else ""
    merge = _submit("synth-merge", [plan.merge_task()], plan, plan.resources.no_gpus(), after)
    return Submitted((merge,), job, todo)


def _submit_dump(plan: StagePlan, todo: tuple[int, ...], before: Submitted) -> Submitted:
    """Submit the shards whose synthesis is on its way, each to wait for it, and the other unfinished ones at once.

    SLURM pairs the tasks of two arrays by their place, so the first array holds the same shards as the synthesis.
    Finished dumps are among them: their conversations may change, and `dump run` skips or refuses what did.
    """
    resources = plan.resources.one_node()
    kind = "aftercorr" if len(before.shards) > 1 else "afterok"
    paired = [plan.task(number) for number in before.shards]
    job = _submit("dump", paired, plan, resources, f"{kind}:{before.job_of_shards}")
    at_once = _submit("dump", [plan.task(number) for number in todo if number not in before.shards], plan, resources)
    return Submitted(tuple(job for job in (*before.jobs, job, at_once) if job))


def _submit(name: str, tasks: Sequence[Task], plan: StagePlan, resources: Resources, after: str = "") -> str:
    """Submit tasks as one job, an array if there are several, and return its id; "" without tasks.

    `after` is SLURM's dependency of the job.
    """
    if not tasks:
        return ""
    executor = _make_executor(name, plan, resources, after)
    jobs = executor.submit_array(tasks) if len(tasks) > 1 else [executor.submit(tasks[0])]
    job_id = str(jobs[0].job_id).partition("_")[0]
    if resources.cluster == "slurm":
        print(f"  {name}: job {job_id}, logs in {plan.folder / 'jobs'}")
        return job_id
    failed = [job for job in jobs if job.exception() is not None]
    if failed:
        raise IncompleteError(
            f"{plan.folder}: {len(failed)} of {len(jobs)} tasks of {name} failed, see {failed[0].paths.stderr} and "
            f"{failed[0].paths.stdout}; `distributed retry {plan.folder}` runs what is unfinished"
        )
    return job_id


def _make_executor(name: str, plan: StagePlan, resources: Resources, after: str) -> Any:
    folder = plan.folder / "jobs"
    if resources.cluster != "slurm":
        executor = submitit.AutoExecutor(folder=folder, cluster=resources.cluster)
        executor.update_parameters(timeout_min=resources.time_min)
        return executor
    executor = submitit.AutoExecutor(folder=folder, cluster="slurm", slurm_max_num_timeout=MAX_REQUEUES)
    additional: dict[str, Any] = {"requeue": True, **resources.slurm_options()}
    if after:
        additional |= {"dependency": after, "kill-on-invalid-dep": "yes"}
    executor.update_parameters(
        name=f"draftline-{name}",
        slurm_time=resources.time_min,
        slurm_signal_delay_s=resources.signal_delay_s,
        slurm_array_parallelism=resources.max_running,
        nodes=resources.nodes,
        tasks_per_node=resources.tasks_per_node,
        slurm_additional_parameters=additional,
        **({"slurm_gpus_per_node": resources.gpus_per_node} if resources.gpus_per_node else {}),
        **resources.sbatch_cores(),
    )
    return executor
