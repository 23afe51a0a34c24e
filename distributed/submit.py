"""Hand a run's tasks to SLURM through submitit: arrays, dependencies between stages, a signal before the time limit.

A task of a dump waits for the task of the synthesis that writes its shard, and for no other (SLURM's `aftercorr`); a
training waits for all that comes before it.

Writes: OUTPUT/distributed.json (distributed/plan.py) and OUTPUT/jobs/, submitit's folder with each task's log.

On "local" every task is a process of this machine and stages wait for one another; on "debug" they run in this process.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import submitit

from contracts.errors import IncompleteError, UserError
from distributed.plan import StagePlan
from distributed.status import task_status
from distributed.tasks import Task

MAX_REQUEUES = 1000


@dataclass(frozen=True)
class Resources:
    """What a task gets. `options` are SLURM's own, by their long names: {"partition": "gpu"}."""

    cluster: str = "slurm"
    max_running: int = 64
    time_min: int = 240
    signal_delay_s: int = 180
    nodes: int = 1
    tasks_per_node: int = 1
    gpus_per_node: int = 0
    cpus_per_task: int | None = None
    options: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Submitted:
    """Jobs on their way: those that training waits for, and the one whose tasks write these shards, in their order."""

    jobs: tuple[str, ...] = ()
    job_of_shards: str = ""
    shards: tuple[int, ...] = ()


NOTHING = Submitted()


def submit(plan: StagePlan, resources: Resources, before: Submitted = NOTHING) -> Submitted:
    """Submit the tasks of a plan that are not done, to wait for the stage before it.

    Raises UserError for a cluster that is not known, IncompleteError for a task that failed on "local" or "debug".
    """
    plan.save()
    numbers = [0] if plan.stage == "train" else list(range(plan.shards))
    todo = [number for number in numbers if task_status(plan, number).state != "done"]
    print(f"{plan.stage}: {len(todo)} of {len(numbers)} tasks to do -> {plan.output}")
    if plan.stage == "synth":
        job = _submit("synth", [plan.task(number) for number in todo], plan, resources)
        after = f"afterok:{job}" if job else ""
        merge = _submit("synth-merge", [plan.merge_task()], plan, _small(resources), after)
        return Submitted((merge,), job, tuple(todo))
    if plan.stage == "dump":
        # SLURM pairs tasks by their place in the two arrays: the dump's must hold the same shards, done or not.
        kind = "aftercorr" if len(before.shards) > 1 else "afterok"
        paired = [plan.task(number) for number in before.shards]
        job = _submit("dump", paired, plan, resources, f"{kind}:{before.job_of_shards}")
        at_once = _submit("dump", [plan.task(n) for n in todo if n not in before.shards], plan, resources)
        return Submitted(tuple(job for job in (*before.jobs, job, at_once) if job))
    after = ":".join(("afterok", *before.jobs)) if before.jobs else ""
    _submit("train", [plan.task(number) for number in todo], plan, resources, after)
    return NOTHING


def _submit(name: str, tasks: Sequence[Task], plan: StagePlan, resources: Resources, after: str = "") -> str:
    """The id of the job, one array where there are several tasks; "" for none. `after`: what SLURM is to wait for."""
    if not tasks:
        return ""
    executor = _make_executor(name, plan, resources, after)
    jobs = executor.map_array(_call, tasks) if len(tasks) > 1 else [executor.submit(tasks[0])]
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


def _call(task: Task) -> None:
    task()


def _make_executor(name: str, plan: StagePlan, resources: Resources, after: str) -> Any:
    if resources.cluster not in ("slurm", "local", "debug"):
        raise UserError("--cluster", found=resources.cluster, expected="slurm, local or debug", fix="Correct it.")
    folder = plan.folder / "jobs"
    if resources.cluster != "slurm":
        executor = submitit.AutoExecutor(folder=folder, cluster=resources.cluster)
        executor.update_parameters(timeout_min=resources.time_min)
        return executor
    executor = submitit.AutoExecutor(folder=folder, cluster="slurm", slurm_max_num_timeout=MAX_REQUEUES)
    additional: dict[str, Any] = {"requeue": True, **resources.options}
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
        **({"cpus_per_task": resources.cpus_per_task} if resources.cpus_per_task else {}),
    )
    return executor


def _small(resources: Resources) -> Resources:
    """A task that only joins files needs no GPU."""
    return Resources(
        cluster=resources.cluster,
        time_min=resources.time_min,
        signal_delay_s=resources.signal_delay_s,
        options=resources.options,
    )
