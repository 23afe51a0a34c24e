"""`bench`: measure a served draft's acceptance, speed, accuracy and agreement with the trainer; watch it for drift."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from common.cli import expand_options, make_app
from common.errors import run_app
from recipe.cli import OverridesOption, RecipeOption, load_checked

if TYPE_CHECKING:
    from bench.plan import Point
    from recipe.recipe import Recipe

app = make_app("Measure a served draft: acceptance, speed, accuracy, agreement with the trainer.")

DraftOption = Annotated[
    Path, typer.Option(help="Folder of the exported draft (`train export`), or org/name@revision on the hub.")
]
StoreOption = Annotated[Path, typer.Option(help="A store of greedy conversations (`dump run`).")]
EndpointOption = Annotated[
    str | None,
    typer.Option(help="URL of a running server with this draft, ending in /v1.", show_default="start servers"),
]
TrainingOption = Annotated[
    list[Path] | None,
    typer.Option(
        help="What the draft was trained on (`synth generate`, or its prompts): report which questions overlap "
        "with it, and the acceptance without them. Repeatable."
    ),
]


@dataclass(frozen=True)
class RecipeOptions:
    """The recipe and its overrides."""

    recipe: RecipeOption
    set_: OverridesOption = None

    def load(self, flags: dict[str, Any] | None = None) -> Recipe:
        return load_checked(self.recipe, self.set_, flags)

    @property
    def args(self) -> list[str]:
        """The same options, for the command of another stage."""
        return ["--recipe", str(self.recipe), *(word for value in self.set_ or [] for word in ("--set", value))]


@dataclass(frozen=True)
class PointOptions:
    """Filters of the recipe's sweep points."""

    layout: Annotated[list[str] | None, typer.Option(help="Only this layout, for example tp8-ep8-dp. Repeatable.")] = (
        None
    )
    scenario: Annotated[
        list[str] | None, typer.Option(help="Only these input and output lengths, for example 1k1k. Repeatable.")
    ] = None
    concurrency: Annotated[
        list[int] | None, typer.Option(min=1, help="Only this number of concurrent requests. Repeatable.")
    ] = None

    def plan(self, recipe: Recipe) -> list[Point]:
        """List the points. Raises UserError for a name that is not in the recipe."""
        from bench.plan import plan_points

        return plan_points(recipe, self.layout or [], self.scenario or [], self.concurrency or [])

    def plan_evaluated(self, recipe: Recipe) -> list[Point]:
        """List the points that are evaluated. Raises UserError if the filters leave none."""
        from bench.plan import evaluated_points

        return evaluated_points(recipe, self.layout or [], self.scenario or [], self.concurrency or [])


@dataclass(frozen=True)
class TrafficOptions:
    """What is known of a server's traffic: which rows of a card it may be a mix of, and what is not independent."""

    card_set: Annotated[str | None, typer.Option(help="Only the card's figures of this set.")] = None
    thinking_mode: Annotated[
        str | None, typer.Option(help='Only those of this thinking mode; "" is none.', show_default="all: any mix")
    ] = None
    temperature: Annotated[
        float | None, typer.Option(min=0, help="Only those of this temperature.", show_default="all: any mix")
    ] = None
    requests_per_conversation: Annotated[
        float, typer.Option(min=1, help="Of the traffic, on average: requests of one conversation are not independent.")
    ] = 1.0


@dataclass(frozen=True)
class ReportOptions:
    """Where a watch is reported beside its lines."""

    json: Annotated[
        Path | None,
        typer.Option(help="Write the figures here after each read. An earlier file's last read begins the window."),
    ] = None
    prometheus: Annotated[
        Path | None, typer.Option(help="Write Prometheus metrics here, for node_exporter's textfile collector.")
    ] = None
    listen: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="Serve the metrics there, as on 127.0.0.1:9109.")
    ] = None


@app.command(
    epilog="Example: bench acceptance -r recipe.yaml --prompts mt_bench --prompts gsm8k=gsm8k.jsonl "
    "--thinking-modes enabled,disabled --draft-tokens 1-7 --draft runs/export --output runs/acceptance"
)
@expand_options
def acceptance(
    options: RecipeOptions,
    draft: DraftOption,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the replies and figures.")],
    conversations: Annotated[
        Path | None,
        typer.Option(
            help="Held-out conversations (`synth generate`). Generate their replies again, measure the speed, and "
            "recommend the number of draft tokens."
        ),
    ] = None,
    prompts: Annotated[
        list[str] | None,
        typer.Option(
            help="A prompt set: mt_bench, gsm8k, humaneval, math500, aime or speed_bench; NAME=FILE; or a JSONL file "
            "with turns or messages. Repeatable."
        ),
    ] = None,
    thinking_modes: Annotated[
        str | None, typer.Option(help="Thinking modes of --prompts, comma-separated.", show_default="the recipe's")
    ] = None,
    temperature: Annotated[
        list[float] | None, typer.Option(help="Temperature of --prompts. Repeatable.", show_default="0")
    ] = None,
    draft_tokens: Annotated[
        str | None,
        typer.Option(
            help="1-7 or 3,7. A server is started for each number.",
            show_default="the draft's own; with --conversations also 1",
        ),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Use at most this many rows of each set.")] = None,
    endpoint: EndpointOption = None,
    training_conversations: TrainingOption = None,
) -> None:
    """Measure acceptance on prompt sets (by category, mode and draft tokens) or held-out conversations."""
    from bench.acceptance import Matrix, measure
    from bench.draft_tokens import parse_draft_tokens
    from bench.replay import measure as replay
    from drafts.published import find_draft

    if (conversations is None) == (not prompts):
        raise typer.BadParameter("give either --conversations or --prompts")
    if conversations is not None and (thinking_modes or temperature or limit or endpoint):
        raise typer.BadParameter("--thinking-modes, --temperature, --limit and --endpoint need --prompts")
    loaded, numbers, seen = options.load(), parse_draft_tokens(draft_tokens), training_conversations or []
    if conversations is not None:
        replay(loaded, conversations, find_draft(draft), output, numbers, seen)
        return
    modes = thinking_modes.split(",") if thinking_modes is not None else list(dict.fromkeys(loaded.synth.modes_in_turn))
    matrix = Matrix(prompts or [], modes or [""], temperature or [0.0], numbers, limit, endpoint, seen)
    measure(loaded, options.args, find_draft(draft), matrix, output)


@app.command(
    epilog="Example: bench schedule -r recipe.yaml --conversations runs/synth/held_out --draft runs/export "
    "--draft-tokens 1,3,7 --concurrency 1,2,4,8,16,32 --output runs/schedule"
)
@expand_options
def schedule(
    options: RecipeOptions,
    draft: DraftOption,
    conversations: Annotated[Path, typer.Option(help="Held-out conversations (`synth generate`), the load.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for the replies, the schedule and the report.")
    ],
    draft_tokens: Annotated[
        str | None,
        typer.Option(
            help="1-7 or 3,7: numbers to measure. Those between are predicted, and measured too if they are among "
            "the fastest. A server is started for each, and one that drafts nothing.",
            show_default="1 and the number that is served",
        ),
    ] = None,
    concurrency: Annotated[
        str | None,
        typer.Option(help="1,2,4,8: requests in flight, the batch sizes to measure.", show_default="the recipe's"),
    ] = None,
    acceptance: Annotated[
        Path | None,
        typer.Option(
            help="acceptance.json of `bench acceptance`, or the output of `train eval`: choose by its acceptance. On "
            "GPUs, servers accept at random with its rates, and the draft need not be trained.",
            show_default="the draft's own, as served",
        ),
    ] = None,
    repeats: Annotated[
        int, typer.Option(min=2, max=10, help="How often the check serves the schedule, fixed numbers and no draft.")
    ] = 3,
    check: Annotated[bool, typer.Option(help="Check the schedule under load.")] = True,
) -> None:
    """Make vLLM's schedule of draft tokens by batch size, and check that it is as fast as any fixed number."""
    from bench.draft_tokens import parse_concurrency, parse_draft_tokens
    from bench.schedule import Asked, measure_schedule
    from drafts.published import find_draft

    recipe = options.load({"bench.concurrency": parse_concurrency(concurrency)})
    numbers, times = parse_draft_tokens(draft_tokens), repeats if check else 0
    measure_schedule(Asked(recipe, find_draft(draft), conversations, output, numbers, acceptance, times))


@app.command(
    epilog="Example: bench lossless -r recipe.yaml --conversations runs/synth/held_out --draft runs/export "
    "--requests tools.jsonl --output runs/lossless"
)
@expand_options
def lossless(
    options: RecipeOptions,
    draft: DraftOption,
    conversations: Annotated[Path, typer.Option(help="Held-out greedy conversations (`synth generate`).")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the replies and figures.")],
    requests: Annotated[
        Path | None,
        typer.Option(help="Chat requests to send along: a JSONL of messages, tools, tool_choice, structured_outputs."),
    ] = None,
    concurrency: Annotated[
        list[int] | None, typer.Option(min=1, help="Requests in flight. Repeatable.", show_default="1, 8, 32")
    ] = None,
    max_num_batched_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens per engine step.", show_default="half of the median prompt")
    ] = None,
    tolerance: Annotated[
        float | None,
        typer.Option(
            min=0.0, help="Largest gap of two logits that is a tie.", show_default="0.001 for fp32, else 0.25"
        ),
    ] = None,
) -> None:
    """Check greedy equality under prefix caching, chunked prefill, concurrency and tool calls."""
    from bench.lossless import Check, Load, check
    from drafts.published import find_draft

    load = Load(conversations, requests, concurrency or [1, 8, 32], max_num_batched_tokens, tolerance)
    check(Check(options.load(), find_draft(draft), load, output))


@app.command(
    epilog="Example: bench accuracy -r recipe.yaml --draft runs/export --output runs/accuracy --tasks gsm8k,my_task "
    "--include-path my_tasks --limit 200"
)
@expand_options
def accuracy(
    options: RecipeOptions,
    points: PointOptions,
    draft: DraftOption,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the answers and the report.")],
    tasks: Annotated[
        str | None,
        typer.Option(help="Tasks of lm-eval, or of --include-path, comma-separated.", show_default="the recipe's"),
    ] = None,
    include_path: Annotated[
        Path | None, typer.Option(help="Folder with task files (YAML) of your own.", show_default="the recipe's")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first questions of each task.")] = None,
) -> None:
    """Compare the answers to lm-eval's tasks with and without the draft, greedy and sampled, question by question.

    The servers are those of the points that `bench plan` marks as evaluated; without such points, one with the recipe's
    own flags.
    """
    from bench.accuracy import Evaluation, measure
    from drafts.published import find_draft

    flags = {
        "bench.accuracy.tasks": None if tasks is None else [name for name in tasks.split(",") if name],
        "bench.accuracy.include_path": None if include_path is None else str(include_path),
        "bench.accuracy.limit": limit,
    }
    loaded = options.load(flags)
    measure(Evaluation(loaded, find_draft(draft), output, points.plan_evaluated(loaded)))


@app.command(
    epilog="Example: bench gate -r recipes/Tiny-DFlash/recipe.yaml --store runs/store --output runs/gate --samples 100"
)
@expand_options
def gate(
    options: RecipeOptions,
    store: StoreOption,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the draft and the figures.")],
    samples: Annotated[int, typer.Option(min=1, help="Number of samples of the store to overfit.")] = 100,
    steps: Annotated[int, typer.Option(min=1, help="Training steps.")] = 400,
    processes: Annotated[int, typer.Option(min=1, help="Processes that train under torchrun, one for each GPU.")] = 1,
) -> None:
    """Check a recipe before a long run: overfit a few samples, serve the draft, compare predicted with served."""
    from bench.gate import Gate
    from bench.gate import gate as open_gate

    open_gate(Gate(options.load(), options.args, store, output, samples, steps, processes))


@app.command(
    epilog="Example: bench parity -r recipes/Tiny-DFlash/recipe.yaml --run runs/draft --draft runs/export "
    "--store runs/store --output runs/parity"
)
@expand_options
def parity(
    options: RecipeOptions,
    run: Annotated[Path, typer.Option("--run", help="Folder of `train offline`.")],
    draft: DraftOption,
    store: StoreOption,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the traces and the report.")],
    samples: Annotated[int, typer.Option(min=1, help="Number of samples of the store to compare.")] = 4,
) -> None:
    """Compare trainer and engine, from captured layers to the draft's logits. Name the first difference."""
    from bench.parity import Compared
    from bench.parity import parity as compare_sides
    from contracts.draft import DraftRun
    from drafts.published import find_draft

    compare_sides(options.load(), options.args, Compared(DraftRun(run), find_draft(draft), store), output, samples)


@app.command(epilog="Example: see the last command of recipes/Tiny-DFlash/run.sh")
def report(
    target: Annotated[Path, typer.Option(help="Folder of the target.")],
    synth_train: Annotated[Path, typer.Option(help="Training conversations (`synth generate`).")],
    synth_held_out: Annotated[Path, typer.Option(help="Held-out conversations (`synth generate`).")],
    store_train: Annotated[Path, typer.Option(help="Store of the training conversations (`dump run`).")],
    store_held_out: Annotated[Path, typer.Option(help="Store of the held-out conversations (`dump run`).")],
    run: Annotated[Path, typer.Option(help="Folder of `train offline`.")],
    evaluation: Annotated[Path, typer.Option("--eval", help="Output of `train eval`.")],
    served: Annotated[Path, typer.Option(help="Folder of `bench acceptance`.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="report.json. The plot is written beside it.")],
) -> None:
    """Collect the figures of a whole pipeline in one report, with a table and a plot."""
    from bench.report import Folders, write_report

    write_report(
        Folders(target, synth_train, synth_held_out, store_train, store_held_out, run, evaluation, served), output
    )


@app.command(epilog="Example: bench plan -r recipes/MiniMax-M3-DFlash/eagle3.yaml --scenario 8k1k --layout tp8-ep8")
@expand_options
def plan(
    options: RecipeOptions,
    points: PointOptions,
    draft_tokens: Annotated[
        int | None, typer.Option(min=0, help="Draft tokens per step.", show_default="those of train.draft")
    ] = None,
    format_: Annotated[str, typer.Option("--format", help="Output format: table or json.")] = "table",
) -> None:
    """Print the points of the recipe's sweep: layouts, loads, sizes, and which points are evaluated."""
    from bench.plan import show_plan

    loaded = options.load()
    if draft_tokens is None:
        draft_tokens = loaded.training().draft.num_draft_tokens
    typer.echo(show_plan(points.plan(loaded), draft_tokens, format_))


@app.command(epilog="Example: bench sweep -r recipes/Tiny-DFlash/recipe.yaml --draft runs/export --output runs/sweep")
@expand_options
def sweep(
    options: RecipeOptions,
    points: PointOptions,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the points.")],
    draft: Annotated[
        str | None,
        typer.Option(
            help="An exported draft (`train export`), org/name@revision on the hub, or the name of one in serve.heads.",
            show_default="no draft",
        ),
    ] = None,
    baseline: Annotated[bool, typer.Option(help="Also measure each point without the draft.")] = True,
) -> None:
    """Measure throughput, latencies and acceptance of each layout and load, with and without the draft."""
    from bench.sweep import sweep as sweep_points
    from drafts.published import find_draft

    loaded = options.load()
    found = str(find_draft(draft)) if draft else None
    sweep_points(loaded, points.plan(loaded), found, output, with_baseline=baseline)


@app.command(epilog="Example: bench compare runs/sweep runs/sweep-eagle3 --output runs/compare")
def compare(
    sweep: Annotated[Path, typer.Argument(help="Folder of `bench sweep`.")],
    other: Annotated[Path | None, typer.Argument(help="Folder of a second sweep, of another draft.")] = None,
    *,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the report, the plots and the figures.")],
    acceptance: Annotated[
        list[Path] | None, typer.Option(help="Folder of `bench acceptance --prompts`. Repeatable: one for each draft.")
    ] = None,
) -> None:
    """Compare a draft with no draft, or two drafts: uplift, break-even concurrency, acceptance."""
    from bench.compare import compare as compare_sweeps

    compare_sweeps([sweep, other] if other else [sweep], acceptance or [], output)


@app.command(
    epilog="Example: bench variants runs/compare -r recipes/Tiny-DFlash/recipe.yaml --conversations runs/synth/held_out"
)
@expand_options
def variants(
    folder: Annotated[Path, typer.Argument(help="Folder of `train compare`.")],
    options: RecipeOptions,
    *,
    conversations: Annotated[Path, typer.Option(help="Held-out conversations (`synth generate`).")],
    variant: Annotated[list[str] | None, typer.Option(help="Only this variant. Repeatable.")] = None,
    draft_tokens: Annotated[
        str | None, typer.Option(help="1-7 or 3,7: numbers to measure.", show_default="each draft's own, and 1")
    ] = None,
) -> None:
    """Serve all drafts of `train compare` and name the best one for each concurrency."""
    from bench.draft_tokens import parse_draft_tokens
    from bench.variants import serve_variants

    serve_variants(options.load(), folder, conversations, variant, parse_draft_tokens(draft_tokens))


@app.command(
    epilog="Example: bench watch --endpoint http://127.0.0.1:8000/v1 --card runs/export --every 600 --json watch.json "
    "--prometheus /var/lib/node_exporter/draft.prom"
)
@expand_options
def watch(
    endpoint: Annotated[str, typer.Option(help="URL of a running vLLM server with the draft, ending in /v1.")],
    card: Annotated[
        Path, typer.Option(help="Folder of the draft's export with its certificate, or org/name@revision on the hub.")
    ],
    traffic: TrafficOptions,
    reports: ReportOptions,
    *,
    every: Annotated[float, typer.Option(min=0.1, help="Seconds between reads.")] = 600.0,
    once: Annotated[
        bool,
        typer.Option(
            "--once",
            help="Compare one window and exit: since the last read in --json, else of --every seconds. "
            "With --requests and no such file, only these are compared.",
        ),
    ] = False,
    requests: Annotated[
        str | None,
        typer.Option(
            help="Conversations (`synth generate`) or prompts to send once at the start, to compare acceptance by mode."
        ),
    ] = None,
    num_requests: Annotated[int, typer.Option(min=1, help="Conversations of --requests to send.")] = 64,
    false_alarms: Annotated[
        float, typer.Option(min=1e-6, max=0.5, help="Highest share of windows that are reported by chance.")
    ] = 0.001,
    min_drafts: Annotated[int, typer.Option(min=1, help="Drafts (steps) that a window has at least.")] = 1000,
) -> None:
    """Compare a running server's acceptance with the draft's card, and say when it has drifted.

    Exit codes: 0 as the card, 1 drifted, 2 a mistake in the call or a server that does not draft, 3 cannot say (too few
    drafts, or no answer). Without --once it runs until Ctrl-C. The server's key is read from OPENAI_API_KEY.
    """
    from bench.card import Filters
    from bench.probe import Requests
    from bench.watch import Settings
    from bench.watch import watch as watch_server
    from bench.watch_report import Report, parse_address
    from drafts.published import find_draft

    settings = Settings(
        endpoint=endpoint,
        card=find_draft(card),
        filters=Filters(traffic.card_set, traffic.thinking_mode, traffic.temperature),
        every_s=every,
        once=once,
        rate=false_alarms,
        min_drafts=min_drafts,
        requests_per_conversation=traffic.requests_per_conversation,
        requests=Requests(requests, num_requests) if requests is not None else None,
    )
    report = Report(reports.json, reports.prometheus, parse_address(reports.listen) if reports.listen else None)
    raise typer.Exit(watch_server(settings, report))


def main() -> None:
    run_app(app)
