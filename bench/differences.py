"""Check that a draft does not change the target's greedy replies, token by token.

Speculative decoding must return the target's own greedy reply. At the first difference, the log-probabilities of the
two tokens distinguish rounding (a gap near 0; batches differ in shape) from a draft that corrupts the output.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from bench.requests import Answer, Turn

Scorer = Callable[[Sequence[int], Sequence[int]], list[float]]
"""A function from a prompt and tokens to the target's log-probabilities of the tokens after the prompt."""


def compare_replies(
    turns: Sequence[Turn], without: Mapping[str, list[int]], answers: Sequence[Answer], score: Scorer | None = None
) -> tuple[int, list[dict[str, Any]]]:
    """Return `(number of identical greedy replies, the differences)`. `without`: replies without a draft, by turn.

    A difference has the position of the first token that differs (in the reply, from 0), both tokens, and `logit_gap`:
    the logit of the token without the draft minus that of the other, from `score`. It is None if one reply is a prefix
    of the other, or without `score`.
    """
    known = {turn.id: turn for turn in turns}
    identical, differing = 0, []
    for answer in answers:
        turn = known[answer.id]
        if not turn.is_greedy:
            continue
        expected = without[answer.id]
        if answer.token_ids == expected:
            identical += 1
            continue
        pairs = enumerate(zip(expected, answer.token_ids, strict=False))
        position, tokens = next(((i, pair) for i, pair in pairs if pair[0] != pair[1]), (None, None))
        gap = None
        if tokens is not None and score is not None:
            a, b = score([*turn.prompt, *expected[:position]], tokens)
            gap = round(a - b, 5)
        differing.append({"turn": answer.id, "first_token": position, "tokens": tokens, "logit_gap": gap})
    return identical, differing


def find_overruns(answers: Sequence[Answer], end_token_ids: Collection[int]) -> list[str]:
    """Return the turns whose reply continues after an end token or stopped without one."""
    if not end_token_ids:
        return []
    wrong = []
    for answer in answers:
        first = next((i for i, token_id in enumerate(answer.token_ids) if token_id in end_token_ids), None)
        last = len(answer.token_ids) - 1
        if first != (last if answer.finish_reason == "stop" else None):
            wrong.append(answer.id)
    return wrong
