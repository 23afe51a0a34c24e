"""Whether a draft changes what the target says: greedy replies with and without it, token by token.

Speculative decoding promises the target's own greedy reply. Where two replies part, the two tokens' log-probabilities
there tell a tie that rounding decides (a gap near 0; batches differ in shape) from a draft that spoils the output.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from bench.requests import Answer, Turn

Scorer = Callable[[Sequence[int], Sequence[int]], list[float]]
"""The target's log-probabilities of some tokens after a prompt."""


def compare_replies(
    turns: Sequence[Turn], without: Mapping[str, list[int]], answers: Sequence[Answer], score: Scorer | None = None
) -> tuple[int, list[dict[str, Any]]]:
    """`(greedy replies that are the same, where the others part)`; `without` has the replies without a draft by turn.

    A difference names the first token that differs (its place in the reply, from 0), both tokens, and `logit_gap`: the
    logit of the one without the draft minus that of the other, as `score` tells it. None: a reply ended early.
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
        place, tokens = next(((i, pair) for i, pair in pairs if pair[0] != pair[1]), (None, None))
        gap = None
        if tokens is not None and score is not None:
            a, b = score([*turn.prompt, *expected[:place]], tokens)
            gap = round(a - b, 5)
        differing.append({"turn": answer.id, "first_token": place, "tokens": tokens, "logit_gap": gap})
    return identical, differing


def find_overruns(answers: Sequence[Answer], end_token_ids: Collection[int]) -> list[str]:
    """Turns whose reply goes on after its end token, or says that it stopped and has none."""
    if not end_token_ids:
        return []
    wrong = []
    for answer in answers:
        first = next((i for i, token_id in enumerate(answer.token_ids) if token_id in end_token_ids), None)
        last = len(answer.token_ids) - 1
        if first != (last if answer.finish_reason == "stop" else None):
            wrong.append(answer.id)
    return wrong
