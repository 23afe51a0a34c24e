"""The forecast as one picture: pilots, the curve with its interval, and the curve of each form."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from train.extrapolate import FORMS, Curve

NUM_POINTS = 60


def draw_forecast(result: Mapping[str, Any], curve: Curve, output: Path) -> None:
    """Draw the forecast as a PNG. `result`: what `train forecast` writes."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    pilots, full, confidence = result["pilots"], result["full"]["tokens"], result["confidence"]
    first, last = pilots[0]["tokens"] / 1.5, max(at["tokens"] for at in result["forecast"])
    grid = np.geomspace(first, last, NUM_POINTS)
    levels = [(1 - confidence) / 2, 0.5, (1 + confidence) / 2]
    low, middle, high = np.quantile(np.stack([curve.draw(tokens) for tokens in grid]), levels, axis=1)
    forms = np.median(np.stack([curve.of_forms(tokens) for tokens in grid]), axis=2)  # (points, forms)
    figure, axis = pyplot.subplots(figsize=(8, 5), constrained_layout=True)
    axis.fill_between(grid, low, high, alpha=0.2, label=f"{confidence:.0%} interval of a training")
    axis.plot(grid, middle, label="median")
    for name, values in zip(FORMS, forms.T, strict=True):
        axis.plot(grid, values, "--", linewidth=0.8, label=name)
    lengths = np.array([pilot["acceptance_length"] for pilot in pilots])
    edges = np.array([pilot["interval"] for pilot in pilots]).T
    axis.errorbar(
        [pilot["tokens"] for pilot in pilots], lengths, np.abs(edges - lengths), fmt="ko", capsize=3, label="pilots"
    )
    axis.axvline(full, color="grey", linewidth=0.8)
    axis.annotate("full data", (full, axis.get_ylim()[0]), textcoords="offset points", xytext=(4, 6), color="grey")
    if actual := result.get("actual"):
        axis.plot([full], [actual["acceptance_length"]], "r*", markersize=12, label="the whole training")
    axis.set_xscale("log")
    axis.set_xlabel("supervised tokens")
    axis.set_ylabel(f"acceptance length at K = {result['num_draft_tokens']}")
    axis.grid(alpha=0.3)
    axis.legend(fontsize="small")
    figure.savefig(output, dpi=120)
    pyplot.close(figure)
