"""Acceptance length and rate of a draft, computed from counters.

With K draft tokens per step and n_a the number of steps that accepted exactly a of them: steps S = sum n_a, accepted
A = sum a*n_a, acceptance length = 1 + A/S (the bonus token counts), position i: sum_{a>=i} n_a / S. These are the
definitions of vLLM's `vllm:spec_decode_*` counters. Pool by adding counters, never by averaging ratios.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import UserError
from common.files import read_json

RESAMPLES = 1000


@dataclass(frozen=True)
class Acceptance:
    """`histogram[a]` is the number of steps that accepted exactly a draft tokens, a = 0..K."""

    histogram: tuple[int, ...]

    @classmethod
    def from_steps(cls, accepted: Iterable[int], num_draft_tokens: int) -> Acceptance:
        """Build from the number of accepted tokens of each step."""
        histogram = [0] * (num_draft_tokens + 1)
        for count in accepted:
            histogram[count] += 1
        return cls(tuple(histogram))

    @classmethod
    def from_counters(cls, num_drafts: float, accepted_at: Sequence[float]) -> Acceptance:
        """Build from vLLM's counters: the number of steps, and of steps that accepted position i, from 0."""
        at_least = [int(num_drafts), *map(int, accepted_at), 0]
        return cls(tuple(at_least[i] - at_least[i + 1] for i in range(len(at_least) - 1)))

    @classmethod
    def pool(cls, parts: Iterable[Acceptance]) -> Acceptance:
        """Return the sum of the parts. Raises ValueError for no parts, or for parts of different K."""
        histograms = [part.histogram for part in parts]
        if not histograms:
            raise ValueError("no acceptance to pool: nothing was measured")
        return cls(tuple(map(sum, zip(*histograms, strict=True))))

    @property
    def steps(self) -> int:
        return sum(self.histogram)

    @property
    def accepted(self) -> int:
        return sum(count * steps for count, steps in enumerate(self.histogram))

    @property
    def acceptance_length(self) -> float:
        """Tokens per step, the bonus token included; 1.0 without steps."""
        return 1.0 + self.accepted / self.steps if self.steps else 1.0

    @property
    def acceptance_rate(self) -> float:
        """Share of the drafted tokens that were accepted."""
        drafted = self.steps * (len(self.histogram) - 1)
        return self.accepted / drafted if drafted else 0.0

    @property
    def per_position(self) -> list[float]:
        """Share of steps that accepted at least i tokens, i = 1..K; non-increasing, sums to the length minus 1."""
        return [sum(self.histogram[i:]) / max(1, self.steps) for i in range(1, len(self.histogram))]

    @staticmethod
    def interval(parts: Sequence[Acceptance], confidence: float = 0.95) -> tuple[float, float]:
        """Return the bootstrap interval of the pooled acceptance length, resampling parts (conversations)."""
        return _quantiles(_resample(parts), confidence)

    @staticmethod
    def gain_interval(
        parts: Sequence[Acceptance], before: Sequence[Acceptance], confidence: float = 0.95
    ) -> tuple[float, float]:
        """Return the bootstrap interval of the pooled acceptance length minus that of `before`, paired by part."""
        return _quantiles(_resample(parts) - _resample(before), confidence)

    def summary(self) -> dict[str, Any]:
        """Return the figures of a report."""
        return {
            "acceptance_length": round(self.acceptance_length, 4),
            "acceptance_rate": round(self.acceptance_rate, 4),
            "per_position": [round(share, 4) for share in self.per_position],
            "steps": self.steps,
            "accepted": self.accepted,
            "histogram": list(self.histogram),
        }


def read_rates(path: Path, num_draft_tokens: int) -> list[float]:
    """Read the share of steps that accepted each of the first `num_draft_tokens` positions from a report.

    The report is the output of `train eval`, or acceptance.json of `bench acceptance`, of which the largest K counts.
    Raises UserError for another file, or one of fewer draft tokens.
    """
    what = "the output of `train eval`, or acceptance.json of `bench acceptance`"
    report = read_json(path, what)
    found = report if isinstance(report, dict) else {}
    if pooled := found.get("pooled"):
        found = pooled[max(pooled, key=int)]
    rates = found.get("per_position")
    if not isinstance(rates, list):
        raise UserError(path, found="no per_position", expected=what, fix="Give one of these files.")
    if len(rates) < num_draft_tokens:
        raise UserError(
            path,
            found=f"the acceptance of {len(rates)} draft tokens",
            expected=f"of {num_draft_tokens}",
            fix="Give a report of as many, or lower --draft-tokens.",
        )
    return [float(rate) for rate in rates[:num_draft_tokens]]


def _resample(parts: Sequence[Acceptance]) -> np.ndarray:
    """Return pooled acceptance lengths of resampled parts, `(RESAMPLES,)`; the draws depend on their number alone."""
    rng = np.random.default_rng(0)
    counts = np.array([(part.accepted, part.steps) for part in parts], dtype=float)
    drawn = counts[rng.integers(len(counts), size=(RESAMPLES, len(counts)))].sum(axis=1)
    lengths: np.ndarray = 1.0 + drawn[:, 0] / np.maximum(drawn[:, 1], 1.0)
    return lengths


def _quantiles(values: np.ndarray, confidence: float) -> tuple[float, float]:
    low, high = np.quantile(values, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)
