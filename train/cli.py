"""`train`: train a draft from stored hidden states, predict its acceptance, export it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from common.cli import expand_options, make_app
from common.errors import UserError, run_app
from recipe.cli import (
    NO_MOONCAKE,
    MooncakeOptions,
    OptionalRecipeOption,
    OverridesOption,
    RecipeOption,
    load_checked,
)

if TYPE_CHECKING:
    from train.certificate import Figures

app = make_app("Train a draft from a store, evaluate it, export it.")

ForceOption = Annotated[bool, typer.Option("--force", help="Begin even if the memory seems too small.")]
_RUN = typer.Option(
    "--run",
    "--run-folder",
    help="Folder of `train offline`. Under torchrun use --run-folder: it takes --run for an option of its own.",
)
RunOption = Annotated[Path, _RUN]
OptionalRunOption = Annotated[Path | None, _RUN]


@dataclass(frozen=True)
class PilotOptions:
    """The pilots of `train forecast`: trained here, or finished."""

    fractions: Annotated[
        str, typer.Option(metavar="F,F,F", help="Shares of the data to train pilots on; at least three.")
    ] = "0.05,0.1,0.25"
    runs: Annotated[
        list[Path] | None,
        typer.Option(help="Instead: a finished `train offline` with fewer samples and steps. Repeatable."),
    ] = None
    full: Annotated[
        int | None,
        typer.Option(min=1, metavar="SAMPLES", help="Samples of the whole training, if the store has only a part."),
    ] = None
    processes: Annotated[int, typer.Option(min=1, help="Processes of each training, under torchrun.")] = 1

    def shares(self) -> list[float]:
        """Return `fractions` as numbers. Raises UserError for others than shares of the data."""
        try:
            found = [float(part) for part in self.fractions.split(",")]
        except ValueError:
            found = []
        if not found or not all(0 < share <= 1 for share in found):
            raise UserError(
                "--fractions", found=self.fractions, expected="numbers from 0 to 1, as 0.05,0.1,0.25", fix="Correct it."
            )
        return found


@dataclass(frozen=True)
class CurveOptions:
    """What `train forecast` says about the curve."""

    budget: Annotated[
        list[float] | None, typer.Option(min=1, metavar="TOKENS", help="Supervised tokens to forecast. Repeatable.")
    ] = None
    least_gain: Annotated[
        float, typer.Option(min=0.0001, max=1, help="Relative gain below which twice the data does not pay.")
    ] = 0.03
    served: Annotated[
        Path | None, typer.Option(help="Folder of `bench acceptance` with a draft of this size, for speed-ups.")
    ] = None
    step_ratio: Annotated[
        float | None, typer.Option(min=0.1, help="Instead: the time of a step with the draft, relative to without.")
    ] = None
    actual: Annotated[Path | None, typer.Option(help="Compare with this `train eval` of the whole training.")] = None


NO_PILOTS, NO_CURVE = PilotOptions(), CurveOptions()


@app.command(epilog="Example: train plan -r recipes/MiniMax-M3-DFlash/recipe.yaml --gpu h200 --gpus 8 --read-rate 10")
def plan(
    recipe: RecipeOption,
    store: Annotated[Path | None, typer.Option(help="Take the samples' lengths from this store.")] = None,
    gpu: Annotated[
        str | None,
        typer.Option(
            help="h100, h200, b200, b300, gb200, gb300, mi355x or cpu.", show_default="serve.hardware, or h100"
        ),
    ] = None,
    gpus: Annotated[int | None, typer.Option(min=1, help="GPUs that train.", show_default="those of a node")] = None,
    mean_tokens: Annotated[int, typer.Option(min=2, help="Without --store: mean tokens of a sample.")] = 2000,
    prompt_share: Annotated[float, typer.Option(min=0, max=0.99, help="Without --store: share of prompts.")] = 0.25,
    mfu: Annotated[float, typer.Option(min=0.01, max=1, help="Share of the GPU's peak that training reaches.")] = 0.4,
    run: Annotated[Path | None, typer.Option(help="Take the MFU from this training run on the same GPUs.")] = None,
    read_rate: Annotated[float | None, typer.Option(min=0.001, help="GB/s that a node reads from the store.")] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    set_: OverridesOption = None,
) -> None:
    """Print memory, operations, bytes to read and hours of a training; no GPU, store or weights are needed."""
    from train.plan import Request, answer

    loaded = load_checked(recipe, set_)
    answer(loaded, Request(store, gpu, gpus, mean_tokens, prompt_share, mfu, run, read_rate), as_json=json_)


@app.command(epilog="Example: train offline -r recipes/Tiny-DFlash/recipe.yaml --store runs/store --output runs/draft")
@expand_options
def offline(
    recipe: RecipeOption,
    store: Annotated[Path, typer.Option(help="A store that `dump run` wrote.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The run's folder.")],
    follow: Annotated[
        bool, typer.Option("--follow", help="The store is one that `dump run --window` fills meanwhile.")
    ] = False,
    until_empty: Annotated[
        bool,
        typer.Option("--until-empty", help="With --follow: save and stop where samples are missing; do not wait."),
    ] = False,
    mooncake: MooncakeOptions = NO_MOONCAKE,
    force: ForceOption = False,
    set_: OverridesOption = None,
) -> None:
    """Train to the recipe's number of steps; an interrupted run resumes from its last checkpoint."""
    from train.data import Following
    from train.offline import train_offline

    if (until_empty or mooncake.where()) and not follow:
        raise typer.BadParameter("--until-empty and --mooncake need --follow")
    following = Following(until_empty, mooncake.where()) if follow else None
    train_offline(load_checked(recipe, set_), store, output, force=force, follow=following)


@app.command(
    name="eval",
    epilog="Example: train eval -r recipes/Tiny-DFlash/recipe.yaml --run runs/draft --store runs/store-held-out "
    "--output runs/eval.json",
)
def eval_(
    recipe: RecipeOption,
    store: Annotated[Path, typer.Option(help="A store of held-out conversations.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The report (JSON).")],
    run: OptionalRunOption = None,
    draft: Annotated[
        Path | None,
        typer.Option(
            help="Instead of --run: an export, a published draft of any known layout, or org/name@revision on the hub."
        ),
    ] = None,
    samples: Annotated[int | None, typer.Option(min=1, help="Evaluate only the first N samples.")] = None,
    proposals: Annotated[
        Path | None, typer.Option(help="Also write what the draft proposed at each step, for `dump browse`.")
    ] = None,
    force: ForceOption = False,
    set_: OverridesOption = None,
) -> None:
    """Predict the acceptance length by walking held-out conversations as serving does; torchrun shares them out."""
    if (run is None) == (draft is None):
        raise UserError(
            "--run and --draft",
            found="neither" if run is None else "both",
            expected="one of them",
            fix="Give --run for a training run, --draft for an export or a published draft.",
        )
    from train.evaluate import Evaluation, evaluate

    evaluate(load_checked(recipe, set_), Evaluation(store, output, run, draft, samples, force, proposals))


@dataclass(frozen=True)
class CitedOptions:
    """The reports and the data that a draft's certificate cites."""

    evaluation: Annotated[
        list[str] | None,
        typer.Option(
            "--eval",
            metavar="[NAME=]FILE",
            help="Report of `train eval`. Repeatable; the first one also calibrates confidences.",
        ),
    ] = None
    served: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[NAME=]FOLDER",
            help="Folder of `bench acceptance`, `bench lossless` or `bench accuracy` with this draft. Repeatable.",
        ),
    ] = None
    store: Annotated[Path | None, typer.Option(help="The store that the draft was trained on.")] = None
    prompts: Annotated[
        Path | None, typer.Option(help="With --store: the prompts' manifest (`synth prepare`), for their licenses.")
    ] = None

    def figures(self) -> Figures:
        """Return where they are. Raises UserError for a wrong name."""
        from train.certificate import Figures
        from train.provenance import DataFolders
        from train.reports import Source

        return Figures(
            [Source.parse("--eval", text) for text in self.evaluation or []],
            [Source.parse("--served", text) for text in self.served or []],
            DataFolders(self.store, self.prompts),
        )


@app.command(epilog="Example: train export -r recipes/Tiny-DFlash/recipe.yaml --run runs/draft --output runs/export")
@expand_options
def export(
    cited: CitedOptions,
    recipe: OptionalRecipeOption = None,
    run: OptionalRunOption = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="The directory that a server loads.")] = None,
    layout: Annotated[
        str | None,
        typer.Option("--format", help="A layout of the method: native or speculators.", show_default="native"),
    ] = None,
    check: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Write nothing: compare this export, or org/name@revision, with its certificate, and that with the "
            "reports and the data given.",
        ),
    ] = None,
    push: Annotated[
        str | None, typer.Option(metavar="ORG/NAME", help="Then upload --output to the hub, as a private repository.")
    ] = None,
    public: Annotated[bool, typer.Option("--public", help="With --push: as a public one.")] = False,
    set_: OverridesOption = None,
) -> None:
    """Write the folder that vLLM loads, with its certificate and model card; check it; push it to the hub.

    --push alone, with --output, uploads a finished export.
    """
    needed = {"--recipe": recipe, "--run": run, "--output": output}
    missing = [name for name, value in needed.items() if value is None]
    if check is not None:
        from drafts.published import find_draft
        from train.check import check_folder

        if len(missing) < len(needed) or push:
            raise typer.BadParameter("--check writes nothing: it takes no --recipe, --run, --output and --push")
        check_folder(find_draft(check), cited.figures())
        return
    if public and not push:
        raise typer.BadParameter("--public needs --push")
    if missing and not (push and missing == ["--recipe", "--run"]):
        raise typer.BadParameter(f"give {', '.join(missing)}, or --check FOLDER")
    if recipe is not None and run is not None and output is not None:
        from train.export import export as export_draft

        export_draft(load_checked(recipe, set_), run, output, cited.figures(), layout)
    if push and output is not None:
        from train.push import push as push_draft

        push_draft(output, push, public=public)


@app.command(
    epilog="Example: train compare -r recipes/Tiny-DFlash/recipe.yaml "
    "--variants recipes/Tiny-DFlash/variants/methods.yaml --store runs/store --held-out runs/store-held-out "
    "--output runs/compare"
)
def compare(
    recipe: RecipeOption,
    variants: Annotated[Path, typer.Option(help="A YAML file, `name: [KEY=VALUE, ...]` for each variant.")],
    store: Annotated[Path, typer.Option(help="The store to train on.")],
    held_out: Annotated[Path, typer.Option(help="A store of held-out conversations.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of all runs and of the report.")],
    set_: OverridesOption = None,
) -> None:
    """Train several methods or settings on one store and compare what they predict; resumes."""
    from train.compare import compare as compare_variants
    from train.compare import read_variants

    stores = (store, held_out)
    compare_variants(read_variants(variants), lambda more: load_checked(recipe, [*(set_ or []), *more]), stores, output)


@app.command(
    epilog="Example: train forecast -r recipes/Tiny-DFlash/recipe.yaml --store runs/store "
    "--held-out runs/store-held-out --output runs/forecast --served runs/bench"
)
@expand_options
def forecast(
    recipe: RecipeOption,
    store: Annotated[Path, typer.Option(help="The store to train on, or a part of it; of --runs also a rolling one.")],
    held_out: Annotated[Path, typer.Option(help="A store of held-out conversations.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the pilots and the forecast.")],
    pilots: PilotOptions = NO_PILOTS,
    curve: CurveOptions = NO_CURVE,
    set_: OverridesOption = None,
) -> None:
    """Train pilots on parts of the data and forecast the acceptance length of the whole training; resumes."""
    from train.forecast import Asked
    from train.forecast import forecast as make_forecast
    from train.pilots import Work

    overrides = set_ or []
    work = Work(
        recipe, overrides, lambda more: load_checked(recipe, [*overrides, *more]), store, held_out, output,
        pilots.full, pilots.processes,
    )  # fmt: skip
    asked = Asked(
        pilots.shares(), pilots.runs or [], curve.budget or [], curve.least_gain, curve.served, curve.step_ratio,
        curve.actual,
    )  # fmt: skip
    make_forecast(work, asked)


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
