"""`recipe`: check a recipe and show it resolved. Also the options that every command line shares."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from contracts.errors import UserError, run_app

if TYPE_CHECKING:
    from contracts.recipe import Recipe

RecipeOption = Annotated[Path, typer.Option("--recipe", "-r", help="The pipeline's recipe (YAML).")]
OverridesOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a recipe key, as in train.num_steps=50. Repeatable."),
]

ShardOption = Annotated[
    str | None, typer.Option("--shard", metavar="I/N", help="Only this one of N parts of the work; I from 0.")
]


def parse_shard(text: str | None) -> tuple[int, int] | None:
    """`"3/64"` as (3, 64). Raises UserError for anything else than I/N with 0 <= I < N."""
    if text is None:
        return None
    number, _, count = text.partition("/")
    if number.isdecimal() and count.isdecimal() and int(number) < int(count):
        return int(number), int(count)
    raise UserError("--shard", found=text, expected="I/N with I from 0 to N-1, as in 3/64", fix="Correct it.")


def make_app(help_text: str) -> typer.Typer:
    """A typer app in the house's manner: help without arguments, errors by contracts.errors."""
    return typer.Typer(
        help=help_text,
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
    )


def load_checked(path: Path, overrides: list[str] | None, flags: dict[str, Any] | None = None) -> Recipe:
    """A stage's recipe: loaded, and checked as `recipe check` does."""
    from contracts.check import check_recipe
    from contracts.recipe import load_recipe

    recipe = load_recipe(path, overrides or [], flags)
    check_recipe(recipe)
    return recipe


app = make_app("Check recipes and show them resolved.")


@app.callback()
def _callback() -> None:
    """Check recipes and show them resolved."""


@app.command(epilog="Example: recipe show --recipe recipes/Tiny-DFlash/recipe.yaml --set train.num_steps=50")
def show(recipe: RecipeOption, set_: OverridesOption = None) -> None:
    """Print every key of the recipe, defaults filled in, and where each value came from."""
    from contracts.show_recipe import show_recipe

    typer.echo(show_recipe(recipe, set_ or []), nl=False)


@app.command(epilog="Example: recipe check --recipe recipes/Tiny-DFlash/recipe.yaml")
def check(recipe: RecipeOption, set_: OverridesOption = None) -> None:
    """Check the recipe; say so, or name the first thing wrong and exit 2."""
    from contracts.target import Target

    loaded = load_checked(recipe, set_)
    here = Target.of(loaded.target).is_here if loaded.target.facts or loaded.target.path.exists() else False
    typer.echo(f"{recipe}: ok" + ("" if here else f" (as far as it goes without the files of {loaded.target.path})"))


def main() -> None:
    run_app(app)
