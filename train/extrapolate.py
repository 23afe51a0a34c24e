"""Extrapolate the acceptance length from pilots to more data, with an interval that counts what is not known.

Three forms are fitted to acceptance lengths L at n supervised tokens:

    power       e = a + b n^-c                 a power law with a floor: Hestness et al., arXiv 1712.00409
    log-linear  L = a + b ln n                 Yan et al., Scaling Laws for Speculative Decoding, arXiv 2505.07858
    saturating  L = 1 + a / (1 + (b / n)^c)    Morgan-Mercer-Flodin, among the best of 20 forms on learning curves:
                                               Mohr et al., LCDB 1.0 (ECML PKDD 2022)

e is an error: L is turned into the rate p at which a draft that is equally good at every position has it, L =
(1 - p^(K+1)) / (1 - p) (Leviathan et al., arXiv 2211.17192, equation 1), and e = 1 - p. Constraints: more data never
makes a prediction worse (b, c >= 0), a >= 0, and 1 <= L <= K + 1.

Three pilots determine neither three parameters nor the form: far from the pilots the forms differ more than anything
else. So a prediction is a weighted mean of the three, as in Domhan et al. (IJCAI 2015); each draw takes weights anew,
uniformly among all that sum to one. A draw also resamples the held-out samples (the same for all pilots), adds the
noise of a training to each pilot, and draws the free parameter of a form (c of `power`, a of `saturating`) in
proportion to its prior times exp(-chi^2 / 2); the other two are the least-squares fit. The interval is made of the
draws' quantiles.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from contracts.acceptance import Acceptance

DRAWS = 3000
FORMS = ("power", "log-linear", "saturating")
EXPONENTS = np.geomspace(0.05, 1.5, 60)
"""Exponents c of `power`, equally likely. Published: 0.07 to 0.35 (arXiv 1712.00409); short pilots have larger ones."""
CEILINGS = np.linspace(0.02, 1.0, 99)
"""Ceilings a of `saturating` as shares of K, equally likely."""
TRAINING_NOISE = 0.03
"""Standard deviation of a training's error e, relative to it. Two seeds of the tiny recipe differed by 2.6%."""
RATES = np.linspace(0.0, 1.0, 20_001)[:-1]
LEAST, MOST = 1e-4, 1.0 - 1e-6
"""Bounds of errors, so that no logarithm is infinite."""


def length_of(rate: np.ndarray, num_draft_tokens: int) -> np.ndarray:
    """Return the acceptance length of drafts that are right at every position with probability `rate` < 1."""
    lengths: np.ndarray = (1.0 - rate ** (num_draft_tokens + 1)) / (1.0 - rate)
    return lengths


def rate_of(length: np.ndarray, num_draft_tokens: int) -> np.ndarray:
    """Return the rate that `length_of` turns into `length`."""
    return np.interp(length, length_of(RATES, num_draft_tokens), RATES)


@dataclass(frozen=True)
class Curve:
    """Draws of the curve of one recipe. `fits`: a, b, c `(3, D)` of each form; `weights` `(forms, D)`; `noise` `(D,)`
    of a training's error.
    """

    num_draft_tokens: int
    fits: list[np.ndarray]
    weights: np.ndarray
    noise: np.ndarray

    def of_forms(self, tokens: float) -> np.ndarray:
        """Return draws `(forms, D)` of the mean acceptance length of trainings on `tokens` supervised tokens."""
        k, n = self.num_draft_tokens, max(tokens, 1.0)
        (a, b, c), (first, slope, _), (ceiling, middle, steepness) = self.fits
        power = length_of(1.0 - np.clip(a + b * n**-c, LEAST, 1.0), k)
        straight = first + slope * np.log(n)
        saturating = 1.0 + ceiling / (1.0 + np.exp(np.clip(steepness * (middle - np.log(n)), -60.0, 60.0)))
        lengths: np.ndarray = np.clip(np.stack([power, straight, saturating]), 1.0, k + 1.0)
        return lengths

    def expected(self, tokens: float) -> np.ndarray:
        """Return draws `(D,)` of the weighted mean of all forms."""
        lengths: np.ndarray = (self.weights * self.of_forms(tokens)).sum(0)
        return lengths

    def draw(self, tokens: float) -> np.ndarray:
        """Return draws `(D,)` of the acceptance length of one training on `tokens` supervised tokens."""
        errors = 1.0 - rate_of(self.expected(tokens), self.num_draft_tokens)
        return length_of(1.0 - np.clip(errors * np.exp(self.noise), LEAST, 1.0), self.num_draft_tokens)


def fit_curve(tokens: Sequence[float], pilots: Sequence[Sequence[Acceptance]], seed: int = 0) -> Curve:
    """Fit draws of the curve to pilots on `tokens` supervised tokens. `pilots`: of each, the held-out samples' parts.

    Raises ValueError for fewer than three different amounts of data.
    """
    if len(set(tokens)) < 3:
        raise ValueError("fewer than three different amounts of data")
    k = len(pilots[0][0].histogram) - 1
    rng = np.random.default_rng(seed)
    errors = 1.0 - rate_of(_resample(pilots, rng), k)  # (D, P)
    errors = np.clip(errors * np.exp(TRAINING_NOISE * rng.standard_normal(errors.shape)), LEAST, MOST)
    x = np.log(np.asarray(tokens, dtype=float))
    fits = [_fit_power(errors, x, rng), _fit_line(errors, x, k), _fit_ceiling(errors, x, k, rng)]
    weights = rng.dirichlet(np.ones(len(FORMS)), size=DRAWS).T
    return Curve(k, fits, weights, TRAINING_NOISE * rng.standard_normal(DRAWS))


def _resample(pilots: Sequence[Sequence[Acceptance]], rng: np.random.Generator) -> np.ndarray:
    """Return acceptance lengths `(D, P)` of pilots over held-out samples that are drawn again, the same for all."""
    counts = np.array([[(part.accepted, part.steps) for part in parts] for parts in pilots], dtype=float)  # (P, N, 2)
    number = counts.shape[1]
    drawn = rng.multinomial(number, np.full(number, 1.0 / number), size=DRAWS)  # (D, N): how often each is drawn
    sums = np.einsum("dn,pnk->dpk", drawn, counts)
    lengths: np.ndarray = 1.0 + sums[..., 0] / np.maximum(sums[..., 1], 1.0)
    return lengths


def _fit_power(errors: np.ndarray, x: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return a, b, c `(3, D)` of e = a + b n^-c for errors `(D, P)`; `x` is ln n."""
    powers = np.exp(-EXPONENTS[:, None] * x)  # (C, P)
    y, weight = errors[:, None], (TRAINING_NOISE * errors[:, None]) ** -2.0
    a, b = _fit_lines(powers, y, weight)
    through = (weight * powers * y).sum(-1) / (weight * powers**2).sum(-1)  # without a floor
    level = (weight * y).sum(-1) / weight.sum(-1)  # more data changes nothing
    a, b = np.where(a < 0, 0.0, a), np.where(a < 0, through, b)
    a, b = np.where(b < 0, level, a), np.maximum(b, 0.0)
    picked = _pick(((y - a[..., None] - b[..., None] * powers) ** 2 * weight).sum(-1), rng)
    rows = np.arange(len(errors))
    return np.stack([a[rows, picked], b[rows, picked], EXPONENTS[picked]])


def _fit_line(errors: np.ndarray, x: np.ndarray, k: int) -> np.ndarray:
    """Return a, b and zeros `(3, D)` of L = a + b ln n."""
    lengths = length_of(1.0 - errors, k)
    weight = _length_noise(errors, k) ** -2.0
    a, b = _fit_lines(x[None], lengths[:, None], weight[:, None])
    level = (weight * lengths).sum(-1) / weight.sum(-1)
    a, b = np.where(b[:, 0] < 0, level, a[:, 0]), np.maximum(b[:, 0], 0.0)
    return np.stack([a, b, np.zeros_like(a)])


def _fit_ceiling(errors: np.ndarray, x: np.ndarray, k: int, rng: np.random.Generator) -> np.ndarray:
    """Return a, ln b, c `(3, D)` of L = 1 + a / (1 + (b / n)^c): for each ceiling a line in ln n."""
    gains = (length_of(1.0 - errors, k) - 1.0)[:, None]  # (D, 1, P)
    ceilings = (k * CEILINGS)[:, None]
    below = gains < 0.999 * ceilings
    share = np.clip(gains / ceilings, 1e-6, 0.999)
    weight = (_length_noise(errors, k)[:, None] / (gains * (1.0 - share))) ** -2.0  # of the logarithm of the odds
    slope_at, c = _fit_lines(x[None], np.log(share / (1.0 - share)), weight)
    c = np.maximum(c, 1e-3)
    middle = -slope_at / c
    fitted = ceilings / (1.0 + np.exp(np.clip(c[..., None] * (middle[..., None] - x), -60.0, 60.0)))
    chi2 = (((gains - fitted) / _length_noise(errors, k)[:, None]) ** 2).sum(-1)
    picked = _pick(np.where(below.all(-1), chi2, chi2.max() + 1e3), rng)
    rows = np.arange(len(errors))
    return np.stack([ceilings[picked, 0], middle[rows, picked], c[rows, picked]])


def _length_noise(errors: np.ndarray, k: int) -> np.ndarray:
    """Return the standard deviation of the lengths of trainings that `TRAINING_NOISE` gives."""
    noise: np.ndarray = length_of(1.0 - errors * (1.0 - TRAINING_NOISE), k) - length_of(1.0 - errors, k)
    return np.maximum(noise, 1e-6)


def _fit_lines(x: np.ndarray, y: np.ndarray, weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return intercepts and slopes of weighted least squares over the last axis, broadcast over the others."""
    total = weight.sum(-1)
    mean_x, mean_y = (weight * x).sum(-1) / total, (weight * y).sum(-1) / total
    centered = x - mean_x[..., None]
    slope = (weight * centered * (y - mean_y[..., None])).sum(-1) / (weight * centered**2).sum(-1)
    return mean_y - slope * mean_x, slope


def _pick(chi2: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Draw a column for each row of chi^2 `(D, C)` with probability proportional to exp(-chi^2 / 2)."""
    weights = np.exp(-0.5 * (chi2 - chi2.min(axis=1, keepdims=True)))
    cumulated = np.cumsum(weights, axis=1)
    picked: np.ndarray = (cumulated < rng.random((len(chi2), 1)) * cumulated[:, -1:]).sum(axis=1)
    return picked
