"""Parse the tool calls in a reply, with vLLM's parser run on the whole text.

Requests with tools are sent with `tool_choice: "none"`. vLLM then renders the tools into the prompt, and neither parses
the reply nor constrains its tokens by a grammar: text and token ids are complete. The calls are parsed here.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from common.errors import UserError
from recipe.recipe import Recipe
from target.target import Target

PARSER_OF_MARKER = {
    "]<]minimax[>[": "minimax_m3",
    "<minimax:tool_call>": "minimax_m2",
    "<seed:tool_call>": "seed_oss",
    "<arg_key>": "glm45",
    "<function=": "qwen3_coder",
    "<|tool_calls_section_begin|>": "kimi_k2",
    "[TOOL_CALLS]": "mistral",
    "<|python_tag|>": "llama3_json",
    "<tool_call>": "hermes",
}
"""vLLM's parser by a string in the chat template; the first match counts."""
ERRORS = (ValueError, LookupError, TypeError, AttributeError)
"""Exceptions of vLLM's parsers for malformed calls, and of pydantic for malformed tools."""


@dataclass(frozen=True)
class Parsed:
    """A reply's text without its calls, and the calls in OpenAI's form."""

    content: str
    calls: list[dict[str, Any]]


class ToolCallParser:
    """vLLM's parser of one format, loaded when it is first used (importing vLLM takes ten seconds)."""

    def __init__(self, name: str, target_path: Path) -> None:
        self.name = name
        self._path = target_path
        self._loaded: tuple[Any, Any] | None = None
        self._lock = threading.Lock()

    def parse(self, text: str, tools: list[dict[str, Any]]) -> Parsed:
        """Parse the calls of a reply, without its reasoning. Malformed calls stay in the content.

        Raises UserError if vLLM has no such parser or it does not fit the target's tokenizer.
        """
        from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest

        with self._lock:
            parser, tokenizer = self._load()
            try:
                request = ChatCompletionRequest(messages=[], tools=tools, tool_choice="auto")
                found = parser(tokenizer, request.tools).extract_tool_calls(text, request)
            except ERRORS:
                return Parsed(text, [])
        if not found.tools_called:
            return Parsed(text, [])
        calls = [call.model_dump(include={"id", "type", "function"}, exclude_none=True) for call in found.tool_calls]
        return Parsed(found.content or "", calls)

    def _load(self) -> tuple[Any, Any]:
        if self._loaded is None:
            from transformers import AutoTokenizer
            from vllm.tool_parsers import ToolParserManager

            logging.getLogger("vllm").setLevel(logging.CRITICAL)  # parsers log a traceback per malformed call
            tokenizer = AutoTokenizer.from_pretrained(self._path)
            try:
                parser = ToolParserManager.get_tool_parser(self.name)
                parser(tokenizer)
            except KeyError:
                known = ", ".join(sorted(ToolParserManager.list_registered()))
                raise UserError(
                    "synth.tool_call_parser", found=self.name, expected=f"one of {known}", fix="Correct it."
                ) from None
            except (RuntimeError, ValueError) as error:  # such as a token that the tokenizer lacks
                raise UserError(
                    "synth.tool_call_parser",
                    found=f"{self.name} ({error})",
                    expected=f"the format of {self._path}",
                    fix="Name the parser that vLLM's documentation gives for this target.",
                ) from None
            self._loaded = parser, tokenizer
        return self._loaded


def find_parser(recipe: Recipe, target: Target) -> ToolCallParser | None:
    """Return the parser of the target's tool calls; None if the format is unknown or vLLM is missing.

    It is that of synth.tool_call_parser, of the production server's flags, or of the chat template, in this order.
    """
    production = recipe.serve.purposes.get("production")
    flag = {**recipe.serve.args, **(production.args if production else {})}.get("tool-call-parser")
    template = target.find_chat_template() or ""
    of_template = next((name for marker, name in PARSER_OF_MARKER.items() if marker in template), None)
    name = recipe.synth.tool_call_parser or flag or of_template
    return ToolCallParser(str(name), target.path) if name and find_spec("vllm") else None


def same_calls(some: list[dict[str, Any]], others: list[dict[str, Any]]) -> bool:
    """Return whether calls have equal functions and arguments; their ids are random."""
    return [_content(call) for call in some] == [_content(call) for call in others]


def with_parsed_arguments(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return messages with calls' arguments as objects, as vLLM passes them to the chat template."""
    parsed = []
    for message in messages:
        calls = [
            {**call, "function": {**call["function"], "arguments": _content(call)[1]}}
            for call in message.get("tool_calls") or []
        ]
        parsed.append({**message, "tool_calls": calls} if calls else message)
    return parsed


def describe_call(call: Mapping[str, Any]) -> str:
    """Return a call in the form of ShareGPT's `function_call`."""
    return f'{{"name": "{call["function"]["name"]}", "arguments": {call["function"].get("arguments") or "{}"}}}'


def _content(call: Mapping[str, Any]) -> tuple[str, Any]:
    arguments = call["function"].get("arguments") or "{}"
    try:
        return call["function"]["name"], json.loads(arguments) if isinstance(arguments, str) else arguments
    except ValueError:
        return call["function"]["name"], arguments
