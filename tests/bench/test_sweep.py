"""Claims about sweeps: points are kept one by one, figures are the counters', failures are told and tried again."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import scripted
from conftest import ROOT, kill_when, run, run_here
from tracked import read_tensorboard
from written import write_store

import bench.sweep
from bench.load import LATENCIES, load_flags, mean_length, read_acceptance, read_opening_row, spread, write_prompts
from bench.plan import Layout, Point, plan_points
from bench.sweep import Job, make_record
from common.errors import IncompleteError, UserError
from contracts.prompt_files import Row
from recipe.load import load_recipe
from recipe.recipe import Recipe
from serve.flags import parse_flags
from target.target import Target

SPACE = "bench.sweep.scenarios=[{isl: 16, osl: 16, search_space: [{conc_start: 1, conc_end: 2}]}]"
POINT = Point(Layout(4), 1024, 1024, 2)
RAW: dict[str, Any] = {
    "duration": 2.0, "completed": 20, "failed": 0, "total_input_tokens": 200, "total_output_tokens": 100,
    "output_throughput": 50.0, "total_token_throughput": 150.0, "spec_decode_num_drafts": 40,
    "spec_decode_draft_tokens": 120, "spec_decode_accepted_tokens": 60,
    "spec_decode_per_position_acceptance_rates": [0.75, 0.5, 0.25],
    **{f"{name}_{of}_ms": 4.0 for name in ("mean", "median", "p50", "p90", "p95", "p99") for of in LATENCIES},
}  # fmt: skip


@pytest.fixture
def recipe(recipe_path: Path) -> Recipe:
    return load_recipe(recipe_path, [SPACE])


def test_lengths_of_the_field_are_those_that_vllm_draws() -> None:
    for size in (16, 128, 1024, 8192):
        for ratio in (0.25, 0.8, 1.0):
            mean, around = mean_length(size, ratio), spread(ratio)
            assert mean * (1 + around) <= size
            assert mean * (1 + around) == pytest.approx(size, abs=2)
            assert mean * (1 - around) == pytest.approx(ratio * size, abs=2)


def test_figures_are_per_user_and_per_gpu_and_acceptance_is_the_counters() -> None:
    record = make_record(Job(POINT, "draft"), RAW, [])
    assert (record["status"], record["tokens_per_s_per_user"], record["tokens_per_s_per_gpu"]) == ("done", 250.0, 37.5)
    assert record["acceptance"]["histogram"] == [10, 10, 10, 10]
    assert (record["acceptance"]["acceptance_length"], record["acceptance"]["acceptance_rate"]) == (2.5, 0.5)
    assert read_acceptance({"completed": 1}) is None


def test_more_than_5_percent_failed_requests_make_a_failed_point() -> None:
    assert make_record(Job(POINT, "base"), {**RAW, "failed": 1}, [])["status"] == "done"
    failed = make_record(Job(POINT, "base"), {**RAW, "failed": 2}, [])
    assert failed["status"] == "failed"
    assert "2 of 20 requests failed" in failed["reason"]
    assert "total_tokens_per_s" not in failed


def test_a_load_is_greedy_and_ten_prompts_a_slot(recipe: Recipe, tmp_path: Path) -> None:
    flags = load_flags(recipe.bench.sweep, Target.read(recipe.target.path), POINT, "url", None, tmp_path / "r.raw")
    assert (flags["num-prompts"], flags["num-warmups"], flags["max-concurrency"]) == (20, 4, 2)
    assert (flags["temperature"], flags["ignore-eos"], flags["endpoint"]) == (0, True, "/v1/chat/completions")


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}, {"role": "assistant"}]},
        {"system": "s", "turns": ["u", "v"]},
        {"system": "s", "prompt": "u"},
        {"prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]},
        {"conversations": [{"from": "system", "value": "s"}, {"from": "human", "value": "u"}, {"from": "gpt"}]},
        {"messages": '[{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]'},
    ],
)
def test_a_prompt_is_a_row_up_to_its_first_user_turn(row: dict[str, Any]) -> None:
    assert read_opening_row(Row(0, "", row)) == [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]


@pytest.mark.parametrize("row", [{}, {"turns": []}, {"messages": [{"role": "system", "content": "s"}]}])
def test_a_row_without_a_user_turn_is_an_error(row: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="p:1: found no"):
        read_opening_row(Row(0, "p:1", row))


def test_prompts_are_rendered_with_the_targets_template_and_long_ones_left_out(
    recipe_path: Path, prompts_path: Path, tmp_path: Path
) -> None:
    rows = [*prompts_path.read_text().splitlines(), json.dumps({"prompt": "word " * 200})]
    (tmp_path / "prompts.jsonl").write_text("\n".join(rows) + "\n")
    recipe = load_recipe(recipe_path, [f"bench.sweep.dataset={tmp_path / 'prompts.jsonl'}"])
    path = tmp_path / "out/64-50.jsonl"
    assert write_prompts(recipe, Target.read(recipe.target.path), Point(Layout(1), 64, 50, 1), path) == (24, 1)
    written = [json.loads(line) for line in path.read_text().splitlines()]
    assert "Be brief." in written[0]["prompt"]
    assert {row["output_tokens"] for row in written} <= set(range(40, 51))


@pytest.fixture(scope="module")
def draft(recipe_path: Path, target_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sweep")
    args = ["--recipe", recipe_path, "--set", "train.num_steps=1"]
    args += ["--set", "export.max_position_embeddings=512", "--set", "export.yarn.factor=4.0"]  # room for the 256 extra
    store = write_store(folder / "store", Target.read(target_folder))
    run_here("train", "offline", *args, "--store", store, "--output", folder / "draft")
    run_here("train", "export", *args, "--run", folder / "draft", "--output", folder / "export")
    return folder / "export"


@pytest.mark.vllm
@pytest.mark.proves("counters")
@pytest.mark.long
def test_a_killed_sweep_keeps_its_points_and_the_counters_agree(recipe_path: Path, draft: Path, tmp_path: Path) -> None:
    output = tmp_path / "sweep"
    args = ["bench", "sweep", "-r", recipe_path, "--set", SPACE, "--draft", draft, "--output", output]
    first = output / "points/16-16-tp1-c1-base.json"
    assert kill_when(first.exists, *args) == -9
    kept = first.read_bytes()
    said = run(*args).stdout
    assert "3 of 4 points to measure" in said
    assert "point 3 of 3: 16-16-tp1-c2-draft" in said
    assert first.read_bytes() == kept
    summary = json.loads((output / "sweep.json").read_text())
    assert len(summary["points"]) == len(list(csv.reader((output / "sweep.csv").open()))) - 1 == 4
    for point in summary["points"]:
        assert (point["completed"], point["failed"]) == (10 * point["concurrency"], 0)
        assert 12 * point["completed"] <= point["output_tokens"] <= 16 * point["completed"]
        acceptance = point["acceptance"]
        if point["kind"] == "base":
            assert acceptance is None
            continue
        assert sum(count * steps for count, steps in enumerate(acceptance["histogram"])) == acceptance["accepted"]
        assert sum(acceptance["histogram"]) == acceptance["steps"]
        assert acceptance["drafted"] == 3 * acceptance["steps"]
        # The prefill gives a reply's first token; its last steps may verify tokens beyond its end.
        overshoot = point["completed"] + acceptance["steps"] + acceptance["accepted"] - point["output_tokens"]
        assert 0 <= overshoot <= 8 * point["completed"]
    assert "0 of 4 points to measure" in run(*args).stdout


@pytest.mark.vllm
def test_failed_points_are_named_the_others_go_on_and_a_second_run_tries_again(
    recipe_path: Path, prompts_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = load_recipe(recipe_path, [SPACE.replace("isl: 16", "isl: 64"), f"bench.sweep.dataset={prompts_path}"])

    @contextmanager
    def refuse(*_: Any, **__: Any) -> Iterator[Any]:
        with scripted.serve(fail_fraction=1.0) as server:
            yield SimpleNamespace(url=server.url.removesuffix("/v1"))

    monkeypatch.setattr(bench.sweep, "run_server", refuse)
    with pytest.raises(IncompleteError, match=r"2 of 2 points failed \(64-16-tp1-c1-base, 64-16-tp1-c2-base\)"):
        bench.sweep.sweep(recipe, plan_points(recipe), None, tmp_path / "out")
    records = [json.loads(path.read_text()) for path in sorted((tmp_path / "out/points").glob("*.json"))]
    assert [record["reason"].split(";")[0] for record in records] == [
        "10 of 10 requests failed", "20 of 20 requests failed",
    ]  # fmt: skip
    monkeypatch.setattr(bench.sweep, "run_load", lambda *_: RAW)
    points = bench.sweep.sweep(recipe, plan_points(recipe), None, tmp_path / "out")["points"]
    assert [point["status"] for point in points] == ["done", "done"]


def test_a_server_that_does_not_start_fails_its_points_alone(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise UserError("server", found="no GPU", expected="eight", fix="Buy them.")

    monkeypatch.setattr(bench.sweep, "run_server", fail)
    with pytest.raises(IncompleteError, match="2 of 2 points failed"):
        bench.sweep.sweep(recipe, plan_points(recipe), None, tmp_path)
    assert "no GPU" in json.loads((tmp_path / "points/16-16-tp1-c1-base.json").read_text())["reason"]


def test_every_layout_and_kind_has_a_server_of_its_own_sized_for_its_highest_concurrency(
    recipe_path: Path, tmp_path: Path, draft: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[dict[str, Any]] = []

    @contextmanager
    def start(command: Any, **_: Any) -> Iterator[Any]:
        started.append(parse_flags(command.args[2:]))
        yield SimpleNamespace(url="")

    monkeypatch.setattr(bench.sweep, "run_server", start)
    monkeypatch.setattr(bench.sweep, "run_load", lambda *_: RAW)
    spaces = "[{conc_start: 1, conc_end: 8}, {tp: 2, ep: 2, dp_attn: true, conc_start: 2, conc_end: 2}]"
    scenario = f"bench.sweep.scenarios=[{{isl: 64, osl: 16, search_space: {spaces}}}]"
    recipe = load_recipe(recipe_path, [scenario, "tracking.bench=[tensorboard]"])
    points = plan_points(recipe)
    summary = bench.sweep.sweep(recipe, points, str(draft), tmp_path / "both")
    curves, _ = read_tensorboard(tmp_path / "both")
    tracked = {name.split("/")[0] for name in curves if name.endswith("/output_tokens_per_s")}
    assert tracked == {point["id"] for point in summary["points"]}
    assert [point["kind"] for point in summary["points"]] == ["base", "draft"] * 5
    assert [flags["max-cudagraph-capture-size"] for flags in started] == ["8", "32", "4", "8"]
    assert ["speculative-config" in flags for flags in started] == [False, True, False, True]
    assert all("no-enable-prefix-caching" in flags for flags in started)
    assert [flags.get("data-parallel-size") for flags in started] == [None, None, "2", "2"]
    alone = bench.sweep.sweep(recipe, points, str(draft), tmp_path / "alone", with_baseline=False)
    assert {point["kind"] for point in alone["points"]} == {"draft"}


def test_a_draft_of_another_target_is_refused_before_anything_is_served(
    recipe: Recipe, tmp_path: Path, draft: Path, other_target_folder: Path
) -> None:
    section = recipe.target.model_copy(update={"path": other_target_folder})
    with pytest.raises(UserError, match="a draft for target"):
        bench.sweep.sweep(recipe.model_copy(update={"target": section}), plan_points(recipe), str(draft), tmp_path)
    assert not (tmp_path / "run.json").exists()


def test_the_tiny_recipes_prompts_are_those_that_its_script_writes() -> None:
    recipe = load_recipe(ROOT / "recipes/Tiny-DFlash/recipe.yaml")
    script = (ROOT / "recipes/Tiny-DFlash/run.sh").read_text()
    assert "run=${1:-runs/tiny-dflash}" in script
    assert recipe.bench.sweep.dataset == "runs/tiny-dflash/prompts/held_out.jsonl"


def test_a_points_file_has_no_key(recipe: Recipe) -> None:
    job = Job(plan_points(recipe, [], [], [])[0], "draft")
    record = make_record(job, None, ["serve", "--api-key", "sk-hidden", "--port", "1"], "it did not start")
    assert record["server"] == ["serve", "--api-key", "<redacted>", "--port", "1"]
