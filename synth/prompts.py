"""Rows to prompts: what the target is asked, turn by turn, under an id and a thinking mode that never change.

A row holds `messages` (OpenAI), `conversations` (ShareGPT's `from`/`value`, or role/content), `turns` or `prompt`;
`tools`, `system`, `id` and `category` are optional. Lists may be JSON in a string, as Parquet files have them. Every
row becomes, for each sample asked for, a Prompt or a Reject that says why not.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from contracts.conversation import make_conversation_id
from contracts.seen import Seen
from synth.sources import Row

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


@dataclass(frozen=True)
class Prompt:
    """One conversation to be written.

    `messages` has the source's messages, with `{"role": "assistant"}` where the target is to reply. Such a place names
    in `tool_calls` the tools whose results follow it, if any.
    """

    index: int
    sample: int
    id: str
    source_id: str
    category: str
    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None
    thinking_mode: str
    temperature: float


@dataclass(frozen=True)
class Reject:
    """A sample of a row that cannot be used, and why."""

    index: int
    sample: int
    where: str
    reason: str


def read_prompts(
    rows: Iterator[Row], thinking_modes: Sequence[str], temperatures: Sequence[float], num_samples: int, seen: Seen
) -> Iterator[Prompt | Reject]:
    """Yield every sample of every row: `num_samples` for each temperature.

    Row i takes mode i modulo their number. The row's own id is kept where no earlier row has it; a prompt that an
    earlier row has in the same mode is a Reject, as its conversations would have the same ids.
    """
    for row in rows:
        mode = thinking_modes[row.index % len(thinking_modes)] if thinking_modes else ""
        try:
            if row.error:
                raise ValueError(row.error)
            messages, tools = read_messages(row.value)
            id_ = make_conversation_id(messages, tools, mode)
            first = seen.first_row("content", id_, row.index)
            if first != row.index:
                raise ValueError(f"the same prompt and mode as row {first}; ask for more with synth.num_samples")
        except ValueError as error:
            for sample in range(num_samples * len(temperatures)):
                yield Reject(row.index, sample, row.where, str(error))
            continue
        own_id = next((_to_text(row.value[key]) for key in ID_KEYS if row.value.get(key) not in (None, "")), "")
        unique = own_id and seen.first_row("source", own_id, row.index) == row.index
        for sample in range(num_samples * len(temperatures)):
            yield Prompt(
                index=row.index,
                sample=sample,
                id=make_conversation_id(messages, tools, mode, sample) if sample else id_,
                source_id=own_id if unique else id_,
                category=_to_text(row.value.get("category", "")),
                messages=messages,
                tools=tools,
                thinking_mode=mode,
                temperature=temperatures[sample // num_samples],
            )


def read_messages(row: Any) -> tuple[list[dict[str, Any]], list[dict[str, Any]] | None]:
    """The row's messages, the target's places marked, and its tools. Raises ValueError with the reason."""
    if not isinstance(row, dict):
        raise ValueError("not a JSON object")
    tools = _parse(row.get("tools")) or None
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise ValueError("`tools` is no list of objects")
    messages, prompt, turns = (_parse(row.get(key)) for key in ("messages", "prompt", "turns"))
    messages = messages if isinstance(messages, list) else _parse(row.get("conversations"))
    if isinstance(messages, list):
        messages = [_from_sharegpt(message) for message in messages]
    elif isinstance(turns, list):
        messages = [{"role": "user", "content": turn} for turn in turns]
    elif isinstance(prompt, list):  # preference sets hold messages under this name
        messages = prompt
    elif isinstance(row.get("prompt"), str):
        messages = [{"role": "user", "content": row["prompt"]}]
    else:
        raise ValueError(f"none of `messages`, `conversations`, `turns`, `prompt`; its keys are {', '.join(row)}"[:300])
    for message in messages:
        _check(message)
    if isinstance(row.get("system"), str) and row["system"] and messages and messages[0]["role"] == "user":
        messages = [{"role": "system", "content": row["system"]}, *messages]
    return _mark_places(messages), tools


def _to_text(value: Any) -> str:
    """As a string that UTF-8 can hold: JSON may carry lone surrogates."""
    return str(value).encode(errors="replace").decode()


def _parse(value: Any) -> Any:
    """JSON inside a string, if it is a list; anything else as it is."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            return json.loads(value)
        except ValueError:
            return value
    return value


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


def _check(message: Any) -> None:
    if not isinstance(message, dict) or message.get("role") not in ROLES:
        role = message.get("role") if isinstance(message, dict) else type(message).__name__
        raise ValueError(f"a message of role {role!r}, which is none of {', '.join(ROLES)}")
    if message["role"] == "assistant":
        return
    content = message.get("content")
    parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
    if not all(isinstance(p, dict) and p.get("type") == "text" and isinstance(p.get("text"), str) for p in parts):
        raise ValueError(f"a {message['role']} message whose content is no text")


def _mark_places(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Messages with a place for each of the target's replies.

    The places are the source's own assistant turns, and the end. A source without any is a list of user turns, each of
    which is answered. Assistant turns before the first user turn greet nobody and are dropped.
    """
    answered = any(message["role"] == "assistant" for message in messages)
    marked: list[dict[str, Any]] = []
    pending: list[dict[str, str]] = []  # tool calls of the last assistant turn that still lack a result
    for message in messages:
        role = message["role"]
        if role == "assistant":
            if not any(m["role"] == "user" for m in marked):
                continue
            if marked[-1]["role"] != "assistant":  # two in a row are one reply
                marked.append({"role": "assistant"})
            pending = _read_calls(message)
            continue
        kept = {key: message[key] for key in ("role", "content", "name") if message.get(key) is not None}
        if role == "tool":
            place = next((m for m in reversed(marked) if m["role"] == "assistant"), None)
            kept["name"] = _name_result(message, pending)
            if place is None or marked[-1]["role"] not in ("assistant", "tool"):
                raise ValueError("a tool result without a call before it")
            place.setdefault("tool_calls", []).append(kept["name"])
        elif role == "user" and not answered and marked and marked[-1]["role"] == "user":
            marked.append({"role": "assistant"})
        marked.append(kept)
    if marked and marked[-1]["role"] in ("user", "tool"):
        marked.append({"role": "assistant"})
    while marked and marked[-1]["role"] != "assistant":
        marked.pop()
    if not any(message["role"] == "user" for message in marked):
        raise ValueError("no user message that the target could answer")
    return marked


def _read_calls(message: Mapping[str, Any]) -> list[dict[str, str]]:
    calls = _parse(message.get("tool_calls")) or []
    try:
        return [{"id": str(call.get("id", "")), "name": str(call["function"]["name"])} for call in calls]
    except (AttributeError, KeyError, TypeError):
        raise ValueError("an assistant message whose tool_calls name no function") from None


def _name_result(message: Mapping[str, Any], pending: list[dict[str, str]]) -> str:
    """The tool that a result is of: by its call's id, its own name, or the order of the calls; taken from `pending`."""
    id_, name = str(message.get("tool_call_id", "")), str(message.get("name", ""))
    for call in pending:
        if (id_ and call["id"] == id_) or (not id_ and name in ("", call["name"])):
            pending.remove(call)
            return call["name"]
    return name  # "" where the source names its call nowhere: then no call of the target's is the same
