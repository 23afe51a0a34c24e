"""`distributed`: submit stages as SLURM jobs, show their progress, and submit unfinished ones again."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from common.cli import expand_options, make_app
from common.errors import UserError, run_app
from distributed.resources import DEFAULTS, Resources
from recipe.cli import NO_MOONCAKE, MooncakeOptions, OverridesOption, RecipeOption, load_checked

if TYPE_CHECKING:
    from distributed.plan import StagePlan

app = make_app("Run stages on many machines, as SLURM jobs.")

FolderArgument = Annotated[Path, typer.Argument(metavar="OUTPUT", help="The --output of `distributed submit`.")]


@app.command(
    epilog="Example: distributed submit synth -r recipe.yaml --input prompts.jsonl --output runs/synth --shards 64 "
    "--gpus-per-node 8 --time 720 --slurm partition=gpu"
)
@expand_options
def submit(
    stage: Annotated[
        str,
        typer.Argument(
            help="synth, dump, train, pipeline for all three, or rolling: dump and train at the same time.",
        ),
    ],
    recipe: RecipeOption,
    input_: Annotated[Path, typer.Option("--input", help="Prompts (synth, pipeline), conversations (dump), store.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The stage's folder; of a pipeline, all of them.")],
    resources: Resources,
    shards: Annotated[int, typer.Option(min=1, help="Tasks that share the work.")] = 1,
    window: Annotated[
        float | None, typer.Option(min=0, help="rolling: GiB of the store that dump fills and train reads.")
    ] = None,
    in_turns: Annotated[
        bool, typer.Option("--in-turns", help="rolling: dump and train in turns, in one job on one node.")
    ] = False,
    set_: OverridesOption = None,
    mooncake: MooncakeOptions = NO_MOONCAKE,
) -> None:
    """Submit a stage as an array of tasks, or a pipeline: each shard is dumped once it is written; then training.

    Or `rolling`, from conversations: a training, and tasks that capture its samples just before it reads them.
    """
    from distributed.plan import STAGES, StagePlan
    from distributed.secrets import hide

    loaded, given, where = load_checked(recipe, set_), DEFAULTS.override(resources), mooncake.where()
    _refuse_unfit(stage, window, str(given.cluster), in_turns=in_turns, mooncake=where is not None)
    if stage in ("train", "pipeline", "rolling"):
        loaded.training().check_processes(given.num_processes)
    names = {"pipeline": STAGES, "rolling": ("dump", "train")}.get(stage, ())
    folders = {name: output / name for name in names} or {stage: output}
    plans, source, overrides = [], input_.absolute(), hide(set_ or [])
    for name, folder in folders.items():
        plans.append(
            StagePlan(
                stage=name,
                recipe=str(recipe.absolute()),
                overrides=overrides,
                input=str(source),
                output=str(folder.absolute()),
                shards=1 if name == "train" else shards,
                window_gib=window,
                mooncake=where,
                conversations=str(input_.absolute()) if in_turns and name == "train" else "",
                resources=given,
            )
        )
        source = folder.absolute()
    _submit_all(plans[-1:] if in_turns else plans)


@app.command(epilog="Example: distributed status runs/tiny-dflash --watch --html")
def status(
    folder: Annotated[
        Path,
        typer.Argument(
            metavar="FOLDER", help="The output of a stage or of `distributed submit`, or the folder of a recipe's run."
        ),
    ],
    watch: Annotated[bool, typer.Option("--watch", help="Show it again until everything is done or failed.")] = False,
    every: Annotated[float, typer.Option(min=0.1, metavar="SECONDS", help="Seconds between two looks of --watch.")] = 5,
    html: Annotated[bool, typer.Option("--html", help="Also write a page: FOLDER/status.html, or --output.")] = False,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="The page's file; implies --html.")] = None,
) -> None:
    """Show how far each stage and task is: its state, rows by status and rate; what remains, and for how long.

    With --watch it ends by itself: exit code 0 if all is done, 1 if something failed and nothing works any more.
    """
    from distributed.stage import RunReader
    from distributed.status import show_status

    page = output or (folder / "status.html" if html else None)
    write = None
    if page is not None:
        from distributed.page import PageWriter

        write = PageWriter(folder, page, every if watch else None).write
    reader = RunReader(folder)
    if watch:
        from distributed.watch import open_display
        from distributed.watch import watch as watch_run

        raise typer.Exit(watch_run(reader, open_display(folder), every, write))
    stages = reader.read()
    show_status(stages, folder)
    if write is not None:
        write(stages, False)
        print(f"-> {page}")


@app.command(epilog="Example: distributed retry runs/synth --time 720")
@expand_options
def retry(
    folder: FolderArgument,
    resources: Resources,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="A secret of the submission, such as serve.env.HF_TOKEN."),
    ] = None,
) -> None:
    """Submit unfinished tasks again, with the resources of the submission.

    Resources given here replace those of the submission; the defaults below are those of `submit`.
    """
    from common.redact import REDACTED
    from distributed.secrets import hide_again
    from recipe.load import load_recipe

    plans = _plans(folder)
    hide_again(plans[0].overrides, set_ or [])
    plans = [plan.model_copy(update={"resources": plan.resources.override(resources)}) for plan in plans]
    for plan in plans:
        if plan.stage == "train":
            known = [word for word in plan.overrides if REDACTED not in word]
            load_recipe(Path(plan.recipe), known).training().check_processes(plan.resources.num_processes)
    _submit_all(plans)


def _refuse_unfit(stage: str, window: float | None, cluster: str, *, in_turns: bool, mooncake: bool) -> None:
    """Raise UserError for options that do not fit each other."""
    from distributed.plan import STAGES

    if stage not in (*STAGES, "pipeline", "rolling"):
        raise UserError("stage", found=stage, expected="synth, dump, train, pipeline or rolling", fix="Correct it.")
    if (stage == "rolling") != (window is not None) or (in_turns and stage != "rolling"):
        raise UserError("--window", found=f"stage {stage}", expected="it for rolling alone", fix="Correct them.")
    if mooncake and (stage != "rolling" or in_turns):
        raise UserError(
            "--mooncake",
            found="--in-turns" if in_turns else f"stage {stage}",
            expected="rolling, with dump and train at the same time: samples vanish with the dump that lent its memory",
            fix="Leave out --mooncake.",
        )
    if stage == "rolling" and not in_turns and cluster != "slurm":
        raise UserError(
            "--cluster",
            found=cluster,
            expected="slurm: dump and train run at the same time",
            fix="Give --in-turns, or start `dump run --window` and `train offline --follow` yourself.",
        )


def _submit_all(plans: list[StagePlan]) -> None:
    """Submit the stages of a run in their order."""
    from distributed.submit import NOTHING
    from distributed.submit import submit as submit_plan

    submitted = NOTHING
    for plan in plans:
        submitted = submit_plan(plan, submitted)


def _plans(folder: Path) -> list[StagePlan]:
    """Return the plan of a stage's folder, or those of a pipeline's folder in their order."""
    from distributed.plan import PLAN_FILE, STAGES, read_plan

    stages = [folder / name for name in STAGES if (folder / name / PLAN_FILE).exists()]
    return [read_plan(path) for path in stages or [folder]]


def main() -> None:
    run_app(app)
