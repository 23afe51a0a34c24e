"""`serve`: print or run the vLLM command of a recipe's target, with or without a draft."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from contracts.cli import OverridesOption, RecipeOption, make_app
from contracts.errors import run_app

if TYPE_CHECKING:
    from contracts.recipe import Recipe
    from serve.command import ServeCommand

app = make_app("Serve a recipe's target with vLLM, with or without a draft.")

DraftOption = Annotated[Path | None, typer.Option(help="An exported draft (`train export`).", show_default="none")]
ExtractOption = Annotated[
    Path | None,
    typer.Option(help="Hand out hidden states for `dump run` into this folder.", show_default="no"),
]
PortOption = Annotated[int | None, typer.Option(help="Where to listen.", show_default="the recipe's, else a free one")]


@app.command(
    epilog="Example: serve command --recipe recipes/Tiny-DFlash/recipe.yaml --draft runs/tiny-dflash/draft --port 8000"
)
def command(
    recipe: RecipeOption,
    draft: DraftOption = None,
    extract: ExtractOption = None,
    port: PortOption = None,
    set_: OverridesOption = None,
) -> None:
    """Print the command, ready to paste."""
    from contracts.recipe import load_recipe

    loaded = load_recipe(recipe, set_ or [], {"serve.port": port})
    typer.echo(_build(loaded, loaded.serve.port or 8000, draft, extract).to_shell())


@app.command(epilog="Example: serve start --recipe recipes/Tiny-DFlash/recipe.yaml --port 8000")
def start(
    recipe: RecipeOption,
    draft: DraftOption = None,
    extract: ExtractOption = None,
    port: PortOption = None,
    log: Annotated[Path, typer.Option(help="The server's output.")] = Path("serve.log"),
    set_: OverridesOption = None,
) -> None:
    """Start the server, wait until it is healthy, and serve until Ctrl-C or SIGTERM."""
    from contracts.recipe import load_recipe
    from serve.server import find_port, run_server

    loaded = load_recipe(recipe, set_ or [], {"serve.port": port})
    built = _build(loaded, find_port(loaded.serve.host, loaded.serve.port), draft, extract)
    with run_server(built, log_path=log, startup_timeout_s=loaded.serve.startup_timeout_s) as server:
        typer.echo(f"{server.url}/v1  (Ctrl-C stops it)")
        server.wait()


def _build(recipe: Recipe, port: int, draft: Path | None, extract: Path | None) -> ServeCommand:
    from contracts.target import Target, captured_layers
    from serve.command import build_command
    from serve.extraction import extraction_args, to_server_args

    target = Target.read(recipe.target.path)
    extra_args = None
    if extract is not None:
        layer_ids = captured_layers(recipe.target, target)
        extra_args = to_server_args(extraction_args(recipe, target, layer_ids, extract.absolute()))
    return build_command(recipe, target, port=port, draft=draft, extra_args=extra_args)


def main() -> None:
    run_app(app)
