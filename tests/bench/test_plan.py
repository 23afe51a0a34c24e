"""Claims about planning a sweep: the published search space gives the published points, sizes and evaluations."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from conftest import ROOT, run

from bench.plan import Layout, Point, mark_evaluated, plan_points
from common.errors import UserError
from recipe.bench import LayoutSpace
from recipe.load import load_recipe
from recipe.recipe import Recipe

M3 = ROOT / "recipes/MiniMax-M3-DFlash/eagle3.yaml"
TINY = ROOT / "recipes/Tiny-DFlash/recipe.yaml"


@pytest.fixture(scope="module")
def m3() -> Recipe:
    return load_recipe(M3)


def test_the_published_search_space_gives_53_points_and_evaluates_5(m3: Recipe) -> None:
    points = plan_points(m3)
    assert Counter(point.scenario for point in points) == {"1k1k": 28, "8k1k": 25}
    assert len({point.id for point in points}) == 53
    assert {point.id for point in points if point.is_evaluated} == {
        "8k1k-tp8-c64", "8k1k-tp8-ep8-c64", "8k1k-tp4-c64", "8k1k-tp8-ep8-c256", "8k1k-tp8-ep8-dp-c256",
    }  # fmt: skip


def test_sizes_follow_the_load(m3: Recipe) -> None:
    rows = {point.id: point.describe(num_draft_tokens=3) for point in plan_points(m3)}
    first, last = rows["1k1k-tp8-c1"], rows["8k1k-tp8-ep8-dp-c256"]
    assert (first["flags"]["max-model-len"], first["flags"]["max-num-batched-tokens"]) == (2304, 2048)
    assert (last["flags"]["max-model-len"], last["flags"]["max-num-batched-tokens"]) == (9472, 16384)
    assert (last["num_prompts"], last["num_warmups"]) == (2560, 512)
    captured = {row["concurrency"]: row["flags"]["max-cudagraph-capture-size"] for row in rows.values()}
    assert [captured[2**i] for i in range(10)] == [4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048]


@pytest.mark.parametrize(
    ("layout", "name", "flags"),
    [
        (Layout(8), "tp8", {"tensor-parallel-size": 8}),
        (Layout(8, 8), "tp8-ep8", {"tensor-parallel-size": 8, "enable-expert-parallel": True}),
        (
            Layout(8, 8, dp_attn=True),
            "tp8-ep8-dp",
            {"tensor-parallel-size": 1, "data-parallel-size": 8, "enable-expert-parallel": True},
        ),
    ],
)
def test_each_layout_has_its_flags(layout: Layout, name: str, flags: dict[str, object]) -> None:
    assert (layout.name, layout.flags, layout.num_gpus) == (name, flags, 8)


def test_concurrency_doubles_and_ends_where_it_is_told() -> None:
    assert LayoutSpace(conc_start=4, conc_end=32).concurrencies == [4, 8, 16, 32]
    assert LayoutSpace(conc_start=4, conc_end=24).concurrencies == [4, 8, 16, 24]
    assert LayoutSpace(conc_start=4, conc_end=4).concurrencies == [4]


def test_evaluated_is_the_upper_median_of_distinct_concurrencies_from_16_on() -> None:
    points = [Point(Layout(8), 8192, 1024, concurrency) for concurrency in (1, 8, 16, 32, 64, 128)]
    assert [point.concurrency for point in mark_evaluated(points) if point.is_evaluated] == [64, 128]
    assert not any(point.is_evaluated for point in mark_evaluated(points[:2]))


def test_filters_leave_their_points_and_evaluations_stay_as_they_were(m3: Recipe) -> None:
    points = plan_points(m3, layouts=["tp8", "tp4"], scenarios=["8k1k"], concurrencies=[32, 64])
    assert [(point.id, point.is_evaluated) for point in points] == [
        ("8k1k-tp8-c32", False), ("8k1k-tp8-c64", True), ("8k1k-tp4-c32", False), ("8k1k-tp4-c64", True),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("filters", "telling"),
    [
        ({"layouts": ["tp16"]}, r"--layout: found tp16, expected one of tp8, tp8-ep8, tp4"),
        ({"scenarios": ["1k8k"]}, "expected one of 1k1k, 8k1k"),
        ({"concurrencies": [3]}, "--concurrency: found 3"),
        ({"layouts": ["tp4"], "concurrencies": [512]}, "no point that matches all of them"),
    ],
)
def test_a_filter_that_leaves_nothing_is_an_error(m3: Recipe, filters: dict[str, list], telling: str) -> None:
    with pytest.raises(UserError, match=telling):
        plan_points(m3, **filters)


@pytest.mark.parametrize(
    ("space", "telling"),
    [
        ("{tp: 8, ep: 4, conc_start: 1, conc_end: 2}", "ep is 1 or tp"),
        ("{tp: 8, dp_attn: true, conc_start: 1, conc_end: 2}", "dp_attn needs ep"),
        ("{conc_start: 4, conc_end: 2}", "conc_end is below conc_start"),
        ("{conc_start: 1, conc_end: 2, conc_ends: 2}", "Did you mean 'conc_end'"),
    ],
)
def test_a_layout_that_cannot_be_is_an_error_that_says_why(space: str, telling: str) -> None:
    with pytest.raises(UserError, match=telling):
        load_recipe(TINY, [f"bench.sweep.scenarios=[{{isl: 8, osl: 8, search_space: [{space}]}}]"])


def test_a_recipe_without_a_search_space_is_an_error(recipe_path: Path) -> None:
    with pytest.raises(UserError, match=r"bench\.sweep\.scenarios: found none"):
        plan_points(load_recipe(recipe_path))


def test_the_command_prints_a_table_and_json() -> None:
    table = run("bench", "plan", "-r", M3, "--draft-tokens", 3).stdout
    assert "53 points on 9 servers, 5 of them evaluated" in table
    rows = json.loads(run("bench", "plan", "-r", TINY, "--format", "json", "--concurrency", 16).stdout)
    assert [row["id"] for row in rows] == ["256-128-tp1-c16"]
    assert rows[0]["flags"]["max-cudagraph-capture-size"] == 128


def test_a_sweeps_search_space_is_no_setting_of_other_benchmarks_or_finished_points() -> None:
    bench = load_recipe(TINY).bench
    assert not {"sweep", "accuracy"} & set(bench.settings())
    assert "scenarios" not in bench.sweep.settings()
    assert bench.sweep.settings()["range_ratio"] == 0.8
