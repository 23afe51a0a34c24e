"""Report a schedule of draft tokens: what it was chosen from, how it did under load, how to serve it.

Writes: OUTPUT/schedule.json, schedule.md (the tables, which are printed, too), schedule.png (the check), report.html.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.plots import draw_speeds
from bench.schedule_check import Checked
from bench.schedule_choice import Steps
from common.files import write_atomic, write_json
from common.html import Table, write_page
from contracts.schedule import SCHEDULE_KEY, draft_tokens_at

TEMPLATE = Path(__file__).with_name("schedule.html.j2")


def write_report(report: Mapping[str, Any], steps: Steps, checked: Sequence[Checked], output: Path) -> None:
    """Write all files, and print the tables. `report` is the content of schedule.json."""
    ranges, predicted, measured = list_ranges(report), list_steps(report, steps), list_check(checked)
    how = explain_use(report)
    parts = ["Draft tokens (K) by batch size:", to_markdown(ranges), *how, *report["warnings"]]
    parts += ["Tokens/s at the measured batch sizes, and ms of a step; `~`: predicted:", to_markdown(predicted)]
    if checked:
        parts += ["Under load, tokens/s, and the schedule's ratio to others:", to_markdown(measured)]
        draw_speeds(_series(checked), output / "schedule.png")
    text = "\n\n".join(parts) + "\n"
    write_json(output / "schedule.json", report)
    write_atomic(output / "schedule.md", text)
    write_page(
        output / "report.html",
        TEMPLATE,
        title="Draft tokens by batch size",
        draft=report["draft"],
        ranges=ranges,
        how=how,
        warnings=report["warnings"],
        steps=predicted,
        check=measured if checked else None,
        plot=output / "schedule.png",
    )
    print(f"\n{text}")


def explain_use(report: Mapping[str, Any]) -> list[str]:
    """Return how to serve the schedule, as paragraphs; the second is a part of a recipe."""
    schedule = report[SCHEDULE_KEY]
    if not any(k for _, _, k in schedule):
        return ["No number of draft tokens is faster than none: serve the target without this draft."]
    keys = {key: report[key] for key in ("num_speculative_tokens", SCHEDULE_KEY)}
    lines = ["serve:", "  speculative:", *(f"    {key}: {json.dumps(value)}" for key, value in keys.items())]
    return ["Put it into the recipe for `serve command`:", "\n".join(f"    {line}" for line in lines)]


def list_ranges(report: Mapping[str, Any]) -> Table:
    """List the schedule's ranges of batch sizes."""
    rows = [(f"{first} to {last}" if first < last else str(first), k) for first, last, k in report[SCHEDULE_KEY]]
    return Table(("batch size", "K"), rows)


def list_steps(report: Mapping[str, Any], steps: Steps) -> Table:
    """List tokens/s and the time of a step at each measured batch size by K, and the chosen K."""
    rows = []
    for size in steps.batch_sizes:
        speeds = steps.tokens_per_s(size)
        cells = [
            f"{'' if k in report['measured'] else '~'}{speeds[k]:.1f} ({steps.ms[size][k]:.2f} ms)"
            for k in steps.numbers
        ]
        rows.append((size, *cells, draft_tokens_at(report[SCHEDULE_KEY], size)))
    lengths = tuple(f"{steps.lengths[k]:.3f}" for k in steps.numbers)
    rows.append(("tokens a step", *lengths, ""))
    return Table(("batch size", *(f"K = {k}" for k in steps.numbers), "chosen"), rows)


def list_check(checked: Sequence[Checked]) -> Table:
    """List the speeds of all servers under load, and the schedule's ratios with their intervals."""
    names = list(checked[0].tokens_per_s) if checked else []
    rows = [
        (
            at.concurrency,
            *(f"{at.tokens_per_s[name]:.1f}" for name in names),
            f"{at.drafted:.2f}",
            f"{at.fixed}{' slower' if at.fixed.is_slower else ''}",
            f"{at.none}{' slower' if at.none.is_slower else ''}",
        )
        for at in checked
    ]
    return Table(("concurrency", *names, "drafted a step", "to the best fixed K [95%]", "to no draft [95%]"), rows)


def to_markdown(table: Table) -> str:
    """Format a table as Markdown."""
    lines = [table.columns, ["---:"] * len(table.columns), *table.rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def _series(checked: Sequence[Checked]) -> dict[str, dict[int, float]]:
    names = checked[0].tokens_per_s
    return {name: {at.concurrency: at.tokens_per_s[name] for at in checked} for name in names}
