"""Send conversations or prompts to a running server, and compare their acceptance with the draft's card by mode.

Reads: a folder of `synth generate`, or a prompt set (contracts/prompt_files.py), which the server renders with the
       thinking modes and sampling of the recipe in the card.

The server must report accepted tokens per request (`--per-request-spec-decode-metrics detailed`).
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from bench.card import Card
from bench.counters import CannotSayError
from bench.drift import Tested, compare_parts
from bench.requests import (
    REQUEST_TIMEOUT_S,
    SAMPLING_KEYS,
    Answer,
    Served,
    Turn,
    kept_steps,
    read_turns,
    refuse_min_p,
    send_all,
)
from common.errors import IncompleteError, UserError
from contracts.acceptance import Acceptance
from contracts.conversation import CONVERSATIONS_FILE, read_conversations
from contracts.prompt_files import open_prompts
from contracts.prompts import read_category, read_opening
from recipe.synth import SynthSection
from serve.client import AnswerError, Connection
from target.section import TargetSection
from target.thinking import template_arguments

CONCURRENCY = 8


@dataclass(frozen=True)
class Group:
    """Requests of one thinking mode and temperature, or of one category: `n` conversations.

    `tested` is None if nothing can be said: too few, no such row on the card, or a row without interval.
    """

    name: str
    n: int
    acceptance: Acceptance
    interval: tuple[float, float]
    tested: Tested | None = None

    def to_json(self) -> dict[str, Any]:
        tested = self.tested.to_json() if self.tested else None
        return {"name": self.name, "n": self.n, **self.acceptance.summary(), "interval": self.interval, "card": tested}


@dataclass(frozen=True)
class Probe:
    """What was sent: its acceptance by thinking mode and temperature, and by category."""

    by_mode: list[Group]
    by_category: list[Group]

    @property
    def outside(self) -> list[Group]:
        return [group for group in self.by_mode if group.tested is not None and group.tested.side]

    @property
    def is_tested(self) -> bool:
        """Whether a drop of any mode would have been reported."""
        return any(group.tested is not None and group.tested.low > 1.0 for group in self.by_mode)

    def to_json(self) -> dict[str, Any]:
        return {
            "by_mode": [group.to_json() for group in self.by_mode],
            "by_category": [group.to_json() for group in self.by_category],
        }


@dataclass(frozen=True)
class Requests:
    """What to send to which server: a folder of `synth generate` or a prompt set, and how many conversations of it."""

    source: str
    limit: int

    def read(self, server: Served, card: Card) -> list[Turn]:
        """Return the turns to send. Raises UserError for unusable ones, CannotSayError if the server renders none."""
        folder = Path(self.source)
        if not (folder / CONVERSATIONS_FILE).is_file():
            return _render_prompts(server, self.source, self.limit, card)
        turns = read_turns(read_conversations(folder), dataset=folder.resolve().name)
        # Ids are hashes: the first ones are a random choice, and the same in each run.
        chosen = set(list(dict.fromkeys(turn.conversation for turn in turns))[: self.limit])
        found = [turn for turn in turns if turn.conversation in chosen]
        if not found:
            raise UserError(folder, found="no finished conversation", expected="some", fix="Raise synth.max_tokens.")
        refuse_min_p(folder, found)
        return found


def send_requests(server: Served, requests: Requests, card: Card) -> list[tuple[Turn, Answer]]:
    """Send the requests and return them with their answers.

    Raises UserError if the server reports no accepted tokens per request, CannotSayError if a request fails.
    """
    turns = requests.read(server, card)
    synth, target = _sections(card)
    sent = send_all(
        server,
        turns,
        concurrency=CONCURRENCY,
        max_tokens=synth.max_tokens,
        title="watch: requests",
        max_model_len=target.max_model_len if target else None,
    )
    try:
        answers, _ = asyncio.run(sent)
    except IncompleteError as error:
        raise CannotSayError(str(error)) from None
    if not any(answer.accepted for answer in answers):
        raise UserError(
            server.url,
            found="replies without accepted tokens per request",
            expected="them, to tell modes apart",
            fix="Start the server with --per-request-spec-decode-metrics detailed, or leave out --requests.",
        )
    return list(zip(turns, answers, strict=True))


def summarize(answered: Sequence[tuple[Turn, Answer]], card: Card, draft_tokens: tuple[int, int], rate: float) -> Probe:
    """Return the acceptance of answered turns by mode and temperature, compared with the card, and by category.

    `draft_tokens`: of the steps of these requests, see `Counts.draft_tokens`. `rate`: chance that any mode is outside
    of the card by sampling.
    """
    num_draft_tokens = draft_tokens[1]
    modes = _group(answered, lambda turn: (turn.thinking_mode, turn.temperature), num_draft_tokens)
    categories = _group(answered, lambda turn: turn.category, num_draft_tokens)
    by_mode = []
    for (mode, temperature), parts in modes.items():
        rows = [
            row
            for row in card.rows_for(num_draft_tokens)
            if (row.thinking_mode, row.temperature) == (mode, temperature)
        ]
        tested = compare_parts(parts, rows, rate / len(modes), draft_tokens) if rows else None
        by_mode.append(_make_group(f"thinking {mode or 'unset'}, temperature {temperature:g}", parts, tested))
    return Probe(by_mode, [_make_group(name or "no category", parts) for name, parts in categories.items()])


def _group(
    answered: Iterable[tuple[Turn, Answer]], key: Callable[[Turn], Any], num_draft_tokens: int
) -> dict[Any, list[Acceptance]]:
    """Return the acceptance of each conversation, by group."""
    steps: dict[Any, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for turn, answer in answered:
        steps[key(turn)][turn.conversation] += kept_steps(answer)
    return {
        name: [Acceptance.from_steps(found, num_draft_tokens) for found in of_group.values()]
        for name, of_group in sorted(steps.items())
    }


def _make_group(name: str, parts: Sequence[Acceptance], tested: Tested | None = None) -> Group:
    return Group(name, len(parts), Acceptance.pool(parts), Acceptance.interval(parts), tested)


def _render_prompts(server: Served, source: str, limit: int, card: Card) -> list[Turn]:
    """Return the opening turns of a prompt set as the server renders them, spread evenly over its rows."""
    synth, target = _sections(card)
    sampling = {key: value for key in SAMPLING_KEYS if (value := getattr(synth, key)) is not None}
    if isinstance(sampling.get("temperature"), list):
        sampling["temperature"] = sampling["temperature"][0]
    modes = synth.modes_in_turn or [""]
    prompts = open_prompts(source)
    chosen = {place * prompts.num_rows // limit for place in range(limit)}
    turns = []
    with Connection() as connection:
        for number, row in enumerate(prompts.rows(chosen.__contains__)):
            mode = modes[number % len(modes)]
            try:
                body: dict[str, Any] = {"messages": read_opening(row.value), "add_generation_prompt": True}
            except ValueError as error:
                raise UserError(
                    row.where, found=row.error or str(error), expected="a prompt", fix="Delete this row."
                ) from None
            if target and (values := template_arguments(target, mode)):
                body["chat_template_kwargs"] = values
            ids = _tokenize(connection, server, body)
            turns.append(Turn(f"{row.index}-0-{len(ids)}", mode, read_category(row.value), ids, [], sampling))
    refuse_min_p(source, turns)
    return turns


def _tokenize(connection: Connection, server: Served, body: Mapping[str, Any]) -> list[int]:
    try:
        return connection.ask(lambda client: client.tokenize(f"{server.url}/v1", body, REQUEST_TIMEOUT_S))
    except AnswerError as error:
        raise CannotSayError(f"{server.url}/tokenize: found {error}, expected the token ids of a prompt") from None


def _sections(card: Card) -> tuple[SynthSection, TargetSection | None]:
    """Return the sections of the card's recipe that say how prompts are rendered and sampled."""
    synth, target = card.recipe.get("synth") or {}, card.recipe.get("target")
    try:
        return SynthSection.model_validate(synth), TargetSection.model_validate(target) if target else None
    except ValidationError as error:
        raise UserError(
            card.name,
            found=f"a recipe of another version ({error.errors()[0]['msg']})",
            expected="one of this version",
            fix="Export the draft again.",
        ) from None
