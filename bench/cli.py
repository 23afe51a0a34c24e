"""`bench`: what a served draft is worth."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from contracts.cli import OverridesOption, RecipeOption, load_checked, make_app
from contracts.errors import run_app

app = make_app("Measure a served draft, and gather a pipeline's figures.")


LayoutOption = Annotated[list[str] | None, typer.Option(help="Only this layout, as in tp8-ep8-dp. Repeatable.")]
ScenarioOption = Annotated[list[str] | None, typer.Option(help="Only these tokens in and out, as in 1k1k. Repeatable.")]
ConcurrencyOption = Annotated[
    list[int] | None, typer.Option(min=1, help="Only so many requests at a time. Repeatable.")
]


@app.command(
    epilog="Example: bench acceptance -r recipe.yaml --prompts mt_bench --prompts gsm8k=gsm8k.jsonl "
    "--thinking-modes enabled,disabled --draft-tokens 1-7 --draft runs/export --output runs/acceptance"
)
def acceptance(
    recipe: RecipeOption,
    draft: Annotated[Path, typer.Option(help="An exported draft (`train export`).")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the answers and figures.")],
    conversations: Annotated[
        Path | None, typer.Option(help="Held-out conversations (`synth generate`): their replies again, and the speed.")
    ] = None,
    prompts: Annotated[
        list[str] | None,
        typer.Option(
            help="A prompt set: mt_bench, gsm8k, humaneval, math500, aime or speed_bench; NAME=FILE; or a JSONL file "
            "of turns or messages. Repeatable."
        ),
    ] = None,
    thinking_modes: Annotated[
        str | None, typer.Option(help="Comma-separated; each set is asked in each.", show_default="the recipe's")
    ] = None,
    temperature: Annotated[list[float] | None, typer.Option(help="Repeatable.", show_default="0")] = None,
    draft_tokens: Annotated[
        str | None, typer.Option(help="1-7, or 3,7: a server for each number.", show_default="the draft's own")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first so many rows of each set.")] = None,
    endpoint: Annotated[
        str | None,
        typer.Option(help="A running server with this draft, its URL ending in /v1.", show_default="start servers"),
    ] = None,
    set_: OverridesOption = None,
) -> None:
    """Acceptance over prompt sets by category, thinking mode and draft tokens; or over held-out conversations."""
    from bench.acceptance import Matrix, measure, parse_draft_tokens
    from bench.replay import measure as replay

    if (conversations is None) == (not prompts):
        raise typer.BadParameter("give either --conversations or --prompts")
    loaded = load_checked(recipe, set_)
    if conversations is not None:
        replay(loaded, conversations, draft, output)
        return
    modes = thinking_modes.split(",") if thinking_modes is not None else list(dict.fromkeys(loaded.synth.modes_in_turn))
    matrix = Matrix(
        prompts or [], modes or [""], temperature or [0.0], parse_draft_tokens(draft_tokens), limit, endpoint
    )
    words = ["--recipe", str(recipe), *(word for value in set_ or [] for word in ("--set", value))]
    measure(loaded, words, draft, matrix, output)


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


@app.command(
    epilog="Example: bench parity -r recipes/Tiny-DFlash/recipe.yaml --run runs/draft --draft runs/export "
    "--store runs/store --output runs/parity"
)
def parity(
    recipe: RecipeOption,
    run: Annotated[Path, typer.Option("--run", help="Folder of `train offline`.")],
    draft: Annotated[Path, typer.Option(help="Its export (`train export`).")],
    store: Annotated[Path, typer.Option(help="A store of greedy conversations (`dump run`).")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the traces and the report.")],
    samples: Annotated[int, typer.Option(min=1, help="How many of the store's samples.")] = 4,
    set_: OverridesOption = None,
) -> None:
    """Trainer against engine: layers, the target's argmax, mask token, vocabulary, draft logits; what differs first."""
    from bench.parity import parity as compare_sides

    words = ["--recipe", str(recipe), *(word for value in set_ or [] for word in ("--set", value))]
    compare_sides(load_checked(recipe, set_), words, run, draft, store, output, samples)


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


@app.command(epilog="Example: bench plan -r recipes/MiniMax-M3-DFlash/eagle3.yaml --scenario 8k1k --layout tp8-ep8")
def plan(
    recipe: RecipeOption,
    layout: LayoutOption = None,
    scenario: ScenarioOption = None,
    concurrency: ConcurrencyOption = None,
    draft_tokens: Annotated[
        int | None, typer.Option(min=0, help="Draft tokens a step.", show_default="train.block_size - 1")
    ] = None,
    format_: Annotated[str, typer.Option("--format", help="table or json.")] = "table",
    set_: OverridesOption = None,
) -> None:
    """Print the points of the recipe's sweep: layouts, loads, sizes, and which ones are evaluated."""
    from bench.plan import plan_points, show_plan

    loaded = load_checked(recipe, set_)
    points = plan_points(loaded, layout or [], scenario or [], concurrency or [])
    typer.echo(show_plan(points, loaded.train.block_size - 1 if draft_tokens is None else draft_tokens, format_))


@app.command(epilog="Example: bench sweep -r recipes/Tiny-DFlash/recipe.yaml --draft runs/export --output runs/sweep")
def sweep(
    recipe: RecipeOption,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the points.")],
    draft: Annotated[
        str | None,
        typer.Option(help="An exported draft (`train export`), or one of serve.heads.", show_default="only without"),
    ] = None,
    baseline: Annotated[bool, typer.Option(help="Measure each point without the draft, too.")] = True,
    layout: LayoutOption = None,
    scenario: ScenarioOption = None,
    concurrency: ConcurrencyOption = None,
    set_: OverridesOption = None,
) -> None:
    """Serve every layout with and without the draft, and measure every load: throughput, latencies, acceptance."""
    from bench.plan import plan_points
    from bench.sweep import sweep as sweep_points

    loaded = load_checked(recipe, set_)
    points = plan_points(loaded, layout or [], scenario or [], concurrency or [])
    sweep_points(loaded, points, draft, output, with_baseline=baseline)


@app.command(epilog="Example: bench compare runs/sweep runs/sweep-eagle3 --output runs/compare")
def compare(
    sweep: Annotated[Path, typer.Argument(help="Folder of `bench sweep`.")],
    other: Annotated[Path | None, typer.Argument(help="A second one, of another draft.")] = None,
    *,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the report, the plots and the figures.")],
    acceptance: Annotated[
        list[Path] | None, typer.Option(help="Folder of `bench acceptance --prompts`. Repeatable, one a draft.")
    ] = None,
) -> None:
    """Hold a draft against no draft, or two drafts against each other: uplift, break-even concurrency, acceptance."""
    from bench.compare import compare as compare_sweeps

    compare_sweeps([sweep, other] if other else [sweep], acceptance or [], output)


def main() -> None:
    run_app(app)
