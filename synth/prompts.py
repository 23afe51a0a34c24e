"""Read prompts: JSONL rows with `messages`, `prompt` or `turns`.

Each row becomes a Prompt or a reason why it cannot be one; every row is accounted for either way.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from contracts.conversation import make_conversation_id
from contracts.files import read_jsonl

ROLES = {"system", "developer", "root", "user", "assistant", "tool"}


@dataclass(frozen=True)
class Prompt:
    """One conversation to be written: its place in the input, its messages (no assistant turn), its mode."""

    index: int
    id: str
    source_id: str
    category: str
    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None
    thinking_mode: str


@dataclass(frozen=True)
class Reject:
    """A row that cannot be used, and why."""

    index: int
    id: str
    reason: str


def read_prompts(path: Path, thinking_modes: Sequence[str]) -> Iterator[Prompt | Reject]:
    """Yield each row of a JSONL file; row i (its place in the whole input) takes mode i modulo their number.

    Raises UserError for a missing file or a line that is not JSON. A repeated prompt is a Reject: its conversation
    would have the same id and the same content.
    """
    seen: set[str] = set()
    for index, (number, row) in enumerate(read_jsonl(path, "prompts, one JSON object a line")):
        mode = thinking_modes[index % len(thinking_modes)] if thinking_modes else ""
        try:
            messages, tools = _messages_of(row), row.get("tools")
        except ValueError as error:
            yield Reject(index, f"row-{index:07d}", f"line {number}: {error}")
            continue
        id_ = make_conversation_id(messages, tools, mode)
        if id_ in seen:
            yield Reject(index, f"row-{index:07d}", f"line {number}: the same prompt and mode as an earlier row, {id_}")
            continue
        seen.add(id_)
        yield Prompt(index, id_, str(row.get("id", id_)), str(row.get("category", "")), messages, tools, mode)


def _messages_of(row: Any) -> list[dict[str, Any]]:
    """The row's messages without assistant turns, which the target writes anew. Raises ValueError with the reason."""
    if not isinstance(row, dict):
        raise ValueError("not a JSON object")
    if isinstance(row.get("messages"), list):
        messages = row["messages"]
    elif isinstance(row.get("prompt"), str):
        messages = [{"role": "user", "content": row["prompt"]}]
    elif isinstance(row.get("turns"), list):
        messages = [{"role": "user", "content": turn} for turn in row["turns"]]
    else:
        raise ValueError("none of `messages`, `prompt`, `turns`")
    for message in messages:
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            raise ValueError(f"a message whose role is none of {', '.join(sorted(ROLES))}")
        if message["role"] == "tool":
            raise ValueError("tool results cannot be replayed yet")
        if not isinstance(message.get("content"), str) and message["role"] != "assistant":
            raise ValueError("a message whose content is no text")
    kept = [message for message in messages if message["role"] != "assistant"]
    if not kept or kept[-1]["role"] != "user":
        raise ValueError("no user message at the end")
    return kept
