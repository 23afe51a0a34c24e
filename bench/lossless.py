"""Check that greedy replies do not change with a draft under prefix caching, chunked prefill, load and tool calls.

Reads:  held-out conversations (`synth generate`), an exported draft, chat requests (JSONL; tools, structured output).
Writes: OUTPUT/baseline.json and OUTPUT/draft.json (replies and differences of each pass; finished files are kept),
        OUTPUT/lossless.json (the figures).

Both servers have the recipe's flags for production, a prefix cache, and fewer tokens per engine step than the prompts.
Each takes all requests together at every concurrency, twice: the second pass finds its prompts in the cache. Every
concurrency has a cache of its own (`cache_salt`), so that its first pass computes the prompts. A reply is compared with
that without a draft to the same request, sent alone: token by token, and as the client sees it (text, parsed tool
calls, finish reason).
"""

from __future__ import annotations

import asyncio
import random
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from bench.differences import compare_replies
from bench.requests import REQUEST_TIMEOUT_S, Answer, Served, Turn, read_turns, score, send_concurrently
from common.errors import IncompleteError, UserError
from common.files import hash_file, parse_line, read_json, read_lines, write_json
from common.progress import Progress
from contracts.conversation import CONVERSATIONS_FILE, check_written_by, read_conversations
from contracts.run import Run
from recipe.recipe import Recipe
from serve.client import AnswerError, Client, ask
from serve.command import MODEL_NAME, Serving, build_command, draft_inputs
from serve.flags import layer_flags, speculative_overrides
from serve.server import find_port, run_server
from serve.settings import NEUTRAL_FLAGS, output_settings
from target.target import Target

FP32_TOLERANCE, OTHER_TOLERANCE = 1e-3, 0.25
"""Largest gap of two logits that counts as a tie: in fp32; in bf16 and lower precisions."""


@dataclass(frozen=True)
class Load:
    """What the servers are sent: conversations, chat requests, and how many of them at once.

    `max_num_batched_tokens`: tokens per engine step; None: half of the prompts' median length.
    `tolerance`: the largest logit gap of a tie; None: by the recipe's dtype.
    """

    conversations: Path
    requests: Path | None = None
    concurrency: Sequence[int] = (1, 8, 32)
    max_num_batched_tokens: int | None = None
    tolerance: float | None = None


@dataclass(frozen=True)
class Request:
    """A request to one of two routes; its body lacks the model, the temperature and the salt."""

    id: str
    is_chat: bool
    body: Mapping[str, Any]


@dataclass(frozen=True)
class Reply:
    """Token ids of prompt and reply, what the client sees of the reply, and how many of the prompt's were cached."""

    id: str
    prompt: list[int]
    token_ids: list[int]
    seen: dict[str, Any]
    cached: int


@dataclass(frozen=True)
class Check:
    """Inputs and folders of the check."""

    recipe: Recipe
    draft: Path
    load: Load
    output: Path

    @cached_property
    def target(self) -> Target:
        return Target.here(self.recipe.target)

    @cached_property
    def requests(self) -> list[Request]:
        """The greedy turns as completions, and the chat requests. Raises UserError if there are no turns."""
        folder, limits = self.load.conversations, self.recipe.synth.max_tokens
        turns = [turn for turn in read_turns(read_conversations(folder)) if turn.is_greedy]
        if not turns:
            raise UserError(
                folder, found="no greedy conversation", expected="some", fix="Generate them with temperature 0."
            )
        longest = self.recipe.target.max_model_len
        completions = [
            Request(
                turn.id,
                False,
                {
                    **turn.sampling,
                    "prompt": turn.prompt,
                    "max_tokens": min(limits, longest - len(turn.prompt)) if longest else limits,
                },
            )
            for turn in turns
        ]
        return completions + (read_chats(self.load.requests, limits) if self.load.requests else [])

    @cached_property
    def max_num_batched_tokens(self) -> int:
        """Tokens per engine step; vLLM wants at least one for each request in flight."""
        lengths = [len(request.body["prompt"]) for request in self.requests if not request.is_chat]
        return self.load.max_num_batched_tokens or max(int(statistics.median(lengths)) // 2, *self.load.concurrency)

    @property
    def tolerance(self) -> float:
        if self.load.tolerance is not None:
            return self.load.tolerance
        dtype = layer_flags(self.recipe, "production").get("dtype")
        return FP32_TOLERANCE if dtype == "float32" else OTHER_TOLERANCE


def read_chats(path: Path, max_tokens: int) -> list[Request]:
    """Read chat requests: bodies of /v1/chat/completions, with an `id`. Raises UserError for rows that are none."""
    found = []
    for number, line in read_lines(path, "chat requests"):
        where = f"{path}:{number}"
        row = parse_line(line, where, "a chat request")
        if not isinstance(row, dict) or not isinstance(row.get("messages"), list):
            raise UserError(where, found="no messages", expected="the body of a chat completion", fix="Correct it.")
        body = {key: value for key, value in row.items() if key != "id"}
        found.append(Request(f"{row.get('id', number)}", True, {"max_tokens": max_tokens, **body}))
    if len({request.id for request in found}) < len(found):
        raise UserError(path, found="an id twice", expected="one for each request", fix="Correct it.")
    return found


def check(work: Check) -> dict[str, Any]:
    """Serve without and with the draft, compare all replies, and return the report.

    Raises UserError for inputs of another target, IncompleteError for a reply that differs by more than a tie, or if
    the load exercised too little.
    """
    recipe, load, output = work.recipe, work.load, work.output
    check_written_by(load.conversations, work.target)
    files = {"conversations": load.conversations / CONVERSATIONS_FILE, "requests": load.requests}
    run = Run.open(
        output,
        "bench lossless",
        settings={
            "serve": output_settings(recipe, "production", NEUTRAL_FLAGS),
            "speculative": speculative_overrides(recipe.serve),
            "max_tokens": recipe.synth.max_tokens,
            "concurrency": list(load.concurrency),
            "max_num_batched_tokens": work.max_num_batched_tokens,
        },
        inputs={
            **{name: hash_file(path) for name, path in files.items() if path},
            "target": work.target.fingerprint,
            **draft_inputs(recipe, work.draft),
        },
        recipe_yaml=recipe.to_yaml(),
    )
    baseline = _serve_and_send(work, None, output / "baseline.json", {})
    alone = {row["id"]: Reply(**row) for row in baseline[0]["replies"]}
    run.tick()
    drafted = _serve_and_send(work, work.draft, output / "draft.json", alone)
    report = summarize(work, {"baseline": baseline, "draft": drafted})
    write_json(output / "lossless.json", report)
    print(make_table(report))
    refuse(report, alone)
    run.finish({key: report[key] for key in ("replies", "identical", "ties")})
    print(f"bench: lossless, in {run.seconds:.0f} s -> {output}")
    return report


def _serve_and_send(work: Check, draft: Path | None, path: Path, expected: Mapping[str, Reply]) -> list[dict[str, Any]]:
    """Send all passes to a server and write `path` unless it exists; return its content.

    Replies are compared with `expected`, or with those of the first pass if that is empty.
    """
    if path.exists():
        print(f"bench: {path} is there already")
        return list(read_json(path, "a server's replies"))
    recipe, concurrency = work.recipe, work.load.concurrency
    serving = Serving(
        draft=draft,
        purpose="production",
        extra_args={
            "enable-prefix-caching": True,
            "enable-chunked-prefill": True,
            "enable-prompt-tokens-details": True,
            "max-num-batched-tokens": work.max_num_batched_tokens,
            "max-num-seqs": max(concurrency),
        },
    )
    port = find_port(recipe.serve.host, recipe.serve.port)
    command = build_command(recipe, work.target, port=port, serving=serving)
    passes = []
    with run_server(
        command, log_path=path.with_suffix(".log"), startup_timeout_s=recipe.serve.startup_timeout_s
    ) as server:
        served = Served(server.url, MODEL_NAME)
        for number in dict.fromkeys((1, *concurrency)):
            for name in ("first", "repeated"):
                title = f"{path.stem}, {number} at once, {name}"
                found = _send_pass(served, work.requests, number, title)
                expected = expected or {reply.id: reply for reply in found["replies"]}
                found |= {"name": name, "concurrency": number, **_compare(served, expected, found["replies"])}
                passes.append({**found, "replies": [asdict(reply) for reply in found["replies"]]})
    write_json(path, passes)
    return passes


def _send_pass(server: Served, requests: Sequence[Request], concurrency: int, title: str) -> dict[str, Any]:
    """Send all requests, in an order of the pass's own; return the replies and the change of vLLM's counters."""
    waiting = random.Random(title).sample(requests, len(requests))
    before = _read_counters(server.url)
    replies = asyncio.run(_send_all(server, waiting, concurrency, title))
    after = _read_counters(server.url)
    return {"replies": replies, "counters": {key: after[key] - before.get(key, 0.0) for key in after}}


def _read_counters(url: str) -> dict[str, float]:
    async def read(client: Client) -> dict[str, float]:
        cache = await client.read_cache_counters(url)
        return {**await client.read_counters(url), **{f"prefix_{name}": value for name, value in cache.items()}}

    try:
        return ask(read)
    except AnswerError as error:
        raise UserError(
            f"{url}/metrics", found=str(error), expected="vLLM's metrics", fix="Look at the server's log."
        ) from None


async def _send_all(server: Served, requests: Sequence[Request], concurrency: int, title: str) -> list[Reply]:
    replies: list[Reply] = []

    async def send(client: Client, request: Request) -> None:
        replies.append(await _send(client, server, request, salt=f"{concurrency}"))

    with Progress(len(requests), title, "request") as progress:
        await send_concurrently(requests, send, concurrency, progress)
    return replies


async def _send(client: Client, server: Served, request: Request, salt: str) -> Reply:
    url = f"{server.url}/v1"
    fixed = {"model": server.model, "temperature": 0.0, "return_token_ids": True, "cache_salt": salt}
    body = {**request.body, **fixed}
    try:
        answer = await (client.chat if request.is_chat else client.complete)(url, body, REQUEST_TIMEOUT_S)
    except AnswerError as error:
        raise IncompleteError(
            f"{url} ({request.id}): found {error}, expected an answer. Look at the server's log beside the answers, "
            "then run again: a finished server is kept."
        ) from None
    (choice,) = answer["choices"]
    return Reply(
        id=request.id,
        prompt=answer["prompt_token_ids"] if request.is_chat else request.body["prompt"],
        token_ids=choice["token_ids"],
        seen={"finish_reason": choice["finish_reason"], **_show(choice)},
        cached=(answer["usage"].get("prompt_tokens_details") or {}).get("cached_tokens") or 0,
    )


def _show(choice: Mapping[str, Any]) -> dict[str, Any]:
    """Return a reply's text or message, without the random ids of tool calls."""
    if "message" not in choice:
        return {"text": choice["text"]}
    message = {key: value for key, value in choice["message"].items() if value}
    calls = [call["function"] for call in message.pop("tool_calls", [])]
    return {"message": message, "tool_calls": calls}


def _compare(server: Served, expected: Mapping[str, Reply], replies: Sequence[Reply]) -> dict[str, Any]:
    """Return how many replies are identical, and where the others differ: in tokens, or else only as seen."""
    turns = [Turn(reply.id, "", "", reply.prompt, reply.token_ids) for reply in expected.values()]
    answers = [Answer(reply.id, reply.token_ids, str(reply.seen["finish_reason"]), [], 0.0) for reply in replies]
    tokens = {reply.id: reply.token_ids for reply in expected.values()}
    identical, differing = compare_replies(turns, tokens, answers, partial(score, server))
    seen = [
        {"turn": reply.id, "expected": expected[reply.id].seen, "found": reply.seen}
        for reply in replies
        if reply.token_ids == expected[reply.id].token_ids and reply.seen != expected[reply.id].seen
    ]
    return {"identical": identical - len(seen), "differing": differing, "differing_as_seen": seen}


def summarize(work: Check, sides: Mapping[str, Sequence[dict[str, Any]]]) -> dict[str, Any]:
    """Compute the figures: a row for each server and pass, with its wrong replies."""
    budget, tolerance = work.max_num_batched_tokens, work.tolerance
    rows = []
    for server, passes in sides.items():
        for found in passes:
            wrong = [d for d in found["differing"] if d["logit_gap"] is None or abs(d["logit_gap"]) > tolerance]
            wrong += found["differing_as_seen"]
            counters = found["counters"]
            rows.append(
                {
                    "server": server,
                    "concurrency": found["concurrency"],
                    "order": found["name"],
                    "replies": len(found["replies"]),
                    "identical": found["identical"],
                    "ties": len(found["replies"]) - found["identical"] - len(wrong),
                    "wrong": wrong,
                    "tool_calls": sum(bool(reply["seen"].get("tool_calls")) for reply in found["replies"]),
                    "chunked": sum(len(reply["prompt"]) - reply["cached"] > budget for reply in found["replies"]),
                    "cached": sum(reply["cached"] for reply in found["replies"]) / max(1, _count_prompts(found)),
                    "accepted_tokens": int(counters["num_accepted_tokens"]),
                    "acceptance_length": 1 + counters["num_accepted_tokens"] / max(1, counters["num_drafts"]),
                }
            )
    return {
        "draft": str(work.draft),
        "target": str(work.recipe.target.path),
        "max_num_batched_tokens": budget,
        "tolerance": tolerance,
        "num_chats": sum(request.is_chat for request in work.requests),
        **{key: sum(row[key] for row in rows) for key in ("replies", "identical", "ties")},
        "passes": rows,
    }


def _count_prompts(found: Mapping[str, Any]) -> int:
    """Return the tokens of a pass's prompts."""
    return sum(len(reply["prompt"]) for reply in found["replies"])


def make_table(report: Mapping[str, Any]) -> str:
    """Format the passes as a Markdown table."""
    lines = [
        "| server | at once | pass | identical | ties | wrong | prompts chunked | prompt tokens cached "
        "| replies with tool calls | acceptance length |",
        "|---|---:|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {row['server']} | {row['concurrency']} | {row['order']} | {row['identical']} of {row['replies']} "
        f"| {row['ties']} | {len(row['wrong'])} | {row['chunked']} | {row['cached']:.0%} | {row['tool_calls']} "
        f"| {row['acceptance_length']:.3f} |"
        for row in report["passes"]
    ]
    return "\n".join(lines)


def refuse(report: Mapping[str, Any], alone: Mapping[str, Reply]) -> None:
    """Raise IncompleteError for the first wrong reply, or if the passes exercised too little."""
    for row in report["passes"]:
        if row["wrong"]:
            where = f"{row['server']}, {row['concurrency']} at once, {row['order']} pass"
            raise IncompleteError(
                f"{where}: found {len(row['wrong'])} of {row['replies']} greedy replies unlike those to the same "
                f"requests alone and without a draft, expected none beyond a logit gap of {report['tolerance']:g}. "
                f"{_locate(row['wrong'][0], alone)}"
            )
    drafted = [row for row in report["passes"] if row["server"] == "draft"]
    missing = {
        "no prompt in the prefix cache: choose a smaller serve.args.block-size, or longer prompts": all(
            row["cached"] > 0 for row in report["passes"] if row["order"] == "repeated"
        ),
        "no prompt longer than a step's tokens: choose a smaller --max-num-batched-tokens": all(
            row["chunked"] > 0 for row in report["passes"] if row["order"] == "first"
        ),
        "no accepted draft token: train the draft": all(row["accepted_tokens"] > 0 for row in drafted),
        "no parsed tool call: set tool-call-parser in serve.purposes.production.args, or tool_choice": not report[
            "num_chats"
        ]
        or all(row["tool_calls"] > 0 for row in report["passes"]),
    }
    for what, holds in missing.items():
        if not holds:
            raise IncompleteError(f"bench lossless: found {what.replace(': ', ', expected some. ', 1)}.")


def _locate(wrong: Mapping[str, Any], alone: Mapping[str, Reply]) -> str:
    """Describe where a reply differs."""
    if "first_token" not in wrong:
        return f"First: {wrong['turn']} has the same tokens, but {wrong['found']} instead of {wrong['expected']}."
    if wrong["first_token"] is None:
        return f"First: {wrong['turn']} ends elsewhere than after its {len(alone[wrong['turn']].token_ids)} tokens."
    a, b = wrong["tokens"]
    gap = wrong["logit_gap"]
    return f"First: {wrong['turn']} at token {wrong['first_token']}, {b} instead of {a}, logit gap {gap}."
