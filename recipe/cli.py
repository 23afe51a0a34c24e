"""`recipe`: write, check, show and plan recipes. Also the recipe options of all stages."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from common.cli import expand_options, make_app
from common.errors import run_app

if TYPE_CHECKING:
    from contracts.mooncake import Mooncake
    from recipe.recipe import Recipe

_RECIPE = typer.Option("--recipe", "-r", help="The pipeline's recipe (YAML).")
RecipeOption = Annotated[Path, _RECIPE]
OptionalRecipeOption = Annotated[Path | None, _RECIPE]
OverridesOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a recipe key, as in train.num_steps=50. Repeatable."),
]


@dataclass(frozen=True)
class MooncakeOptions:
    """Options of both sides of a rolling store that lies in the memory of nodes without a shared disk."""

    mooncake: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT",
            help="Mooncake's master. Samples go from memory to memory, not to disk.",
        ),
    ] = None
    mooncake_name: Annotated[str, typer.Option(help="What the names of this store's objects begin with.")] = "draftline"
    mooncake_protocol: Annotated[str, typer.Option(help="tcp or rdma.")] = "tcp"
    mooncake_devices: Annotated[str, typer.Option(help="RDMA devices, separated by commas.")] = ""
    mooncake_host: Annotated[
        str,
        typer.Option(help="This node's address, as the others reach it; default: where it reaches the master from."),
    ] = ""

    def where(self) -> Mooncake | None:
        """Return how to reach Mooncake; None without --mooncake."""
        from contracts.mooncake import Mooncake

        if self.mooncake is None:
            return None
        return Mooncake(
            self.mooncake, self.mooncake_name, self.mooncake_protocol, self.mooncake_devices, self.mooncake_host
        )


NO_MOONCAKE = MooncakeOptions()


@dataclass(frozen=True)
class BudgetOptions:
    """Limits of `recipe plan`."""

    budget_hours: Annotated[float | None, typer.Option(min=0, help="Most hours from start to end.")] = None
    budget_disk: Annotated[float | None, typer.Option(min=0, metavar="TB", help="Most TB on disk.")] = None
    budget_money: Annotated[float | None, typer.Option(min=0, help="Most money; needs plan.gpu_hour_price.")] = None


NO_BUDGET = BudgetOptions()


def load_checked(path: Path, overrides: list[str] | None, flags: dict[str, Any] | None = None) -> Recipe:
    """Load a recipe and check it as `recipe check` does. Raises UserError for the first mistake."""
    from recipe.check import check_recipe
    from recipe.load import load_recipe

    recipe = load_recipe(path, overrides or [], flags)
    check_recipe(recipe)
    return recipe


app = make_app("Write recipes, check them, show them resolved, plan what they take.")


@app.callback()
def _callback() -> None:
    """Write recipes, check them, show them resolved, plan what they take."""


@app.command(epilog="Example: recipe init Qwen/Qwen3-8B --gpus 8 -o qwen3-8b.yaml")
def init(
    target: Annotated[Path, typer.Argument(help="The target's folder, hub name, or config.json.")],
    method: Annotated[str, typer.Option(help="The draft method: dflash, eagle3, ...")] = "dflash",
    gpus: Annotated[int, typer.Option(min=1, help="GPUs of the machine.")] = 1,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="The recipe.", show_default="stdout")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite the file.")] = False,
) -> None:
    """Write a commented recipe from a target's config: no weights are needed."""
    from common.errors import UserError
    from common.files import write_atomic
    from recipe.init import init_recipe

    if output is not None and output.exists() and not force:
        raise UserError(output, found="a file", expected="a new one", fix="Choose another name, or pass --force.")
    new = init_recipe(target, method, gpus)
    if output is None:
        typer.echo(new.text, nl=False)
    else:
        write_atomic(output, new.text)
        typer.echo(f"{output}: written")
    for note in new.notes:
        typer.echo(f"note: {note}", err=output is None)
    name = output or "recipe.yaml"
    typer.echo(f"next: recipe check -r {name}", err=output is None)
    typer.echo(f"      dump plan -r {name} --samples 50000 --mean-tokens 2000", err=output is None)
    typer.echo(f"      train plan -r {name} --gpu h100 --gpus {gpus}", err=output is None)


@app.command(epilog="Example: recipe show --recipe recipes/Tiny-DFlash/recipe.yaml --set train.num_steps=50")
def show(recipe: RecipeOption, set_: OverridesOption = None) -> None:
    """Print every key of the recipe, defaults included, and the source of each value."""
    from recipe.show import show_recipe

    typer.echo(show_recipe(recipe, set_ or []), nl=False)


@app.command(epilog="Example: recipe check --recipe recipes/Tiny-DFlash/recipe.yaml")
def check(recipe: RecipeOption, set_: OverridesOption = None) -> None:
    """Check the recipe: print ok, or the first mistake and exit with 2."""
    from recipe.check import note_ranks
    from recipe.mask import note_mask_token
    from target.free_rows import note_free_rows
    from target.target import Target, find_folder

    loaded = load_checked(recipe, set_)
    target = Target.of(loaded.target) if loaded.target.facts or find_folder(loaded.target.path).exists() else None
    here = target is not None and target.is_here
    typer.echo(f"{recipe}: ok" + ("" if here else f" (as far as it goes without the files of {loaded.target.path})"))
    if target is None:
        return
    if mask_token := note_mask_token(loaded, target):
        typer.echo(mask_token)
    for note in (note_ranks(target, loaded.serve.args), note_free_rows(target)):
        if note:
            typer.echo(f"note: {note}")


@app.command(
    epilog="Example: recipe plan -r recipes/Qwen3-8B/recipe.yaml --hardware h100 --nodes 8 "
    "--set plan.gpu_hour_price=3 --budget-disk 2"
)
@expand_options
def plan(
    recipe: RecipeOption,
    hardware: Annotated[
        str | None,
        typer.Option(help="h100, h200, b200, b300, gb200, gb300 or mi355x.", show_default="serve.hardware, or h100"),
    ] = None,
    nodes: Annotated[int, typer.Option(min=1, help="Number of nodes.")] = 1,
    measured: Annotated[
        Path | None, typer.Option(help="Take rates from this run of run.sh on one such node, as from a smoke run.")
    ] = None,
    window: Annotated[
        float | None, typer.Option(min=0.001, metavar="GIB", help="Plan a rolling store (`dump run --window`).")
    ] = None,
    train_plan: Annotated[Path | None, typer.Option(help="JSON of `train plan`; default: ask it.")] = None,
    budget: BudgetOptions = NO_BUDGET,
    json_: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    set_: OverridesOption = None,
) -> None:
    """Print hours, disk, memory and money of the whole pipeline, and what to change to fit a budget."""
    from recipe.budget import Budget
    from recipe.plan_report import Request, answer

    limits = Budget(budget.budget_hours, budget.budget_disk and 1000 * budget.budget_disk, budget.budget_money)
    asked = Request(hardware, nodes, measured, window, train_plan, limits)
    answer(load_checked(recipe, set_), asked, as_json=json_)


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    options_metavar="[OPTIONS OF TRAIN FORECAST]",
    epilog="Example: recipe forecast -r recipes/Tiny-DFlash/recipe.yaml --store runs/store "
    "--held-out runs/store-held-out --output runs/forecast",
)
def forecast(context: typer.Context) -> None:
    """Forecast what the whole training gives, from pilots: `train forecast` with the same options (see its --help)."""
    from common.stages import become_stage

    become_stage("train", "forecast", *context.args)  # it trains, which the recipe cannot import


def main() -> None:
    run_app(app)
