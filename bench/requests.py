"""Send held-out prompts as token ids to a running server and read replies and counters.

A turn's prompt is the recorded tokens up to its reply, so server and trainer see the same context.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

from common.errors import IncompleteError, UserError, raise_known
from common.progress import Progress
from contracts.conversation import NO_FILTERS, NO_PENALTIES, Conversation
from serve.client import AnswerError, Client, ask

T = TypeVar("T")
REQUEST_TIMEOUT_S = 600.0
NUM_SCORED = 20  # vLLM's default --max-logprobs
SAMPLING_KEYS = ("temperature", *NO_FILTERS, *NO_PENALTIES)


@dataclass(frozen=True)
class Served:
    """A running server: its URL without /v1, and the name of its model."""

    url: str
    model: str


@dataclass(frozen=True)
class Turn:
    """One reply to generate again: token ids of the prompt, and of the target's reply without a draft.

    `sampling` has the recorded parameters (`SAMPLING_KEYS`); empty means greedy. `max_tokens` is the length at which
    this reply was cut, if it was. `dataset` is the name of the prompt set, if there are several.
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
        """Prompt set, thinking mode and temperature: turns that are measured together."""
        return self.dataset, self.thinking_mode, self.temperature

    @property
    def conversation(self) -> str:
        return conversation_of(self.id)


@dataclass(frozen=True)
class Answer:
    """A server's reply. `accepted`: accepted draft tokens of each step, if the server drafts."""

    id: str
    token_ids: list[int]
    finish_reason: str
    accepted: list[int]
    latency_s: float


def conversation_of(turn_id: str) -> str:
    """Return the id of a turn's conversation."""
    return turn_id.rsplit("-", 2)[0]


def kept_steps(answer: Answer) -> list[int]:
    """Return the accepted tokens of each step, without those beyond the end of the reply.

    vLLM counts all tokens that the last step accepted, also those beyond the stop token or max_tokens.
    """
    left = len(answer.token_ids) - 1  # the first token is from the prefill
    kept = []
    for accepted in answer.accepted:
        if left <= 0:
            break
        kept.append(min(accepted, left))
        left -= accepted + 1
    return kept


def read_turns(conversations: Iterable[Conversation], *, include_cut: bool = False, dataset: str = "") -> list[Turn]:
    """Return the conversations' replies by id; those of cut conversations only if `include_cut`."""
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
                            key: value for key in SAMPLING_KEYS if (value := conversation.sampling.get(key)) is not None
                        },
                        max_tokens=end - start if cut and last else None,
                        dataset=dataset,
                    )
                )
    return turns


def refuse_min_p(where: object, turns: Sequence[Turn]) -> None:
    """Raise UserError for turns that were sampled with min_p.

    vLLM refuses min_p on a server that drafts (vllm/sampling_params.py, `_validate_spec_decode`, 0.32).
    """
    if any(turn.sampling.get("min_p") for turn in turns):
        raise UserError(
            where,
            found="replies sampled with min_p",
            expected="none: vLLM has no min_p with speculative decoding",
            fix="Generate the conversations with synth.min_p=0.",
        )


async def send_all(
    server: Served,
    turns: Sequence[Turn],
    *,
    concurrency: int,
    max_tokens: int,
    title: str,
    max_model_len: int | None = None,
) -> tuple[list[Answer], float]:
    """Return `(answers in the order of the turns, seconds from the first request to the last answer)`.

    Turns are sampled as recorded. Replies end at `max_tokens`, or at the length of a recorded reply that was cut, or
    when `max_model_len` is reached.
    """
    answers: dict[str, Answer] = {}

    async def send(client: Client, turn: Turn) -> None:
        limit = turn.max_tokens or max_tokens
        if max_model_len is not None:
            limit = min(limit, max_model_len - len(turn.prompt))
        answers[turn.id] = await _send(client, server, turn, limit)

    with Progress(len(turns), title, "turn") as progress:
        seconds = await send_concurrently(turns, send, concurrency, progress)
    return [answers[turn.id] for turn in turns], seconds


async def send_concurrently(
    items: Iterable[T], send: Callable[[Client, T], Awaitable[None]], concurrency: int, progress: Progress
) -> float:
    """Call `send` for all items, `concurrency` at a time; return the seconds that took.

    Raises the first error of `send` (see `raise_known`).
    """
    waiting = iter(items)
    async with Client(concurrency) as client:

        async def work() -> None:
            for item in waiting:
                await send(client, item)
                progress.update()

        started = time.perf_counter()
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(concurrency):
                    group.create_task(work())
        except BaseExceptionGroup as errors:
            raise_known(errors)
        return time.perf_counter() - started


async def _send(client: Client, server: Served, turn: Turn, max_tokens: int) -> Answer:
    url = f"{server.url}/v1"
    body = {
        "model": server.model,
        "prompt": turn.prompt,
        "max_tokens": max_tokens,
        "temperature": 0.0,
        **turn.sampling,
        "return_token_ids": True,
    }
    started = time.perf_counter()
    try:
        answer = await client.complete(url, body, REQUEST_TIMEOUT_S)
    except AnswerError as error:
        raise IncompleteError(
            f"{url} ({turn.id}): found {error}, expected an answer. Look at the server's log, then run again."
        ) from None
    latency_s = time.perf_counter() - started
    choice = answer["choices"][0]
    drafting = (answer.get("metrics") or {}).get("speculative_decoding") or {}
    return Answer(
        id=turn.id,
        token_ids=choice["token_ids"],
        finish_reason=choice["finish_reason"],
        accepted=drafting.get("per_step_accepted") or [],
        latency_s=round(latency_s, 4),
    )


def ask_model(url: str) -> str:
    """Return the name of a server's model, from its /v1 URL. Raises UserError if it does not answer."""
    try:
        return ask(lambda client: client.read_model(url))
    except AnswerError as error:
        raise UserError(
            url, found=str(error), expected="a running server's URL, ending in /v1", fix="Correct it."
        ) from None


def score(server: Served, prompt: Sequence[int], token_ids: Sequence[int]) -> list[float]:
    """Return the target's log-probability of each of `token_ids` as the token after `prompt`.

    A token beyond the `NUM_SCORED` likeliest gets the least of theirs, an upper bound. Raises UserError if the server
    returns none.
    """
    url = f"{server.url}/v1"
    body = {
        "model": server.model,
        "prompt": list(prompt),
        "max_tokens": 1,
        "temperature": 0.0,
        # Not logprob_token_ids: a drafting server returns none for them (vllm/v1/sample/rejection_sampler.py, 0.32).
        "logprobs": NUM_SCORED,
        "return_tokens_as_token_ids": True,
        "cache_salt": "score",  # computed by the target alone, not read from what a drafting request cached
    }
    try:
        answer = ask(lambda client: client.complete(url, body, REQUEST_TIMEOUT_S))
        (found,) = answer["choices"][0]["logprobs"]["top_logprobs"]
        least = min(map(float, found.values()))
        return [float(found.get(f"token_id:{token_id}", least)) for token_id in token_ids]
    except (AnswerError, LookupError, TypeError, ValueError) as error:
        raise UserError(
            url, found=str(error) or "none", expected="log-probabilities", fix="Look at the server's log."
        ) from None


def read_counters(url: str) -> dict[str, float]:
    """Read vLLM's speculative decoding counters (see `serve.client.to_counters`); `url` has no /v1.

    Raises UserError if /metrics does not answer.
    """
    try:
        return ask(lambda client: client.read_counters(url))
    except AnswerError as error:
        raise UserError(
            f"{url}/metrics", found=str(error), expected="vLLM's metrics", fix="Look at the server's log."
        ) from None


def answers_to_json(answers: Sequence[Answer]) -> list[dict[str, Any]]:
    return [asdict(answer) for answer in answers]


def answers_from_json(rows: Sequence[dict[str, Any]]) -> list[Answer]:
    return [Answer(**row) for row in rows]
