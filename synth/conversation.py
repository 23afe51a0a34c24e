"""Generate one conversation with a served target: every turn in order, with the server's token ids.

The target's own replies, reasoning included, are the history of its later turns, as in serving.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from common.errors import UserError
from common.loops import find_loop
from contracts.conversation import Conversation, Loop, Sample
from recipe.recipe import Recipe
from serve.endpoints import Endpoint, Endpoints, PromptTooLongError, RequestError
from synth.prompts import Prompt
from synth.rendered import Renderer
from synth.reply import ENDED, Reply, add_calls
from synth.sampling import SharedSampling
from synth.tokens import TokenCheck
from synth.tool_calls import ToolCallParser, describe_call
from target.target import Target
from target.thinking import template_arguments, thinking_tags_of

NEEDS_PARSER = "--enable-auto-tool-choice"
"""Part of vLLM's refusal of prompts with tools, from a server without a tool call parser."""


@dataclass(frozen=True)
class Writer:
    """The objects that all conversations of a run share."""

    endpoints: Endpoints
    recipe: Recipe
    target: Target
    sampling: SharedSampling
    renderer: Renderer
    tool_calls: ToolCallParser | None
    tokens: TokenCheck

    @cached_property
    def identity(self) -> dict[str, str]:
        return {"path": str(self.target.path), "fingerprint": self.target.fingerprint}

    @cached_property
    def template(self) -> str:
        return self.target.template_checksum

    @cached_property
    def thinking_tags(self) -> tuple[str, str] | None:
        return thinking_tags_of(self.recipe.target, self.target)

    @property
    def tool_choice(self) -> dict[str, str]:
        """The request's tool_choice, with which the prompt has the tools and the reply stays complete.

        It is "none" for the stage's own vLLM server. Other servers get no tool_choice: SGLang would drop the tools.
        """
        ours = self.recipe.serve.backend == "vllm" and not self.recipe.synth.endpoints
        return {"tool_choice": "none"} if ours else {}


def check_modes(recipe: Recipe) -> None:
    """Raise UserError if a thinking mode has no value for the template."""
    values = recipe.target.thinking_mode_values
    for mode in recipe.synth.modes_in_turn:
        if values and mode not in values:
            raise UserError(
                "synth.thinking_modes",
                found=mode,
                expected=f"one of {', '.join(values)}",
                fix="Name a known mode, or give this one a value in target.thinking_mode_values.",
            )


@dataclass
class Progress:
    """A conversation in progress."""

    messages: list[dict[str, Any]] = field(default_factory=list)
    turns: list[dict[str, str]] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    finish_reason: str = "stop"
    stopped: str = ""
    loop: Loop | None = None
    rendered: bool = False
    num_replies: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0


async def write_conversation(writer: Writer, prompt: Prompt) -> Conversation:
    """Generate the target's replies to `prompt`; return the record.

    The conversation ends early after a reply that was cut by max_tokens, after a tool call without results in the
    source, and when the history fills the context. Raises PromptTooLongError if the first prompt does not fit,
    RequestError if a request failed, UnusableTokensError for tokens that no draft may learn, and UserError if the
    server strips reasoning.
    """
    progress = Progress()
    sampling = writer.sampling.of(prompt)
    endpoint: Endpoint | None = None
    calls: list[dict[str, Any]] = []  # the target's last tool calls without a result yet
    for message in prompt.messages:
        if message["role"] != "assistant":
            _add_message(progress, message, calls)
            continue
        body = _make_request(writer, prompt, progress.messages, sampling)
        try:
            # Use the same server for all turns, since it has the history in its KV cache.
            answer, endpoint = await _ask(writer, body, endpoint)
        except PromptTooLongError as error:
            if not progress.num_replies:
                raise
            progress.stopped = f"turn {progress.num_replies}: {error}"
            break
        choice = answer["choices"][0]
        prompt_ids: Any = answer.get("prompt_token_ids")
        reply_ids: Any = choice.get("token_ids")
        if not prompt_ids or reply_ids is None:
            _refuse_parsed_calls(choice)
            progress.rendered = True
            prompt_ids, reply_ids = await asyncio.to_thread(writer.renderer.render, body, choice)
        writer.tokens.refuse(prompt_ids, reply_ids)
        reply = await _read_reply(writer, prompt, choice)
        _add_reply(writer, progress, choice, reply, (prompt_ids, reply_ids))
        if progress.finish_reason not in ENDED:
            break
        calls = list(reply.message.get("tool_calls", []))
        progress.stopped = _compare_calls(calls, message.get("tool_calls", []), is_parsed=reply.is_parsed)
        if progress.stopped:
            break
    return _to_record(writer, prompt, progress, sampling)


def _to_record(writer: Writer, prompt: Prompt, progress: Progress, sampling: dict[str, Any]) -> Conversation:
    is_sharegpt = writer.recipe.synth.output_format == "sharegpt"
    return Conversation(
        id=prompt.id,
        source_id=prompt.source_id,
        index=prompt.index,
        sample=prompt.sample,
        category=prompt.category,
        messages=None if is_sharegpt else progress.messages,
        conversations=progress.turns if is_sharegpt else None,
        tools=prompt.tools,
        thinking_mode=prompt.thinking_mode,
        samples=progress.samples,
        finish_reason="stop" if progress.finish_reason in ENDED else "length",
        stopped=progress.stopped,
        loop=progress.loop,
        rendered=progress.rendered,
        sampling=sampling,
        target=writer.identity,
        template=writer.template,
        usage={"prompt_tokens": progress.prompt_tokens, "completion_tokens": progress.completion_tokens},
    )


async def _ask(writer: Writer, body: dict[str, Any], prefer: Endpoint | None) -> tuple[dict[str, Any], Endpoint]:
    """Return the answer and its server; retry with tool_choice "none" if vLLM has no tool call parser."""
    try:
        return await writer.endpoints.chat(body, prefer=prefer)
    except RequestError as error:
        if NEEDS_PARSER not in str(error):
            raise
    return await writer.endpoints.chat({**body, "tool_choice": "none"}, prefer=prefer)


def _add_message(progress: Progress, message: Mapping[str, Any], calls: list[dict[str, Any]]) -> None:
    added = dict(message)
    if message["role"] == "tool":
        call = next(call for call in calls if call["function"]["name"] == message["name"])
        calls.remove(call)
        added["tool_call_id"] = call.get("id", "")
    progress.messages.append(added)
    content = message["content"]
    text = content if isinstance(content, str) else "".join(part["text"] for part in content)
    progress.turns.append({"from": {"user": "human"}.get(message["role"], message["role"]), "value": text})


def _make_request(
    writer: Writer, prompt: Prompt, messages: list[dict[str, Any]], sampling: Mapping[str, Any]
) -> dict[str, Any]:
    body: dict[str, Any] = {"messages": messages, **sampling, "return_token_ids": True}
    if values := template_arguments(writer.recipe.target, prompt.thinking_mode):
        body["chat_template_kwargs"] = values
    if prompt.tools:
        # Some targets mark calls with special tokens, which the text would lack otherwise.
        body |= {"tools": prompt.tools, "skip_special_tokens": False, **writer.tool_choice}
    return body


def _refuse_parsed_calls(choice: Mapping[str, Any]) -> None:
    """Raise UserError for a reply without token ids whose tool calls were stripped: its tokens are lost."""
    if choice["message"].get("tool_calls"):
        raise UserError(
            "the server's answer",
            found="tool calls, and no token ids: a tool call parser took their tokens out of the text",
            expected="the whole text, or its token ids",
            fix="Serve without a tool call parser, or with vLLM, which returns token ids.",
        )


async def _read_reply(writer: Writer, prompt: Prompt, choice: Mapping[str, Any]) -> Reply:
    """Return a reply with the server's tool calls, or parsed ones. Raises: see `Reply.of_server`."""
    parser = writer.tool_calls
    reply = Reply.of_server(choice, writer.thinking_tags, is_parsed=not prompt.tools or parser is not None)
    if not prompt.tools or reply.message.get("tool_calls") or parser is None or choice["finish_reason"] not in ENDED:
        return reply
    return Reply(await asyncio.to_thread(add_calls, reply.message, prompt.tools, parser), reply.text)


def _add_reply(
    writer: Writer, progress: Progress, choice: Mapping[str, Any], reply: Reply, ids: tuple[list[int], list[int]]
) -> None:
    """Add one reply: its message, and the token ids of prompt and reply."""
    progress.finish_reason = choice["finish_reason"]
    prompt_ids, reply_ids = ids
    synth, has_ended = writer.recipe.synth, progress.finish_reason in ENDED
    add_turn(progress.samples, prompt_ids, reply_ids, unsupervised=int(has_ended and not synth.supervise_end))
    if progress.loop is None and (found := find_loop(reply_ids, synth.min_loop_tokens)):
        progress.loop = Loop(turn=progress.num_replies, period=found[0], num_tokens=found[1])
    progress.messages.append(reply.message)
    progress.turns.append({"from": "gpt", "value": reply.text})
    calls = reply.message.get("tool_calls", [])
    progress.turns.extend({"from": "function_call", "value": describe_call(call)} for call in calls)
    progress.num_replies += 1
    progress.prompt_tokens += len(prompt_ids)
    progress.completion_tokens += len(reply_ids)


def _compare_calls(calls: list[dict[str, Any]], with_results: list[str], *, is_parsed: bool) -> str:
    """Return why the conversation cannot continue after a reply, or "".

    The source must have results of exactly these tools; if calls are not parsed, it must have none.
    """
    called = [str(call["function"]["name"]) for call in calls]
    if sorted(called) == sorted(with_results):
        return ""
    made = f"the target called {', '.join(called) or 'no tool'}"
    if not is_parsed:
        made = "the format of the target's tool calls is not known (synth.tool_call_parser)"
    results = ", ".join(name or "a tool that it does not name" for name in with_results) or "none"
    return f"{made}, the source has results of {results}"


def add_turn(samples: list[Sample], prompt_ids: list[int], reply_ids: list[int], *, unsupervised: int = 0) -> None:
    """Add a generated turn to the samples; its last `unsupervised` tokens are not in the loss.

    If the prompt starts with the last sample's tokens, the template only appended, and the sample grows by one span.
    Otherwise the template rewrote the history, and the turn becomes a new sample.
    """
    start, end = len(prompt_ids), len(prompt_ids) + len(reply_ids) - unsupervised
    spans = [(start, end)] if end > start else []
    if samples and prompt_ids[: len(samples[-1].token_ids)] == samples[-1].token_ids:
        samples[-1] = Sample(token_ids=prompt_ids + reply_ids, loss_spans=[*samples[-1].loss_spans, *spans])
    else:
        samples.append(Sample(token_ids=prompt_ids + reply_ids, loss_spans=spans))
