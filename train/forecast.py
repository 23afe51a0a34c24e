"""Forecast the acceptance length and the speed-up of a whole training from pilots on parts of its data.

Reads:  see train/pilots.py; the speeds that `bench acceptance` measured with a draft of the same K.
Writes: OUTPUT/forecast.json and forecast.png, and the pilots' folders.

The interval is that of one training, on conversations like the held-out ones. The speed-up is the acceptance length
divided by the ratio of a step's time with K draft tokens to one without a draft. The ratio does not depend on how good
the draft is, so any draft of the same size and K measures it, the smallest pilot too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import UserError
from common.files import read_json, write_json
from contracts.acceptance import Acceptance
from contracts.speeds import Speeds
from train.extrapolate import FORMS, Curve, fit_curve
from train.forecast_plot import draw_forecast
from train.pilots import Data, Pilot, Work, parts_of, read_pilots, train_pilots

CONFIDENCE = 0.9
SHARES = (0.5, 1.0, 2.0, 4.0)
"""Of the whole data: where the curve is reported besides the budgets."""
REACH = 100.0
"""How far beyond the whole data the end of what pays is looked for."""


@dataclass(frozen=True)
class Asked:
    """What to forecast. `runs`: finished pilots, instead of training some on `fractions` of the data.

    `budgets`: supervised tokens. `least_gain`: relative gain below which twice the data does not pay. `served`: folder
    of `bench acceptance`; `step_ratio`: the same stated. `actual`: evaluation of the whole training.
    """

    fractions: Sequence[float]
    runs: Sequence[Path]
    budgets: Sequence[float]
    least_gain: float
    served: Path | None = None
    step_ratio: float | None = None
    actual: Path | None = None


def forecast(work: Work, asked: Asked) -> dict[str, Any]:
    """Train or read the pilots, extrapolate, write and print the forecast; return it.

    Raises UserError for fewer than three different amounts of data.
    """
    number = len(set(asked.runs or asked.fractions))
    if number < 3:
        raise UserError(
            "--runs" if asked.runs else "--fractions",
            found=f"{number} pilots",
            expected="at least three: two do not show how the curve bends",
            fix="Add some.",
        )
    data, pilots = read_pilots(work, asked.runs) if asked.runs else train_pilots(work, asked.fractions)
    if len({pilot.tokens for pilot in pilots}) < 3:
        raise UserError("--runs", found="fewer than three amounts of data", expected="three", fix="Add a pilot.")
    curve = fit_curve([pilot.tokens for pilot in pilots], [pilot.parts for pilot in pilots])
    ratios = _step_ratios(asked, curve.num_draft_tokens)
    result = {
        "num_draft_tokens": curve.num_draft_tokens,
        "confidence": CONFIDENCE,
        "pilots": [_describe(pilot, data) for pilot in pilots],
        "full": {"samples": round(data.samples), "tokens": round(data.tokens)},
        "forecast": [_at(curve, tokens, data, ratios) for tokens in _amounts(asked, data)],
        "stops_paying": _end_of_gain(curve, pilots[0].tokens, data, asked.least_gain),
        "step_ratios": ratios,
        **_compare(curve, data, asked.actual),
    }
    write_json(work.output / "forecast.json", result)
    draw_forecast(result, curve, work.output / "forecast.png")
    show(result)
    print(f"forecast: -> {work.output / 'forecast.json'}, {work.output / 'forecast.png'}")
    return result


def _amounts(asked: Asked, data: Data) -> list[float]:
    return sorted({*(share * data.tokens for share in SHARES), *asked.budgets})


def _describe(pilot: Pilot, data: Data) -> dict[str, Any]:
    low, high = Acceptance.interval(pilot.parts, CONFIDENCE)
    return {
        "name": pilot.name,
        "samples": pilot.samples,
        "steps": pilot.steps,
        "tokens": round(pilot.tokens),
        "share": round(pilot.tokens / data.tokens, 4),
        "acceptance_length": round(pilot.acceptance_length, 4),
        "interval": [round(low, 4), round(high, 4)],
        "seconds": pilot.seconds,
        "trained_on": pilot.trained_on,
    }


def _summary(draws: np.ndarray) -> dict[str, Any]:
    low, middle, high = np.quantile(draws, [(1 - CONFIDENCE) / 2, 0.5, (1 + CONFIDENCE) / 2])
    return {"median": round(float(middle), 4), "interval": [round(float(low), 4), round(float(high), 4)]}


def _at(curve: Curve, tokens: float, data: Data, ratios: Mapping[str, float]) -> dict[str, Any]:
    """Return the forecast for an amount of data."""
    draws = curve.draw(tokens)
    return {
        "tokens": round(tokens),
        "share": round(tokens / data.tokens, 4),
        "acceptance_length": _summary(draws),
        "by_form": dict(zip(FORMS, map(_summary, curve.of_forms(tokens)), strict=True)),
        "speed_up": {name: _summary(draws / ratio) for name, ratio in ratios.items()},
    }


def _end_of_gain(curve: Curve, first: float, data: Data, least_gain: float) -> dict[str, Any]:
    """Return from how many tokens on twice as many give less than `least_gain` more; None: not within REACH."""
    grid = np.geomspace(first, REACH * data.tokens, 120)
    lengths = np.stack([curve.expected(tokens) for tokens in grid])  # (G, D)
    doubled = np.stack([curve.expected(2 * tokens) for tokens in grid])
    pays = doubled / lengths - 1 >= least_gain
    # The last amount that still pays: a curve may begin flat.
    last = np.where(pays.any(axis=0), len(grid) - 1 - np.argmax(pays[::-1], axis=0), 0)
    ends = np.where(last + 1 < len(grid), grid[np.minimum(last + 1, len(grid) - 1)], np.inf)
    low, middle, high = np.quantile(ends, [(1 - CONFIDENCE) / 2, 0.5, (1 + CONFIDENCE) / 2], method="nearest")
    full = curve.expected(2 * data.tokens) / curve.expected(data.tokens) - 1

    def shown(tokens: float) -> int | None:
        return round(float(tokens)) if np.isfinite(tokens) else None

    return {
        "least_gain": least_gain,
        "tokens": shown(middle),
        "interval": [shown(low), shown(high)],
        "searched_to": round(REACH * data.tokens),
        "gain_of_doubling_the_full_data": _summary(full),
    }


def _step_ratios(asked: Asked, num_draft_tokens: int) -> dict[str, float]:
    """Return the time of a step with the draft relative to one without, by name of what it was measured at."""
    if asked.step_ratio is not None:
        return {"stated": asked.step_ratio}
    if asked.served is None:
        return {}
    path = asked.served / "acceptance.json"
    found = read_json(path, "the report of `bench acceptance --conversations`").get("speeds") or []
    speeds = [Speeds.model_validate(one) for one in found]
    if not speeds or speeds[0].largest.draft_tokens != num_draft_tokens:
        raise UserError(
            path,
            found=f"K = {speeds[0].largest.draft_tokens}" if speeds else "no speeds",
            expected=f"speeds at K = {num_draft_tokens} and without a draft",
            fix="Run `bench acceptance --conversations` with the export of a pilot.",
        )
    return {f"concurrency {at.concurrency}": at.largest.step_ms / at.base.step_ms for at in speeds}


def _compare(curve: Curve, data: Data, actual: Path | None) -> dict[str, Any]:
    """Return how the forecast for the whole data compares with its evaluation: a back-test."""
    if actual is None:
        return {}
    report = read_json(actual, "the evaluation of the whole training (`train eval`)")
    length = Acceptance.pool(parts_of(report)).acceptance_length
    told = _summary(curve.draw(data.tokens))
    low, high = told["interval"]
    return {
        "actual": {
            "acceptance_length": round(length, 4),
            "inside": bool(low <= length <= high),
            "error": round(told["median"] / length - 1, 4),
        }
    }


def show(result: Mapping[str, Any]) -> None:
    """Print the pilots, the curve and where more data stops paying."""
    print(f"\n{'pilot':<12}{'samples':>9}{'steps':>8}{'tokens':>14}{'length':>9}  {'90% interval':<16}{'seconds':>9}")
    for pilot in result["pilots"]:
        print(
            f"{pilot['name']:<12}{pilot['samples']:>9}{pilot['steps']:>8}{pilot['tokens']:>14,}"
            f"{pilot['acceptance_length']:>9.3f}  {_interval(pilot['interval']):<16}{pilot['seconds']:>9.0f}"
        )
    forms = "".join(f"{name:>13}" for name in FORMS)
    ratios = "".join(f"{f'speed-up, {name}':>30}" for name in result["step_ratios"])
    print(f"\n{'of the data':<12}{'tokens':>14}{'length':>9}  {'90% interval':<16}{forms}{ratios}")
    for at in result["forecast"]:
        length = at["acceptance_length"]
        by_form = "".join(f"{at['by_form'][name]['median']:>13.3f}" for name in FORMS)
        told = [f"{gain['median']:.2f}x [{_interval(gain['interval'], 2)}]" for gain in at["speed_up"].values()]
        gains = "".join(f"{words:>30}" for words in told)
        print(
            f"{at['share']:<12.1%}{at['tokens']:>14,}{length['median']:>9.3f}  {_interval(length['interval']):<16}"
            f"{by_form}{gains}"
        )
    _show_end(result)


def _show_end(result: Mapping[str, Any]) -> None:
    end, full = result["stops_paying"], result["full"]
    names = [f"{tokens:,}" if tokens is not None else f"over {end['searched_to']:,}" for tokens in end["interval"]]
    told = f"{end['tokens']:,} tokens" if end["tokens"] is not None else f"more than {end['searched_to']:,} tokens"
    gain = end["gain_of_doubling_the_full_data"]
    print(f"\nTwice the data gives less than {end['least_gain']:.1%} more from {told} on [{names[0]}, {names[1]}].")
    print(
        f"Twice the full data ({full['tokens']:,} tokens) would give {gain['median']:+.1%} "
        f"[{gain['interval'][0]:+.1%}, {gain['interval'][1]:+.1%}]."
    )
    if not result["step_ratios"]:
        print(
            "For speed-ups, serve a pilot's export (`bench acceptance --conversations`) and give --served, or give "
            "--step-ratio."
        )
    if actual := result.get("actual"):
        where = "inside" if actual["inside"] else "outside"
        print(
            f"The whole training has {actual['acceptance_length']:.3f}: {where} the interval, median off by "
            f"{actual['error']:+.1%}."
        )


def _interval(edges: Sequence[float], digits: int = 3) -> str:
    return f"{edges[0]:.{digits}f} to {edges[1]:.{digits}f}"
