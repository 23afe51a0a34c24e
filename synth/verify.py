"""Prove a run token by token: every reply's tokens are its text, every context is the server's own rendering.

Reads:  RUN/conversations.jsonl, the target's tokenizer, the rendering of a server of the target (POST /tokenize).
Writes: RUN/verified.json with the counts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream
from tqdm import tqdm

from contracts.conversation import Conversation, read_conversations
from contracts.errors import IncompleteError, UserError
from contracts.files import write_json
from contracts.recipe import Recipe
from contracts.target import Target
from synth.conversation import make_reply, template_values
from synth.endpoints import api_key
from synth.generate import serve_target

MAX_TOLD = 5


@dataclass(frozen=True)
class Turn:
    """One reply of a conversation: its context and its own tokens, and the messages up to it."""

    number: int
    context: list[int]
    reply: list[int]
    history: list[dict[str, Any]]
    message: dict[str, Any]


def verify(recipe: Recipe, folder: Path) -> dict[str, Any]:
    """Check every turn; the counts. Raises IncompleteError that names the first turns that do not hold."""
    target = Target.read(recipe.target.path)
    counts = {"conversations": 0, "turns": 0, "text_equal": 0, "context_equal": 0}
    wrong: list[str] = []
    with serve_target(recipe, target, folder) as (urls, _), httpx2.Client(timeout=60) as client:
        renderer = ServerRenderer(client, urls[0], recipe, target)
        for conversation in tqdm(read_conversations(folder), desc="verify", unit="conv", disable=None):
            if conversation.messages is None:
                raise UserError(
                    folder, found="ShareGPT output", expected="--output-format oai", fix="Verify a run in OpenAI form."
                )
            counts["conversations"] += 1
            for turn in read_turns(conversation):
                counts["turns"] += 1
                text = renderer.decode(turn.context, turn.reply)
                expected = {k: v for k, v in turn.message.items() if k != "tool_calls"}
                text_equal = "tool_calls" in turn.message or make_reply(text, recipe.target.thinking_tags) == expected
                context_equal = renderer.render(conversation, turn.history) == turn.context
                counts["text_equal"] += text_equal
                counts["context_equal"] += context_equal
                if not (text_equal and context_equal):
                    wrong.append(f"{conversation.id} turn {turn.number} ({'text' if context_equal else 'context'})")
    write_json(folder / "verified.json", counts)
    print(
        f"synth verify: {counts['conversations']} conversations, {counts['turns']} turns: "
        f"{counts['text_equal']} decode to their text, {counts['context_equal']} have the server's rendering as context"
    )
    if wrong:
        raise IncompleteError(
            f"{folder}: found {len(wrong)} of {counts['turns']} turns that do not hold ({', '.join(wrong[:MAX_TOLD])}"
            "), expected all. Look at them with `synth inspect`; was it another server, template or mode?"
        )
    return counts


def read_turns(conversation: Conversation) -> Iterator[Turn]:
    """The replies in order with their spans. A turn without a supervised token (of one stop token) has no span."""
    spans = [(sample, span) for sample in conversation.samples for span in sample.loss_spans]
    messages = conversation.messages or []
    replies = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
    if len(spans) != len(replies):
        raise IncompleteError(
            f"{conversation.id}: found {len(spans)} loss spans, expected {len(replies)} as it has replies. "
            "Look at it with `synth inspect`."
        )
    for number, (place, (sample, (start, end))) in enumerate(zip(replies, spans, strict=True)):
        yield Turn(number, sample.token_ids[:start], sample.token_ids[start:end], messages[:place], messages[place])


class ServerRenderer:
    """A server's rendering of messages in a mode, and the target's tokenizer."""

    def __init__(self, client: httpx2.Client, url: str, recipe: Recipe, target: Target) -> None:
        self._client = client
        self._url = f"{url.rstrip('/').removesuffix('/v1')}/tokenize"
        self._section = recipe.target
        self._tokenizer = Tokenizer.from_file(str(target.path / "tokenizer.json"))

    def decode(self, context: list[int], reply: list[int]) -> str:
        """The reply's text as vLLM tells it: token by token after its context, special tokens left out.

        A character whose last bytes never came is left out, too, which decoding all ids at once would show as U+FFFD.
        """
        stream = DecodeStream(ids=context, skip_special_tokens=True)
        text = ""
        for token_id in reply:
            try:
                text += stream.step(self._tokenizer, token_id) or ""
            except Exception as error:
                if not str(error).startswith("Invalid prefix"):
                    raise
                stream = DecodeStream(skip_special_tokens=True)  # bytes that are no UTF-8: vLLM begins afresh, too
                text += stream.step(self._tokenizer, token_id) or ""
        return text

    def render(self, conversation: Conversation, messages: list[dict[str, Any]]) -> list[int]:
        """The prompt's ids. Raises UserError when the server does not tell them."""
        body: dict[str, Any] = {"messages": messages, "add_generation_prompt": True}
        if conversation.tools:
            body["tools"] = conversation.tools
        if values := template_values(self._section, conversation.thinking_mode):
            body["chat_template_kwargs"] = values
        response = self._client.post(self._url, json=body, headers={"Authorization": f"Bearer {api_key()}"})
        if response.status_code != 200:
            raise UserError(
                self._url,
                found=f"HTTP {response.status_code}: {response.text[:200]}",
                expected="the ids of a rendered prompt",
                fix="Verify against vLLM.",
            )
        return list(response.json()["tokens"])
