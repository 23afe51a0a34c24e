"""List the points of a serving sweep: layouts, loads, sizes, and which points are evaluated. Starts no server.

Reads: the recipe's `bench.sweep`.

The rules are InferenceMAX's for single-node sweeps, so figures can be compared with published ones.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from common.errors import UserError
from recipe.bench import LayoutSpace
from recipe.recipe import Recipe
from serve.flags import Sizes, size_flags

PROMPTS_PER_SLOT = 10
WARMUPS_PER_SLOT = 2
EVALUATED_SIZES = (8192, 1024)
EVALUATED_FROM = 16


@dataclass(frozen=True)
class Layout:
    """How a server uses its GPUs: tensor parallel size, expert parallel size, data-parallel attention."""

    tp: int
    ep: int = 1
    dp_attn: bool = False

    @property
    def name(self) -> str:
        """`tp8`, `tp8-ep8`, `tp8-ep8-dp`."""
        return f"tp{self.tp}" + (f"-ep{self.ep}" if self.ep > 1 else "") + ("-dp" if self.dp_attn else "")

    @property
    def num_gpus(self) -> int:
        return self.tp

    @property
    def flags(self) -> dict[str, Any]:
        """vLLM's flags without the dashes."""
        experts = {"enable-expert-parallel": True} if self.ep > 1 else {}
        if self.dp_attn:
            return {"tensor-parallel-size": 1, "data-parallel-size": self.tp, **experts}
        return {"tensor-parallel-size": self.tp, **experts}


@dataclass(frozen=True)
class Point:
    """One load on one layout: `concurrency` concurrent requests of at most `isl` input and `osl` output tokens."""

    layout: Layout
    isl: int
    osl: int
    concurrency: int
    is_evaluated: bool = False

    @property
    def scenario(self) -> str:
        """`8k1k` for 8192 in and 1024 out; `256-128` for sizes that are not multiples of 1024."""
        sizes = [f"{size // 1024}k" if size % 1024 == 0 else f"{size}" for size in (self.isl, self.osl)]
        return ("" if all(size.endswith("k") for size in sizes) else "-").join(sizes)

    @property
    def id(self) -> str:
        """Name of the point's files: `8k1k-tp8-ep8-dp-c256`."""
        return f"{self.scenario}-{self.layout.name}-c{self.concurrency}"

    @property
    def num_prompts(self) -> int:
        return PROMPTS_PER_SLOT * self.concurrency

    @property
    def num_warmups(self) -> int:
        return WARMUPS_PER_SLOT * self.concurrency

    def describe(self, num_draft_tokens: int) -> dict[str, Any]:
        """Return the point as JSON. `flags` size a server with `num_draft_tokens` for this point alone."""
        sizes = size_flags(Sizes(self.isl, self.osl, self.concurrency), num_draft_tokens)
        return {
            "id": self.id,
            "scenario": self.scenario,
            "layout": self.layout.name,
            "num_gpus": self.layout.num_gpus,
            "isl": self.isl,
            "osl": self.osl,
            "concurrency": self.concurrency,
            "num_prompts": self.num_prompts,
            "num_warmups": self.num_warmups,
            "evaluated": self.is_evaluated,
            "flags": {**self.layout.flags, **sizes},
        }


def plan_points(
    recipe: Recipe,
    layouts: Collection[str] = (),
    scenarios: Collection[str] = (),
    concurrencies: Collection[int] = (),
) -> list[Point]:
    """List the recipe's points in order, each once, filtered by layout, scenario and concurrency.

    Raises UserError if the recipe has no search space, or for a name that is not in it.
    """
    found = [
        Point(_layout(space), scenario.isl, scenario.osl, concurrency)
        for scenario in recipe.bench.sweep.scenarios
        for space in scenario.search_space
        for concurrency in space.concurrencies
    ]
    if not found:
        raise UserError(
            "bench.sweep.scenarios", found="none", expected="a search space", fix="See recipes/Tiny-DFlash/recipe.yaml."
        )
    points = mark_evaluated(dict.fromkeys(found))
    _check_known("--layout", layouts, (point.layout.name for point in points))
    _check_known("--scenario", scenarios, (point.scenario for point in points))
    _check_known("--concurrency", concurrencies, (point.concurrency for point in points))
    chosen = [
        point
        for point in points
        if (not layouts or point.layout.name in layouts)
        and (not scenarios or point.scenario in scenarios)
        and (not concurrencies or point.concurrency in concurrencies)
    ]
    if not chosen:
        raise UserError(
            "the filters", found="no point that matches all of them", expected="some", fix="Omit one of them."
        )
    return chosen


def evaluated_points(
    recipe: Recipe,
    layouts: Collection[str] = (),
    scenarios: Collection[str] = (),
    concurrencies: Collection[int] = (),
) -> list[Point]:
    """List the points at which `bench accuracy` asks its questions; none for a recipe without such points.

    Raises UserError if the filters leave none.
    """
    filters = (layouts, scenarios, concurrencies)
    points = plan_points(recipe, *filters) if recipe.bench.sweep.scenarios or any(filters) else []
    found = [point for point in points if point.is_evaluated]
    if any(filters) and not found:
        raise UserError(
            "the filters",
            found="no point that is evaluated",
            expected="one that `bench plan` marks as evaluated",
            fix="Omit them: a recipe without such points is evaluated on its own flags.",
        )
    return found


def mark_evaluated(points: Iterable[Point]) -> list[Point]:
    """Return the points, with those marked at which `bench accuracy` evaluates the target.

    InferenceMAX's rule for a node: among the 8k1k points from concurrency 16 on, separately with and without
    data-parallel attention, those at the highest and at the (upper) median of the distinct concurrencies.
    """
    points = list(points)
    chosen: set[Point] = set()
    for dp_attn in (False, True):
        group = [
            point
            for point in points
            if (point.isl, point.osl) == EVALUATED_SIZES
            and point.layout.dp_attn == dp_attn
            and point.concurrency >= EVALUATED_FROM
        ]
        distinct = sorted({point.concurrency for point in group})
        wanted = {distinct[-1], distinct[len(distinct) // 2]} if distinct else set()
        chosen |= {point for point in group if point.concurrency in wanted}
    return [replace(point, is_evaluated=point in chosen) for point in points]


def show_plan(points: Sequence[Point], num_draft_tokens: int, form: str) -> str:
    """Format the points as `table` or `json`. Raises UserError for another form."""
    rows = [point.describe(num_draft_tokens) for point in points]
    if form == "json":
        return json.dumps(rows, indent=1)
    if form != "table":
        raise UserError("--format", found=form, expected="table or json", fix="Correct it.")
    lines = [
        f"{'point':<24}{'in':>6}{'out':>6}{'at once':>9}{'prompts':>9}{'warm-up':>9}"
        f"{'context':>9}{'batched':>9}{'graphs':>8}  evaluated"
    ]
    for row in rows:
        flags = row["flags"]
        lines.append(
            f"{row['id']:<24}{row['isl']:>6}{row['osl']:>6}{row['concurrency']:>9}{row['num_prompts']:>9}"
            f"{row['num_warmups']:>9}{flags['max-model-len']:>9}{flags['max-num-batched-tokens']:>9}"
            f"{flags['max-cudagraph-capture-size']:>8}  {'yes' if row['evaluated'] else ''}".rstrip()
        )
    servers = {(point.scenario, point.layout) for point in points}
    evaluated = sum(point.is_evaluated for point in points)
    lines.append(
        f"{len(points)} points on {len(servers)} servers, {evaluated} of them evaluated (`bench accuracy`); with "
        f"{num_draft_tokens} draft tokens and without a draft: {2 * len(points)} points on {2 * len(servers)} servers"
    )
    return "\n".join(lines)


def _layout(space: LayoutSpace) -> Layout:
    return Layout(space.tp, space.ep, space.dp_attn)


def _check_known(where: str, wanted: Collection[Any], known: Iterable[Any]) -> None:
    names = list(dict.fromkeys(known))
    for name in wanted:
        if name not in names:
            raise UserError(where, found=str(name), expected=f"one of {', '.join(map(str, names))}", fix="Correct it.")
