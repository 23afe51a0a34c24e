"""`synth`: generate conversations with the target from prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from common.cli import ShardOption, make_app, parse_shard
from common.errors import run_app
from recipe.cli import OverridesOption, RecipeOption, load_checked

app = make_app("Have the target write conversations, with token ids.")

RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="The output folder of `synth generate`.")]


@app.callback()
def _callback() -> None:
    """Have the target write conversations, with token ids."""


@app.command(
    epilog="Example: synth generate -r recipes/Tiny-DFlash/recipe.yaml --prompts prompts.jsonl "
    "--output runs/synth --thinking-modes enabled:2,disabled:1"
)
def generate(
    recipe: RecipeOption,
    prompts: Annotated[
        str, typer.Option(help="JSONL, JSON, Parquet, a directory of them, a saved `datasets` folder, or a hub name.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for conversations.jsonl and ledger.jsonl.")],
    thinking_modes: Annotated[
        str | None,
        typer.Option(
            help="Comma-separated, optionally with weights; row i takes mode i modulo their number. Empty: none."
        ),
    ] = None,
    endpoint: Annotated[
        list[str] | None,
        typer.Option(help="A running server's URL, ending in /v1. Repeatable.", show_default="start one"),
    ] = None,
    concurrency: Annotated[
        int | None, typer.Option(help="Conversations in flight.", show_default="as many as the server keeps up with")
    ] = None,
    output_format: Annotated[
        str | None, typer.Option(help="Form of the messages beside the token ids: oai or sharegpt.")
    ] = None,
    until_tokens: Annotated[
        int | None,
        typer.Option(
            min=1, help="Stop when the finished conversations hold so many generated tokens.", show_default="all rows"
        ),
    ] = None,
    shard: ShardOption = None,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Also try the failed rows again.")] = False,
    set_: OverridesOption = None,
) -> None:
    """Generate the target's replies to every prompt, each row exactly once. Run again to resume."""
    from synth.generate import generate as generate_all

    flags = {
        "synth.thinking_modes": None if thinking_modes is None else [m for m in thinking_modes.split(",") if m],
        "synth.concurrency": concurrency,
        "synth.output_format": output_format,
        "synth.endpoints": endpoint or None,
        "synth.until_tokens": until_tokens,
    }
    loaded = load_checked(recipe, set_, flags)
    generate_all(loaded, prompts, output, shard=parse_shard(shard), retry_failed=retry_failed)


@app.command(epilog="Example: synth merge runs/synth")
def merge(run: RunArgument) -> None:
    """Join the finished shards of a run in the order of the input, and check that their counts add up."""
    from synth.merge import merge as merge_shards

    merge_shards(run)


@app.command(epilog="Example: synth stats runs/synth --plot runs/synth/stats.png")
def stats(
    run: RunArgument,
    plot: Annotated[Path | None, typer.Option(help="Where to write the plot.", show_default="RUN/stats.png")] = None,
) -> None:
    """Print and plot statuses, thinking modes, finish reasons and lengths."""
    from synth.stats import show_stats

    show_stats(run, plot or run / "stats.png")


@app.command(epilog="Example: synth inspect runs/synth 3f9c --html conversation.html")
def inspect(
    run: RunArgument,
    id_: Annotated[
        str, typer.Argument(metavar="ID", help="A conversation's id, a prefix of it, or the prompt's own id.")
    ],
    html: Annotated[Path | None, typer.Option(help="Write one HTML file instead.")] = None,
) -> None:
    """Show a conversation's tokens, with those in the loss coloured."""
    from synth.inspect import inspect_conversation

    inspect_conversation(run, id_, html)


@app.command(epilog="Example: synth verify runs/synth -r recipes/Tiny-DFlash/recipe.yaml")
def verify(
    run: RunArgument,
    recipe: RecipeOption,
    endpoint: Annotated[
        str | None, typer.Option(help="A running server of the target, ending in /v1.", show_default="start one")
    ] = None,
    set_: OverridesOption = None,
) -> None:
    """Check every turn: its tokens decode to its message, its context is what the server renders."""
    from synth.verify import verify as verify_run

    flags = {"synth.endpoints": [endpoint] if endpoint else None}
    verify_run(load_checked(recipe, set_, flags), run)


def main() -> None:
    run_app(app)
