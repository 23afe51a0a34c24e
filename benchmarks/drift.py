"""Count how often `bench watch` is quiet on prompts like the card's, and how often it names other prompts.

    python benchmarks/drift.py --recipe recipes/Tiny-DFlash/recipe.yaml --set target.path=RUN/target \\
        --card RUN/export --prompts RUN/prompts/held_out.jsonl --conversations RUN/synth/held_out --work FOLDER

One server drafts with the card's draft. A run is two calls of `bench watch --once` with requests between them, drawn by
a seed: the card's prompts, in thinking modes in which the card has not measured them, or sums and stories, which are
none of its prompts. Exits with an error unless every run of the first kind ends as the card, with exit code
0, and every one of the second as drifted, with 1.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.requests import REQUEST_TIMEOUT_S, Served, send_concurrently
from common.progress import Progress
from contracts.conversation import read_conversations
from contracts.prompt_files import open_prompts
from contracts.prompts import read_opening
from recipe.load import load_recipe
from recipe.recipe import Recipe
from serve.client import Client
from serve.command import MODEL_NAME, Serving, build_command
from serve.server import find_port, run_server
from target.target import Target
from target.thinking import template_arguments

CONCURRENCY = 8
EXPECTED = {"own": 0, "other": 1}
"""The exit code by what is sent."""
NAMES = ("Ada", "Ben", "Carla", "Dmitri", "Elif", "Farid", "Greta", "Hugo", "Ines", "Jonas", "Kim", "Lara")
THINGS = ("apples", "marbles", "stamps", "candles", "tickets", "pencils", "shells", "coins", "books", "lamps")

Request = tuple[list[dict[str, Any]], str]
"""Messages and thinking mode."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", type=Path, required=True)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--card", type=Path, required=True, help="the export with its certificate")
    parser.add_argument("--prompts", type=Path, required=True, help="the card's prompts")
    parser.add_argument("--conversations", type=Path, required=True, help="the card's conversations")
    parser.add_argument("--work", type=Path, required=True, help="folder for the server's log and the watches' files")
    parser.add_argument("--runs", type=int, default=10, help="of either kind")
    parser.add_argument("--requests", type=int, default=120, help="of a run")
    args = parser.parse_args()
    recipe = load_recipe(args.recipe, args.set)
    args.work.mkdir(parents=True, exist_ok=True)
    unmeasured = list_unmeasured(recipe, args.prompts, args.conversations)
    right = dict.fromkeys(EXPECTED, 0)
    command = build_command(
        recipe, Target.here(recipe.target), port=find_port("127.0.0.1", None), serving=Serving(args.card, "bench")
    )
    with run_server(command, log_path=args.work / "server.log", startup_timeout_s=600) as server:
        for seed in range(args.runs):
            for kind, expected in EXPECTED.items():
                draw = random.Random(f"{kind} {seed}")
                requests = draw.sample(unmeasured, args.requests)
                if kind == "other":
                    requests = [(make_question(draw), mode) for _, mode in requests]
                path = args.work / f"{kind}-{seed}.json"
                path.unlink(missing_ok=True)
                watch(server.url, args.card, path)
                asyncio.run(send(recipe, Served(server.url, MODEL_NAME), requests))
                code, line = watch(server.url, args.card, path)
                right[kind] += code == expected
                print(f"{kind} {seed}: exit code {code}; {line}", flush=True)
    print(f"as the card on its own prompts: {right['own']} of {args.runs} runs")
    print(f"drifted on others: {right['other']} of {args.runs} runs")
    if any(count < args.runs for count in right.values()):
        sys.exit("not every run ended as it should")


def list_unmeasured(recipe: Recipe, prompts: Path, conversations: Path) -> list[Request]:
    """Return each prompt in each thinking mode in which it has no conversation."""
    measured = {(found.index, found.thinking_mode) for found in read_conversations(conversations)}
    modes = dict.fromkeys(recipe.synth.modes_in_turn)
    return [
        (read_opening(row.value), mode)
        for row in open_prompts(prompts).rows()
        for mode in modes
        if (row.index, mode) not in measured
    ]


def make_question(draw: random.Random) -> list[dict[str, Any]]:
    """Return the messages of a sum in words or of a request for a story."""
    name, other = draw.sample(NAMES, 2)
    thing = draw.choice(THINGS)
    texts = (
        f"{name} has {draw.randint(10, 99)} {thing} and gives {draw.randint(2, 9)} to {other}. How many are left?",
        f"Write a short story in which {name} finds {draw.randint(2, 9)} {thing} and {other} does not believe it.",
    )
    return [{"role": "user", "content": draw.choice(texts)}]


async def send(recipe: Recipe, server: Served, requests: Sequence[Request]) -> None:
    """Send chat requests with the recipe's sampling, `CONCURRENCY` at a time."""

    async def ask(client: Client, request: Request) -> None:
        messages, mode = request
        body: dict[str, Any] = {
            "model": server.model,
            "messages": messages,
            "max_tokens": recipe.synth.max_tokens,
            "temperature": recipe.synth.temperature,
        }
        if values := template_arguments(recipe.target, mode):
            body["chat_template_kwargs"] = values
        await client.chat(f"{server.url}/v1", body, REQUEST_TIMEOUT_S)

    with Progress(len(requests), "requests", "request") as progress:
        await send_concurrently(requests, ask, CONCURRENCY, progress)


def watch(url: str, card: Path, path: Path) -> tuple[int, str]:
    """Run `bench watch --once`; return its exit code and the line of the window, or the verdict without one."""
    words = ["watch", "--endpoint", f"{url}/v1", "--card", card, "--once", "--every", "0.1", "--json", path]
    program = Path(sys.executable).with_name("bench")
    run = subprocess.run([program, *map(str, words)], capture_output=True, text=True, check=False)
    if run.returncode not in (0, 1, 3):
        sys.exit(run.stderr)
    windows = json.loads(path.read_text())["windows"]
    return run.returncode, run.stdout.splitlines()[-2 if windows else -1]


if __name__ == "__main__":
    main()
