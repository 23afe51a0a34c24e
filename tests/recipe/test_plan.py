"""Claims about `recipe plan`: figures follow from plans, rates and prices, and changes fit what they say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, run_here

from recipe.figures import least_certain

M3 = ROOT / "recipes/MiniMax-M3-DFlash/recipe.yaml"
QWEN = ROOT / "recipes/Qwen3-8B/recipe.yaml"
PRICES = ("--set", "plan.gpu_hour_price=3", "--set", "plan.disk_tb_month_price=20")
RATES = ("--set", "plan.synth_tokens_per_s=20000", "--set", "plan.dump_tokens_per_s=10000")


def write_train_plan(folder: Path, gpus: int, **changes: Any) -> Path:
    """An answer of `train plan --json` with round figures."""
    layout = "single" if gpus == 1 else f"ddp x{gpus}"
    answer = {
        "gpus": gpus, "samples_per_rank": 2, "parameters": 10**9, "memory_bytes": {layout: {"weights": 50 * 10**9}},
        "fits": {layout: True}, "flops_per_step_and_rank": 1e14, "bytes_read_per_step": 4 * 10**9,
        "seconds_per_step": {"compute": 0.5, "reading": None}, "mfu": 0.4, "changes_that_fit": [], **changes,
    }  # fmt: skip
    path = folder / f"train-{gpus}.json"
    path.write_text(json.dumps(answer))
    return path


def plan_of(*words: object) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(run_here("recipe", "plan", *words, "--json").stdout)
    return found


def figures_of(plan: dict[str, Any], name: str) -> dict[str, float]:
    return {stage["stage"]: stage[name]["value"] for stage in plan["stages"]}


def test_hours_disk_and_money_follow_from_rates_and_plans(tmp_path: Path) -> None:
    train = write_train_plan(tmp_path, 8)
    plan = plan_of("-r", M3, "--hardware", "h200", "--train-plan", train, *PRICES, *RATES)
    hours, tokens = figures_of(plan, "hours"), 456_881 * 2200
    assert hours["synth"] == pytest.approx(tokens * 0.75 / 20_000 / 3600 + 1 / 6)
    assert hours["dump"] == pytest.approx(tokens / 10_000 / 3600 + 1 / 6)
    assert hours["train"] == pytest.approx(28_555 * 0.5 / 3600)
    printed = run_here("dump", "plan", "-r", M3, "--samples", "456881", "--mean-tokens", "2200").stdout
    disk = figures_of(plan, "disk_gb")
    assert f"({disk['dump']:.2f} GB)" in printed
    money = figures_of(plan, "money")
    assert money["dump"] == pytest.approx(hours["dump"] * 8 * 3)
    total = plan["total"]
    assert total["hours"]["value"] == pytest.approx(sum(hours.values()))
    assert total["disk_money"]["value"] == pytest.approx(sum(disk.values()) / 1000 * 20 * sum(hours.values()) / 730)
    assert total["money"]["value"] == pytest.approx(sum(money.values()) + total["disk_money"]["value"])


def test_each_figure_says_what_it_rests_on(tmp_path: Path) -> None:
    run = tmp_path / "run/synth/train"
    run.mkdir(parents=True)
    state = {"complete": True, "seconds": 100.0, "summary": {"tokens": 2_000_000}}
    (run / "run.json").write_text(json.dumps(state))
    words = ("-r", M3, "--hardware", "h200", "--train-plan", write_train_plan(tmp_path, 8))
    plan = plan_of(*words, "--measured", tmp_path / "run", *RATES)
    kinds = {stage["stage"]: stage["hours"]["kind"] for stage in plan["stages"]}
    assert kinds == {"synth": "measured", "dump": "stated", "train": "estimated", "bench": "estimated"}
    assert figures_of(plan, "hours")["synth"] == pytest.approx(456_881 * 2200 * 0.75 / 20_000 / 3600)
    assert all(stage[name]["how"] for stage in plan["stages"] for name in ("hours", "disk_gb", "gpu_gb"))
    assert plan["total"]["hours"]["kind"] == "estimated"
    assert least_certain(["measured", "stated"]) == "stated"
    printed = run_here("recipe", "plan", *words, *RATES).stdout
    assert "8 nodes" not in printed
    assert "1 nodes x 10000 (plan.dump_tokens_per_s)" in printed
    assert "money: give --set plan.gpu_hour_price" in printed


def test_nodes_share_synthesis_and_capture_and_training_takes_no_more_gpus_than_samples(tmp_path: Path) -> None:
    words = ("-r", M3, "--hardware", "h200", *RATES, "--set", "plan.start_minutes=0")
    one = plan_of(*words, "--train-plan", write_train_plan(tmp_path, 8))
    many = plan_of(*words, "--nodes", 64, "--train-plan", write_train_plan(tmp_path, 16))
    for stage in ("synth", "dump"):
        assert figures_of(one, "hours")[stage] == pytest.approx(64 * figures_of(many, "hours")[stage])
    assert [stage["nodes"] for stage in many["stages"]] == [64, 64, 2, 1]
    assert "training uses 16 of 512 GPUs: a batch has 16 samples" in many["notes"][0]
    wrong = run_here("recipe", "plan", *words, "--train-plan", write_train_plan(tmp_path, 512), check=False)
    assert "found a plan for 512 GPUs, expected one for 8" in wrong.stderr


def test_rates_are_estimated_from_the_hardware_where_none_is_stated(tmp_path: Path) -> None:
    train = write_train_plan(tmp_path, 8)
    null = ("--set", "plan.dump_tokens_per_s=null")
    plans = {name: plan_of("-r", QWEN, "--hardware", name, *null, "--train-plan", train) for name in ("h100", "h200")}
    rates = {name: {stage["stage"]: stage.get("rate") for stage in plan["stages"]} for name, plan in plans.items()}
    # A prefill is limited by operations, of which both have as many; decoding by memory, of which one is faster.
    assert rates["h100"]["dump"]["value"] == pytest.approx(8 * 989e12 * 0.4 / (2 * 7.57e9))
    assert rates["h200"]["dump"] == rates["h100"]["dump"]
    assert rates["h200"]["synth"]["value"] > 1.3 * rates["h100"]["synth"]["value"]
    assert rates["h100"]["synth"]["kind"] == "estimated"


def test_a_target_that_the_nodes_cannot_hold_is_refused_or_spread_over_nodes(tmp_path: Path) -> None:
    words = ("-r", M3, "--hardware", "h100", "--train-plan", write_train_plan(tmp_path, 8))
    refused = run_here("recipe", "plan", *words, check=False)
    assert refused.returncode == 2
    assert "1 x h100: found 640 GB of GPU memory, expected 947 GB for the target" in refused.stderr
    spread = ("-r", M3, "--hardware", "h100", "--nodes", 2, "--train-plan", write_train_plan(tmp_path, 16))
    assert "the target needs 2 nodes for one replica: vLLM over several nodes" in plan_of(*spread)["notes"]
    assert not any("nodes" in note for note in plan_of(*words, "--set", "serve.variant=mxfp8")["notes"])


def test_changes_that_fit_a_budget_give_the_figures_that_their_own_plan_has(tmp_path: Path) -> None:
    train = write_train_plan(tmp_path, 8)
    words = ["-r", QWEN, "--hardware", "h100", "--train-plan", train, *PRICES, "--set", "train.draft.num_layers=1"]
    words += ["--set", "train.draft.intermediate_size=1"]  # no smaller draft, for which `train plan` would be asked
    limits = ("--budget-disk", "2", "--budget-hours", "100")
    plan = plan_of(*words, *limits)
    assert not plan["budget"]["holds"]
    changes = {change["change"]: change for change in plan["changes"]}
    for key, value in (("dump.dtype", "int4"), ("dump.dtype", "fp8_e4m3"), ("dump.final_states", "drop")):
        own = plan_of(*words, "--set", f"{key}={value}")["total"]
        change = changes[f"{key}: {value}"]
        assert change["disk_gb"] == pytest.approx(own["disk_gb"]["value"])
        assert change["hours"] == pytest.approx(own["hours"]["value"])
        assert change["fits"] == (own["disk_gb"]["value"] <= 2000)
    (fewer,) = (change for name, change in changes.items() if "conversations" in name)
    number, steps = int(fewer["change"].split()[0]), int(fewer["change"].split("num_steps: ")[1].rstrip(")"))
    again = plan_of(*words, *limits, "--set", f"plan.conversations={number}", "--set", f"train.num_steps={steps}")
    assert again["budget"]["holds"]
    assert again["total"]["disk_gb"]["value"] == pytest.approx(2000, rel=0.001)
    assert any(name.startswith("dump run --window") and change["fits"] for name, change in changes.items())
    fitting = [change["fits"] for change in plan["changes"]]
    assert fitting == sorted(fitting, reverse=True)


def test_a_rolling_store_takes_its_window_and_a_capture_for_each_epoch(tmp_path: Path) -> None:
    words = ("-r", QWEN, "--hardware", "h100", "--nodes", 5, "--train-plan", write_train_plan(tmp_path, 32))
    words = (*words, "--set", "plan.start_minutes=0", *RATES)
    whole, rolling = plan_of(*words), plan_of(*words, "--window", 100)
    assert figures_of(rolling, "disk_gb")["dump"] == pytest.approx(100 * 2**30 / 1e9)
    # Six epochs on one node, since four of the five train, instead of one on five.
    assert figures_of(rolling, "hours")["dump"] == pytest.approx(30 * figures_of(whole, "hours")["dump"])
    hours = figures_of(rolling, "hours")
    side_by_side = hours["synth"] + max(hours["dump"], hours["train"]) + hours["bench"]
    assert rolling["total"]["hours"]["value"] == pytest.approx(side_by_side)


def test_a_rolling_store_on_the_nodes_that_train_takes_the_sum_and_gpus_for_both(tmp_path: Path) -> None:
    train = write_train_plan(tmp_path, 8)
    shared = plan_of("-r", QWEN, "--hardware", "h100", "--train-plan", train, "--window", 100, *RATES)
    assert shared["total"]["hours"]["value"] == pytest.approx(sum(figures_of(shared, "hours").values()))
    assert any("capture and training share the nodes" in note for note in shared["notes"])
    words = ("-r", M3, "--hardware", "h200", "--train-plan", train)
    refused = run_here("recipe", "plan", *words, "--window", 100, check=False)
    assert "--window: found 1 x h200, all of whose GPUs hold the target" in refused.stderr


def test_a_budget_of_money_needs_a_price(tmp_path: Path) -> None:
    words = ("-r", QWEN, "--train-plan", write_train_plan(tmp_path, 8), "--budget-money", 10)
    refused = run_here("recipe", "plan", *words, check=False)
    assert refused.returncode == 2
    assert "--budget-money: found no price" in refused.stderr


def test_training_is_planned_by_train_plan_itself(recipe_path: Path) -> None:
    plan = plan_of("-r", recipe_path, "--hardware", "h100")
    told = json.loads(
        run_here("train", "plan", "-r", recipe_path, "--gpu", "h100", "--gpus", "4", "--json").stdout
    )  # a batch has four samples
    seconds = told["seconds_per_step"]["compute"]
    assert figures_of(plan, "hours")["train"] == pytest.approx(12 * seconds / 3600)
    assert figures_of(plan, "gpu_gb")["train"] == pytest.approx(sum(told["memory_bytes"]["ddp x4"].values()) / 1e9)
