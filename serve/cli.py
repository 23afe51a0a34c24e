"""`serve`: print or run the vLLM command of a recipe's target, with or without a draft."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast, get_args

import typer

from common.cli import expand_options, make_app
from common.errors import UserError, run_app
from recipe.cli import OverridesOption, RecipeOption, load_checked

if TYPE_CHECKING:
    from recipe.recipe import Recipe
    from serve.command import ServeCommand

app = make_app("Serve a recipe's target with vLLM, with or without a draft.")


@dataclass(frozen=True)
class ServerOptions:
    """The options of both commands: target, draft, hardware, purpose and load."""

    recipe: RecipeOption
    draft: Annotated[
        str | None,
        typer.Option(
            help="An exported draft (`train export`), org/name@revision on the hub, the name of one in serve.heads, or "
            "none.",
            show_default="none",
        ),
    ] = None
    variant: Annotated[
        str | None, typer.Option(help="One of serve.variants: bf16, mxfp8, ...", show_default="the recipe's")
    ] = None
    hardware: Annotated[
        str | None,
        typer.Option(help="The GPU node: h100, h200, b200, b300, gb200, gb300, mi355x.", show_default="the recipe's"),
    ] = None
    purpose: Annotated[
        str | None,
        typer.Option("--for", help="Add the flags of this purpose (serve.purposes): synth, dump, bench or production."),
    ] = None
    isl: Annotated[
        int | None, typer.Option(min=1, help="Input tokens of a request. Sizes the context and the batch.")
    ] = None
    osl: Annotated[int | None, typer.Option(min=1, help="Output tokens of a request. Sizes the context.")] = None
    concurrency: Annotated[int | None, typer.Option(min=1, help="Concurrent requests. Sizes the CUDA graphs.")] = None
    extract: Annotated[
        Path | None,
        typer.Option(help="Write hidden states for `dump run` into this folder.", show_default="no"),
    ] = None
    port: Annotated[
        int | None, typer.Option(help="Port to listen on.", show_default="the recipe's, else a free one")
    ] = None
    extra: Annotated[list[str] | None, typer.Argument(help="More vLLM flags, after --. They override all others.")] = (
        None
    )
    set_: OverridesOption = None

    def load(self) -> Recipe:
        """Load and check the recipe; --port, --variant and --hardware override its keys."""
        keys = {"serve.port": self.port, "serve.variant": self.variant, "serve.hardware": self.hardware}
        return load_checked(self.recipe, self.set_, keys)

    def build(self, recipe: Recipe, port: int, *, on_cpu: bool | None = None) -> ServeCommand:
        """Build the command, for the CPU build of the engine or not; default: as is installed.

        Raises UserError for an unknown purpose or contradictory flags.
        """
        from drafts.published import find_draft
        from recipe.check import note_ranks
        from recipe.serve import Purpose
        from serve.command import Serving, build_command
        from serve.flags import Sizes, parse_flags
        from target.target import Target

        known = get_args(Purpose)
        if self.purpose not in (None, *known):
            raise UserError("--for", found=str(self.purpose), expected=f"one of {', '.join(known)}", fix="Correct it.")
        target = Target.of(recipe.target)
        extraction: dict[str, Any] = {}
        if self.extract is not None:
            from serve.extraction import extraction_args, to_server_args
            from target.layers import captured_layers

            layer_ids = captured_layers(recipe.target, target)
            args = extraction_args(recipe, target, layer_ids, self.extract.absolute(), on_cpu=on_cpu)
            extraction = to_server_args(args)
        serving = Serving(
            draft=None if self.draft in (None, "none") else find_draft(self.draft),
            purpose=cast("Purpose | None", self.purpose),
            sizes=Sizes(self.isl, self.osl, self.concurrency),
            extra_args={**extraction, **parse_flags(self.extra or [])},
            on_cpu=on_cpu,
        )
        command = build_command(recipe, target, port=port, serving=serving)
        captures = self.extract is not None or serving.draft is not None
        if captures and (note := note_ranks(target, parse_flags(command.args[2:]))):
            typer.echo(f"note: {note}", err=True)
        return command


@app.command(
    epilog="Example: serve command --recipe recipes/MiniMax-M3-DFlash/recipe.yaml --variant mxfp8 --hardware h200 "
    "--draft eagle3 --for production -- --gpu-memory-utilization 0.92"
)
@expand_options
def command(
    options: ServerOptions,
    format_: Annotated[str, typer.Option("--format", help="Output format: shell, json or docker.")] = "shell",
) -> None:
    """Print the command that serves the target, ready to paste."""
    from recipe.hardware import find_node

    loaded = options.load()
    # The container has a GPU build of its own, whatever is installed here.
    built = options.build(loaded, loaded.serve.port or 8000, on_cpu=False if format_ == "docker" else None)
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
@expand_options
def start(
    options: ServerOptions,
    log: Annotated[Path, typer.Option(help="File for the server's output.")] = Path("serve.log"),
    preflight: Annotated[
        bool, typer.Option("--preflight/--no-preflight", help="With --extract: prove the states first.")
    ] = True,
) -> None:
    """Start the server, wait until it is healthy, and serve until Ctrl-C or SIGTERM."""
    from serve.extraction import prove_extraction
    from serve.server import find_port, run_server

    loaded = options.load()
    built = options.build(loaded, find_port(loaded.serve.host, loaded.serve.port))
    with run_server(built, log_path=log, startup_timeout_s=loaded.serve.startup_timeout_s) as server:
        if options.extract is not None and preflight:
            prove_extraction(options.recipe, options.set_ or [], f"{server.url}/v1", options.extract.absolute())
        typer.echo(f"{server.url}/v1  (Ctrl-C stops it)")
        with suppress(KeyboardInterrupt):
            server.wait()
    typer.echo("serve: stopped")


def main() -> None:
    run_app(app)
