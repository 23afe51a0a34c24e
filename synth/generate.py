"""Write the conversations of a whole prompt file, exactly once each.

Reads:  prompts (JSONL), a recipe, a served target.
Writes: OUTPUT/conversations.jsonl, one record a line in order of completion, and OUTPUT/ledger.jsonl, one line for
        every input row. A ledger line names the end of its record in conversations.jsonl; what lies beyond the last
        one was not accounted for when the process died, and is cut off and written again.
"""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
from tqdm import tqdm

from contracts.conversation import CONVERSATIONS_FILE, Conversation
from contracts.errors import IncompleteError, UserError, raise_known
from contracts.files import hash_file, read_jsonl
from contracts.ledger import STATUSES, Ledger, check_counts
from contracts.recipe import Recipe
from contracts.run import Run
from contracts.target import Target
from serve.command import MODEL_NAME, build_command
from serve.server import find_port, is_healthy, run_server
from synth.conversation import Writer, api_key, write_conversation
from synth.prompts import Prompt, Reject, read_prompts


class Output:
    """The conversations file and its ledger, appended to together."""

    def __init__(self, folder: Path) -> None:
        self.ledger = Ledger(folder / "ledger.jsonl")
        committed = max((entry.get("end", 0) for entry in self.ledger.entries.values()), default=0)
        self._file = (folder / CONVERSATIONS_FILE).open("ab")
        self._file.truncate(committed)
        self._file.seek(committed)

    def add(self, conversation: Conversation) -> None:
        """Make the record durable, then account for it."""
        self._file.write(conversation.model_dump_json().encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        status = "done" if conversation.finish_reason == "stop" else "truncated"
        reason = "" if status == "done" else "a reply reached max_tokens"
        tokens = conversation.usage["completion_tokens"]
        self.ledger.append(conversation.id, status, reason, tokens=tokens, end=self._file.tell())

    def close(self) -> None:
        self._file.close()
        self.ledger.close()


def generate(
    recipe: Recipe, prompts: Path, output: Path, *, endpoint: str | None = None, retry_failed: bool = False
) -> dict[str, Any]:
    """Write every conversation that `output` still lacks; its summary (counts by status, tokens).

    Without `endpoint` a server is started and stopped. Raises UserError for bad input, IncompleteError when the server
    is lost or too many rows failed; both keep what was finished.
    """
    target = Target.read(recipe.target.path)
    num_rows = sum(1 for _ in read_jsonl(prompts, "prompts, one JSON object a line"))
    run = Run.open(
        output,
        "synth generate",
        settings={
            "synth": recipe.synth.settings(),
            "serve": recipe.serve.settings(),
            "max_model_len": recipe.target.max_model_len,
        },
        inputs={"prompts": hash_file(prompts), "target": target.fingerprint},
        recipe_yaml=recipe.to_yaml(),
    )
    out = Output(output)
    skipped = {*out.ledger.ids("done", "truncated", "filtered"), *([] if retry_failed else out.ledger.ids("failed"))}
    rows = [row for row in read_prompts(prompts, recipe.synth.thinking_modes) if row.id not in skipped]
    if run.complete and not rows:
        print(f"synth: {output} is finished, skipped ({_describe(run.state['summary'])})")
        return dict(run.state["summary"])
    run.reopen()
    if skipped:
        print(f"synth: {len(skipped)} of {num_rows} rows are there already, going on with {len(rows)}")
    for row in rows:
        if isinstance(row, Reject):
            out.ledger.append(row.id, "filtered", row.reason)
    todo = [row for row in rows if isinstance(row, Prompt)]
    if todo:
        with _served(recipe, target, output, endpoint) as (url, model):
            asyncio.run(_write_all(Writer.make(url, model, recipe, target), todo, out, run))
    summary = {**out.ledger.counts(), "input": num_rows, "tokens": out.ledger.total("tokens")}
    out.close()
    check_counts(output / "ledger.jsonl", out.ledger.counts(), num_rows)
    print(f"synth: {_describe(summary)} in {run.seconds:.0f} s -> {output / CONVERSATIONS_FILE}")
    _refuse_many_failures(output, out.ledger, recipe.synth.max_failed_fraction, num_rows)
    run.finish(summary)
    return summary


@contextmanager
def _served(recipe: Recipe, target: Target, output: Path, endpoint: str | None) -> Iterator[tuple[str, str]]:
    """`(base URL, model name)` of the given endpoint, or of a server that lives as long as the block."""
    if endpoint is not None:
        yield endpoint.rstrip("/"), _served_model(endpoint.rstrip("/"))
        return
    command = build_command(recipe, target, port=find_port(recipe.serve.host, recipe.serve.port))
    timeout_s = recipe.serve.startup_timeout_s
    with run_server(command, log_path=output / "server.log", startup_timeout_s=timeout_s) as server:
        yield f"{server.url}/v1", MODEL_NAME


def _served_model(endpoint: str) -> str:
    try:
        client = openai.OpenAI(base_url=endpoint, api_key=api_key(), timeout=10, max_retries=0)
        return client.models.list().data[0].id
    except (openai.OpenAIError, LookupError) as error:
        raise UserError(
            endpoint,
            found=f"no model list ({error})",
            expected="an OpenAI-compatible server",
            fix="Correct --endpoint (it ends in /v1), or leave it out to have a server started.",
        ) from None


async def _write_all(writer: Writer, prompts: Sequence[Prompt], out: Output, run: Run) -> None:
    """Keep `synth.concurrency` conversations in flight until all prompts are accounted for."""
    waiting = iter(prompts)
    tokens = 0
    with tqdm(total=len(prompts), desc="synth", unit="conv", mininterval=2) as bar:

        async def work() -> None:
            nonlocal tokens
            for prompt in waiting:
                try:
                    conversation = await write_conversation(writer, prompt)
                except openai.APIError as error:
                    _refuse_lost_server(writer, error)
                    out.ledger.append(prompt.id, "failed", f"{type(error).__name__}: {error}"[:300])
                else:
                    out.add(conversation)
                    tokens += conversation.usage["completion_tokens"]
                bar.update()
                bar.set_postfix_str(f"{tokens / max(bar.format_dict['elapsed'], 1e-3):.0f} tok/s", refresh=False)
                run.tick()

        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(min(writer.recipe.synth.concurrency, len(prompts))):
                    group.create_task(work())
        except BaseExceptionGroup as errors:
            raise_known(errors)
    await writer.client.close()


def _refuse_lost_server(writer: Writer, error: openai.APIError) -> None:
    """Raise IncompleteError when the server itself is gone: its rows have not failed, they wait for the next run."""
    url = str(writer.client.base_url).rstrip("/").removesuffix("/v1")
    if isinstance(error, openai.APIStatusError) and error.status_code < 500:
        return
    if not is_healthy(url):
        raise IncompleteError(
            f"{url}: found no healthy server any more ({type(error).__name__}), expected one until the end. "
            "Look at its log, then run the same command again: what was finished is kept."
        )


def _refuse_many_failures(output: Path, ledger: Ledger, max_fraction: float, num_rows: int) -> None:
    failed = ledger.ids("failed")
    if not failed:
        return
    reasons = Counter(ledger.entries[id_]["reason"] for id_ in failed)
    reason, _ = reasons.most_common(1)[0]
    print(f"synth: {len(failed)} rows failed, most often: {reason}. Try them again with --retry-failed.")
    if len(failed) > max_fraction * num_rows:
        raise IncompleteError(
            f"{output / 'ledger.jsonl'}: found {len(failed)} of {num_rows} rows failed ({reason}), expected at most "
            f"{max_fraction:.0%}. Mend the cause and run again with --retry-failed."
        )


def _describe(counts: Mapping[str, int]) -> str:
    parts = [f"{counts[status]} {status}" for status in STATUSES if counts[status]]
    return f"{counts['input']} rows: {', '.join(parts)}; {counts['tokens']} tokens"
