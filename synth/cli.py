"""`synth`: prepare prompts, and generate conversations with the target from them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from common.cli import LimitOption, ShardOption, TargetOption, make_app, parse_shard
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


@app.command(
    epilog="Example: synth prepare -r recipe.yaml --against gsm8k=gsm8k.jsonl --against held_out.jsonl "
    "--output runs/prompts"
)
def prepare(
    recipe: RecipeOption,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for prompts.jsonl and manifest.json.")],
    against: Annotated[
        list[str] | None,
        typer.Option(
            help="An evaluation set to keep out: mt_bench, gsm8k, humaneval, math500, aime, speed_bench; NAME=FILE; a "
            "file of prompts; a folder of conversations. Repeatable.",
            show_default="the recipe's, or all known sets",
        ),
    ] = None,
    set_: OverridesOption = None,
) -> None:
    """Build a prompt set: mix sources, remove duplicates and evaluation questions. Run again to resume."""
    from synth.prepare import prepare as prepare_all

    prepare_all(load_checked(recipe, set_, {"prepare.against": against or None}), output)


@app.command(
    epilog="Example: synth overlap runs/synth/train --against humaneval=humaneval.jsonl --against runs/synth/held_out "
    "--output overlap.jsonl"
)
def overlap(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The output folder of `synth generate`, or prompts.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="File for the conversations that overlap.")],
    against: Annotated[
        list[str] | None,
        typer.Option(help="An evaluation set, as in `synth prepare`. Repeatable.", show_default="all known sets"),
    ] = None,
    ngram: Annotated[int, typer.Option(min=5, max=50, help="Words in a row that make an overlap.")] = 13,
) -> None:
    """List conversations whose prompts or replies overlap with evaluation questions."""
    from synth.overlap import check_overlap

    check_overlap(run, against, output, ngram)


@app.command(epilog="Example: synth presets")
def presets() -> None:
    """List the prompt sets that `prepare.sources` knows by name: size, license, splits."""
    from synth.presets import list_presets

    typer.echo(list_presets())


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


@app.command(epilog="Example: synth browse runs/synth --output runs/synth/browse.html")
def browse(
    run: RunArgument,
    output: Annotated[Path, typer.Option("--output", "-o", help="The page.")] = Path("browse.html"),
    limit: LimitOption = 10000,
    target: TargetOption = None,
) -> None:
    """Write one HTML page to search, filter and read all conversations."""
    from synth.browse import browse as browse_run

    browse_run(run, output, limit or None, target)


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
