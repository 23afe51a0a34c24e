"""`train`: train a draft from stored hidden states, predict its acceptance, export it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from common.cli import make_app
from common.errors import run_app
from recipe.cli import OverridesOption, RecipeOption, load_checked

app = make_app("Train a draft from a store, evaluate it, export it.")

RunOption = Annotated[Path, typer.Option("--run", help="Folder of `train offline`.")]


@app.command(epilog="Example: train offline -r recipes/Tiny-DFlash/recipe.yaml --store runs/store --output runs/draft")
def offline(
    recipe: RecipeOption,
    store: Annotated[Path, typer.Option(help="A store that `dump run` wrote.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The run's folder.")],
    set_: OverridesOption = None,
) -> None:
    """Train to the recipe's number of steps; an interrupted run resumes from its last checkpoint."""
    from train.offline import train_offline

    train_offline(load_checked(recipe, set_), store, output)


@app.command(
    name="eval",
    epilog="Example: train eval -r recipes/Tiny-DFlash/recipe.yaml --run runs/draft --store runs/store-held-out "
    "--output runs/eval.json",
)
def eval_(
    recipe: RecipeOption,
    run: RunOption,
    store: Annotated[Path, typer.Option(help="A store of held-out conversations.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The report (JSON).")],
    samples: Annotated[int | None, typer.Option(min=1, help="Evaluate only the first N samples.")] = None,
    set_: OverridesOption = None,
) -> None:
    """Predict the acceptance length by walking held-out conversations as serving does."""
    from train.evaluate import evaluate

    evaluate(load_checked(recipe, set_), run, store, output, samples)


@app.command(epilog="Example: train export -r recipes/Tiny-DFlash/recipe.yaml --run runs/draft --output runs/export")
def export(
    recipe: RecipeOption,
    run: RunOption,
    output: Annotated[Path, typer.Option("--output", "-o", help="The directory that a server loads.")],
    evaluation: Annotated[
        Path | None, typer.Option("--eval", help="Report of `train eval`, for the model card.")
    ] = None,
    layout: Annotated[
        str | None,
        typer.Option("--format", help="A layout of the method: native or speculators.", show_default="native"),
    ] = None,
    set_: OverridesOption = None,
) -> None:
    """Write the folder that vLLM loads."""
    from train.export import export as export_draft

    export_draft(load_checked(recipe, set_), run, output, evaluation, layout)


@app.command(
    epilog="Example: train trace -r recipes/Tiny-DFlash/recipe.yaml --run runs/draft --store runs/store "
    "--output trace.safetensors"
)
def trace(
    recipe: RecipeOption,
    run: RunOption,
    store: Annotated[Path, typer.Option(help="A store of the target's conversations.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The file to write.")],
    samples: Annotated[int, typer.Option(min=1, help="Number of samples.")] = 4,
    set_: OverridesOption = None,
) -> None:
    """Write the trainer's tensors for a few samples; `bench parity` compares them with the engine's."""
    from train.trace import trace as write_trace

    write_trace(load_checked(recipe, set_), run, store, output, samples)


def main() -> None:
    # Spinning threads would take cores from the working ones. torch reads this variable when it is first imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    run_app(app)


if __name__ == "__main__":  # under torchrun
    main()
