"""The comparison for people: a table for the terminal, and report.html with tables and plots in one file.

Reads:  nothing; takes the content of compare.json.
Writes: OUTPUT/report.html and the plots as PNG.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.html import Page
from bench.plots import draw_plots


def write_report(result: dict[str, Any], output: Path) -> None:
    """Draw the plots and write the page."""
    plots = draw_plots(result, output)
    page = Page("What the draft is worth under load")
    for name, sweep in result["sweeps"].items():
        page.text(f"{name}: draft {sweep['draft'] or 'none'}, points of {sweep['folder']}.")
    page.text("Total tokens/s count input and output. Greedy; clean servers without prefix caching; vLLM's own load.")
    page.heading("Break-even")
    page.text("The concurrency at which the draft stops paying: uplift crosses 0, linear in log2 of concurrency.")
    page.table(
        ("scenario", "layout", "compared", "best uplift", "at concurrency", "break-even"),
        [
            (
                curve["scenario"],
                curve["layout"],
                f"{curve['name']} over {curve['over']}",
                f"{best['uplift']:+.2%}",
                best["concurrency"],
                curve["break_even_in_words"],
            )
            for curve in result["curves"]
            for best in [max(curve["points"], key=lambda point: point["uplift"])]
        ],
        num_text=3,
    )
    page.heading("Uplift")
    page.picture(plots["Uplift by concurrency"], "Uplift by concurrency")
    page.table(
        ("scenario", "layout", "compared", "concurrency", "tokens/s before", "tokens/s after", "uplift"),
        [
            (
                curve["scenario"],
                curve["layout"],
                f"{curve['name']} over {curve['over']}",
                point["concurrency"],
                f"{point['base']:,.2f}",
                f"{point['draft']:,.2f}",
                f"{point['uplift']:+.2%}",
            )
            for curve in result["curves"]
            for point in curve["points"]
        ],
        num_text=3,
    )
    for title in ("Throughput by concurrency", "Throughput per GPU against speed per user"):
        page.heading(title)
        page.picture(plots[title], title)
    page.text("Numbers beside the points are concurrencies; up and to the right is better.")
    _add_points(page, result["points"])
    if result["acceptance"]:
        _add_acceptance(page, result["acceptance"], plots)
    page.write(output / "report.html")


def _add_points(page: Page, series: dict[str, list[dict[str, Any]]]) -> None:
    page.heading("Every point")
    page.text("Latencies in ms: time to first token, time per output token, end to end.")
    rows = []
    for label, points in series.items():
        for point in points:
            ttft, tpot, e2el = (point["latency_ms"][name] for name in ("ttft", "tpot", "e2el"))
            rows.append(
                (
                    point["scenario"],
                    point["layout"],
                    label,
                    point["concurrency"],
                    f"{point['total_tokens_per_s']:,.1f}",
                    f"{point['output_tokens_per_s']:,.1f}",
                    f"{point['tokens_per_s_per_user'] or 0:,.1f}",
                    f"{ttft['p50']:,.0f} / {ttft['p99']:,.0f}",
                    f"{tpot['p50']:,.2f} / {tpot['p99']:,.2f}",
                    f"{e2el['p50']:,.0f} / {e2el['p99']:,.0f}",
                    f"{point['acceptance']['acceptance_length']:.3f}" if point["acceptance"] else "",
                    f"{point['completed']} / {point['failed']}",
                )
            )
    columns = (
        "scenario", "layout", "series", "at once", "tokens/s", "output/s", "a user", "TTFT p50 / p99",
        "TPOT p50 / p99", "E2EL p50 / p99", "accepted", "done / failed",
    )  # fmt: skip
    page.table(columns, rows, num_text=3)


def _add_acceptance(page: Page, acceptance: dict[str, Any], plots: dict[str, Path]) -> None:
    page.heading("Acceptance")
    page.text(
        "Tokens a step, the bonus token included; all modes and temperatures, pooled by adding steps. Draft tokens: "
        + ", ".join(f"{name} {draft['num_draft_tokens']}" for name, draft in acceptance.items())
    )
    for title in ("Acceptance by category", "Acceptance by position"):
        page.picture(plots[title], title)
    names = list(acceptance)
    for key, what in (("by_dataset", "dataset"), ("by_category", "category")):
        rows = list(dict.fromkeys(row for draft in acceptance.values() for row in draft[key]))
        cells = [[row, *(_length(acceptance[name][key].get(row)) for name in names)] for row in [*rows]]
        cells.append(["all", *(_length(acceptance[name]["all"]) for name in names)])
        page.table((what, *names), cells)


def _length(figures: dict[str, Any] | None) -> str:
    return "" if figures is None else f"{figures['acceptance_length']:.3f} ({figures['acceptance_rate']:.1%})"


def make_table(curves: Sequence[dict[str, Any]]) -> str:
    """Uplift as the field prints it."""
    lines = []
    for curve in curves:
        lines.append(f"\n{curve['scenario']} {curve['layout']}: {curve['name']} over {curve['over']}, total tokens/s")
        lines.append(f"{'concurrency':>13}{'before':>14}{'after':>14}{'uplift':>12}")
        for point in curve["points"]:
            lines.append(
                f"{point['concurrency']:>13}{point['base']:>14,.2f}{point['draft']:>14,.2f}{point['uplift']:>+12.2%}"
            )
        lines.append(f"  break-even concurrency: {curve['break_even_in_words']}")
    return "\n".join(lines)
