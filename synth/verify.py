"""Prove a run token by token: each reply's tokens decode to its message, each context is the server's rendering.

Reads:  RUN/conversations.jsonl, the target's tokenizer, renderings of a server of the target (POST /tokenize).
Writes: RUN/verified.json with the counts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream
from tqdm import tqdm

from common.errors import IncompleteError, UserError
from common.files import write_json
from contracts.conversation import Conversation, Sample, read_conversations
from recipe.recipe import Recipe
from serve.client import AnswerError, Connection
from synth.generate import serve_target
from synth.reply import add_calls, make_reply
from synth.tool_calls import find_parser, same_calls
from target.target import Target
from target.thinking import template_arguments, thinking_tags_of

MAX_TOLD = 5
RENDER_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Turn:
    """One reply of a conversation: the messages before it, its message, and its tokens in a sample.

    `found` is the sample and the reply's span; None if the record has no tokens of the reply.
    """

    number: int
    history: list[dict[str, Any]]
    message: dict[str, Any]
    found: tuple[Sample, int, int] | None
    context_equal: bool

    @property
    def name(self) -> str:
        return f"turn {self.number}"


def verify(recipe: Recipe, folder: Path) -> dict[str, Any]:
    """Check every turn; return the counts. Raises IncompleteError with the first turns that fail."""
    target = Target.here(recipe.target)
    counts = {"conversations": 0, "turns": 0, "text_equal": 0, "context_equal": 0}
    wrong: list[str] = []
    with serve_target(recipe, target, folder) as (urls, _), Connection() as connection:
        renderer = ServerRenderer(connection, urls[0], recipe, target)
        checker = Checker(recipe, target, renderer)
        for conversation in tqdm(read_conversations(folder), desc="verify", unit="conv", disable=None):
            if conversation.messages is None:
                raise UserError(
                    folder, found="ShareGPT output", expected="--output-format oai", fix="Verify a run in OpenAI form."
                )
            counts["conversations"] += 1
            for turn in checker.find_turns(conversation):
                counts["turns"] += 1
                text_equal = checker.is_text_equal(conversation, turn)
                counts["text_equal"] += text_equal
                counts["context_equal"] += turn.context_equal
                if not (text_equal and turn.context_equal):
                    defect = "text" if turn.context_equal else "context"
                    wrong.append(f"{conversation.id} {turn.name} ({defect})")
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


class Checker:
    """Compares the turns of records with the server's rendering and with their own tokens."""

    def __init__(self, recipe: Recipe, target: Target, renderer: ServerRenderer) -> None:
        self._target = target
        self._thinking_tags = thinking_tags_of(recipe.target, target)
        self._renderer = renderer
        self._tool_calls = find_parser(recipe, target)

    def find_turns(self, conversation: Conversation) -> Iterator[Turn]:
        """Yield the replies in order, each with its tokens.

        The next loss span belongs to a reply if its context is the server's rendering. A reply of only an
        unsupervised end token has no span: its tokens follow the rendering.
        """
        spans = [(sample, start, end) for sample in conversation.samples for start, end in sample.loss_spans]
        messages = conversation.messages or []
        places = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
        for number, place in enumerate(places):
            history, message = messages[:place], messages[place]
            rendered = self._renderer.render(conversation, history)
            if spans and spans[0][0].token_ids[: spans[0][1]] == rendered:
                yield Turn(number, history, message, spans.pop(0), context_equal=True)
            elif (found := self._find_end(conversation, rendered)) is not None:
                yield Turn(number, history, message, found, context_equal=True)
            else:
                has_span = len(spans) >= len(places) - number  # fewer spans than replies: some reply lacks its own
                yield Turn(number, history, message, spans.pop(0) if has_span else None, context_equal=False)
        for number, span in enumerate(spans, start=len(places)):
            yield Turn(number, messages, {}, span, context_equal=False)  # tokens without a message

    def _find_end(self, conversation: Conversation, rendered: list[int]) -> tuple[Sample, int, int] | None:
        """Return the empty span after `rendered` of a reply that is only an unsupervised end token."""
        start = len(rendered)
        for sample in conversation.samples:
            ids = sample.token_ids
            is_end = len(ids) > start and ids[start] in self._target.end_token_ids
            if is_end and ids[:start] == rendered and all(span[0] != start for span in sample.loss_spans):
                return sample, start, start
        return None

    def is_text_equal(self, conversation: Conversation, turn: Turn) -> bool:
        """Return whether a turn's tokens decode to its message, tool calls included.

        Raises UserError for calls in an unknown format.
        """
        if turn.found is None or not turn.message:
            return False
        sample, start, end = turn.found
        ids, tools = sample.token_ids[start:end], conversation.tools
        if ids and ids[-1] in self._target.end_token_ids:
            ids = ids[:-1]  # the end token is not in the text
        text = self._renderer.decode(sample.token_ids[:start], ids, skip_special_tokens=not tools)
        expected = make_reply(text, self._thinking_tags)
        calls = turn.message.get("tool_calls")
        if not calls or not tools:
            return expected == turn.message
        if self._tool_calls is None:
            raise UserError(
                f"{conversation.id} {turn.name}",
                found="tool calls in a format that is not known",
                expected="a parser, to compare them with their tokens",
                fix="Set synth.tool_call_parser, and install vLLM.",
            )
        expected = add_calls(expected, tools, self._tool_calls)
        return (
            same_calls(expected.get("tool_calls", []), calls)
            and (expected["content"] or "").strip() == (turn.message["content"] or "").strip()
            and expected.get("reasoning_content") == turn.message.get("reasoning_content")
        )


class ServerRenderer:
    """A server's rendering of messages, and the target's tokenizer."""

    def __init__(self, connection: Connection, url: str, recipe: Recipe, target: Target) -> None:
        self._connection = connection
        self._url = url
        self._section = recipe.target
        self._tokenizer = Tokenizer.from_file(str(target.path / "tokenizer.json"))

    def decode(self, context: list[int], reply: list[int], *, skip_special_tokens: bool) -> str:
        """Return the reply's text as vLLM decodes it: token by token after its context.

        An incomplete last character is left out; decoding all ids at once would show it as U+FFFD.
        """
        stream = DecodeStream(ids=context, skip_special_tokens=skip_special_tokens)
        text = ""
        for token_id in reply:
            try:
                text += stream.step(self._tokenizer, token_id) or ""
            except Exception as error:
                if not str(error).startswith("Invalid prefix"):
                    raise
                # Bytes that are not UTF-8: vLLM starts a new stream too.
                stream = DecodeStream(skip_special_tokens=skip_special_tokens)
                text += stream.step(self._tokenizer, token_id) or ""
        return text

    def render(self, conversation: Conversation, messages: list[dict[str, Any]]) -> list[int]:
        """Return the prompt's ids. Raises UserError if the server does not return them."""
        body: dict[str, Any] = {"messages": messages, "add_generation_prompt": True}
        if conversation.tools:
            body["tools"] = conversation.tools
        if values := template_arguments(self._section, conversation.thinking_mode):
            body["chat_template_kwargs"] = values
        try:
            return self._connection.ask(lambda client: client.tokenize(self._url, body, RENDER_TIMEOUT_S))
        except AnswerError as error:
            raise UserError(
                self._url, found=str(error), expected="the ids of a rendered prompt", fix="Verify against vLLM."
            ) from None
