"""Run a serving sweep: each layout and load of the recipe, with and without a draft, on new servers.

Reads:  the recipe's `bench.sweep`, an exported draft (or one of serve.heads).
Writes: OUTPUT/points/<point>-{base,draft}.json, one per finished or failed point, with our figures and vLLM's result
        (the load generator's output is in .log); servers/*.log; prompts/; sweep.json and sweep.csv with all points.

Each server has one layout and scenario, is sized by InferenceMAX's rules for its highest concurrency, and runs without
prefix caching. Points are saved as they are measured: a stopped sweep resumes with the next and retries failed ones.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.load import read_figures, run_load, write_prompts
from bench.plan import Layout, Point
from bench.track import figures_of_points, log_results
from common.errors import IncompleteError, UserError
from common.files import hash_file, read_json, write_atomic, write_json
from common.redact import redact_words
from common.trackers import installed_trackers
from contracts.run import Run
from recipe.recipe import Recipe
from serve.command import ServeCommand, Serving, build_command, draft_inputs, speculation_of
from serve.flags import Sizes
from serve.server import find_port, run_server
from serve.settings import measured_settings
from target.target import Target

MAX_FAILED_FRACTION = 0.05
SWEEP_FILE = "sweep.json"


@dataclass(frozen=True)
class Job:
    """One point, served with or without the draft."""

    point: Point
    kind: str  # base or draft

    @property
    def id(self) -> str:
        return f"{self.point.id}-{self.kind}"

    @property
    def server(self) -> tuple[str, Layout, str]:
        """Key of the job's server; jobs with the same key share a server."""
        return self.point.scenario, self.point.layout, self.kind


@dataclass(frozen=True)
class Sweep:
    """The models to serve, the output folder, and the jobs that are still to be measured."""

    recipe: Recipe
    target: Target
    draft: str | None
    output: Path
    left: list[Job]

    def path(self, job: Job) -> Path:
        return self.output / "points" / f"{job.id}.json"

    def is_done(self, job: Job) -> bool:
        path = self.path(job)
        return path.exists() and read_json(path, "a point")["status"] == "done"

    def note(self, job: Job, record: dict[str, Any]) -> None:
        """Save the result of a point and print it."""
        write_json(self.path(job), record)
        print(f"bench: point {self.left.index(job) + 1} of {len(self.left)}: {_in_words(record)}", flush=True)


def sweep(
    recipe: Recipe, points: Sequence[Point], draft: str | None, output: Path, *, with_baseline: bool = True
) -> dict[str, Any]:
    """Measure the points that are not measured yet and return the content of sweep.json.

    Raises UserError for a draft of another target; IncompleteError, after all points were tried, if some failed (more
    than 5% of the requests failed, or the server did not start).
    """
    installed_trackers(recipe.tracking.bench)
    target = Target.here(recipe.target)
    kinds = (["base"] if with_baseline or draft is None else []) + (["draft"] if draft else [])
    servers: dict[tuple[str, Layout, str], list[Job]] = {}
    for job in (Job(point, kind) for point in points for kind in kinds):
        servers.setdefault(job.server, []).append(job)
    jobs = [job for of_server in servers.values() for job in of_server]
    state = Sweep(recipe, target, draft, output, left=[])
    if draft:
        speculation_of(recipe, target, draft)  # refuse a wrong draft before hours of measurements
    run = Run.open(
        output,
        "bench sweep",
        settings={"sweep": recipe.bench.sweep.settings(), "serve": measured_settings(recipe)},
        inputs={
            "target": target.fingerprint,
            **(draft_inputs(recipe, draft) if draft else {"draft": ""}),
            "dataset": _hash_dataset(recipe.bench.sweep.dataset),
        },
        recipe_yaml=recipe.to_yaml(),
    )
    state.left.extend(job for job in jobs if not state.is_done(job))
    if state.left and run.complete:
        run.reopen()  # this call may add layouts or loads
    print(f"bench: {len(state.left)} of {len(jobs)} points to measure")
    for of_server in servers.values():
        if any(job in state.left for job in of_server):
            _measure(state, of_server, run)
    summary = _summarize(output, draft)
    print(make_table(summary["points"]))
    log_results(recipe, run, figures_of_points(summary["points"]))
    failed = [job.id for job in jobs if not state.is_done(job)]
    if failed:
        raise IncompleteError(
            f"{output}: found {len(failed)} of {len(jobs)} points failed ({', '.join(failed)}), expected all measured. "
            "Their files in points/ say why. Run the same command again to retry them."
        )
    if not run.complete:
        run.finish({"points": len(summary["points"])})
    print(f"bench: {len(jobs)} points, {run.seconds:.0f} s -> {output / SWEEP_FILE}")
    return summary


def _measure(state: Sweep, jobs: Sequence[Job], run: Run) -> None:
    """Start one server, sized for all `jobs`, and measure those that are left."""
    recipe, first = state.recipe, jobs[0].point
    left = [job for job in jobs if job in state.left]
    prompts = None
    if recipe.bench.sweep.dataset != "random":
        prompts = state.output / "prompts" / f"{first.scenario}.jsonl"
        count, left_out = write_prompts(recipe, state.target, first, prompts)
        print(f"bench: {count} prompts of at most {first.isl} tokens; {left_out} longer ones left out")
    try:
        command = _command(state, jobs, find_port(recipe.serve.host, recipe.serve.port))
        log_path = state.output / "servers" / f"{first.scenario}-{first.layout.name}-{jobs[0].kind}.log"
        with run_server(command, log_path=log_path, startup_timeout_s=recipe.serve.startup_timeout_s) as server:
            for job in left:
                try:
                    raw = run_load(recipe, state.target, job.point, server.url, prompts, state.path(job))
                    state.note(job, make_record(job, raw, command.args))
                except IncompleteError as error:
                    state.note(job, make_record(job, None, command.args, str(error)))
                run.tick()
    except UserError as error:  # this layout does not start, but the next one may
        for job in left:
            if not state.is_done(job):
                state.note(job, make_record(job, None, None, str(error)))


def _command(state: Sweep, jobs: Sequence[Job], port: int) -> ServeCommand:
    first = jobs[0].point
    serving = Serving(
        draft=state.draft if jobs[0].kind == "draft" else None,
        purpose="bench",
        sizes=Sizes(first.isl, first.osl, max(job.point.concurrency for job in jobs)),
        # Repeated prompts must cost as much as the first time.
        extra_args={**first.layout.flags, "enable-prefix-caching": False},
    )
    return build_command(state.recipe, state.target, port=port, serving=serving)


def make_record(
    job: Job, raw: dict[str, Any] | None, server_args: list[str] | None, reason: str = ""
) -> dict[str, Any]:
    """Return a point's record; with a `reason`, or over 5% failed requests, it is failed without figures."""
    point = job.point
    if raw and raw["failed"] > MAX_FAILED_FRACTION * point.num_prompts:
        reason = f"{raw['failed']} of {point.num_prompts} requests failed; points/{job.id}.log has their errors"
    return {
        "id": job.id,
        "kind": job.kind,
        "status": "failed" if reason else "done",
        "reason": reason,
        "scenario": point.scenario,
        "layout": point.layout.name,
        "num_gpus": point.layout.num_gpus,
        "isl": point.isl,
        "osl": point.osl,
        "concurrency": point.concurrency,
        "temperature": 0.0,
        "evaluated": point.is_evaluated,
        **({} if reason or raw is None else read_figures(raw, point)),
        "server": redact_words(server_args) if server_args else None,
        "vllm": raw,
    }


def _summarize(output: Path, draft: str | None) -> dict[str, Any]:
    """Write sweep.json and sweep.csv with all points of the folder."""
    records = [read_json(path, "a point") for path in sorted((output / "points").glob("*.json"))]
    records.sort(key=lambda r: (r["scenario"], r["layout"], r["concurrency"], r["kind"]))
    points = [{key: value for key, value in r.items() if key not in ("vllm", "server")} for r in records]
    summary = {"draft": draft, "points": points}
    write_json(output / SWEEP_FILE, summary)
    rows = [_flatten(point) for point in points]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(key for row in rows for key in row)))
    writer.writeheader()
    writer.writerows(rows)
    write_atomic(output / "sweep.csv", text.getvalue())
    return summary


def make_table(points: Sequence[dict[str, Any]]) -> str:
    """Format the points for the terminal."""
    lines = [
        f"\n{'point':<34}{'tok/s':>10}{'output':>10}{'a user':>9}{'a GPU':>9}{'TTFT p50':>10}{'TPOT p50':>10}"
        f"{'p99':>8}{'length':>8}"
    ]
    for point in points:
        if point["status"] != "done":
            lines.append(f"{point['id']:<34}  failed: {point['reason'][:100]}")
            continue
        ttft, tpot = point["latency_ms"]["ttft"], point["latency_ms"]["tpot"]
        length = f"{point['acceptance']['acceptance_length']:.3f}" if point["acceptance"] else ""
        lines.append(
            f"{point['id']:<34}{point['total_tokens_per_s']:>10.1f}{point['output_tokens_per_s']:>10.1f}"
            f"{point['tokens_per_s_per_user'] or 0:>9.1f}{point['tokens_per_s_per_gpu']:>9.1f}{ttft['p50']:>10.1f}"
            f"{tpot['p50']:>10.2f}{tpot['p99']:>8.2f}{length:>8}"
        )
    return "\n".join(lines)


def _in_words(record: dict[str, Any]) -> str:
    if record["status"] != "done":
        return f"{record['id']} failed: {record['reason']}"
    length = f", acceptance length {record['acceptance']['acceptance_length']:.3f}" if record["acceptance"] else ""
    return f"{record['id']} {record['total_tokens_per_s']:.1f} tokens/s in {record['seconds']:.0f} s{length}"


def _hash_dataset(name: str) -> str:
    if name == "random":
        return name
    if not Path(name).is_file():
        raise UserError(
            "bench.sweep.dataset", found=f"no file {name}", expected="random or a JSONL of prompts", fix="Correct it."
        )
    return hash_file(Path(name))


def _flatten(point: dict[str, Any]) -> dict[str, Any]:
    """Make one CSV row: nested figures get dotted names, lists are left out."""
    flat: dict[str, Any] = {}
    for key, value in point.items():
        if isinstance(value, dict):
            flat |= {f"{key}.{name}": inner for name, inner in _flatten(value).items()}
        elif value is not None and not isinstance(value, list):
            flat[key] = value
    return flat
