"""Send held-out prompts, as token ids, to a running server and count what comes back.

The prompt of a turn is the recorded tokens up to its reply, so that server and trainer see the very same context.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
import urllib.request
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import openai
from tqdm import tqdm

from contracts.conversation import Conversation
from contracts.errors import IncompleteError, UserError, raise_known


@dataclass(frozen=True)
class Turn:
    """One reply to be generated again: `prompt` token ids, and the `reply` that the target gave without a draft.

    `sampling` is what it was sampled with (temperature, top_p, top_k); none: greedily. `max_tokens` is where this reply
    was cut, if it was. `dataset` is the prompt set's name, where there are several.
    """

    id: str
    thinking_mode: str
    category: str
    prompt: list[int]
    reply: list[int]
    sampling: dict[str, Any] = field(default_factory=dict)
    max_tokens: int | None = None
    dataset: str = ""

    @property
    def temperature(self) -> float:
        return float(self.sampling.get("temperature") or 0.0)

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def group(self) -> tuple[str, str, float]:
        """Set, thinking mode and temperature: what is measured together."""
        return self.dataset, self.thinking_mode, self.temperature

    @property
    def conversation(self) -> str:
        """The id of the conversation that the reply is of."""
        return self.id.rsplit("-", 2)[0]


@dataclass(frozen=True)
class Answer:
    """A server's reply; `accepted` draft tokens of each verify step where the server drafts."""

    id: str
    token_ids: list[int]
    finish_reason: str
    accepted: list[int]
    latency_s: float


def read_turns(conversations: Iterable[Conversation], *, include_cut: bool = False, dataset: str = "") -> list[Turn]:
    """Every reply of the conversations that ended by themselves, by id; or of all, to be cut where they were."""
    turns = []
    for conversation in sorted(conversations, key=lambda conversation: conversation.id):
        cut = conversation.finish_reason == "length"
        if cut and not include_cut:
            continue
        for number, sample in enumerate(conversation.samples):
            for start, end in sample.loss_spans:
                last = number == len(conversation.samples) - 1 and (start, end) == sample.loss_spans[-1]
                turns.append(
                    Turn(
                        id=f"{conversation.id}-{number}-{start}",
                        thinking_mode=conversation.thinking_mode,
                        category=conversation.category,
                        prompt=sample.token_ids[:start],
                        reply=sample.token_ids[start:end],
                        sampling={
                            key: value
                            for key in ("temperature", "top_p", "top_k")
                            if (value := conversation.sampling.get(key)) is not None
                        },
                        max_tokens=end - start if cut and last else None,
                        dataset=dataset,
                    )
                )
    return turns


async def send_all(
    base_url: str,
    model: str,
    turns: Sequence[Turn],
    *,
    concurrency: int,
    max_tokens: int,
    title: str,
    max_model_len: int | None = None,
) -> tuple[list[Answer], float]:
    """`(answers in the order of the turns, seconds from the first request to the last answer)`, sampled as recorded.

    Replies end after `max_tokens`, or where the recorded one was cut, or where `max_model_len` is full.
    """
    client = openai.AsyncOpenAI(
        base_url=base_url, api_key=os.environ.get("OPENAI_API_KEY", "EMPTY"), timeout=600, max_retries=0
    )
    answers: dict[str, Answer] = {}
    waiting = iter(turns)
    started = time.perf_counter()
    with tqdm(total=len(turns), desc=title, unit="turn", mininterval=2) as bar:

        async def work() -> None:
            for turn in waiting:
                limit = turn.max_tokens or max_tokens
                if max_model_len is not None:
                    limit = min(limit, max_model_len - len(turn.prompt))
                answers[turn.id] = await _send(client, model, turn, limit)
                bar.update()

        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(concurrency):
                    group.create_task(work())
        except BaseExceptionGroup as errors:
            raise_known(errors)
    seconds = time.perf_counter() - started
    await client.close()
    return [answers[turn.id] for turn in turns], seconds


async def _send(client: openai.AsyncOpenAI, model: str, turn: Turn, max_tokens: int) -> Answer:
    started = time.perf_counter()
    try:
        response = await client.completions.with_raw_response.create(
            model=model,
            prompt=turn.prompt,
            max_tokens=max_tokens,
            extra_body={"temperature": 0.0, **turn.sampling, "return_token_ids": True},
        )
    except openai.APIError as error:
        raise IncompleteError(
            f"{client.base_url} ({turn.id}): found {type(error).__name__} {error}, expected an answer. "
            "Look at the server's log beside the answers, then run again: finished servers are kept."
        ) from None
    body: dict[str, Any] = json.loads(response.content)
    choice = body["choices"][0]
    drafting = (body.get("metrics") or {}).get("speculative_decoding") or {}
    return Answer(
        id=turn.id,
        token_ids=choice["token_ids"],
        finish_reason=choice["finish_reason"],
        accepted=drafting.get("per_step_accepted") or [],
        latency_s=round(time.perf_counter() - started, 4),
    )


def ask_model(url: str) -> str:
    """The name of the model that a server has, from its /v1 URL. Raises UserError when it does not answer."""
    client = openai.OpenAI(base_url=url, api_key=os.environ.get("OPENAI_API_KEY", "EMPTY"), timeout=30, max_retries=0)
    try:
        return client.models.list().data[0].id
    except (openai.APIError, IndexError) as error:
        raise UserError(
            url, found=str(error)[:200], expected="a running server's URL, ending in /v1", fix="Correct it."
        ) from None


def score(url: str, model: str, prompt: Sequence[int], token_ids: Sequence[int]) -> list[float]:
    """The target's log-probabilities of `token_ids` as the one that follows `prompt`.

    Raises UserError when the server does not tell them.
    """
    client = openai.OpenAI(base_url=url, api_key=os.environ.get("OPENAI_API_KEY", "EMPTY"), timeout=600, max_retries=0)
    try:
        response = client.completions.create(
            model=model,
            prompt=list(prompt),
            max_tokens=1,
            temperature=0.0,
            logprobs=1,
            extra_body={"logprob_token_ids": list(token_ids), "return_tokens_as_token_ids": True},
        )
    except openai.APIError as error:
        raise UserError(url, found=str(error), expected="log-probabilities", fix="Look at the server's log.") from None
    logprobs = response.choices[0].logprobs
    (found,) = (logprobs and logprobs.top_logprobs) or [{}]
    return [found[f"token_id:{token_id}"] for token_id in token_ids]


def read_counters(url: str) -> dict[str, float]:
    """vLLM's speculative counters, summed over engines: drafts, draft tokens, accepted tokens, and each position's.

    Raises UserError when /metrics does not answer.
    """
    try:
        with urllib.request.urlopen(f"{url}/metrics", timeout=10) as response:  # noqa: S310 (our own server)
            text = response.read().decode()
    except OSError as error:
        raise UserError(
            f"{url}/metrics", found=str(error), expected="vLLM's metrics", fix="Look at the server's log."
        ) from None
    return parse_counters(text)


def parse_counters(text: str) -> dict[str, float]:
    """The counters of a Prometheus text; positions as `accepted_at_<i>`, i from 0."""
    from prometheus_client.parser import text_string_to_metric_families

    found = dict.fromkeys(("num_drafts", "num_draft_tokens", "num_accepted_tokens"), 0.0)
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            name = sample.name.removesuffix("_total").removeprefix("vllm:spec_decode_")
            if name in found:
                found[name] += sample.value
            elif name == "num_accepted_tokens_per_pos":
                key = f"accepted_at_{sample.labels['position']}"
                found[key] = found.get(key, 0.0) + sample.value
    return found


def answers_to_json(answers: Sequence[Answer]) -> list[dict[str, Any]]:
    return [asdict(answer) for answer in answers]


def answers_from_json(rows: Sequence[dict[str, Any]]) -> list[Answer]:
    return [Answer(**row) for row in rows]
