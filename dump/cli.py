"""`dump`: capture conversations into a store of hidden states."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from common.cli import LimitOption, ShardOption, TargetOption, expand_options, make_app, parse_shard
from common.errors import run_app
from recipe.cli import NO_MOONCAKE, MooncakeOptions, OverridesOption, RecipeOption, load_checked


@dataclass(frozen=True)
class WindowOptions:
    """Options of a store that rolls."""

    window: Annotated[
        float | None,
        typer.Option(
            min=0, help="GiB of a store that rolls: filled in the order of `train offline --follow`, deleted behind it."
        ),
    ] = None
    until_full: Annotated[
        bool, typer.Option("--until-full", help="With --window: stop once the window is full; do not wait.")
    ] = False


NO_WINDOW = WindowOptions()
app = make_app("Capture the target's hidden states over its own conversations.")

ConversationsOption = Annotated[Path, typer.Option(help="Output folder of `synth generate`.")]
StoreArgument = Annotated[Path, typer.Argument(metavar="STORE", help="A store that `dump run` writes.")]


@app.command(
    epilog="Example: dump plan -r recipes/Tiny-DFlash/recipe.yaml --conversations runs/synth --rate 8000 --shards 16"
)
def plan(
    recipe: RecipeOption,
    conversations: Annotated[Path | None, typer.Option(help="Output folder of `synth generate`.")] = None,
    samples: Annotated[int | None, typer.Option(min=1, help="Without --conversations: number of samples.")] = None,
    mean_tokens: Annotated[int, typer.Option(min=1, help="With --samples: mean tokens of a sample.")] = 2000,
    rate: Annotated[
        float | None, typer.Option(help="Tokens/s of one process with all its engines, printed by an earlier run.")
    ] = None,
    shards: Annotated[int, typer.Option(help="Processes that share the work.")] = 1,
    set_: OverridesOption = None,
) -> None:
    """Print the size of a dump: samples, tokens, bytes, files, hours."""
    from common.errors import UserError
    from dump.plan import make_plan, show_plan, suppose_plan
    from dump.rendered import TemplateMasks
    from dump.samples import read_rows
    from target.target import Target

    loaded = load_checked(recipe, set_)
    target = Target.of(loaded.target)
    if conversations is not None:
        planned = make_plan(loaded, target, read_rows([conversations], TemplateMasks(loaded.target, target)))
    elif samples is not None:
        planned = suppose_plan(loaded, target, samples, mean_tokens)
    else:
        raise UserError("--conversations", found="none", expected="a folder, or --samples", fix="Pass one of them.")
    show_plan(loaded, planned, target, rate, shards)


@app.command(
    epilog="Example: dump run -r recipes/Tiny-DFlash/recipe.yaml --conversations runs/synth --output runs/store"
)
@expand_options
def run(
    recipe: RecipeOption,
    conversations: ConversationsOption,
    output: Annotated[Path, typer.Option("--output", "-o", help="The store's folder.")],
    shard: ShardOption = None,
    backend: Annotated[
        str | None, typer.Option(help="vllm, server or hf (transformers).", show_default="the recipe's")
    ] = None,
    engines: Annotated[
        int | None,
        typer.Option(min=0, help="vLLM engines, each on its own GPUs; 0: as many as fit.", show_default="the recipe's"),
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
    preflight: Annotated[
        bool | None,
        typer.Option("--preflight/--no-preflight", help="Prove the engine on a few samples first.", show_default="yes"),
    ] = None,
    rolls: WindowOptions = NO_WINDOW,
    mooncake: MooncakeOptions = NO_MOONCAKE,
    force: Annotated[bool, typer.Option("--force", help="Begin even if the disk seems too small.")] = False,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Capture the failed samples again.")] = False,
    set_: OverridesOption = None,
) -> None:
    """Fill the store, one file per sample. Run again to resume. Several shards may fill one store."""
    from dump.run import dump
    from dump.window import Rolling, dump_window

    flags = {
        "dump.backend": backend,
        "dump.engines": engines,
        "dump.truncate": truncate,
        "dump.max_reject_fraction": max_reject_fraction,
        "dump.staging_dir": staging_dir,
        "dump.preflight": preflight,
    }
    loaded, part = load_checked(recipe, set_, flags), parse_shard(shard)
    if rolls.window is None:
        if rolls.until_full or mooncake.where():
            raise typer.BadParameter("--until-full and --mooncake need --window")
        dump(loaded, conversations, output, shard=part, force=force, retry_failed=retry_failed)
        return
    rolling = Rolling(
        num_bytes=int(rolls.window * 2**30),
        shard=part or (0, 1),
        until_full=rolls.until_full,
        force=force,
        retry_failed=retry_failed,
        mooncake=mooncake.where(),
    )
    dump_window(loaded, conversations, output, rolling)


@app.command(
    epilog="Example: dump preflight -r recipe.yaml --set dump.backend=server "
    "--set 'dump.endpoints=[http://node3:8000/v1]' --set dump.server_staging_dir=/dev/shm/states"
)
def preflight(
    recipe: RecipeOption,
    conversations: Annotated[
        Path | None,
        typer.Option(help="Output folder of `synth generate`.", show_default="replies that the server writes"),
    ] = None,
    set_: OverridesOption = None,
) -> None:
    """Prove the engines on a few samples as `dump run` does before it stores any; store nothing."""
    from dump.preflight import prove

    prove(load_checked(recipe, set_), conversations)


@app.command(epilog="Example: dump verify -r recipes/Tiny-DFlash/recipe.yaml --store runs/store")
def verify(
    recipe: RecipeOption,
    store: Annotated[Path, typer.Option(help="A store that `dump run` wrote.")],
    once: Annotated[
        bool, typer.Option("--once", help="Skip a store that was proven before and has not changed.")
    ] = False,
    again: Annotated[
        bool, typer.Option("--again", help="Read all samples, also those that were proven and have not changed.")
    ] = False,
    reference: Annotated[int, typer.Option(help="Samples whose layers are compared with transformers.")] = 8,
    samples: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Check only so many samples, drawn with --seed.",
            show_default="the recipe's dump.verify_samples",
        ),
    ] = None,
    all_: Annotated[bool, typer.Option("--all", help="Check all samples, whatever the recipe says.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of the draw.")] = 0,
    shard: ShardOption = None,
    set_: OverridesOption = None,
) -> None:
    """Prove the store: checksums, tokens, masks, states that predict the tokens, transformers' layers."""
    from dump.verify import Part
    from dump.verify import verify as verify_store

    if samples is not None and all_:
        raise typer.BadParameter("give either --samples or --all")
    loaded = load_checked(recipe, set_)
    part = Part(None if all_ else samples or loaded.dump.verify_samples, seed, parse_shard(shard))
    verify_store(loaded, store, once=once, again=again, num_reference=reference, part=part)


@app.command(epilog="Example: dump inspect runs/store 3f9c --html sample.html")
def inspect(
    store: StoreArgument,
    id_: Annotated[str, typer.Argument(metavar="ID", help="A sample's id, or the start of one.")],
    html: Annotated[Path | None, typer.Option(help="Write one HTML file instead.")] = None,
) -> None:
    """Show one sample: tokens coloured by the mask, norms by layer."""
    from dump.inspect import inspect_sample

    inspect_sample(store, id_, html)


@app.command(epilog="Example: dump browse runs/store --proposals runs/proposals.jsonl --output runs/browse.html")
def browse(
    store: StoreArgument,
    output: Annotated[Path, typer.Option("--output", "-o", help="The page.")] = Path("browse.html"),
    proposals: Annotated[
        Path | None,
        typer.Option(help="Colour the tokens by which a draft would accept: the file of `train eval --proposals`."),
    ] = None,
    limit: LimitOption = 10000,
    target: TargetOption = None,
) -> None:
    """Write one HTML page to search, filter and read all samples."""
    from dump.browse import browse as browse_store

    browse_store(store, output, limit or None, target, proposals)


@app.command(epilog="Example: dump stats runs/store")
def stats(store: StoreArgument) -> None:
    """Print counts, lengths and sizes of a store."""
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
