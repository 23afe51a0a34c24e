"""The prompt row, which `synth` and `bench` read: convert each of its forms to OpenAI messages.

A row holds `messages` (OpenAI), `conversations` (ShareGPT's `from`/`value`, or role/content), `turns` (user turns) or
`prompt` (one user turn, or messages). `tools`, `system`, `id` and `category` are optional. Lists may be JSON in a
string, as Parquet files have them. Rows with images, video or audio are refused: without them, the target would answer
another question. `contracts/prompt_files.py` reads rows from files.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

ROLES = ("system", "developer", "root", "user", "assistant", "tool")
SHAREGPT_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "function_call": "assistant",
    "function_response": "tool",
    "observation": "tool",
}
ID_KEYS = ("id", "conversation_id", "question_id")
CATEGORY_KEYS = ("category", "subject")
PROMPT_KEYS = ("messages", "conversations", "turns", "prompt")
MEDIUM = re.compile("image|video|audio")
"""In the types of content parts that are no text, such as `image_url` and `input_audio`."""
MEDIA_KEYS = ("image", "images", "video", "videos", "audio", "audios")
"""Keys of rows with media beside the messages, as LLaVA's and TRL's data have them."""


@dataclass(frozen=True)
class PromptRow:
    """One row: its id and category ("" if it has none), messages and tools."""

    id: str
    category: str
    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None


def read_prompt_row(row: Any) -> PromptRow:
    """Convert a row to its normal form. Raises ValueError with the reason if it cannot be used."""
    if not isinstance(row, dict):
        raise ValueError("not a JSON object")
    tools = parse_list(row.get("tools")) or None
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise ValueError("`tools` is no list of objects")
    messages = _find_messages(row)
    for key in MEDIA_KEYS:
        if row.get(key):
            raise ValueError(f"a row with `{key}`: drafts are trained on text alone")
    for message in messages:
        _check_message(message)
    if isinstance(row.get("system"), str) and row["system"] and messages and messages[0]["role"] == "user":
        messages = [{"role": "system", "content": row["system"]}, *messages]
    return PromptRow(read_id(row), read_category(row), messages, tools)


def read_opening(row: Any) -> list[dict[str, Any]]:
    """Return a row's messages up to its first user turn. Raises ValueError if it has none."""
    messages = read_prompt_row(row).messages
    first = next((place for place, message in enumerate(messages) if message["role"] == "user"), None)
    if first is None:
        raise ValueError("no user turn")
    return messages[: first + 1]


def read_id(row: Mapping[str, Any]) -> str:
    """Return a row's id, "" if it has none."""
    return _first_text(row, ID_KEYS)


def read_category(row: Mapping[str, Any]) -> str:
    """Return a row's category, "" if it has none."""
    return _first_text(row, CATEGORY_KEYS)


def read_text(message: Mapping[str, Any]) -> str:
    """Return a message's text: its content, or the texts of its parts."""
    content = message.get("content")
    if isinstance(content, list):
        return "\n".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
    return content if isinstance(content, str) else ""


def parse_list(value: Any) -> Any:
    """Return the list in a JSON string; anything else is returned unchanged."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            return json.loads(value)
        except ValueError:
            return value
    return value


def _find_messages(row: Mapping[str, Any]) -> list[Any]:
    messages, conversations, turns, prompt = (parse_list(row.get(key)) for key in PROMPT_KEYS)
    messages = messages if isinstance(messages, list) else conversations
    if isinstance(messages, list):
        return [_from_sharegpt(message) for message in messages]
    if isinstance(turns, list):
        return [{"role": "user", "content": turn} for turn in turns]
    if isinstance(prompt, list):  # preference sets hold messages under this name
        return prompt
    if isinstance(row.get("prompt"), str):
        return [{"role": "user", "content": row["prompt"]}]
    raise ValueError(f"none of `messages`, `conversations`, `turns`, `prompt`; its keys are {', '.join(row)}"[:300])


def _first_text(row: Mapping[str, Any], keys: tuple[str, ...]) -> str:
    """Return the first of these values as a string, its lone surrogates replaced (JSON allows them, UTF-8 does not)."""
    value = next((row[key] for key in keys if row.get(key) not in (None, "")), "")
    return str(value).encode(errors="replace").decode()


def _from_sharegpt(message: Any) -> Any:
    if not isinstance(message, dict) or "from" not in message or "role" in message:
        return message
    speaker, value = str(message["from"]), message.get("value")
    role = SHAREGPT_ROLES.get(speaker, speaker)
    if speaker != "function_call":
        return {"role": role, "content": value}
    try:
        calls = json.loads(value) if isinstance(value, str) else value
        calls = calls if isinstance(calls, list) else [calls]
        return {"role": role, "tool_calls": [{"function": {"name": call["name"]}} for call in calls]}
    except (ValueError, TypeError, KeyError):
        raise ValueError("a function_call that names no function") from None


def _check_message(message: Any) -> None:
    if not isinstance(message, dict) or message.get("role") not in ROLES:
        role = message.get("role") if isinstance(message, dict) else type(message).__name__
        raise ValueError(f"a message of role {role!r}, which is none of {', '.join(ROLES)}")
    if message["role"] == "assistant":
        return
    content = message.get("content")
    parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
    for part in parts:
        if isinstance(part, dict) and (medium := MEDIUM.search(str(part.get("type")))):
            raise ValueError(f"a {message['role']} message with {medium[0]} content: drafts are trained on text alone")
    if not all(isinstance(p, dict) and p.get("type") == "text" and isinstance(p.get("text"), str) for p in parts):
        raise ValueError(f"a {message['role']} message whose content is no text")
