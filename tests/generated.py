"""Runs of `synth generate` with the scripted server, for tests of what they record."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import scripted
from conftest import run

from contracts.conversation import Conversation, read_conversations


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def generate(recipe: Path, tmp_path: Path, rows: list[Any], server: scripted.Server, *more: str) -> list[Conversation]:
    """The records of a run, in the order of the input."""
    prompts = write(tmp_path / "prompts.jsonl", rows)
    args = ("-r", recipe, "--prompts", prompts, "--output", tmp_path / "out", "--endpoint", server.url, *more)
    run("synth", "generate", *args)
    return sorted(read_conversations(tmp_path / "out"), key=lambda record: (record.index, record.sample))


def settings(*values: str) -> list[str]:
    return [word for value in values for word in ("--set", value)]
