"""Convert a reply of the target, the server's choice, to a message with its reasoning and tool calls."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from common.errors import UserError
from synth.tool_calls import ToolCallParser

ENDED = ("stop", "tool_calls")
"""Finish reasons of a reply that the target ended itself."""


@dataclass(frozen=True)
class Reply:
    """An assistant message and its original text; `is_parsed`: whether its tool calls are known."""

    message: dict[str, Any]
    text: str
    is_parsed: bool = True

    @classmethod
    def of_server(cls, choice: Mapping[str, Any], thinking_tags: tuple[str, str] | None, *, is_parsed: bool) -> Reply:
        """Read a choice of a chat completion, with the calls that the server parsed, if any.

        Raises UserError if the server strips reasoning.
        """
        message = choice["message"]
        if message.get("reasoning") or message.get("reasoning_content"):
            raise UserError(
                "the server's answer",
                found="reasoning apart from the text: a reasoning parser is on",
                expected="both in the generated tokens",
                fix="Serve without --reasoning-parser.",
            )
        text = message.get("content") or ""
        reply = make_reply(text, thinking_tags)
        if calls := message.get("tool_calls"):
            return cls({**reply, "tool_calls": calls}, text)
        return cls(reply, text, is_parsed)


def make_reply(text: str, thinking_tags: tuple[str, str] | None) -> dict[str, Any]:
    """Return a text as an assistant message, split at the end of its reasoning; nothing is stripped.

    Reasoning that the prompt opened (mode enabled) has no opening tag in the reply. Reasoning that was cut has no
    closing tag and stays in the content; such a reply ends the conversation. A target without tags has no reasoning.
    """
    if thinking_tags is None:
        return {"role": "assistant", "content": text}
    opening, closing = thinking_tags
    thought, separator, answer = text.partition(closing)
    if not separator:
        return {"role": "assistant", "content": text}
    thought = thought.removeprefix(opening)
    return {"role": "assistant", "content": answer, **({"reasoning_content": thought} if thought else {})}


def add_calls(message: Mapping[str, Any], tools: list[dict[str, Any]], parser: ToolCallParser) -> dict[str, Any]:
    """Return a message with its content's tool calls parsed. Raises: see `ToolCallParser.parse`."""
    parsed = parser.parse(message["content"], tools)
    if not parsed.calls:
        return dict(message)
    return {**message, "content": parsed.content, "tool_calls": parsed.calls}
