"""`serve`: print or run the vLLM command of a recipe's target, with or without a draft."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from contracts.cli import OverridesOption, RecipeOption, make_app
from contracts.errors import run_app

app = make_app("Serve a recipe's target with vLLM, with or without a draft.")

DraftOption = Annotated[Path | None, typer.Option(help="An exported draft (`train export`).", show_default="none")]
PortOption = Annotated[int | None, typer.Option(help="Where to listen.", show_default="the recipe's, else a free one")]


@app.command(
    epilog="Example: serve command --recipe recipes/Tiny-DFlash/recipe.yaml --draft runs/tiny-dflash/draft --port 8000"
)
def command(
    recipe: RecipeOption, draft: DraftOption = None, port: PortOption = None, set_: OverridesOption = None
) -> None:
    """Print the command, ready to paste."""
    from contracts.recipe import load_recipe
    from contracts.target import Target
    from serve.command import build_command

    loaded = load_recipe(recipe, set_ or [], {"serve.port": port})
    target = Target.read(loaded.target.path)
    typer.echo(build_command(loaded, target, port=loaded.serve.port or 8000, draft=draft).to_shell())


@app.command(epilog="Example: serve start --recipe recipes/Tiny-DFlash/recipe.yaml --port 8000")
def start(
    recipe: RecipeOption,
    draft: DraftOption = None,
    port: PortOption = None,
    log: Annotated[Path, typer.Option(help="The server's output.")] = Path("serve.log"),
    set_: OverridesOption = None,
) -> None:
    """Start the server, wait until it is healthy, and serve until Ctrl-C or SIGTERM."""
    from contracts.recipe import load_recipe
    from contracts.target import Target
    from serve.command import build_command
    from serve.server import find_port, run_server

    loaded = load_recipe(recipe, set_ or [], {"serve.port": port})
    target = Target.read(loaded.target.path)
    free_port = find_port(loaded.serve.host, loaded.serve.port)
    built = build_command(loaded, target, port=free_port, draft=draft)
    with run_server(built, log_path=log, startup_timeout_s=loaded.serve.startup_timeout_s) as server:
        typer.echo(f"{server.url}/v1  (Ctrl-C stops it)")
        server.wait()


def main() -> None:
    run_app(app)
