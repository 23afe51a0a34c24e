"""Claims about comparing sweeps: published uplifts come out again, and the report is one file that hides nothing."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from conftest import run

from bench.compare import break_even, compare, pool_rows, tell_break_even, uplift
from bench.plots import pareto
from common.errors import UserError

PUBLISHED = {
    1: (4688.40, 7653.56, "+63.24%"),
    2: (7795.90, 11146.00, "+42.97%"),
    4: (11890.78, 16928.43, "+42.37%"),
    8: (17195.82, 21132.49, "+22.89%"),
    16: (23466.78, 26857.80, "+14.45%"),
}


def test_published_uplifts_come_out_again() -> None:
    for base, draft, printed in PUBLISHED.values():
        assert f"{uplift(base, draft):+.2%}" == printed


@pytest.mark.parametrize(
    ("points", "crossing", "words"),
    [
        ([(1, 0.5), (2, 0.2), (4, -0.2)], 2.83, "2.8"),  # half of the way from 2 to 4, in octaves
        ([(1, 0.5), (8, 0.1), (64, -0.2)], 16.0, "16.0"),  # a third of the way from 8 to 64
        ([(4, -0.2), (1, 0.3), (2, -0.1), (8, 0.1), (16, -0.1)], 11.31, "11.3"),  # the last crossing, in any order
        ([(1, 0.4), (2, 0.0)], 2.0, "2.0"),
        ([(1, 0.5), (16, 0.1)], None, "none up to 16"),
        ([(1, -0.1), (16, -0.3)], None, "none: slower from 1 on"),
    ],
)
def test_break_even_is_where_uplift_crosses_zero(
    points: list[tuple[int, float]], crossing: float | None, words: str
) -> None:
    assert break_even(points) == crossing
    assert tell_break_even(points) == words


def test_only_points_that_none_beats_in_both_make_the_front() -> None:
    assert pareto([(1, 9), (2, 5), (2, 7), (3, 6), (1.5, 6.5)]) == [(1, 9), (2, 7), (3, 6)]


def make_point(kind: str, concurrency: int, speed: float, **changes: Any) -> dict[str, Any]:
    latency = {"mean": 1.0, "p50": 1.0, "p90": 1.0, "p95": 1.0, "p99": 1.0}
    return {
        "id": f"x-{concurrency}-{kind}", "kind": kind, "status": "done", "scenario": "1k1k", "layout": "tp8",
        "num_gpus": 8, "concurrency": concurrency, "total_tokens_per_s": speed, "output_tokens_per_s": speed / 2,
        "tokens_per_s_per_user": speed / concurrency / 2, "tokens_per_s_per_gpu": speed / 8, "completed": 10,
        "failed": 0, "latency_ms": {"ttft": latency, "tpot": latency, "itl": latency, "e2el": latency},
        "acceptance": {"acceptance_length": 2.5} if kind == "draft" else None, **changes,
    }  # fmt: skip


def write_sweep(folder: Path, *points: dict[str, Any], draft: str = "runs/<b>draft</b>", target: str = "t") -> Path:
    folder.mkdir()
    (folder / "sweep.json").write_text(json.dumps({"draft": draft, "points": points}))
    (folder / "run.json").write_text(json.dumps({"inputs": {"target": target}}))
    return folder


def write_published(folder: Path, factor: float = 1.0, **kwargs: Any) -> Path:
    pairs = [
        (make_point("base", c, base), make_point("draft", c, factor * speed))
        for c, (base, speed, _) in PUBLISHED.items()
    ]
    return write_sweep(folder, *(point for both in pairs for point in both), **kwargs)


def write_acceptance(folder: Path, *histograms: tuple[str, str, int, list[int]]) -> Path:
    folder.mkdir()
    rows = [
        {"dataset": dataset, "category": category, "num_draft_tokens": count, "histogram": histogram}
        for dataset, category, count, histogram in histograms
    ]
    (folder / "acceptance.json").write_text(json.dumps({"rows": rows}))
    return folder


def test_one_sweep_holds_the_draft_against_none_in_one_file(tmp_path: Path) -> None:
    sweep = write_published(tmp_path / "sweep")
    rows = [("mt_bench", "<script>", 2, [1, 1, 2])]
    acceptance = write_acceptance(tmp_path / "acc", *rows)
    output = tmp_path / "out"
    printed = run("bench", "compare", sweep, "--acceptance", acceptance, "--output", output).stdout
    for *_, words in PUBLISHED.values():
        assert words in printed
    assert "break-even concurrency: none up to 16" in printed
    page = (output / "report.html").read_text()
    assert all(link.startswith("data:") for link in re.findall(r"""(?:src|href)\s*=\s*["']?([^"'\s>]+)""", page))
    assert page.count("data:image/png;base64,") == 5
    assert "http:" not in page
    assert "https:" not in page
    assert "<script>" not in page
    assert "&lt;script&gt;" in page
    assert "runs/&lt;b&gt;draft" in page
    assert {path.name for path in output.glob("*.png")} == {
        "uplift.png", "throughput.png", "pareto.png", "categories.png", "positions.png",
    }  # fmt: skip


def test_two_sweeps_are_held_against_their_bases_and_each_other(tmp_path: Path) -> None:
    first, second = write_published(tmp_path / "eagle3"), write_published(tmp_path / "dflash", 1.1)
    result = compare([first, second], [], tmp_path / "out")
    assert [(curve["over"], curve["name"]) for curve in result["curves"]] == [
        ("no draft (eagle3)", "eagle3"), ("no draft (dflash)", "dflash"), ("eagle3", "dflash"),
    ]  # fmt: skip
    assert {point["uplift"] for point in result["curves"][2]["points"]} == {0.1}


def test_a_sweep_without_a_baseline_is_held_against_the_others(tmp_path: Path) -> None:
    first = write_published(tmp_path / "eagle3")
    second = write_sweep(tmp_path / "dflash", *(make_point("draft", c, 9.0 * PUBLISHED[c][0]) for c in PUBLISHED))
    curves = compare([second, first], [], tmp_path / "out")["curves"]
    assert [(curve["over"], curve["name"]) for curve in curves] == [
        ("no draft (eagle3)", "dflash"), ("no draft (eagle3)", "eagle3"), ("dflash", "eagle3"),
    ]  # fmt: skip
    assert {point["uplift"] for point in curves[0]["points"]} == {8.0}


def test_points_that_failed_or_were_measured_once_are_left_out(tmp_path: Path) -> None:
    sweep = write_sweep(
        tmp_path / "sweep", make_point("base", 1, 10.0), make_point("draft", 1, 20.0), make_point("base", 2, 10.0),
        make_point("base", 4, 10.0), make_point("draft", 4, 20.0, status="failed"),
    )  # fmt: skip
    (curve,) = compare([sweep], [], tmp_path / "out")["curves"]
    assert [point["concurrency"] for point in curve["points"]] == [1]


def test_a_sweep_without_pairs_or_of_another_target_is_an_error(tmp_path: Path) -> None:
    base = write_sweep(tmp_path / "base", make_point("base", 1, 10.0))
    other = write_published(tmp_path / "other", target="another")
    with pytest.raises(UserError, match="no point that was measured twice"):
        compare([base], [], tmp_path / "out")
    with pytest.raises(UserError, match="two targets"):
        compare([base, other], [], tmp_path / "out")


def test_acceptance_is_pooled_by_adding_steps_at_the_most_draft_tokens(tmp_path: Path) -> None:
    folder = write_acceptance(
        tmp_path / "acc",
        ("gsm8k", "", 1, [9, 9]),
        ("mt_bench", "math", 2, [0, 0, 2]),
        ("mt_bench", "math", 2, [6, 0, 0]),
        ("gsm8k", "", 2, [0, 2, 0]),
    )
    pooled = pool_rows(folder)
    assert pooled["num_draft_tokens"] == 2
    assert pooled["by_category"]["mt_bench / math"]["acceptance_length"] == 1.5
    assert pooled["by_dataset"]["gsm8k"]["acceptance_length"] == 2.0
    assert pooled["all"]["acceptance_length"] == 1.6
