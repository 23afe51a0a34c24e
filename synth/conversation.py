"""Write one conversation with a served target: every user turn answered in order, token ids as the server has them."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from typing import Any, cast

import openai

from contracts.conversation import Conversation, Sample
from contracts.errors import UserError
from contracts.files import hash_bytes
from contracts.recipe import Recipe
from contracts.target import Target
from synth.prompts import Prompt


def api_key() -> str:
    """The endpoint's key, from OPENAI_API_KEY; servers of our own ask for none. It goes into no log and no record."""
    return os.environ.get("OPENAI_API_KEY", "EMPTY")


@dataclass(frozen=True)
class Writer:
    """What is the same for all conversations of a run."""

    client: openai.AsyncOpenAI
    model: str
    recipe: Recipe
    target: dict[str, str]
    template: str

    @classmethod
    def make(cls, base_url: str, model: str, recipe: Recipe, target: Target) -> Writer:
        client = openai.AsyncOpenAI(
            base_url=base_url,
            api_key=api_key(),
            timeout=recipe.synth.request_timeout_s,
            max_retries=recipe.synth.max_attempts - 1,
        )
        identity = {"path": str(target.path), "fingerprint": target.fingerprint}
        return cls(client, model, recipe, identity, target.template_checksum)

    def sampling(self, prompt: Prompt) -> dict[str, Any]:
        """Sampling parameters of one conversation; its seed follows from the recipe's seed and its id."""
        synth = self.recipe.synth
        values = {"temperature": synth.temperature, "top_p": synth.top_p, "top_k": synth.top_k}
        sampling: dict[str, Any] = {key: value for key, value in values.items() if value is not None}
        sampling["max_tokens"] = synth.max_tokens
        if synth.temperature > 0:
            sampling["seed"] = int(hash_bytes(f"{synth.seed}/{prompt.id}".encode())[:8], 16) >> 1
        return sampling


@dataclass
class Draft:
    """A conversation while it is written."""

    messages: list[dict[str, Any]] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    finish_reason: str = "stop"
    prompt_tokens: int = 0
    completion_tokens: int = 0


async def write_conversation(writer: Writer, prompt: Prompt) -> Conversation:
    """Answer every user turn of `prompt`, each with the target's own earlier replies as its history.

    A reply that is cut by max_tokens ends the conversation. Raises openai.APIError when the server refuses, and
    UserError when it does not say its token ids or parses the thought away.
    """
    draft = Draft()
    sampling = writer.sampling(prompt)
    for place, message in enumerate(prompt.messages):
        draft.messages.append(message)
        following = prompt.messages[place + 1]["role"] if place + 1 < len(prompt.messages) else "user"
        if message["role"] != "user" or following != "user":
            continue
        answer = await _complete(writer, draft.messages, prompt, sampling)
        choice = answer["choices"][0]
        prompt_ids, reply_ids = answer["prompt_token_ids"], choice["token_ids"]
        add_turn(draft.samples, prompt_ids, reply_ids)
        draft.messages.append(make_reply(choice["message"]["content"] or "", writer.recipe.target.thinking_tags))
        draft.prompt_tokens += len(prompt_ids)
        draft.completion_tokens += len(reply_ids)
        draft.finish_reason = choice["finish_reason"]
        if draft.finish_reason != "stop":
            break
    return Conversation(
        id=prompt.id,
        source_id=prompt.source_id,
        index=prompt.index,
        category=prompt.category,
        messages=draft.messages,
        tools=prompt.tools,
        thinking_mode=prompt.thinking_mode,
        samples=draft.samples,
        finish_reason="stop" if draft.finish_reason == "stop" else "length",
        sampling=sampling,
        target=writer.target,
        template=writer.template,
        usage={"prompt_tokens": draft.prompt_tokens, "completion_tokens": draft.completion_tokens},
    )


async def _complete(
    writer: Writer, messages: list[dict[str, Any]], prompt: Prompt, sampling: dict[str, Any]
) -> dict[str, Any]:
    body: dict[str, Any] = {"return_token_ids": True}
    if "top_k" in sampling:
        body["top_k"] = sampling["top_k"]
    if prompt.thinking_mode:
        body["chat_template_kwargs"] = {writer.recipe.target.thinking_mode_name: prompt.thinking_mode}
    if prompt.tools:
        body["tools"] = prompt.tools
    response = await writer.client.chat.completions.with_raw_response.create(
        model=writer.model,
        messages=cast(Any, messages),  # plain dictionaries, as the recipe's prompts have them
        extra_body=body,
        **{key: value for key, value in sampling.items() if key != "top_k"},
    )
    answer: dict[str, Any] = json.loads(response.content)
    choice = answer["choices"][0]
    message = choice["message"]
    if message.get("reasoning") or message.get("reasoning_content"):
        raise UserError(
            "the server's answer",
            found="a thought apart from the text",
            expected="both in the generated tokens",
            fix="Serve without --reasoning-parser.",
        )
    if not answer.get("prompt_token_ids") or not choice.get("token_ids"):
        raise UserError(
            "the server's answer",
            found="no token ids",
            expected="prompt_token_ids and choices[0].token_ids",
            fix="Serve the target with vLLM >= 0.10.2, which answers return_token_ids.",
        )
    return answer


def add_turn(samples: list[Sample], prompt_ids: list[int], reply_ids: list[int]) -> None:
    """Add one generated turn to a conversation's samples.

    Where the prompt starts with the last sample's tokens, the template only appended, and the sample grows by one
    span. Otherwise the template rewrote its history, and the turn is a sample of its own.
    """
    span = (len(prompt_ids), len(prompt_ids) + len(reply_ids))
    if samples and prompt_ids[: len(samples[-1].token_ids)] == samples[-1].token_ids:
        samples[-1] = Sample(token_ids=prompt_ids + reply_ids, loss_spans=[*samples[-1].loss_spans, span])
    else:
        samples.append(Sample(token_ids=prompt_ids + reply_ids, loss_spans=[span]))


def make_reply(text: str, thinking_tags: tuple[str, str]) -> dict[str, Any]:
    """The assistant message of a reply's text, split at the end of its thought, nothing stripped.

    A thought opened by the prompt (mode enabled) has no opening tag in the reply; one that was cut has no closing tag
    and stays in the content, which ends the conversation anyway.
    """
    opening, closing = thinking_tags
    thought, separator, answer = text.partition(closing)
    if not separator:
        return {"role": "assistant", "content": text}
    thought = thought.removeprefix(opening)
    return {"role": "assistant", "content": answer, **({"reasoning_content": thought} if thought else {})}
