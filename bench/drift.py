"""Test whether counted acceptance differs from a draft's card by more than both sampling errors explain.

The counts are sums over the requests of a window, without a figure per request; requests differ in how much is
accepted, so steps of one request are not independent. Their variance follows from the card:

    phi   = S_c * (h / 1.96)^2 * g / (g - 1)  variance of a step's accepted tokens, clustering included: the card's 95%
                                              interval, of half-width h, resamples its n_c conversations of S_c steps,
                                              which are worth g = n_c / 2 of equal length
    deff  = max(1, phi / var_c)               design effect: phi over the variance of independent steps
    S_e   = min(S_w, r_w / m * S_c / n_c)     effective steps of a window of S_w steps and r_w requests, m of them in a
                                              conversation: longer conversations than the card's are not more clusters
    SE^2  = deff * var * (1 / S_c + 1 / S_e)  var: that of independent steps with the shares of card and window, pooled

The window is outside if it differs by more than t * SE, with the quantile of Student's t for g - 1 degrees of freedom,
or for those of the window's effective conversations, S_e / (S_c / n_c) / 2 - 1, if they are fewer: the mean of a small
window is skewed. With the card's degrees alone, simulated windows of 40 requests against a card of 400 conversations
that accept little were outside four times as often as stated.
Sources: design effects and effective sample sizes of clustered counts, Rao and Scott, "A simple method for the analysis
of clustered binary data", Biometrics 48 (1992); the effective number of clusters g = n_c / (1 + CV^2), Carter, Schnepel
and Steigerwald, "Asymptotic behavior of a t-test robust to cluster heterogeneity", Review of Economics and Statistics
99 (2017). The card does not tell how much the lengths of its conversations vary: their coefficient of variation CV is
taken as 1, that of exponentially distributed lengths. One deff serves the length and all positions: deep positions are
not more clustered than their sum.

A card without an interval, or of few conversations, gives no phi. Then phi is Pearson's estimate of overdispersion from
W earlier windows, sum S_w (a_w - a)^2 / (W - 1), with W - 1 degrees of freedom and S_e = S_w (McCullagh and Nelder,
"Generalized linear models", 2nd edition, 1989, section 4.5).

A smaller number of draft tokens raises the shares of all positions: steps begin inside stretches that one step of the
larger number covers (docs/architecture.md). So against a card of a larger number only a drop counts, against one of a
smaller number only a rise. If steps draft different numbers of tokens (a schedule by batch size), the counters do not
tell which positions a step had. Then only position 1 is compared, which every draft has.

Counters mix all modes, temperatures and sets in unknown shares. A window is outside only if it is so for every row of
the card that it may be a mix of. Half of the rate of false alarms is for the length, half for all positions
(Bonferroni).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from contracts.acceptance import Acceptance
from contracts.certificate import AcceptanceRow

MIN_CONVERSATIONS = 20
"""Of a card's row, from which its interval is used."""
MIN_WINDOWS = 8
"""From which the spread between windows is used."""
MIN_REPLIES = 30
"""Effective requests of a window: with fewer, their mean is too skewed for the t distribution."""
MIN_OUTCOMES = 20
"""Effective steps that accept a position, and that do not: with fewer, the position is not tested."""
MIN_DRAFTED = 0.99
"""Of the draft tokens of full drafts. With fewer, steps differ in number. A few are short near `max_model_len`."""
MAX_DEGREES = 500
Z_OF_INTERVAL = 1.959964
"""The normal quantile of a two-sided 95% interval."""


@dataclass(frozen=True)
class Counts:
    """What a server counted: steps, steps that accepted at least position i (from 1), requests with any step.

    `beyond`: at most so many of the accepted tokens were beyond the end of a reply, which cards do not count.
    `drafted`: all draft tokens. None: not known.
    """

    steps: int
    accepted_at: tuple[int, ...]
    requests: int | None = None
    beyond: int | None = None
    drafted: int | None = None

    def __add__(self, other: Counts) -> Counts:
        return Counts(
            self.steps + other.steps,
            tuple(a + b for a, b in zip(self.accepted_at, other.accepted_at, strict=True)),
            _add(self.requests, other.requests),
            _add(self.beyond, other.beyond),
            _add(self.drafted, other.drafted),
        )

    @property
    def draft_tokens(self) -> tuple[int, int]:
        """The smallest and the largest number of draft tokens of a step; the smallest is 1 if steps differ."""
        largest = len(self.accepted_at)
        differ = self.drafted is not None and self.drafted < MIN_DRAFTED * self.steps * largest
        return (1 if differ else largest), largest

    @property
    def acceptance_length(self) -> float:
        return self.length(len(self.accepted_at))

    def length(self, positions: int) -> float:
        """Return the acceptance length that the first `positions` draft tokens give; 1.0 without steps."""
        return 1.0 + sum(self.shares[:positions])

    @property
    def shares(self) -> list[float]:
        """The share of steps that accepted at least position i."""
        return [count / max(1, self.steps) for count in self.accepted_at]


@dataclass(frozen=True)
class Spread:
    """`phi`, the variance of a step's accepted tokens between samples, from so many degrees of freedom.

    `steps_per_request`: how many steps of one request count at most; None if `phi` is of whole windows.
    """

    phi: float
    degrees: int
    steps_per_request: float | None = None

    def effective_steps(self, counts: Counts) -> float:
        """Return S_e of a window's counts."""
        if self.steps_per_request is None or counts.requests is None:
            return counts.steps
        return min(counts.steps, counts.requests * self.steps_per_request)


@dataclass(frozen=True)
class Tested:
    """A figure of a window: its value, and the least it is without tokens beyond the ends of replies.

    `low`, `high`: between which values this window is as the card.
    """

    value: float
    least: float
    low: float
    high: float

    @property
    def side(self) -> str:
        """`below` or `above` the card, or ""."""
        if self.value < self.low:
            return "below"
        return "above" if self.least > self.high else ""

    def to_json(self) -> dict[str, Any]:
        return {**{name: round(value, 4) for name, value in asdict(self).items()}, "side": self.side}


@dataclass(frozen=True)
class Comparison:
    """A window against the card: the acceptance length over the shared positions, and each of them (None: too few)."""

    length: Tested
    positions: list[Tested | None]

    @property
    def tells_drops(self) -> bool:
        """Whether there is any acceptance length that would be below the card."""
        return self.length.low > 1.0

    @property
    def outside(self) -> list[tuple[int, Tested]]:
        """The figures outside of the card, by position from 1; 0 is the length."""
        figures = [(0, self.length), *enumerate(self.positions, start=1)]
        return [(place, found) for place, found in figures if found is not None and found.side]

    def to_json(self) -> dict[str, Any]:
        return {
            "length": self.length.to_json(),
            "positions": [None if found is None else found.to_json() for found in self.positions],
        }


def spread_of(row: AcceptanceRow, requests_per_conversation: float = 1.0) -> Spread | None:
    """Return the spread between the conversations of a card's row; None if it does not tell.

    `requests_per_conversation`: m, of the traffic.
    """
    if row.interval is None or row.n < MIN_CONVERSATIONS or not row.steps:
        return None
    half, clusters = (row.interval[1] - row.interval[0]) / 2, row.n / 2
    phi = row.steps * (half / Z_OF_INTERVAL) ** 2 * clusters / (clusters - 1)
    return Spread(phi, int(clusters) - 1, row.steps / row.n / requests_per_conversation)


def spread_between(windows: Sequence[Counts]) -> Spread | None:
    """Return the spread between windows; None for fewer than `MIN_WINDOWS`."""
    if len(windows) < MIN_WINDOWS:
        return None
    steps = sum(window.steps for window in windows)
    mean = sum(window.acceptance_length * window.steps for window in windows) / steps
    squares = sum(window.steps * (window.acceptance_length - mean) ** 2 for window in windows)
    return Spread(squares / (len(windows) - 1), len(windows) - 1)


def effective_conversations(
    counts: Counts, rows: Sequence[AcceptanceRow], requests_per_conversation: float = 1.0
) -> float:
    """Return how many of the card's conversations a window is worth, by the row for which they are fewest.

    Rows that tell no spread do not count; infinity if none does and the requests are not known.
    """
    known = [(row, spread) for row in rows if (spread := spread_of(row, requests_per_conversation)) is not None]
    of_rows = [spread.effective_steps(counts) * row.n / row.steps for row, spread in known]
    return min(of_rows, default=math.inf if counts.requests is None else counts.requests / requests_per_conversation)


def compare(
    counts: Counts,
    rows: Sequence[AcceptanceRow],
    rate: float,
    between: Spread | None,
    requests_per_conversation: float = 1.0,
) -> Comparison | None:
    """Compare a window with the card's rows that it may be a mix of.

    `rate`: chance of a result outside of the card by sampling alone. `between`: the spread between earlier windows, for
    rows that tell none; None is returned if it is needed and None.
    """
    known = [(row, spread) for row in rows if (spread := spread_of(row, requests_per_conversation) or between)]
    if len(known) < len(rows):
        return None
    smallest, largest = counts.draft_tokens
    shared = min([smallest, *(len(row.per_position) for row in rows)])
    # Where a step may draft nothing, its token hides one beyond the end of a reply.
    is_bounded = counts.beyond is not None and smallest == largest
    beyond = counts.beyond if counts.beyond is not None and is_bounded else sum(counts.accepted_at)
    length = _widest([_length_bounds(counts, row, spread, shared, rate / 2) for row, spread in known])
    least = max(1.0, counts.length(shared) - beyond / max(1, counts.steps))
    positions: list[Tested | None] = []
    for place in range(shared):
        bounds = [_position_bounds(counts, row, spread, place, rate / 2 / shared) for row, spread in known]
        found = [edges for edges in bounds if edges is not None]
        if len(found) < len(bounds):
            positions.append(None)
            continue
        # A reply's end cuts a position at most once.
        cut = min(beyond, counts.accepted_at[place] if counts.requests is None else counts.requests)
        share = counts.shares[place]
        tested = Tested(share, max(0.0, share - cut / counts.steps), *_widest(found))
        positions.append(_one_sided(tested, counts.draft_tokens, rows, (0.0, 1.0)))
    tested = Tested(counts.length(shared), least, *length)
    return Comparison(_one_sided(tested, counts.draft_tokens, rows, (1.0, 1.0 + shared)), positions)


def compare_parts(
    parts: Sequence[Acceptance], rows: Sequence[AcceptanceRow], rate: float, draft_tokens: tuple[int, int]
) -> Tested | None:
    """Compare the acceptance length of conversations that were sent, one part each, with the card's rows.

    `draft_tokens`: see `Counts.draft_tokens`.

    Their own spread gives the variance: that of a ratio of sums over clusters (Cochran, "Sampling techniques", 3rd
    edition, 1977, section 6.3). The smaller of both samples gives the degrees of freedom. Half of the rate is used, as
    for the length of a window: simulated samples of 40 conversations are outside 1.1 times as often as t says. None:
    too few conversations, or a card that tells no spread.
    """
    known = [(row, spread) for row in rows if (spread := spread_of(row)) is not None]
    steps = sum(part.steps for part in parts)
    if len(parts) < MIN_CONVERSATIONS or not steps or not known or len(known) < len(rows):
        return None
    shared = min([draft_tokens[0], *(len(row.per_position) for row in rows)])
    accepted = [sum(min(a, shared) * count for a, count in enumerate(part.histogram)) for part in parts]
    mean = sum(accepted) / steps
    squares = sum((a - mean * part.steps) ** 2 for a, part in zip(accepted, parts, strict=True))
    clusters = len(parts) / 2
    variance = clusters / (clusters - 1) * squares / steps**2
    bounds = []
    for row, spread in known:
        of_card = design_effect(row, spread) * variance_of(row.per_position[:shared]) / row.steps
        degrees = min(spread.degrees, int(clusters) - 1)
        margin = t_quantile(rate / 2, degrees) * math.sqrt(variance + of_card)
        value = 1.0 + sum(row.per_position[:shared])
        bounds.append((value - margin, value + margin))
    tested = Tested(1.0 + mean, 1.0 + mean, *_widest(bounds))
    return _one_sided(tested, draft_tokens, rows, (1.0, 1.0 + shared))


def _one_sided(
    tested: Tested, draft_tokens: tuple[int, int], rows: Sequence[AcceptanceRow], limits: tuple[float, float]
) -> Tested:
    """Return the figure with a range that is open, up to its limit, where another number of draft tokens moves it."""
    smallest, largest = draft_tokens
    if any(row.num_draft_tokens > smallest for row in rows):
        tested = replace(tested, high=limits[1])
    if any(row.num_draft_tokens < largest for row in rows):
        tested = replace(tested, low=limits[0])
    return tested


def _add(a: int | None, b: int | None) -> int | None:
    return None if a is None or b is None else a + b


def _widest(bounds: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Return the range of a mix: from the lowest edge of any row to the highest."""
    return min(low for low, _ in bounds), max(high for _, high in bounds)


def _length_bounds(counts: Counts, row: AcceptanceRow, spread: Spread, shared: int, rate: float) -> tuple[float, float]:
    pooled = [_pool(counts, row, place) for place in range(shared)]
    margin = _margin(counts, row, spread, variance_of(pooled), rate)
    value = 1.0 + sum(row.per_position[:shared])
    return value - margin, value + margin


def _position_bounds(
    counts: Counts, row: AcceptanceRow, spread: Spread, place: int, rate: float
) -> tuple[float, float] | None:
    share = _pool(counts, row, place)
    effective = min(row.steps, spread.effective_steps(counts)) / design_effect(row, spread)
    if effective * min(share, 1 - share) < MIN_OUTCOMES:
        return None
    margin = _margin(counts, row, spread, share * (1 - share), rate)
    return row.per_position[place] - margin, row.per_position[place] + margin


def _margin(counts: Counts, row: AcceptanceRow, spread: Spread, variance: float, rate: float) -> float:
    effective = spread.effective_steps(counts)
    variance *= design_effect(row, spread) * (1 / row.steps + 1 / effective)
    degrees = spread.degrees
    if spread.steps_per_request is not None:
        degrees = max(1, min(degrees, int(effective * row.n / row.steps / 2) - 1))
    return t_quantile(rate, degrees) * math.sqrt(variance)


def _pool(counts: Counts, row: AcceptanceRow, place: int) -> float:
    """Return the share of both samples at a position, with one step more of either outcome: never 0 or 1."""
    accepted = row.per_position[place] * row.steps + counts.accepted_at[place] + 1
    return accepted / (row.steps + counts.steps + 2)


def design_effect(row: AcceptanceRow, spread: Spread) -> float:
    """Return by how much clustering raises the variance of a mean over steps, at least 1."""
    alone = variance_of([(share * row.steps + 1) / (row.steps + 2) for share in row.per_position])
    return max(1.0, spread.phi / alone)


def variance_of(shares: Sequence[float]) -> float:
    """Return the variance of a step's accepted tokens, from the shares that accept at least 1, 2, ... of them."""
    mean = sum(shares)
    return sum((2 * i - 1) * share for i, share in enumerate(shares, start=1)) - mean**2


@functools.lru_cache(maxsize=256)
def t_quantile(rate: float, degrees: int) -> float:
    """Return the t that Student's |t| exceeds with probability `rate`, by bisection."""
    low, high = 0.0, 1.0
    while t_tail(high, degrees) > rate:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if t_tail(middle, degrees) > rate else (low, middle)
    return high


def t_tail(t: float, degrees: int) -> float:
    """Return the probability that Student's |t| exceeds `t`.

    The finite series of Abramowitz and Stegun, "Handbook of mathematical functions", 26.7.3 and 26.7.4; above
    `MAX_DEGREES` that many are taken, which is on the safe side. scipy would bring 100 MB for this one function.
    """
    degrees = min(degrees, MAX_DEGREES)
    angle = math.atan(t / math.sqrt(degrees))
    sine, square = math.sin(angle), math.cos(angle) ** 2
    odd = degrees % 2
    term = total = (math.cos(angle) if odd else 1.0) if degrees > 1 else 0.0
    for k in range(3 if odd else 2, degrees - 1, 2):
        term *= square * (k - 1) / k
        total += term
    inside = 2 / math.pi * (angle + sine * total) if odd else sine * total
    return max(0.0, 1.0 - inside)
