"""Compare the target's accuracy with and without the draft, on lm-eval's tasks, greedy and sampled.

Reads:  an exported draft; task files and their data sets (bench/questions.py).
Writes: OUTPUT/answers/<server>-c<concurrency>-{base,draft}/<task>-{greedy,sampled<i>}.json (questions with replies and
        metrics; finished files are kept), OUTPUT/servers/*.log, accuracy.json, accuracy.md (bench/accuracy_report.py).

The questions are asked where `bench plan` has evaluated points: on the point's layout, as many at a time. A recipe
without such points is evaluated on its own flags. Each server answers every question once greedily and `repeats` times
sampled, with the same prompts and seeds on both sides.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.accuracy_report import Answers, judge, summarize, write_report
from bench.plan import Point
from bench.requests import Served, read_counters
from common.errors import UserError
from common.files import hash_file, hash_json, read_json, write_json
from contracts.conversation import NO_FILTERS, NO_PENALTIES
from contracts.run import Run
from recipe.recipe import Recipe
from serve.command import MODEL_NAME, Serving, build_command, draft_inputs, speculation_of
from serve.flags import Sizes
from serve.server import find_port, run_server
from serve.settings import measured_settings
from target.target import Target, find_folder
from target.thinking import template_arguments, thinking_tags_of

if TYPE_CHECKING:
    from bench.questions import Asking

SIDES = ("base", "draft")


@dataclass(frozen=True)
class Load:
    """A server's name and flags beyond the recipe's, and the requests in flight."""

    server: str
    flags: Mapping[str, Any]
    concurrency: int

    @property
    def name(self) -> str:
        return f"{self.server}-c{self.concurrency}"


@dataclass(frozen=True)
class Evaluation:
    """Inputs and folders. `points`: those to evaluate; [] for the recipe's own flags."""

    recipe: Recipe
    draft: Path
    output: Path
    points: Sequence[Point] = ()

    @cached_property
    def target(self) -> Target:
        return Target.here(self.recipe.target)

    @cached_property
    def loads(self) -> list[Load]:
        section = self.recipe.bench
        if not self.points:
            return [Load("recipe", {}, section.accuracy.concurrency or max(section.concurrency))]
        return [
            Load(f"{point.scenario}-{point.layout.name}", point.layout.flags, point.concurrency)
            for point in self.points
        ]

    @property
    def thinking_mode(self) -> str:
        mode = self.recipe.bench.accuracy.thinking_mode
        return mode if mode is not None else next(iter(self.recipe.synth.modes_in_turn), "")

    @cached_property
    def bodies(self) -> dict[str, dict[str, Any]]:
        """Bodies of greedy and sampled requests."""
        shared: dict[str, Any] = {"max_tokens": self.recipe.bench.accuracy.max_tokens or self.recipe.synth.max_tokens}
        if values := template_arguments(self.recipe.target, self.thinking_mode):
            shared["chat_template_kwargs"] = values
        penalties, filters, temperature = resolve_sampling(self.recipe)
        return {
            "greedy": {"temperature": 0.0, **penalties, **shared},
            "sampled": {"temperature": temperature, **filters, **penalties, **shared},
        }

    @property
    def passes(self) -> list[str]:
        """Names of the passes over a task: greedy, and sampled0 and so on."""
        return ["greedy", *(f"sampled{number}" for number in range(self.recipe.bench.accuracy.repeats))]

    def path(self, load: Load, side: str, task: str, name: str) -> Path:
        return self.output / "answers" / f"{load.name}-{side}" / f"{task.replace('/', '_')}-{name}.json"

    def asking(self, load: Load, side: str, task: str, name: str) -> Asking:
        """Return how the questions of one pass are asked."""
        from bench.questions import Asking

        is_greedy = name == "greedy"
        return Asking(
            body=self.bodies["greedy" if is_greedy else "sampled"],
            seed=None if is_greedy else f"{self.recipe.bench.accuracy.seed}/{name}",
            thinking_tags=thinking_tags_of(self.recipe.target, self.target),
            concurrency=load.concurrency,
            title=f"{load.name}, {'with the draft' if side == 'draft' else 'no draft'}, {task}, {name}",
        )


def resolve_sampling(recipe: Recipe) -> tuple[dict[str, float], dict[str, float | int], float]:
    """Return `(penalties, filters, temperature)`: the recipe's, else those of the target's generation_config.json.

    min_p is off, since vLLM has none on a server that drafts.
    """
    path = find_folder(recipe.target.path) / "generation_config.json"
    of_target = read_json(path, "the target's generation_config.json") if path.exists() else {}

    def choose(name: str, neutral: float) -> Any:
        options = (getattr(recipe.bench.accuracy, name, None), of_target.get(name), neutral)
        return next(value for value in options if value is not None)

    penalties = {name: choose(name, neutral) for name, neutral in NO_PENALTIES.items()}
    filters = {**{name: choose(name, neutral) for name, neutral in NO_FILTERS.items()}, "min_p": 0.0}
    return penalties, filters, float(choose("temperature", 1.0)) or 1.0


def check_installed() -> None:
    """Raise UserError if lm-eval is not installed."""
    if find_spec("lm_eval") is None:
        raise UserError(
            "bench accuracy",
            found="no lm-eval in this environment",
            expected="the extra `accuracy`",
            fix="Run `pip install -e '.[accuracy]' -c constraints.txt`.",
        )


def measure(work: Evaluation) -> dict[str, Any]:
    """Ask the questions that are not answered yet, compare both sides, and return the report.

    Raises UserError for unknown tasks or a draft of another target, IncompleteError for a difference beyond chance.
    """
    check_installed()
    from bench.questions import LM_EVAL_VERSION, load_task, open_tasks

    recipe, section = work.recipe, work.recipe.bench.accuracy
    speculation_of(recipe, work.target, work.draft)  # refuse a wrong draft before hours of questions
    manager = open_tasks(section)
    run = Run.open(
        work.output,
        "bench accuracy",
        settings={
            "lm_eval": LM_EVAL_VERSION,
            "requests": work.bodies,
            **{name: getattr(section, name) for name in ("limit", "num_fewshot", "seed")},
            "serve": measured_settings(recipe),
        },
        inputs={
            "target": work.target.fingerprint,
            **draft_inputs(recipe, work.draft),
            "include_path": hash_folder(section.include_path) if section.include_path else "",
        },
        recipe_yaml=recipe.to_yaml(),
    )
    left = {group: todo for group in group_loads(work) if (todo := list(list_unanswered(work, *group)))}
    if left and run.complete:
        run.reopen()  # this call may add tasks, repeats or points
    if left:
        tasks = {name: load_task(manager, name, section) for name in section.tasks}
        for (server, side), todo in left.items():
            _serve_and_ask(work, side, todo, tasks, work.output / "servers" / f"{server}-{side}.log", run)
    report = {
        "draft": str(work.draft),
        "target": str(recipe.target.path),
        "lm_eval": LM_EVAL_VERSION,
        "thinking_mode": work.thinking_mode,
        "sampling": work.bodies["sampled"],
        **summarize(read_answers(work), section.confidence),
    }
    write_report(report, work.output)
    # Finished before the verdict: a difference beyond chance is a result, which the draft's card states.
    beyond_chance = sum(row["is_beyond_chance"] for row in report["rows"])
    run.finish({"comparisons": len(report["rows"]), "beyond_chance": beyond_chance})
    judge(report)
    print(f"bench: no difference beyond chance, in {run.seconds:.0f} s -> {work.output}")
    return report


def group_loads(work: Evaluation) -> list[tuple[str, str]]:
    """Return `(server, side)` of the servers to start, in order. Loads of the same layout and scenario share one."""
    return [(server, side) for server in dict.fromkeys(load.server for load in work.loads) for side in SIDES]


def list_unanswered(work: Evaluation, server: str, side: str) -> Iterator[tuple[Load, str, str]]:
    """Yield `(load, task, pass)` of the passes without a file, for one server."""
    for load in work.loads:
        if load.server == server:
            for task in work.recipe.bench.accuracy.tasks:
                for name in work.passes:
                    if not work.path(load, side, task, name).exists():
                        yield load, task, name


def _serve_and_ask(
    work: Evaluation,
    side: str,
    todo: Sequence[tuple[Load, str, str]],
    tasks: Mapping[str, dict[str, Any]],
    log_path: Path,
    run: Run,
) -> None:
    """Start one server, run the passes `todo` and write a file for each."""
    from bench.questions import ask_questions

    recipe, load = work.recipe, todo[0][0]
    most = max(load.concurrency for load in work.loads if load.server == todo[0][0].server)
    serving = Serving(
        draft=work.draft if side == "draft" else None,
        purpose="bench",
        # The context is the recipe's: a task's prompts and answers have other lengths than the sweep's requests.
        sizes=Sizes(concurrency=most) if load.flags else Sizes(),
        extra_args=load.flags,
    )
    command = build_command(recipe, work.target, port=find_port(recipe.serve.host, recipe.serve.port), serving=serving)
    with run_server(command, log_path=log_path, startup_timeout_s=recipe.serve.startup_timeout_s) as server:
        served = Served(server.url, MODEL_NAME)
        for load, task, name in todo:
            asking = work.asking(load, side, task, name)
            print(f"bench: {asking.title}", flush=True)
            before = read_counters(server.url)
            found = ask_questions(tasks[task], served, asking, recipe.bench.accuracy.limit)
            after = read_counters(server.url)
            counters = {key: after[key] - before.get(key, 0.0) for key in after}
            write_json(work.path(load, side, task, name), {"tasks": found, "counters": counters})
            run.tick()


def read_answers(work: Evaluation) -> list[Answers]:
    """Read the files of all passes, each pair of sides together."""
    found = []
    for load in work.loads:
        for task in work.recipe.bench.accuracy.tasks:
            for kind in ("greedy", "sampled"):
                names = [name for name in work.passes if name.startswith(kind)]
                base, draft = (
                    [dict(read_json(work.path(load, side, task, name), "a pass")) for name in names] for side in SIDES
                )
                if names:
                    found.append(Answers(load.name, kind, base, draft))
    return found


def hash_folder(folder: Path) -> str:
    """Hash names and contents of a folder's files."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and "__pycache__" not in path.parts]
    return hash_json([[str(path.relative_to(folder)), hash_file(path)] for path in files])
