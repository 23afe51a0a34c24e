"""`dump`: conversations to a store of hidden states."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from contracts.cli import OverridesOption, RecipeOption, make_app
from contracts.errors import run_app

app = make_app("Capture the target's hidden states over its own conversations.")


@app.command(
    epilog="Example: dump run -r recipes/Tiny-DFlash/recipe.yaml --conversations runs/synth --output runs/store"
)
def run(
    recipe: RecipeOption,
    conversations: Annotated[Path, typer.Option(help="Output folder of `synth generate`.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The store's folder.")],
    set_: OverridesOption = None,
) -> None:
    """Fill the store with vLLM, one file a sample; resumes by itself."""
    from contracts.recipe import load_recipe
    from dump.run import dump

    dump(load_recipe(recipe, set_ or []), conversations, output)


@app.command(epilog="Example: dump verify -r recipes/Tiny-DFlash/recipe.yaml --store runs/store")
def verify(
    recipe: RecipeOption,
    store: Annotated[Path, typer.Option(help="A store that `dump run` wrote.")],
    once: Annotated[bool, typer.Option("--once", help="Skip a store that was proven before.")] = False,
    set_: OverridesOption = None,
) -> None:
    """Prove the store: checksums, and that its states predict the generated tokens."""
    from contracts.recipe import load_recipe
    from dump.verify import verify as verify_store

    verify_store(load_recipe(recipe, set_ or []), store, once=once)


def main() -> None:
    run_app(app)
