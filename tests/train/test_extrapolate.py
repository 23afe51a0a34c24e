"""Claims about the extrapolation from pilots: its interval holds the truth, and its predictions stay within bounds."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from contracts.acceptance import Acceptance
from train.extrapolate import Curve, fit_curve, length_of, rate_of

K = 7
FULL = 100_000.0
AMOUNTS = [0.05 * FULL, 0.1 * FULL, 0.25 * FULL]

TRUTHS: dict[str, Callable[[float], float]] = {
    "power law, no floor": lambda n: float(length_of(np.array(1 - 2.5 * n**-0.2), K)),
    "power law with a floor": lambda n: float(length_of(np.array(1 - 0.15 - 20.0 * n**-0.4), K)),
    "log-linear": lambda n: 1.5 + 0.3 * np.log(n / 4000),
    "steeper": lambda n: 1.2 + 0.8 * np.log(n / 4500),
    "saturating": lambda n: 1 + 3.5 / (1 + (12_000 / n) ** 0.9),
}


def draw_parts(length: float, rng: np.random.Generator, num_samples: int = 100) -> list[Acceptance]:
    """Held-out samples of about 22 steps each, whose draft is right with one rate at every position."""
    rate = float(rate_of(np.array(length), K))
    drawn = np.minimum(rng.geometric(1 - rate, size=(num_samples, 22)) - 1, K)
    return [Acceptance.from_steps(row.tolist(), K) for row in drawn]


def fit(truth: Callable[[float], float], seed: int = 0) -> Curve:
    rng = np.random.default_rng(seed)
    return fit_curve(AMOUNTS, [draw_parts(truth(tokens), rng) for tokens in AMOUNTS])


@pytest.mark.parametrize("name", TRUTHS)
def test_the_interval_holds_the_truth_of_each_form_and_the_median_is_near(name: str) -> None:
    truth = TRUTHS[name]
    for seed in range(3):
        low, middle, high = np.quantile(fit(truth, seed).draw(FULL), [0.05, 0.5, 0.95])
        assert low <= truth(FULL) <= high
        assert middle == pytest.approx(truth(FULL), rel=0.15)


def test_more_data_is_never_predicted_to_be_worse_and_lengths_stay_possible() -> None:
    curve = fit(TRUTHS["steeper"])
    lengths = np.stack([curve.expected(tokens) for tokens in np.geomspace(1.0, 1e15, 50)])
    assert (np.diff(lengths, axis=0) >= -1e-9).all()
    assert lengths.min() >= 1.0
    assert lengths.max() <= K + 1
    drawn = curve.draw(1e15)
    assert drawn.min() >= 1.0
    assert drawn.max() <= K + 1


def test_pilots_that_get_worse_with_data_predict_a_level_and_no_gain() -> None:
    rng = np.random.default_rng(0)
    curve = fit_curve(AMOUNTS, [draw_parts(length, rng) for length in (3.0, 2.6, 2.2)])
    gain = curve.expected(4 * FULL) / curve.expected(AMOUNTS[-1])
    assert np.median(gain) == pytest.approx(1.0, abs=1e-6)


def test_the_interval_is_wider_the_farther_the_pilots_are() -> None:
    curve = fit(TRUTHS["log-linear"])
    widths = [np.ptp(np.quantile(curve.draw(tokens), [0.05, 0.95])) for tokens in (AMOUNTS[-1], FULL, 4 * FULL)]
    assert widths == sorted(widths)
    assert widths[-1] > 1.5 * widths[0]


def test_the_rate_of_a_length_gives_that_length() -> None:
    lengths = np.linspace(1.0, K + 0.9, 30)
    assert length_of(rate_of(lengths, K), K) == pytest.approx(lengths, abs=1e-3)


def test_two_amounts_of_data_are_refused() -> None:
    parts = draw_parts(2.0, np.random.default_rng(0))
    with pytest.raises(ValueError, match="fewer than three"):
        fit_curve([1.0, 2.0, 2.0], [parts] * 3)
