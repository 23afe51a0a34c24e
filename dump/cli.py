"""`dump`: conversations to a store of hidden states."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from contracts.cli import OverridesOption, RecipeOption, ShardOption, load_checked, make_app, parse_shard
from contracts.errors import run_app

app = make_app("Capture the target's hidden states over its own conversations.")

ConversationsOption = Annotated[Path, typer.Option(help="Output folder of `synth generate`.")]
StoreArgument = Annotated[Path, typer.Argument(metavar="STORE", help="A store that `dump run` writes.")]


@app.command(
    epilog="Example: dump plan -r recipes/Tiny-DFlash/recipe.yaml --conversations runs/synth --rate 8000 --shards 16"
)
def plan(
    recipe: RecipeOption,
    conversations: Annotated[Path | None, typer.Option(help="Output folder of `synth generate`.")] = None,
    samples: Annotated[int | None, typer.Option(min=1, help="Without conversations: so many of them,")] = None,
    mean_tokens: Annotated[int, typer.Option(min=1, help="so long on average.")] = 2000,
    rate: Annotated[float | None, typer.Option(help="Tokens/s of one process, as an earlier run printed it.")] = None,
    shards: Annotated[int, typer.Option(help="Processes that share the work.")] = 1,
    set_: OverridesOption = None,
) -> None:
    """Tell beforehand: samples, tokens, bytes, files, hours."""
    from contracts.errors import UserError
    from contracts.target import Target, captured_layers
    from dump.plan import make_plan, show_plan, suppose_plan

    loaded = load_checked(recipe, set_)
    target = Target.of(loaded.target)
    layer_ids = captured_layers(loaded.target, target)
    if conversations is not None:
        planned = make_plan(loaded, target, layer_ids, [conversations])
    elif samples is not None:
        planned = suppose_plan(loaded, target, layer_ids, samples, mean_tokens)
    else:
        raise UserError(
            "--conversations", found="none", expected="a folder, or --samples", fix="Give what is to be dumped."
        )
    show_plan(loaded, planned, target, layer_ids, rate, shards)


@app.command(
    epilog="Example: dump run -r recipes/Tiny-DFlash/recipe.yaml --conversations runs/synth --output runs/store"
)
def run(
    recipe: RecipeOption,
    conversations: ConversationsOption,
    output: Annotated[Path, typer.Option("--output", "-o", help="The store's folder.")],
    shard: ShardOption = None,
    backend: Annotated[
        str | None, typer.Option(help="vllm, server or hf (transformers).", show_default="the recipe's")
    ] = None,
    truncate: Annotated[
        bool | None, typer.Option("--truncate", help="Cut over-length samples.", show_default="leave them out")
    ] = None,
    max_reject_fraction: Annotated[
        float | None, typer.Option(help="Stop when more samples are rejected.", show_default="the recipe's")
    ] = None,
    staging_dir: Annotated[
        Path | None, typer.Option(help="Where states wait to be stored.", show_default="local memory")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Begin even if the disk seems too small.")] = False,
    set_: OverridesOption = None,
) -> None:
    """Fill the store, one file a sample; resumes by itself. Shards may fill one store together."""
    from dump.run import dump

    flags = {
        "dump.backend": backend,
        "dump.truncate": truncate,
        "dump.max_reject_fraction": max_reject_fraction,
        "dump.staging_dir": staging_dir,
    }
    dump(load_checked(recipe, set_, flags), conversations, output, shard=parse_shard(shard), force=force)


@app.command(epilog="Example: dump verify -r recipes/Tiny-DFlash/recipe.yaml --store runs/store")
def verify(
    recipe: RecipeOption,
    store: Annotated[Path, typer.Option(help="A store that `dump run` wrote.")],
    once: Annotated[bool, typer.Option("--once", help="Skip a store that was proven before.")] = False,
    reference: Annotated[int, typer.Option(help="Samples whose layers are compared with transformers.")] = 8,
    set_: OverridesOption = None,
) -> None:
    """Prove the store: checksums, tokens, masks, states that predict the tokens, layers as transformers has them."""
    from dump.verify import verify as verify_store

    verify_store(load_checked(recipe, set_), store, once=once, num_reference=reference)


@app.command(epilog="Example: dump inspect runs/store 3f9c --html sample.html")
def inspect(
    store: StoreArgument,
    id_: Annotated[str, typer.Argument(metavar="ID", help="A sample's id, or its beginning.")],
    html: Annotated[Path | None, typer.Option(help="Write one HTML file instead.")] = None,
) -> None:
    """Show one sample: tokens coloured by the mask, norms by layer."""
    from dump.inspect import inspect_sample

    inspect_sample(store, id_, html)


@app.command(epilog="Example: dump stats runs/store")
def stats(store: StoreArgument) -> None:
    """Print what a store holds."""
    from dump.inspect import show_stats

    show_stats(store)


@app.command(epilog="Example: dump convert runs/store --to modelopt --output runs/modelopt")
def convert(
    store: StoreArgument,
    to: Annotated[str, typer.Option(help="modelopt or speculators.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The converted store's folder.")],
) -> None:
    """Write a store in the layout of another trainer."""
    from dump.convert import convert as convert_store

    convert_store(store, output, to)


def main() -> None:
    run_app(app)
