"""`synth`: prompts to conversations written by the target."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from contracts.cli import OverridesOption, RecipeOption, make_app
from contracts.errors import run_app

app = make_app("Have the target write conversations, token ids and all.")


@app.callback()
def _callback() -> None:
    """Have the target write conversations, token ids and all."""


@app.command(
    epilog="Example: synth generate -r recipes/Tiny-DFlash/recipe.yaml --prompts prompts.jsonl "
    "--output runs/synth --thinking-modes enabled,disabled,adaptive"
)
def generate(
    recipe: RecipeOption,
    prompts: Annotated[Path, typer.Option(help="JSONL; rows with `messages`, `prompt` or `turns`.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for conversations.jsonl and ledger.jsonl.")],
    thinking_modes: Annotated[
        str | None, typer.Option(help="Comma-separated; row i takes mode i modulo their number. Empty: none is sent.")
    ] = None,
    endpoint: Annotated[
        str | None, typer.Option(help="A running server's URL, ending in /v1.", show_default="start one")
    ] = None,
    concurrency: Annotated[int | None, typer.Option(help="Conversations in flight.")] = None,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Try the failed rows again, too.")] = False,
    set_: OverridesOption = None,
) -> None:
    """Answer every user turn of every prompt; resumes by itself, exactly once a row."""
    from contracts.recipe import load_recipe
    from synth.generate import generate as generate_all

    modes = None if thinking_modes is None else [mode for mode in thinking_modes.split(",") if mode]
    loaded = load_recipe(recipe, set_ or [], {"synth.thinking_modes": modes, "synth.concurrency": concurrency})
    generate_all(loaded, prompts, output, endpoint=endpoint, retry_failed=retry_failed)


def main() -> None:
    run_app(app)
