"""Draw the plots of a comparison, one PNG each: uplift, throughput, throughput against speed per user, acceptance.

Also the plot of a schedule's check.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

COLOURS = ("#2a6f97", "#bc6c25")  # drafts
BASE_COLOURS = ("#9db4c0", "#c9b79c")  # their baselines
MARKERS = "osD^vP*X"


def draw_plots(result: dict[str, Any], folder: Path) -> dict[str, Path]:
    """Draw the plots for which `result` (the content of compare.json) has data; return the files by name."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figures = {
        "uplift": _draw_uplift(pyplot, result["curves"]),
        "throughput": _draw_throughput(pyplot, result["points"]),
        "pareto": _draw_pareto(pyplot, result["points"]),
    }
    if result["acceptance"]:
        figures["categories"] = _draw_categories(pyplot, result["acceptance"])
        figures["positions"] = _draw_positions(pyplot, result["acceptance"])
    for name, figure in figures.items():
        figure.savefig(folder / f"{name}.png", dpi=130)
        pyplot.close(figure)
    return {name: folder / f"{name}.png" for name in figures}


def draw_speeds(series: Mapping[str, Mapping[int, float]], path: Path) -> None:
    """Draw tokens/s by concurrency, a line for each of `series`; the first one stands out."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(7, 3.8), constrained_layout=True)
    for number, (label, speeds) in enumerate(series.items()):
        style = {"color": COLOURS[0], "linewidth": 2.2, "zorder": 3} if number == 0 else {"alpha": 0.7}
        axis.plot(list(speeds), list(speeds.values()), MARKERS[number % len(MARKERS)] + "-", label=label, **style)
    _log2(axis, sorted({concurrency for speeds in series.values() for concurrency in speeds}))
    _tidy(axis, "concurrency", "tokens/s")
    axis.set_ylim(bottom=0)
    _legend(figure)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def pareto(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the points that no other point exceeds in both coordinates, ordered by the first."""
    best: list[tuple[float, float]] = []
    for x, y in sorted(set(points), reverse=True):
        if not best or y > best[-1][1]:
            best.append((x, y))
    return best[::-1]


def _colour(labels: Sequence[str], label: str, points: dict[str, Any]) -> str:
    kind = points[label][0]["kind"]
    same = [other for other in labels if points[other][0]["kind"] == kind]
    return (BASE_COLOURS if kind == "base" else COLOURS)[same.index(label) % 2]


def _panels(pyplot: Any, places: Sequence[tuple[str, str]]) -> tuple[Any, dict[tuple[str, str], Any]]:
    """Make axes per scenario and layout, three in a row."""
    places = list(dict.fromkeys(places))
    columns = min(3, len(places))
    rows = math.ceil(len(places) / columns)
    size = (max(7.5, 4.0 * columns), max(3.8, 2.9 * rows + 0.5))
    figure, grid = pyplot.subplots(rows, columns, figsize=size, squeeze=False, constrained_layout=True)
    figure.get_layout_engine().set(h_pad=0.1, w_pad=0.08)
    for axis in grid.flat[len(places) :]:
        axis.set_visible(False)
    for axis, place in zip(grid.flat, places, strict=False):
        axis.set_title(", ".join(place), fontsize="medium")
    return figure, dict(zip(places, grid.flat, strict=False))


def _tidy(axis: Any, x: str, y: str) -> None:
    axis.set_xlabel(x)
    axis.set_ylabel(y)
    axis.grid(alpha=0.3)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)


def _legend(figure: Any) -> None:
    """Draw one legend for all panels, above them."""
    known = {label: line for axis in figure.axes for line, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    place = {"loc": "outside upper left", "ncols": 4}
    figure.legend(known.values(), known.keys(), frameon=False, fontsize="small", **place)


def _log2(axis: Any, concurrencies: Sequence[int]) -> None:
    axis.set_xscale("log", base=2)
    axis.set_xticks(concurrencies, [str(concurrency) for concurrency in concurrencies])
    axis.minorticks_off()


def _draw_uplift(pyplot: Any, curves: Sequence[dict[str, Any]]) -> Any:
    figure, axes = _panels(pyplot, [(curve["scenario"], curve["layout"]) for curve in curves])
    for place, axis in axes.items():
        here = [curve for curve in curves if (curve["scenario"], curve["layout"]) == place]
        concurrencies = sorted({point["concurrency"] for curve in here for point in curve["points"]})
        width = 0.8 / len(here)
        colours = (*COLOURS, "#6d597a")
        for number, curve in enumerate(here):
            at = [concurrencies.index(point["concurrency"]) + (number + 0.5) * width - 0.4 for point in curve["points"]]
            heights = [100 * point["uplift"] for point in curve["points"]]
            label = f"{curve['name']} over {curve['over']}"
            bars = axis.bar(at, heights, 0.92 * width, label=label, color=colours[number % len(colours)])
            if len(here) == 1:
                axis.bar_label(bars, fmt="%+.0f", fontsize="x-small", padding=2)
        axis.margins(y=0.15)
        axis.axhline(0, color="#444", linewidth=0.8)
        axis.set_xticks(range(len(concurrencies)), [str(concurrency) for concurrency in concurrencies])
        _tidy(axis, "concurrency", "uplift of total tokens/s (%)")
        axis.grid(visible=False, axis="x")
    _legend(figure)
    return figure


def _draw_throughput(pyplot: Any, points: dict[str, list[dict[str, Any]]]) -> Any:
    figure, axes = _panels(pyplot, [(p["scenario"], p["layout"]) for series in points.values() for p in series])
    for place, axis in axes.items():
        seen: set[int] = set()
        for label, series in points.items():
            here = sorted(
                (p["concurrency"], p["total_tokens_per_s"]) for p in series if (p["scenario"], p["layout"]) == place
            )
            if here:
                axis.plot(*zip(*here, strict=True), "o-", label=label, color=_colour(list(points), label, points))
                seen |= {concurrency for concurrency, _ in here}
        _log2(axis, sorted(seen))
        axis.set_ylim(bottom=0)
        _tidy(axis, "concurrency", "total tokens/s")
    _legend(figure)
    return figure


def _draw_pareto(pyplot: Any, points: dict[str, list[dict[str, Any]]]) -> Any:
    """Draw all points, and a line through the Pareto front. Markers distinguish layouts."""
    every = [p for series in points.values() for p in series]
    scenarios = list(dict.fromkeys(p["scenario"] for p in every))
    layouts = list(dict.fromkeys(p["layout"] for p in every))
    figure, axes = _panels(pyplot, [(scenario, "all layouts") for scenario in scenarios])
    for (scenario, _), axis in axes.items():
        for label, series in points.items():
            colour = _colour(list(points), label, points)
            here = [p for p in series if p["scenario"] == scenario and p["tokens_per_s_per_user"]]
            front = pareto([(p["tokens_per_s_per_user"], p["tokens_per_s_per_gpu"]) for p in here])
            for p in here:
                at = p["tokens_per_s_per_user"], p["tokens_per_s_per_gpu"]
                marker = MARKERS[layouts.index(p["layout"]) % len(MARKERS)]
                axis.plot(*at, marker, color=colour, markersize=5, alpha=1.0 if at in front else 0.3)
                if at in front:
                    text = {"textcoords": "offset points", "fontsize": 6, "color": "#666"}
                    axis.annotate(str(p["concurrency"]), at, (4, 4), **text)
            if front:
                axis.plot(*zip(*front, strict=True), "-", color=colour, label=label)
        if len(layouts) > 1:
            for number, layout in enumerate(layouts):
                axis.plot([], [], MARKERS[number % len(MARKERS)], color="#666", label=layout, markersize=5)
        _tidy(axis, "tokens/s per user (1000 / median TPOT in ms)", "total tokens/s per GPU")
        axis.set_xlim(left=0)
        axis.set_ylim(bottom=0)
    _legend(figure)
    return figure


def _draw_categories(pyplot: Any, acceptance: dict[str, Any]) -> Any:
    names = list(dict.fromkeys(name for draft in acceptance.values() for name in draft["by_category"]))
    figure, axis = pyplot.subplots(figsize=(8, max(2.4, 0.34 * len(names) + 1)), constrained_layout=True)
    height = 0.8 / len(acceptance)
    for number, (label, draft) in enumerate(acceptance.items()):
        rows = [(i, draft["by_category"][name]) for i, name in enumerate(names) if name in draft["by_category"]]
        at = [i + (number + 0.5) * height - 0.4 for i, _ in rows]
        lengths = [figures["acceptance_length"] for _, figures in rows]
        bars = axis.barh(at, lengths, 0.92 * height, label=label, color=COLOURS[number % 2])
        axis.bar_label(bars, fmt="%.2f", fontsize="x-small", padding=2)
    axis.set_yticks(range(len(names)), names, fontsize="small")
    axis.invert_yaxis()
    _tidy(axis, "acceptance length (tokens per step)", "")
    axis.grid(visible=False, axis="y")
    _legend(figure)
    return figure


def _draw_positions(pyplot: Any, acceptance: dict[str, Any]) -> Any:
    figure, axis = pyplot.subplots(figsize=(7, 3.6), constrained_layout=True)
    width = 0.8 / len(acceptance)
    for number, (label, draft) in enumerate(acceptance.items()):
        shares = draft["all"]["per_position"]
        at = [i + 1 + (number + 0.5) * width - 0.4 for i in range(len(shares))]
        label = f"{label}: {draft['all']['acceptance_length']:.2f} tokens per step"
        bars = axis.bar(at, shares, 0.92 * width, label=label, color=COLOURS[number % 2])
        axis.bar_label(bars, fmt="%.2f", fontsize="x-small", padding=2)
    axis.set_xticks(range(1, 1 + max(len(draft["all"]["per_position"]) for draft in acceptance.values())))
    axis.set_ylim(0, 1.08)
    _tidy(axis, "draft position", "share of steps that accept it")
    axis.grid(visible=False, axis="x")
    _legend(figure)
    return figure
