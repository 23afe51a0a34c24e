"""Report a comparison: a table for the terminal, and a page with tables and plots.

Writes: OUTPUT/report.html (one file, plots included) and the plots as PNG.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.plots import draw_plots
from common.html import Table, write_page

TEMPLATE = Path(__file__).with_name("compare.html.j2")


def write_report(result: dict[str, Any], output: Path) -> None:
    """Draw the plots and write the page. `result` is the content of compare.json."""
    write_page(
        output / "report.html",
        TEMPLATE,
        title="Gain of the draft under load",
        sweeps=result["sweeps"],
        plots=draw_plots(result, output),
        break_evens=_list_break_evens(result["curves"]),
        uplifts=_list_uplifts(result["curves"]),
        points=_list_points(result["points"]),
        acceptance=result["acceptance"],
        acceptance_tables=_list_lengths(result["acceptance"]),
    )


def _list_break_evens(curves: Sequence[dict[str, Any]]) -> Table:
    rows = []
    for curve in curves:
        best = max(curve["points"], key=lambda point: point["uplift"])
        rows.append((*_place(curve), f"{best['uplift']:+.2%}", best["concurrency"], curve["break_even_in_words"]))
    return Table(("scenario", "layout", "compared", "best uplift", "at concurrency", "break-even"), rows, num_text=3)


def _list_uplifts(curves: Sequence[dict[str, Any]]) -> Table:
    columns = ("scenario", "layout", "compared", "concurrency", "tokens/s before", "tokens/s after", "uplift")
    rows = [
        (
            *_place(curve),
            point["concurrency"],
            f"{point['base']:,.2f}",
            f"{point['draft']:,.2f}",
            f"{point['uplift']:+.2%}",
        )
        for curve in curves
        for point in curve["points"]
    ]
    return Table(columns, rows, num_text=3)


def _place(curve: dict[str, Any]) -> tuple[str, str, str]:
    return curve["scenario"], curve["layout"], f"{curve['name']} over {curve['over']}"


def _list_points(series: dict[str, list[dict[str, Any]]]) -> Table:
    columns = (
        "scenario", "layout", "series", "concurrency", "tokens/s", "output/s", "per user", "TTFT p50 / p99",
        "TPOT p50 / p99", "E2EL p50 / p99", "length", "done / failed",
    )  # fmt: skip
    return Table(columns, [_point(label, point) for label, points in series.items() for point in points], num_text=3)


def _point(label: str, point: dict[str, Any]) -> tuple[object, ...]:
    ttft, tpot, e2el = (point["latency_ms"][name] for name in ("ttft", "tpot", "e2el"))
    return (
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


def _list_lengths(acceptance: dict[str, Any]) -> list[Table]:
    """List acceptance length and rate, one column per draft: a table by dataset and one by category."""
    names = list(acceptance)
    tables = []
    for key, what in (("by_dataset", "dataset"), ("by_category", "category")):
        parts = list(dict.fromkeys(part for draft in acceptance.values() for part in draft[key]))
        rows = [[part, *(_length(acceptance[name][key].get(part)) for name in names)] for part in parts]
        rows.append(["all", *(_length(acceptance[name]["all"]) for name in names)])
        tables.append(Table((what, *names), rows))
    return tables


def _length(figures: dict[str, Any] | None) -> str:
    return "" if figures is None else f"{figures['acceptance_length']:.3f} ({figures['acceptance_rate']:.1%})"


def make_table(curves: Sequence[dict[str, Any]]) -> str:
    """Format the uplifts as text."""
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
