"""Compute the speed of each number of draft tokens (K), measured or predicted, and recommend one for each concurrency.

A step takes `concurrency * L / v` seconds, with the acceptance length L and v tokens/s. Between two measured numbers of
draft tokens its time is interpolated linearly: the draft's own passes cost a fixed time plus a time per token, and so
does verification. Nothing is predicted between no draft and the smallest number measured, where the fixed time begins.

The accepted tokens per step at K = k are `sum(p_i, i <= k)` of the next larger K measured, times a factor that is right
at the next smaller one (measured / cut) and goes to 1 linearly. It has to be measured: steps of a smaller K start at
other tokens, and a draft that proposes a block at once (DFlash) may propose others in a smaller block.

Intervals are bootstrap intervals: conversations are resampled, the same for all numbers of draft tokens. The smallest
K is recommended that the best one does not measurably exceed by 2%.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.requests import Answer, answers_from_json, conversation_of, kept_steps
from contracts.acceptance import RESAMPLES
from contracts.speeds import Speed, Speeds

Array = NDArray[np.float64]
QUANTILES = (0.025, 0.975)
MARGIN = 0.02
"""Gain that counts as none: predictions are no better, and intervals do not show their error."""


@dataclass(frozen=True)
class Load:
    """One load: counts of each conversation, and the duration.

    Shapes: tokens, latency_s, steps (C,); accepted_at (C, K): steps that accepted position i, from 0.
    """

    duration_s: float
    tokens: Array
    latency_s: Array
    steps: Array
    accepted_at: Array

    @classmethod
    def from_point(cls, point: Mapping[str, Any], num_draft_tokens: int) -> Load:
        """Build from a point of bench/replay.py's files; conversations in the order of their ids."""
        members: dict[str, list[Answer]] = defaultdict(list)
        for answer in answers_from_json(point["answers"]):
            members[conversation_of(answer.id)].append(answer)
        answers = [members[id_] for id_ in sorted(members)]
        steps = [[count for answer in of_one for count in kept_steps(answer)] for of_one in answers]
        at = [[sum(count > i for count in of_one) for i in range(num_draft_tokens)] for of_one in steps]
        return cls(
            float(point["seconds"]),
            np.array([sum(len(answer.token_ids) for answer in of_one) for of_one in answers], float),
            np.array([sum(answer.latency_s for answer in of_one) for of_one in answers], float),
            np.array([len(of_one) for of_one in steps], float),
            np.array(at, float).reshape(len(answers), num_draft_tokens),
        )

    def speed(self, weights: Array) -> Array:
        """Return tokens/s of each draw. Shapes: weights (B, C) -> (B,).

        Latencies only tell how much a draw differs from the whole load; its tokens/s are tokens by duration.
        """
        whole = self.tokens.sum() / self.duration_s
        usual = self.tokens.sum() / self.latency_s.sum()
        return whole / usual * (weights @ self.tokens) / (weights @ self.latency_s)

    def accepted(self, weights: Array) -> Array:
        """Return the accepted tokens per step with up to 0, 1, ... K positions. Shapes: (B, C) -> (B, K + 1)."""
        shares = weights @ self.accepted_at / np.maximum(weights @ self.steps, 1.0)[:, None]
        return np.concatenate([np.zeros((len(weights), 1)), shares.cumsum(axis=1)], axis=1)


@dataclass(frozen=True)
class Prediction:
    """Tokens/s and acceptance lengths by number of draft tokens. Shapes: numbers (N,), tokens_per_s, lengths (B, N)."""

    numbers: list[int]
    tokens_per_s: Array
    lengths: Array


def find_speeds(runs: Mapping[int, Mapping[str, Any]]) -> list[Speeds]:
    """Return the speeds at each concurrency of `runs`: files of bench/replay.py by number of draft tokens, 0 for none.

    `runs` holds 0 and at least one other number.
    """
    numbers = sorted(runs)
    assert numbers[0] == 0
    assert len(numbers) > 1
    return [
        _speeds_at(int(key), {k: Load.from_point(runs[k]["points"][key], k) for k in numbers})
        for key in runs[0]["points"]
    ]


def predict(loads: Mapping[int, Load], weights: Array) -> Prediction:
    """Return the figures of every K that was measured or lies between two that were. Shapes: weights (B, C)."""
    measured = sorted(loads)
    lengths = {0: np.ones(len(weights))}
    seconds = {0: 1.0 / loads[0].speed(weights)}  # per step, summed over the requests in flight
    for k in measured[1:]:
        lengths[k] = 1.0 + loads[k].accepted(weights)[:, k]
        seconds[k] = lengths[k] / loads[k].speed(weights)
    for low, high in itertools.pairwise(measured[1:]):
        cut = loads[high].accepted(weights)
        below = cut[:, low]
        factor = np.where(below > 0, (lengths[low] - 1.0) / np.where(below > 0, below, 1.0), 1.0)
        for k in range(low + 1, high):
            share = (k - low) / (high - low)
            lengths[k] = 1.0 + cut[:, k] * (factor + (1.0 - factor) * share)
            seconds[k] = seconds[low] + (seconds[high] - seconds[low]) * share
    numbers = sorted(lengths)
    found = np.stack([lengths[k] for k in numbers], axis=1)
    return Prediction(numbers, found / np.stack([seconds[k] for k in numbers], axis=1), found)


def recommend(numbers: Sequence[int], speeds: Array, drawn: Array) -> int:
    """Return the smallest number of draft tokens that the fastest one does not measurably exceed by `MARGIN`.

    Never one that is slower than no draft, `numbers[0]`. Shapes: speeds (N,), drawn (B, N): the resampled speeds.
    """
    best = int(speeds.argmax())
    for i, number in enumerate(numbers[:best]):
        is_tie = np.quantile(drawn[:, best] / drawn[:, i], QUANTILES[0]) <= 1.0 + MARGIN
        if is_tie and (i == 0 or speeds[i] > speeds[0]):
            return number
    return numbers[best]


def _speeds_at(concurrency: int, loads: Mapping[int, Load]) -> Speeds:
    size = len(loads[0].tokens)
    whole = predict(loads, np.ones((1, size)))
    drawn = predict(loads, np.random.default_rng(0).multinomial(size, np.full(size, 1 / size), RESAMPLES).astype(float))
    speeds, lengths = whole.tokens_per_s[0], whole.lengths[0]
    gains = drawn.tokens_per_s / drawn.tokens_per_s[:, :1]
    edges = np.quantile(gains, QUANTILES, axis=0).round(4)
    return Speeds(
        concurrency=concurrency,
        conversations=size,
        recommended=recommend(whole.numbers, speeds, drawn.tokens_per_s),
        speeds=[
            Speed(
                draft_tokens=k,
                measured=k in loads,
                tokens_per_s=round(float(speeds[i]), 2),
                acceptance_length=round(float(lengths[i]), 4),
                step_ms=round(float(1000 * concurrency * lengths[i] / speeds[i]), 3),
                speed_up=round(float(speeds[i] / speeds[0]), 4),
                interval=(float(edges[0, i]), float(edges[1, i])) if size > 1 else None,
            )
            for i, k in enumerate(whole.numbers)
        ],
    )
