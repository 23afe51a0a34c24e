"""Write one conversation with a served target: every turn in order, token ids as the server has them.

The target's own replies, thoughts included, are the history of its later turns: turn k sees what serving would show.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from contracts.conversation import Conversation, Loop, Sample
from contracts.errors import UserError
from contracts.files import hash_bytes, read_json
from contracts.loops import find_loop
from contracts.recipe import Recipe, TargetSection
from contracts.target import Target, find_folder
from synth.endpoints import Endpoint, Endpoints, PromptTooLongError
from synth.prompts import Prompt
from synth.rendered import WHOLE, Renderer


@dataclass(frozen=True)
class Writer:
    """What is the same for all conversations of a run."""

    endpoints: Endpoints
    recipe: Recipe
    target: Target
    shared_sampling: Mapping[str, Any]
    """Sampling values that hold for every prompt."""
    renderer: Renderer

    @cached_property
    def identity(self) -> dict[str, str]:
        return {"path": str(self.target.path), "fingerprint": self.target.fingerprint}

    @cached_property
    def template(self) -> str:
        return self.target.template_checksum

    def sampling(self, prompt: Prompt) -> dict[str, Any]:
        """Sampling parameters of one conversation; its seed follows from the recipe's seed and its id."""
        if prompt.temperature == 0:
            return {"temperature": 0.0, "max_tokens": self.shared_sampling["max_tokens"]}
        seed = int(hash_bytes(f"{self.recipe.synth.seed}/{prompt.id}".encode())[:8], 16) >> 1
        return {"temperature": prompt.temperature, **self.shared_sampling, "seed": seed}


def template_values(section: TargetSection, thinking_mode: str) -> dict[str, Any]:
    """What the chat template is told of the mode (`chat_template_kwargs`); nothing for no mode."""
    value: Any = thinking_mode or None
    if thinking_mode and section.thinking_mode_values:
        value = section.thinking_mode_values[thinking_mode]
    return {} if value is None else {section.thinking_mode_name: value}


def resolve_sampling(recipe: Recipe) -> tuple[list[float], dict[str, Any]]:
    """Temperatures, and the sampling values that all conversations share: the recipe's, else generation_config's.

    Raises UserError when neither gives a temperature, or when the values contradict each other.
    """
    synth = recipe.synth
    path = find_folder(recipe.target.path) / "generation_config.json"
    of_target = read_json(path, "the target's generation_config.json") if path.exists() else {}
    temperature = synth.temperature
    if temperature is None:
        temperature = 0.0 if of_target.get("do_sample") is False else of_target.get("temperature")
    if temperature is None:
        raise UserError(
            "synth.temperature",
            found=f"none in the recipe, none in {path}",
            expected="a temperature, as the draft will be served with",
            fix="Set synth.temperature (0: greedy).",
        )
    temperatures = [float(t) for t in (temperature if isinstance(temperature, list) else [temperature])]
    if 0.0 in temperatures and synth.num_samples > 1:
        raise UserError(
            "synth.num_samples",
            found=f"{synth.num_samples} samples at temperature 0",
            expected="one: all would be the same",
            fix="Raise the temperature, or ask for one sample.",
        )
    if synth.max_tokens >= recipe.target.max_model_len:
        raise UserError(
            "synth.max_tokens",
            found=str(synth.max_tokens),
            expected=f"fewer than target.max_model_len ({recipe.target.max_model_len}), which holds prompt and reply",
            fix="Lower the one or raise the other.",
        )
    values = {"top_p": synth.top_p, "top_k": synth.top_k}
    shared = {key: of_target.get(key) if value is None else value for key, value in values.items()}
    return temperatures, {**{k: v for k, v in shared.items() if v is not None}, "max_tokens": synth.max_tokens}


def check_modes(recipe: Recipe) -> None:
    """Raise UserError when a thinking mode has no value for the template."""
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
class Draft:
    """A conversation while it is written."""

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
    """Let the target take every turn of `prompt`.

    A reply that is cut by max_tokens ends the conversation; so does a tool call that the source has no results for,
    and a history that fills the context. Raises PromptTooLongError when already the first prompt does not fit,
    RequestError when a request failed for good, and UserError when the server parses thoughts away.
    """
    draft = Draft()
    sampling = writer.sampling(prompt)
    endpoint: Endpoint | None = None
    calls: list[dict[str, Any]] = []  # the target's last tool calls, taken one by one by the source's results
    for message in prompt.messages:
        if message["role"] != "assistant":
            _add_message(draft, message, calls)
            continue
        body = _make_request(writer, prompt, draft.messages, sampling)
        # The same server for all turns: it holds the history's KV cache.
        try:
            answer, endpoint = await writer.endpoints.complete(body, prefer=endpoint)
        except PromptTooLongError as error:
            if not draft.num_replies:
                raise
            draft.stopped = f"turn {draft.num_replies}: {error}"
            break
        choice = answer["choices"][0]
        prompt_ids: Any = answer.get("prompt_token_ids")
        reply_ids: Any = choice.get("token_ids")
        if not prompt_ids or reply_ids is None:
            draft.rendered = True
            prompt_ids, reply_ids = await asyncio.to_thread(writer.renderer.render, body, choice)
        _add_reply(writer, draft, choice, prompt_ids, reply_ids)
        if draft.finish_reason not in WHOLE:
            break
        calls = list(choice["message"].get("tool_calls") or [])
        draft.stopped = _compare_calls(calls, message.get("tool_calls", []))
        if draft.stopped:
            break
    sharegpt = writer.recipe.synth.output_format == "sharegpt"
    return Conversation(
        id=prompt.id,
        source_id=prompt.source_id,
        index=prompt.index,
        sample=prompt.sample,
        category=prompt.category,
        messages=None if sharegpt else draft.messages,
        conversations=draft.turns if sharegpt else None,
        tools=prompt.tools,
        thinking_mode=prompt.thinking_mode,
        samples=draft.samples,
        finish_reason="stop" if draft.finish_reason in WHOLE else "length",
        stopped=draft.stopped,
        loop=draft.loop,
        rendered=draft.rendered,
        sampling=sampling,
        target=writer.identity,
        template=writer.template,
        usage={"prompt_tokens": draft.prompt_tokens, "completion_tokens": draft.completion_tokens},
    )


def _add_message(draft: Draft, message: Mapping[str, Any], calls: list[dict[str, Any]]) -> None:
    added = dict(message)
    if message["role"] == "tool":
        call = next(call for call in calls if call["function"]["name"] == message["name"])
        calls.remove(call)
        added["tool_call_id"] = call.get("id", "")
    draft.messages.append(added)
    content = message["content"]
    text = content if isinstance(content, str) else "".join(part["text"] for part in content)
    draft.turns.append({"from": {"user": "human"}.get(message["role"], message["role"]), "value": text})


def _make_request(
    writer: Writer, prompt: Prompt, messages: list[dict[str, Any]], sampling: Mapping[str, Any]
) -> dict[str, Any]:
    body: dict[str, Any] = {"messages": messages, **sampling, "return_token_ids": True}
    if values := template_values(writer.recipe.target, prompt.thinking_mode):
        body["chat_template_kwargs"] = values
    if prompt.tools:
        body["tools"] = prompt.tools
    return body


def _add_reply(
    writer: Writer, draft: Draft, choice: Mapping[str, Any], prompt_ids: list[int], reply_ids: list[int]
) -> None:
    """Add one reply's message and tokens."""
    message = choice["message"]
    if message.get("reasoning") or message.get("reasoning_content"):
        raise UserError(
            "the server's answer",
            found="a thought apart from the text: it runs a reasoning parser",
            expected="both in the generated tokens",
            fix="Serve without --reasoning-parser.",
        )
    draft.finish_reason = choice["finish_reason"]
    text = message.get("content") or ""
    ended = draft.finish_reason in WHOLE
    synth = writer.recipe.synth
    add_turn(draft.samples, prompt_ids, reply_ids, unsupervised=int(ended and not synth.supervise_end))
    if draft.loop is None and (found := find_loop(reply_ids, synth.loop_tokens)):
        draft.loop = Loop(turn=draft.num_replies, period=found[0], num_tokens=found[1])
    reply = make_reply(text, writer.recipe.target.thinking_tags)
    if message.get("tool_calls"):
        reply["tool_calls"] = message["tool_calls"]
    draft.messages.append(reply)
    draft.turns.append({"from": "gpt", "value": text})
    draft.turns.extend({"from": "function_call", "value": _describe_call(c)} for c in message.get("tool_calls") or [])
    draft.num_replies += 1
    draft.prompt_tokens += len(prompt_ids)
    draft.completion_tokens += len(reply_ids)


def _describe_call(call: Mapping[str, Any]) -> str:
    return f'{{"name": "{call["function"]["name"]}", "arguments": {call["function"].get("arguments") or "{}"}}}'


def _compare_calls(calls: list[dict[str, Any]], with_results: list[str]) -> str:
    """Why the conversation cannot go on after a reply, or "": the source must hold results of these very tools."""
    called = [str(call["function"]["name"]) for call in calls]
    if sorted(called) == sorted(with_results):
        return ""
    return f"the target called {', '.join(called) or 'no tool'}, the source has results of " + (
        ", ".join(name or "a tool that it does not name" for name in with_results) or "none"
    )


def add_turn(samples: list[Sample], prompt_ids: list[int], reply_ids: list[int], *, unsupervised: int = 0) -> None:
    """Add one generated turn to a conversation's samples; its last `unsupervised` tokens stay out of the loss.

    Where the prompt starts with the last sample's tokens, the template only appended, and the sample grows by one
    span. Otherwise the template rewrote its history, and the turn is a sample of its own.
    """
    start, end = len(prompt_ids), len(prompt_ids) + len(reply_ids) - unsupervised
    spans = [(start, end)] if end > start else []
    if samples and prompt_ids[: len(samples[-1].token_ids)] == samples[-1].token_ids:
        samples[-1] = Sample(token_ids=prompt_ids + reply_ids, loss_spans=[*samples[-1].loss_spans, *spans])
    else:
        samples.append(Sample(token_ids=prompt_ids + reply_ids, loss_spans=spans))


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
