"""`distributed`: stages as SLURM jobs: submitted, watched, and what is unfinished submitted again."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from contracts.cli import OverridesOption, RecipeOption, load_checked, make_app
from contracts.errors import UserError, run_app

if TYPE_CHECKING:
    from distributed.plan import StagePlan
    from distributed.submit import Resources

app = make_app("Run stages on many machines, as SLURM jobs.")

ClusterOption = Annotated[str, typer.Option(help="slurm, local (processes here) or debug (this process).")]
MaxRunningOption = Annotated[int, typer.Option(min=1, help="Tasks of an array that run at a time.")]
TimeOption = Annotated[int, typer.Option("--time", min=1, help="Time limit of a task, minutes.")]
SignalOption = Annotated[int, typer.Option(min=1, help="Seconds before the limit when stages stop and save.")]
NodesOption = Annotated[int, typer.Option(min=1, help="Nodes of a training job.")]
TasksOption = Annotated[int, typer.Option(min=1, help="Agents of torchrun on a node; one, but for tests.")]
GpusOption = Annotated[int, typer.Option(min=0, help="GPUs of a node.")]
CpusOption = Annotated[int | None, typer.Option(min=1, help="Cores of a task.")]
SlurmOption = Annotated[
    list[str] | None, typer.Option("--slurm", metavar="NAME=VALUE", help="Any option of sbatch. Repeatable.")
]
FolderArgument = Annotated[Path, typer.Argument(metavar="OUTPUT", help="The --output of `distributed submit`.")]


@app.command(
    epilog="Example: distributed submit synth -r recipe.yaml --input prompts.jsonl --output runs/synth --shards 64 "
    "--gpus-per-node 8 --time 720 --slurm partition=gpu"
)
def submit(
    stage: Annotated[str, typer.Argument(help="synth, dump, train, or pipeline for all three.")],
    recipe: RecipeOption,
    input_: Annotated[Path, typer.Option("--input", help="Prompts (synth, pipeline), conversations (dump), store.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The stage's folder; of a pipeline, all of them.")],
    shards: Annotated[int, typer.Option(min=1, help="Tasks that share the work.")] = 1,
    cluster: ClusterOption = "slurm",
    max_running: MaxRunningOption = 64,
    time_min: TimeOption = 240,
    signal_delay_s: SignalOption = 180,
    nodes: NodesOption = 1,
    tasks_per_node: TasksOption = 1,
    gpus_per_node: GpusOption = 0,
    cpus_per_task: CpusOption = None,
    slurm: SlurmOption = None,
    set_: OverridesOption = None,
) -> None:
    """Submit a stage as an array of tasks, or the pipeline: each shard is dumped once it is written, then training."""
    from distributed.plan import STAGES, StagePlan
    from distributed.submit import NOTHING
    from distributed.submit import submit as submit_plan

    load_checked(recipe, set_)
    if stage not in (*STAGES, "pipeline"):
        raise UserError("stage", found=stage, expected="synth, dump, train or pipeline", fix="Correct it.")
    options = _parse_options(slurm)
    folders = {name: output / name for name in STAGES} if stage == "pipeline" else {stage: output}
    source, submitted = input_.absolute(), NOTHING
    for name, folder in folders.items():
        resources = _resources(
            name, cluster, max_running, time_min, signal_delay_s, nodes, tasks_per_node, gpus_per_node, cpus_per_task,
            options,
        )  # fmt: skip
        plan = StagePlan(
            stage=name,
            recipe=str(recipe.absolute()),
            overrides=list(set_ or []),
            input=str(source),
            output=str(folder.absolute()),
            shards=1 if name == "train" else shards,
            processes_per_node=max(1, gpus_per_node),
        )
        submitted = submit_plan(plan, resources, submitted)
        source = folder.absolute()


@app.command(epilog="Example: distributed status runs/synth")
def status(folder: FolderArgument) -> None:
    """Show how far each task is: its state, rows by status, rate; what remains, and for how long."""
    from distributed.status import show_status

    for plan in _plans(folder):
        show_status(plan)


@app.command(epilog="Example: distributed retry runs/synth --gpus-per-node 8 --time 720")
def retry(
    folder: FolderArgument,
    cluster: ClusterOption = "slurm",
    max_running: MaxRunningOption = 64,
    time_min: TimeOption = 240,
    signal_delay_s: SignalOption = 180,
    nodes: NodesOption = 1,
    tasks_per_node: TasksOption = 1,
    gpus_per_node: GpusOption = 0,
    cpus_per_task: CpusOption = None,
    slurm: SlurmOption = None,
) -> None:
    """Submit again what is unfinished, and nothing else."""
    from distributed.submit import NOTHING
    from distributed.submit import submit as submit_plan

    submitted = NOTHING
    for plan in _plans(folder):
        resources = _resources(
            plan.stage, cluster, max_running, time_min, signal_delay_s, nodes, tasks_per_node, gpus_per_node,
            cpus_per_task, _parse_options(slurm),
        )  # fmt: skip
        submitted = submit_plan(plan, resources, submitted)


def _plans(folder: Path) -> list[StagePlan]:
    """The plan of a stage's folder, or those of a pipeline's in their order."""
    from distributed.plan import PLAN_FILE, STAGES, read_plan

    stages = [folder / name for name in STAGES if (folder / name / PLAN_FILE).exists()]
    return [read_plan(path) for path in stages or [folder]]


def _parse_options(words: list[str] | None) -> dict[str, str]:
    options = {}
    for word in words or []:
        name, separator, value = word.partition("=")
        if not separator:
            raise UserError(
                f"--slurm {word}", found="no '='", expected="name=value", fix="As in --slurm partition=gpu."
            )
        options[name.lstrip("-")] = value
    return options


def _resources(
    stage: str,
    cluster: str,
    max_running: int,
    time_min: int,
    signal_delay_s: int,
    nodes: int,
    tasks_per_node: int,
    gpus_per_node: int,
    cpus_per_task: int | None,
    options: dict[str, str],
) -> Resources:
    from distributed.submit import Resources

    several = stage == "train"
    return Resources(
        cluster, max_running, time_min, signal_delay_s, nodes if several else 1, tasks_per_node if several else 1,
        gpus_per_node, cpus_per_task, options,
    )  # fmt: skip


def main() -> None:
    run_app(app)
