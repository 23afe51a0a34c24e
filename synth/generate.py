"""Generate the conversations of a prompt set with the target, each exactly once.

Reads:  prompts (contracts/prompt_files.py), a recipe, a served target.
Writes: OUTPUT/conversations.jsonl, ledger.jsonl, rejects.jsonl (synth/output.py) and metrics.jsonl (synth/watch.py);
        shard i of n writes to OUTPUT/shards/<i>-of-<n>/, for `synth merge`.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from common.errors import IncompleteError, UserError
from common.files import read_json
from contracts.ledger import STATUSES, check_counts, read_entries
from contracts.prompt_files import open_prompts
from contracts.run import Run
from contracts.shards import folders_by_count, folders_of_others, shard_folder
from recipe.recipe import Recipe
from serve.command import Serving, build_command, speculation_of
from serve.server import find_port, run_server
from serve.settings import output_settings
from synth.conversation import check_modes
from synth.demand import Demand
from synth.output import FLAGS, LEDGER_FILE, Output
from synth.prompts import Reject
from synth.sampling import SharedSampling, resolve_sampling
from synth.todo import Source, Todo
from synth.tokens import TokenCheck
from synth.tool_calls import ToolCallParser, find_parser
from synth.work import Job, write_all
from target.target import Target
from target.thinking import thinking_tags_of

STAGE = "synth generate"
MAX_REASONS = 4
"""Reasons of filtered rows that are printed; rejects.jsonl has all."""


def generate(
    recipe: Recipe,
    prompts: str | Path,
    output: Path,
    *,
    shard: tuple[int, int] | None = None,
    retry_failed: bool = False,
) -> dict[str, Any]:
    """Generate every conversation that `output` lacks; return its summary (counts by status, tokens).

    Without `synth.endpoints` a server is started and stopped. `shard` (i, n) takes the conversations whose id is i
    modulo n, and the unusable rows whose index is. Finished conversations are always kept. Raises UserError for bad
    input, IncompleteError if the servers are lost or too many rows failed, KeyboardInterrupt after Ctrl-C or SIGTERM.
    """
    check_modes(recipe)
    sampling = resolve_sampling(recipe)
    target = Target.here(recipe.target)
    tokens = TokenCheck.of(recipe.target, target)
    _check_draft(recipe, target, sampling)
    prompt_set = open_prompts(prompts)
    if shard is None:
        _refuse_shards(output, retry_failed)
        folder, others = output, list[Path]()
    else:
        folder, others = shard_folder(output, *shard), folders_of_others(output, shard[1])
    run = Run.open(
        folder,
        STAGE,
        settings=find_settings(recipe, target, sampling, tokens, shard),
        inputs={"prompts": prompt_set.checksum, "target": target.fingerprint},
        recipe_yaml=recipe.to_yaml(),
    )
    source = Source(prompt_set, recipe.synth, sampling.temperatures, output)
    out = Output(folder, *source.shape)
    todo = Todo.find(source, out, shard, others, retry_failed=retry_failed)
    demand = Demand(recipe.synth, shard, out)
    if run.complete and (not todo.num_open or _is_answered(run, demand, retry_failed)):
        out.close()
        print(f"synth: {folder} is finished, skipped ({describe(run.state['summary'])})")
        return dict(run.state["summary"])
    run.reopen()
    print(f"synth: {source.shape[0]} rows in {len(prompt_set.files)} files; {todo.num_expected} conversations to write")
    if out.counts.total():
        print(f"synth: {todo.num_expected - todo.num_open} of {todo.num_expected} exist, {todo.num_open} to go")
    job = Job(recipe, target, sampling, todo, out, run, _find_parser(recipe, target, todo), tokens, demand)
    try:
        stopped = write_open(job)
    finally:
        out.close()
        run.tick(0.0)
    if stopped:
        raise KeyboardInterrupt
    return _finish(job, source)


def _check_draft(recipe: Recipe, target: Target, sampling: SharedSampling) -> None:
    """Raise UserError if `synth.draft` is not a draft for the target, or if it cannot be served with the sampling."""
    if recipe.synth.draft is None:
        return
    speculation = speculation_of(recipe, target, recipe.synth.draft)
    if sampling.filters.get("min_p") and any(sampling.temperatures):
        raise UserError(
            "synth.draft",
            found=f"a draft, and min_p {sampling.filters['min_p']:g}",
            expected="no min_p: vLLM refuses it on a server that drafts",
            fix="Set synth.min_p=0, which changes what is generated, or omit synth.draft.",
        )
    print(f"synth: drafts with {speculation['model']}, {speculation['num_speculative_tokens']} tokens a step")


def find_settings(
    recipe: Recipe, target: Target, sampling: SharedSampling, tokens: TokenCheck, shard: tuple[int, int] | None
) -> dict[str, Any]:
    """Return the settings that change the conversations; a resume must have the same."""
    section = recipe.target
    return {
        "synth": {**recipe.synth.settings(), **sampling.settings()},
        "serve": output_settings(recipe, "synth"),
        "target": {
            "max_model_len": section.max_model_len,
            "thinking_mode_name": section.thinking_mode_name,
            "thinking_mode_values": section.thinking_mode_values,
            "thinking_tags": list(tags) if (tags := thinking_tags_of(section, target)) else None,
            "chat_template": target.template_checksum,
            "tokenizer": target.tokenizer_checksum,
            **tokens.settings(),
        },
        **({} if shard is None else {"shard": f"{shard[0]}/{shard[1]}"}),
    }


def write_open(job: Job) -> bool:
    """Generate a job's open conversations; return whether Ctrl-C or SIGTERM stopped it before the end.

    No server is started if all open rows are unusable.
    """
    if job.demand.is_met:
        return False
    if job.todo.needs_server:
        with serve_target(job.recipe, job.target, job.out.folder) as (urls, is_gone):
            return asyncio.run(write_all(job, urls, is_gone))
    for item in job.todo.items():
        assert isinstance(item, Reject)
        job.out.add_reject(item)
        job.todo.take(item)
    return False


def _is_answered(run: Run, demand: Demand, retry_failed: bool) -> bool:
    """Return whether a complete run was for the same quotas and budget, and has nothing to try again."""
    summary = run.state["summary"]
    return demand.is_set and summary.get("demand") == demand.settings() and not (retry_failed and summary["failed"])


def _find_parser(recipe: Recipe, target: Target, todo: Todo) -> ToolCallParser | None:
    """Return and print the parser of tool calls, if any prompt has tools."""
    if not todo.num_with_tools:
        return None
    parser = find_parser(recipe, target)
    if parser:
        what = f"tool calls are parsed with vLLM's {parser.name} parser"
    elif not find_spec("vllm"):
        what = "tool calls stay in the text: vLLM, whose parsers read them, is not installed here"
    else:
        what = "the format of the target's tool calls is not known: they stay in the text (synth.tool_call_parser)"
    print(f"synth: {todo.num_with_tools} conversations have tools; {what}")
    return parser


def _finish(job: Job, source: Source) -> dict[str, Any]:
    """Check the counts, mark the run complete and return its summary. Raises: see `generate`."""
    out, folder, num_expected = job.out, job.out.folder, job.todo.num_expected
    counts = {status: out.counts[status] for status in STATUSES}
    num_rows, samples_per_row = source.shape
    summary: dict[str, Any] = {
        **counts,
        "input": num_expected,
        "rows": num_rows,
        "places": num_rows * samples_per_row,  # of the whole input
        "tokens": out.tokens,
        **out.flags,
    }
    unreached = 0
    if job.demand.is_set:
        unreached = job.todo.num_unreached
        summary |= {"unreached": unreached, "demand": job.demand.settings()}
    check_counts(folder / LEDGER_FILE, counts, num_expected - unreached)
    print(f"synth: {describe(summary)} in {job.run.seconds:.0f} s -> {folder / 'conversations.jsonl'}")
    if counts["filtered"]:
        print(f"synth: filtered: {_tell_reasons(_count_reasons(out, 'filtered'))}")
    if short := job.demand.describe_short():
        print(f"synth: the input has too few rows for its quotas: {short} (`synth stats`)")
    _refuse_useless(folder, out, job.recipe.synth.max_failed_fraction, num_expected)
    job.run.finish(summary)
    return summary


def _refuse_shards(output: Path, retry_failed: bool) -> None:
    """Raise UserError if a run without --shard would write beside shards, which a dump may read instead."""
    path = output / "run.json"
    merged = path.exists() and read_json(path, "a run's state")["complete"]
    if folders_by_count(output) and (retry_failed or not merged):
        raise UserError(
            output / "shards",
            found="shards",
            expected="none in the output of a run without --shard",
            fix="Go on with them (--shard I/N) and join them with `synth merge`, or choose another --output.",
        )


@contextmanager
def serve_target(recipe: Recipe, target: Target, folder: Path) -> Iterator[tuple[list[str], Callable[[], bool]]]:
    """Yield the URLs of the endpoints or of a started server, and a function: whether it has exited."""
    if recipe.synth.endpoints:
        yield recipe.synth.endpoints, lambda: False
        return
    port = find_port(recipe.serve.host, recipe.serve.port)
    command = build_command(recipe, target, port=port, serving=Serving(draft=recipe.synth.draft, purpose="synth"))
    timeout_s = recipe.serve.startup_timeout_s
    with run_server(command, log_path=folder / "server.log", startup_timeout_s=timeout_s) as server:
        yield [f"{server.url}/v1"], lambda: server.process.poll() is not None


def _refuse_useless(folder: Path, out: Output, max_failed_fraction: float, num_expected: int) -> None:
    """Print failures. Raises IncompleteError if they are too many, UserError if all rows were filtered."""
    status = "failed" if out.counts["failed"] else "filtered"
    if not out.counts[status] or (status == "filtered" and out.counts["filtered"] < num_expected):
        return
    reason = _count_reasons(out, status).most_common(1)[0][0]
    if status == "filtered":
        raise UserError(
            folder / "rejects.jsonl",
            found=f"all {num_expected} rows filtered, most often: {reason}",
            expected="rows that can be used",
            fix="Look at the reasons, fix the prompts, and give another --output.",
        )
    failed = out.counts["failed"]
    print(f"synth: {failed} rows failed, most often: {reason}. Try them again with --retry-failed.")
    if failed > max_failed_fraction * num_expected:
        raise IncompleteError(
            f"{folder / LEDGER_FILE}: found {failed} of {num_expected} rows failed ({reason}), expected at "
            f"most {max_failed_fraction:.0%}. Fix the cause and run again with --retry-failed."
        )


def _count_reasons(out: Output, status: str) -> Counter[str]:
    """Return how many rows have `status` for each reason."""
    entries = (entry for entry in read_entries(out.folder / LEDGER_FILE) if entry["status"] == status)
    return Counter(entry["reason"] for entry in entries if out.status(entry["index"], entry["sample"]) == status)


def _tell_reasons(reasons: Counter[str]) -> str:
    """Return the most frequent reasons with their counts, and the number of the others."""
    frequent = reasons.most_common(MAX_REASONS)
    told = [f"{count} x {reason}" for reason, count in frequent]
    others = reasons.total() - sum(count for _, count in frequent)
    return "; ".join([*told, *([f"{others} for other reasons"] if others else [])])


def describe(summary: Mapping[str, Any]) -> str:
    """Return a summary in words."""
    parts = [f"{summary[status]} {status}" for status in STATUSES if summary[status]]
    parts += [f"{summary['unreached']} not reached"] if summary.get("unreached") else []
    parts += [f"{summary[flag]} {flag}" for flag in FLAGS if summary.get(flag)]
    return f"{summary['input']} rows: {', '.join(parts)}; {summary['tokens']} tokens"
