"""`bench`: what a served draft is worth."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from contracts.cli import OverridesOption, RecipeOption, load_checked, make_app
from contracts.errors import run_app

app = make_app("Measure a served draft, and gather a pipeline's figures.")


@app.command(
    epilog="Example: bench acceptance -r recipes/Tiny-DFlash/recipe.yaml --conversations runs/held-out "
    "--draft runs/export --output runs/bench"
)
def acceptance(
    recipe: RecipeOption,
    conversations: Annotated[Path, typer.Option(help="Held-out conversations (`synth generate`).")],
    draft: Annotated[Path, typer.Option(help="An exported draft (`train export`).")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the answers and figures.")],
    set_: OverridesOption = None,
) -> None:
    """Serve held-out prompts with and without the draft: acceptance, tokens/s, identical greedy output."""
    from bench.acceptance import measure

    measure(load_checked(recipe, set_), conversations, draft, output)


@app.command(
    epilog="Example: bench gate -r recipes/Tiny-DFlash/recipe.yaml --store runs/store --output runs/gate --samples 100"
)
def gate(
    recipe: RecipeOption,
    store: Annotated[Path, typer.Option(help="A store of greedy conversations (`dump run`).")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the trial's draft and figures.")],
    samples: Annotated[int, typer.Option(min=1, help="How many of the store's samples to overfit.")] = 100,
    steps: Annotated[int, typer.Option(min=1, help="Training steps.")] = 400,
    set_: OverridesOption = None,
) -> None:
    """Before a long run: overfit some samples, serve the draft, and compare what was predicted with what is served."""
    from bench.gate import gate as open_gate

    words = ["--recipe", str(recipe), *(word for value in set_ or [] for word in ("--set", value))]
    open_gate(load_checked(recipe, set_), words, store, output, samples, steps)


@app.command(epilog="Example: see the last command of recipes/Tiny-DFlash/run.sh")
def report(
    target: Annotated[Path, typer.Option(help="The target's folder.")],
    synth_train: Annotated[Path, typer.Option(help="Conversations to train on.")],
    synth_held_out: Annotated[Path, typer.Option(help="Held-out conversations.")],
    store_train: Annotated[Path, typer.Option(help="Store of the former.")],
    store_held_out: Annotated[Path, typer.Option(help="Store of the latter.")],
    run: Annotated[Path, typer.Option(help="Folder of `train offline`.")],
    evaluation: Annotated[Path, typer.Option("--eval", help="Output of `train eval`.")],
    served: Annotated[Path, typer.Option(help="Folder of `bench acceptance`.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="report.json; a plot goes beside it.")],
) -> None:
    """Gather the figures of a whole pipeline into one report, with a table and a plot."""
    from bench.report import Folders, write_report

    write_report(
        Folders(target, synth_train, synth_held_out, store_train, store_held_out, run, evaluation, served), output
    )


def main() -> None:
    run_app(app)
