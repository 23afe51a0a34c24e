"""Extrapolate the acceptance length from pilots to more data, with an interval that counts what is not known.

The acceptance length L of K draft tokens is turned into the rate p at which a draft that is equally good at every
position has it, L = (1 - p^(K+1)) / (1 - p) (Leviathan et al., arXiv 2211.17192, equation 1), and into the error
e = 1 - p. So every prediction lies between 1 and K + 1. With n supervised tokens, three forms are fitted:

    error       e = a + b n^-c                  power law with a floor: Hestness et al., arXiv 1712.00409
    odds        e / (1 - e) = a + b n^-c        the same for the odds: starts flat where pilots have hardly learned
    log-linear  L = a + b ln n                  Yan et al., Scaling Laws for Speculative Decoding, arXiv 2505.07858

with b >= 0 and a >= 0 (log-linear: b >= 0): more data never makes a prediction worse. Three pilots do not determine
three parameters and a form. So a draw of the prediction resamples the held-out samples (the same for all pilots), adds
the noise of a training to each pilot, and then draws form and exponent c with the probability that their fit to these
pilots has: prior times exp(-chi^2 / 2). The forms have equal priors, and c a log-uniform one. The draws' quantiles are
the interval.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from contracts.acceptance import Acceptance

DRAWS = 4000
EXPONENTS = np.geomspace(0.05, 1.5, 60)
"""Exponents c. Published ones are 0.07 to 0.35 (arXiv 1712.00409), those of short pilots larger."""
TRAINING_NOISE = 0.03
"""Standard deviation of a training's error e, relative to it. Two seeds of the tiny recipe differed by 2.6%."""
RATES = np.linspace(0.0, 1.0, 20_001)[:-1]
FORMS = ("error", "odds", "log-linear")


def length_of(rate: np.ndarray, num_draft_tokens: int) -> np.ndarray:
    """Return the acceptance length of drafts that are right at every position with probability `rate` < 1."""
    lengths: np.ndarray = (1.0 - rate ** (num_draft_tokens + 1)) / (1.0 - rate)
    return lengths


def rate_of(length: np.ndarray, num_draft_tokens: int) -> np.ndarray:
    """Return the rate that `length_of` turns into `length`."""
    return np.interp(length, length_of(RATES, num_draft_tokens), RATES)


@dataclass(frozen=True)
class Curve:
    """Draws of the curve of one recipe. `form` (D,) numbers of FORMS; `a`, `b`, `c` (D,); `noise` (D,) of a training.

    `fit` is the share of the draws that each form has.
    """

    num_draft_tokens: int
    form: np.ndarray
    a: np.ndarray
    b: np.ndarray
    c: np.ndarray
    noise: np.ndarray

    @property
    def shares(self) -> dict[str, float]:
        """The share of the draws that each form has."""
        return {name: float((self.form == number).mean()) for number, name in enumerate(FORMS)}

    def expected(self, tokens: float) -> np.ndarray:
        """Return draws `(D,)` of the acceptance length that trainings on `tokens` supervised tokens have on average."""
        return length_of(self._rate(tokens), self.num_draft_tokens)

    def draw(self, tokens: float) -> np.ndarray:
        """Return draws `(D,)` of the acceptance length of one training on `tokens` supervised tokens."""
        error = np.clip((1.0 - self._rate(tokens)) * np.exp(self.noise), 1e-4, 1.0)
        return length_of(1.0 - error, self.num_draft_tokens)

    def _rate(self, tokens: float) -> np.ndarray:
        power = self.a + self.b * tokens**-self.c
        longest = self.num_draft_tokens + 1 - 1e-3
        straight = rate_of(np.clip(self.a + self.b * np.log(tokens), 1.0, longest), self.num_draft_tokens)
        rates: np.ndarray = np.select(
            [self.form == 0, self.form == 1], [1.0 - np.clip(power, 1e-4, 1.0), 1.0 / (1.0 + power)], straight
        )
        return rates


def fit_curve(tokens: Sequence[float], pilots: Sequence[Sequence[Acceptance]], seed: int = 0) -> Curve:
    """Fit draws of the curve to pilots on `tokens` supervised tokens. `pilots`: of each, the held-out samples' parts.

    Raises ValueError for fewer than three different amounts of data.
    """
    if len(set(tokens)) < 3:
        raise ValueError("fewer than three different amounts of data")
    num_tokens = len(pilots[0][0].histogram) - 1
    rng = np.random.default_rng(seed)
    errors = 1.0 - rate_of(_resample(pilots, rng), num_tokens)  # (D, P)
    errors = np.clip(errors * np.exp(TRAINING_NOISE * rng.standard_normal(errors.shape)), 1e-4, 1.0 - 1e-6)
    amounts = np.asarray(tokens, dtype=float)
    fits = [_fit(form, errors, amounts, num_tokens) for form in range(len(FORMS))]
    a, b, chi2 = (np.concatenate([fit[part] for fit in fits], axis=1) for part in range(3))  # (D, grid of all forms)
    sizes = [fit[0].shape[1] for fit in fits]
    form = np.repeat(np.arange(len(FORMS)), sizes)
    prior = np.concatenate([np.full(size, 1.0 / size) for size in sizes])
    exponents = np.concatenate([EXPONENTS if size > 1 else np.zeros(1) for size in sizes])
    weights = prior * np.exp(-0.5 * (chi2 - chi2.min(axis=1, keepdims=True)))
    cumulated = np.cumsum(weights, axis=1)
    drawn = (cumulated < rng.random((DRAWS, 1)) * cumulated[:, -1:]).sum(axis=1)
    rows = np.arange(DRAWS)
    noise = TRAINING_NOISE * rng.standard_normal(DRAWS)
    return Curve(num_tokens, form[drawn], a[rows, drawn], b[rows, drawn], exponents[drawn], noise)


def _resample(pilots: Sequence[Sequence[Acceptance]], rng: np.random.Generator) -> np.ndarray:
    """Return acceptance lengths `(D, P)` of pilots over held-out samples that are drawn again, the same for all."""
    counts = np.array([[(part.accepted, part.steps) for part in parts] for parts in pilots], dtype=float)  # (P, N, 2)
    number = counts.shape[1]
    drawn = rng.multinomial(number, np.full(number, 1.0 / number), size=DRAWS)  # (D, N): how often each is drawn
    sums = np.einsum("dn,pnk->dpk", drawn, counts)
    lengths: np.ndarray = 1.0 + sums[..., 0] / np.maximum(sums[..., 1], 1.0)
    return lengths


def _fit(form: int, errors: np.ndarray, tokens: np.ndarray, num_tokens: int) -> tuple[np.ndarray, ...]:
    """Return a, b and chi^2, each `(D, C)`, of one form fitted to errors `(D, P)` for each exponent (log-linear: one).

    Weighted least squares; sigma is that of `TRAINING_NOISE`, carried over to the form's scale.
    """
    if form == 0:
        values, sigma = errors, TRAINING_NOISE * errors
    elif form == 1:
        values = errors / (1.0 - errors)
        sigma = TRAINING_NOISE * errors / (1.0 - errors) ** 2
    else:
        values = length_of(1.0 - errors, num_tokens)
        sigma = np.abs(length_of(1.0 - errors * (1.0 - TRAINING_NOISE), num_tokens) - values)
    x = np.log(tokens)[None] if form == 2 else tokens[None] ** -EXPONENTS[:, None]  # (C, P)
    weight = (1.0 / sigma**2)[:, None]  # (D, 1, P)
    y = values[:, None]
    x = x[None]
    total, mean_x, mean_y = weight.sum(-1), (weight * x).sum(-1), (weight * y).sum(-1)
    spread = total * (weight * x * x).sum(-1) - mean_x**2
    b = (total * (weight * x * y).sum(-1) - mean_x * mean_y) / spread
    b = np.maximum(b, 0.0)
    a = (mean_y - b * mean_x) / total
    if form != 2:  # no floor below zero
        through = (weight * x * y).sum(-1) / (weight * x * x).sum(-1)
        a, b = np.where(a < 0, 0.0, a), np.where(a < 0, through, b)
    misfit = (y - a[..., None] - b[..., None] * x) ** 2 * weight
    return a, b, misfit.sum(-1)
