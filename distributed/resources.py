"""What a task gets from the scheduler. Each field is an option of `distributed submit` and of `distributed retry`."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Annotated

import typer

from common.errors import UserError

CPUS_PER_GPU = 8


@dataclass(frozen=True)
class Resources:
    """None is "not given": `submit` then uses `DEFAULTS`, and `retry` the resources of the submission."""

    cluster: Annotated[
        str | None, typer.Option(help="slurm, local (processes here) or debug (this process).", show_default="slurm")
    ] = None
    max_running: Annotated[
        int | None, typer.Option(min=1, help="Tasks of an array that run at the same time.", show_default="64")
    ] = None
    time_min: Annotated[
        int | None, typer.Option("--time", min=1, help="Time limit of a task, minutes.", show_default="240")
    ] = None
    signal_delay_s: Annotated[
        int | None,
        typer.Option(min=1, help="Seconds before the time limit at which stages stop and save.", show_default="180"),
    ] = None
    nodes: Annotated[int | None, typer.Option(min=1, help="Nodes of a training job.", show_default="1")] = None
    tasks_per_node: Annotated[
        int | None, typer.Option(min=1, help="torchrun agents of a node; one, except in tests.", show_default="1")
    ] = None
    gpus_per_node: Annotated[int | None, typer.Option(min=0, help="GPUs of a node.", show_default="0")] = None
    cpus_per_task: Annotated[
        int | None, typer.Option(min=1, help="Cores of a task.", show_default="8 for each GPU")
    ] = None
    slurm: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VALUE", help="Any other option of sbatch. Repeatable.")
    ] = None

    def override(self, given: Resources) -> Resources:
        """Return the resources with the given ones in place of ours; `slurm` options are added to ours.

        Raises UserError for an unknown cluster or an sbatch option of the wrong form.
        """
        replaced = {name: value for name, value in asdict(given).items() if value is not None}
        merged = replace(self, **{**replaced, "slurm": [*(self.slurm or []), *(given.slurm or [])]})
        if merged.cluster not in ("slurm", "local", "debug"):
            raise UserError("--cluster", found=str(merged.cluster), expected="slurm, local or debug", fix="Correct it.")
        merged.slurm_options()
        return merged

    def slurm_options(self) -> dict[str, str]:
        """Return `slurm` by the long names of sbatch's options; the last of a name wins."""
        options = {}
        for word in self.slurm or []:
            name, equals, value = word.partition("=")
            if not equals:
                raise UserError(
                    f"--slurm {word}", found="no '='", expected="name=value", fix="As in --slurm partition=gpu."
                )
            options[name.lstrip("-")] = value
        return options

    @property
    def num_processes(self) -> int:
        """Processes of a training: one per GPU, or one per torchrun agent without GPUs."""
        return (self.nodes or 1) * (self.tasks_per_node or 1) * (self.gpus_per_node or 1)

    def sbatch_cores(self) -> dict[str, int]:
        """Return submitit's parameter for cores: those of a task, or with GPUs a default for each of them.

        SLURM gives a task one core if it is not told otherwise; servers and readers need several.
        """
        if self.cpus_per_task:
            return {"cpus_per_task": self.cpus_per_task}
        if self.gpus_per_node and not {"cpus-per-gpu", "cpus-per-task", "exclusive"} & self.slurm_options().keys():
            return {"slurm_cpus_per_gpu": CPUS_PER_GPU}
        return {}

    def one_node(self) -> Resources:
        """Return the resources of a task that runs on a single node."""
        return replace(self, nodes=1, tasks_per_node=1)

    def no_gpus(self) -> Resources:
        """Return the resources of a task that only joins files."""
        return replace(self.one_node(), gpus_per_node=0, cpus_per_task=None)


DEFAULTS = Resources(
    cluster="slurm", max_running=64, time_min=240, signal_delay_s=180, nodes=1, tasks_per_node=1, gpus_per_node=0,
)  # fmt: skip
