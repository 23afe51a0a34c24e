"""Compare a draft with no draft, or two drafts, under load: uplift, break-even concurrency, acceptance.

Reads:  one or two sweeps (`bench sweep`; one of two may have no baseline), acceptance by prompt set.
Writes: OUTPUT/compare.json, the plots as PNG, and report.html with tables and plots in one file.

Uplift is draft / base - 1 on total tokens/s (input and output), at equal concurrency, layout and scenario.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench.compare_report import make_table, write_report
from bench.sweep import SWEEP_FILE
from common.errors import UserError
from common.files import read_json, write_json
from contracts.acceptance import Acceptance


@dataclass(frozen=True)
class Curve:
    """Uplift of one series over another on one layout and scenario.

    `points` are `(concurrency, tokens/s before, tokens/s after)`.
    """

    scenario: str
    layout: str
    name: str
    over: str
    points: list[tuple[int, float, float]]

    @property
    def uplifts(self) -> list[tuple[int, float]]:
        return [(concurrency, uplift(before, after)) for concurrency, before, after in self.points]

    def to_json(self) -> dict[str, Any]:
        return {
            **asdict(self),
            "points": [
                {"concurrency": concurrency, "base": before, "draft": after, "uplift": round(uplift(before, after), 4)}
                for concurrency, before, after in self.points
            ],
            "break_even": break_even(self.uplifts),
            "break_even_in_words": tell_break_even(self.uplifts),
        }


def compare(sweeps: Sequence[Path], acceptance: Sequence[Path], output: Path) -> dict[str, Any]:
    """Write the comparison and return the content of compare.json.

    Raises UserError for sweeps of different targets, or if no point can be compared.
    """
    names = name_folders(sweeps)
    found = {name: read_json(folder / SWEEP_FILE, "a sweep") for name, folder in zip(names, sweeps, strict=True)}
    targets = {read_json(folder / "run.json", "a sweep")["inputs"]["target"] for folder in sweeps}
    if len(targets) > 1:
        raise UserError(
            ", ".join(map(str, sweeps)), found="two targets", expected="drafts of the same one", fix="Compare those."
        )
    alone = len(names) == 1
    labels = {
        (name, kind): plain if alone else other
        for name in names
        for kind, plain, other in (("base", "no draft", f"no draft ({name})"), ("draft", "draft", name))
    }
    series = {
        label: [p for p in found[name]["points"] if p["kind"] == kind and p["status"] == "done"]
        for (name, kind), label in labels.items()
    }
    # A sweep without a baseline uses the other sweep's.
    with_base = [name for name in names if series[labels[name, "base"]]] or names
    pairs = [(labels[name if name in with_base else with_base[0], "base"], labels[name, "draft"]) for name in names]
    pairs += [] if alone else [(names[0], names[1])]
    curves = [curve for over, name in pairs for curve in pair(series[over], series[name], name, over)]
    if not curves:
        raise UserError(
            ", ".join(map(str, sweeps)),
            found="no point that was measured twice",
            expected="the same points with a draft and without, or of two drafts",
            fix="Run `bench sweep` with --draft, and without --no-baseline.",
        )
    drafts = {name: pool_rows(folder) for name, folder in zip(name_folders(acceptance), acceptance, strict=True)}
    result: dict[str, Any] = {
        "sweeps": {
            name: {"folder": str(folder), "draft": found[name]["draft"]}
            for name, folder in zip(names, sweeps, strict=True)
        },
        "curves": [curve.to_json() for curve in curves],
        "points": {label: points for label, points in series.items() if points},
        "acceptance": drafts,
    }
    write_json(output / "compare.json", result)
    write_report(result, output)
    print(make_table(result["curves"]))
    print(f"bench: {output / 'report.html'}")
    return result


def uplift(base: float, draft: float) -> float:
    """Return `draft / base - 1`, the gain in tokens/s."""
    return draft / base - 1


def break_even(points: Sequence[tuple[int, float]]) -> float | None:
    """Return the concurrency at which the uplift of `points` becomes 0; None if it does not cross 0.

    Points are `(concurrency, uplift)`. Interpolates between the last point with a gain and the next one, linearly in
    the logarithm of the concurrency, since sweeps double the concurrency.
    """
    ordered = sorted(points)
    last = max((i for i, (_, gain) in enumerate(ordered) if gain > 0), default=None)
    if last is None or last + 1 == len(ordered):
        return None
    (before, gain), (after, loss) = ordered[last], ordered[last + 1]
    return round(before * (after / before) ** (gain / (gain - loss)), 2)


def tell_break_even(points: Sequence[tuple[int, float]]) -> str:
    """Describe `break_even` as text, also if uplift does not cross 0."""
    ordered = sorted(points)
    crossing = break_even(ordered)
    if crossing is not None:
        return f"{crossing:.1f}"
    if ordered[-1][1] > 0:
        return f"none up to {ordered[-1][0]}"
    return f"none: slower from {ordered[0][0]} on"


def pair(before: Sequence[dict[str, Any]], after: Sequence[dict[str, Any]], name: str, over: str) -> list[Curve]:
    """Make a curve per layout and scenario, from the points that both series have."""
    known = {(p["scenario"], p["layout"], p["concurrency"]): p["total_tokens_per_s"] for p in before}
    curves: dict[tuple[str, str], list[tuple[int, float, float]]] = defaultdict(list)
    for point in after:
        scenario, layout, concurrency = point["scenario"], point["layout"], point["concurrency"]
        if (base := known.get((scenario, layout, concurrency))) is not None:
            curves[scenario, layout].append((concurrency, base, point["total_tokens_per_s"]))
    return [Curve(scenario, layout, name, over, sorted(points)) for (scenario, layout), points in curves.items()]


def pool_rows(folder: Path) -> dict[str, Any]:
    """Pool a `bench acceptance` folder's rows of the largest K, by dataset and category.

    Raises UserError if it has no rows by prompt set.
    """
    path = folder / "acceptance.json"
    rows = read_json(path, "the output of `bench acceptance`").get("rows")
    if not rows:
        raise UserError(
            path, found="no rows", expected="acceptance by prompt set", fix="Run `bench acceptance --prompts`."
        )
    most = max(row["num_draft_tokens"] for row in rows)
    parts: dict[tuple[str, str], list[Acceptance]] = defaultdict(list)
    for row in rows:
        if row["num_draft_tokens"] == most:
            parts[row["dataset"], row["category"]].append(Acceptance(tuple(row["histogram"])))
    by_dataset: dict[str, list[Acceptance]] = defaultdict(list)
    for (dataset, _), accepted in parts.items():
        by_dataset[dataset] += accepted
    return {
        "num_draft_tokens": most,
        "all": Acceptance.pool(part for accepted in parts.values() for part in accepted).summary(),
        "by_dataset": {name: Acceptance.pool(accepted).summary() for name, accepted in by_dataset.items()},
        "by_category": {
            f"{dataset} / {category}" if category else dataset: Acceptance.pool(accepted).summary()
            for (dataset, category), accepted in parts.items()
        },
    }


def name_folders(folders: Sequence[Path]) -> list[str]:
    """Return a name for each folder: its own, or the path if two folders have the same name."""
    names = [folder.resolve().name for folder in folders]
    return names if len(set(names)) == len(names) else [str(folder) for folder in folders]
