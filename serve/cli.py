"""`serve`: print or run the vLLM command of a recipe's target, with or without a draft."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast, get_args

import typer

from contracts.cli import OverridesOption, RecipeOption, load_checked, make_app
from contracts.errors import run_app

if TYPE_CHECKING:
    from contracts.recipe import Recipe
    from serve.command import ServeCommand, Sizes

app = make_app("Serve a recipe's target with vLLM, with or without a draft.")

DraftOption = Annotated[
    str | None,
    typer.Option(help="An exported draft (`train export`), one of serve.heads (eagle3), or none.", show_default="none"),
]
ExtractOption = Annotated[
    Path | None,
    typer.Option(help="Hand out hidden states for `dump run` into this folder.", show_default="no"),
]
PortOption = Annotated[int | None, typer.Option(help="Where to listen.", show_default="the recipe's, else a free one")]
VariantOption = Annotated[
    str | None, typer.Option(help="One of serve.variants: bf16, mxfp8, ...", show_default="the recipe's")
]
HardwareOption = Annotated[
    str | None,
    typer.Option(help="The node: h100, h200, b200, b300, gb200, gb300, mi355x", show_default="the recipe's"),
]
PurposeOption = Annotated[
    str | None, typer.Option("--for", help="synth, dump, bench or production: its flags (serve.purposes).")
]
IslOption = Annotated[int | None, typer.Option(min=1, help="Tokens in: sizes the context and the batch.")]
OslOption = Annotated[int | None, typer.Option(min=1, help="Tokens out: sizes the context.")]
ConcurrencyOption = Annotated[int | None, typer.Option(min=1, help="Requests at a time: sizes the CUDA graphs.")]
ExtraArgument = Annotated[list[str] | None, typer.Argument(help="More flags of vLLM after --, over all others.")]


@app.command(
    epilog="Example: serve command --recipe recipes/MiniMax-M3-DFlash/recipe.yaml --variant mxfp8 --hardware h200 "
    "--draft eagle3 --for production -- --gpu-memory-utilization 0.92"
)
def command(
    recipe: RecipeOption,
    draft: DraftOption = None,
    variant: VariantOption = None,
    hardware: HardwareOption = None,
    purpose: PurposeOption = None,
    isl: IslOption = None,
    osl: OslOption = None,
    concurrency: ConcurrencyOption = None,
    format_: Annotated[str, typer.Option("--format", help="shell, json or docker.")] = "shell",
    extract: ExtractOption = None,
    port: PortOption = None,
    extra: ExtraArgument = None,
    set_: OverridesOption = None,
) -> None:
    """Print the command, ready to paste."""
    from contracts.errors import UserError
    from serve.command import Sizes
    from serve.hardware import find_node

    flags = {"serve.port": port, "serve.variant": variant, "serve.hardware": hardware}
    loaded = load_checked(recipe, set_, flags)
    built = _build(loaded, loaded.serve.port or 8000, draft, extract, purpose, Sizes(isl, osl, concurrency), extra)
    if format_ not in ("shell", "json", "docker"):
        raise UserError("--format", found=format_, expected="shell, json or docker", fix="Correct it.")
    if format_ == "docker" and loaded.serve.backend != "vllm":
        raise UserError("--format", found="docker", expected="shell or json for SGLang", fix="Write it by hand.")
    if format_ == "docker":
        rocm = bool(loaded.serve.hardware and find_node(loaded.serve.hardware).rocm)
        typer.echo(built.to_docker(loaded.serve.image, rocm=rocm))
    else:
        typer.echo(built.to_json() if format_ == "json" else built.to_shell())


@app.command(epilog="Example: serve start --recipe recipes/Tiny-DFlash/recipe.yaml --port 8000")
def start(
    recipe: RecipeOption,
    draft: DraftOption = None,
    variant: VariantOption = None,
    hardware: HardwareOption = None,
    purpose: PurposeOption = None,
    isl: IslOption = None,
    osl: OslOption = None,
    concurrency: ConcurrencyOption = None,
    extract: ExtractOption = None,
    port: PortOption = None,
    log: Annotated[Path, typer.Option(help="The server's output.")] = Path("serve.log"),
    extra: ExtraArgument = None,
    set_: OverridesOption = None,
) -> None:
    """Start the server, wait until it is healthy, and serve until Ctrl-C or SIGTERM."""
    from serve.command import Sizes
    from serve.server import find_port, run_server

    flags = {"serve.port": port, "serve.variant": variant, "serve.hardware": hardware}
    loaded = load_checked(recipe, set_, flags)
    free = find_port(loaded.serve.host, loaded.serve.port)
    built = _build(loaded, free, draft, extract, purpose, Sizes(isl, osl, concurrency), extra)
    with run_server(built, log_path=log, startup_timeout_s=loaded.serve.startup_timeout_s) as server:
        typer.echo(f"{server.url}/v1  (Ctrl-C stops it)")
        with suppress(KeyboardInterrupt):
            server.wait()
    typer.echo("serve: stopped")


def _build(
    recipe: Recipe,
    port: int,
    draft: str | None,
    extract: Path | None,
    purpose: str | None,
    sizes: Sizes,
    extra: list[str] | None,
) -> ServeCommand:
    from contracts.errors import UserError
    from contracts.recipe import Purpose
    from contracts.target import Target, captured_layers
    from serve.command import build_command, parse_flags
    from serve.extraction import extraction_args, to_server_args

    if purpose not in (None, *get_args(Purpose)):
        raise UserError(
            "--for", found=str(purpose), expected=f"one of {', '.join(get_args(Purpose))}", fix="Correct it."
        )
    target = Target.of(recipe.target)
    args: dict[str, Any] = {}
    if extract is not None:
        layer_ids = captured_layers(recipe.target, target)
        args = to_server_args(extraction_args(recipe, target, layer_ids, extract.absolute()))
    return build_command(
        recipe,
        target,
        port=port,
        draft=None if draft == "none" else draft,
        purpose=cast("Purpose | None", purpose),
        sizes=sizes,
        extra_args={**args, **parse_flags(extra or [])},
    )


def main() -> None:
    run_app(app)
