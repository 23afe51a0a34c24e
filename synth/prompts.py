"""Convert rows to prompts: the turns to send to the target, with an id and a thinking mode that never change.

Every row (`contracts/prompts.py`) becomes, for each of its samples, a Prompt or a Reject with the reason.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from contracts.conversation import make_conversation_id
from contracts.prompt_files import Row
from contracts.prompts import parse_list, read_prompt_row


@dataclass(frozen=True)
class Prompt:
    """One conversation to generate.

    `messages` has the source's messages, with `{"role": "assistant"}` in place of the target's replies. `tool_calls` of
    such a place has the names of the tools whose results follow it, if any.
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
    """A sample of an unusable row, with the reason."""

    index: int
    sample: int
    where: str
    reason: str


class FirstRows(Protocol):
    """Knows the first row of the input that has a key."""

    def first_row(self, kind: str, key: str, row: int) -> int:
        """Return the first row with `key`, which is `row` itself if no earlier row has it."""
        ...


def read_prompts(
    rows: Iterator[Row], thinking_modes: Sequence[str], temperatures: Sequence[float], num_samples: int, seen: FirstRows
) -> Iterator[Prompt | Reject]:
    """Yield every sample of every row, `num_samples` per temperature.

    Row i takes mode i modulo the number of modes. The row's own id is its source id unless an earlier row has the same.
    A prompt that an earlier row has in the same mode is a Reject, since its conversations would have the same ids.
    """
    for row in rows:
        mode = thinking_modes[row.index % len(thinking_modes)] if thinking_modes else ""
        try:
            if row.error:
                raise ValueError(row.error)
            source = read_prompt_row(row.value)
            messages = mark_places(source.messages)
            id_ = make_conversation_id(messages, source.tools, mode)
            first = seen.first_row("content", id_, row.index)
            if first != row.index:
                raise ValueError(f"the same prompt and mode as row {first}; ask for more with synth.num_samples")
        except ValueError as error:
            for sample in range(num_samples * len(temperatures)):
                yield Reject(row.index, sample, row.where, str(error))
            continue
        is_unique = source.id and seen.first_row("source", source.id, row.index) == row.index
        for sample in range(num_samples * len(temperatures)):
            yield Prompt(
                index=row.index,
                sample=sample,
                id=make_conversation_id(messages, source.tools, mode, sample) if sample else id_,
                source_id=source.id if is_unique else id_,
                category=source.category,
                messages=messages,
                tools=source.tools,
                thinking_mode=mode,
                temperature=temperatures[sample // num_samples],
            )


def mark_places(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return messages with a place for each of the target's replies.

    The places are the source's assistant turns, and the end. Without assistant turns, each user turn gets a reply.
    Assistant turns before the first user turn are dropped. Raises ValueError for messages that the target cannot
    answer.
    """
    has_replies = any(message["role"] == "assistant" for message in messages)
    marked: list[dict[str, Any]] = []
    pending: list[dict[str, str]] = []  # tool calls of the last assistant turn without a result yet
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
        elif role == "user" and not has_replies and marked and marked[-1]["role"] == "user":
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
    calls = parse_list(message.get("tool_calls")) or []
    try:
        return [{"id": str(call.get("id", "")), "name": str(call["function"]["name"])} for call in calls]
    except (AttributeError, KeyError, TypeError):
        raise ValueError("an assistant message whose tool_calls name no function") from None


def _name_result(message: Mapping[str, Any], pending: list[dict[str, str]]) -> str:
    """Return the name of the tool that gave a result, and remove its call from `pending`.

    The call is found by the result's call id, else by its name, else by order.
    """
    id_, name = str(message.get("tool_call_id", "")), str(message.get("name", ""))
    for call in pending:
        if (id_ and call["id"] == id_) or (not id_ and name in ("", call["name"])):
            pending.remove(call)
            return call["name"]
    return name  # "" if nothing names the tool; it matches no call of the target
