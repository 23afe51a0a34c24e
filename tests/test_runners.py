"""Claims about vLLM as users run it: its V2 model runner, and two tensor-parallel ranks, do what V1 does with one.

V2 runs on a CPU through Triton's interpreter (tests/v2_runner), which takes about ten times as long. Each test asserts
which runner it had, and which of our changes to vLLM were active in it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from conftest import ROOT, read_lines, run, run_here
from tiny_pipeline import RECIPE, overrides

from contracts.store import Store

pytestmark = [pytest.mark.vllm, pytest.mark.long, pytest.mark.timeout(900)]

V1 = "vllm.v1.worker.cpu_model_runner.CPUModelRunner"
V2 = "vllm.v1.worker.cpu.model_runner.CPUModelRunner"
CPU_MENDS = ["keep_seeded_generators_usable", "expand_sampling_parameters", "accept_empty_top_k", "norm_each_layer"]
METHODS: dict[str, list[str]] = {
    "dflash": [],
    "dflash2": ["block_size=4", "selector_rank=32"],
    "dspark": ["num_speculative_tokens=3"],
    "eagle3": ["num_speculative_tokens=3"],
    "lilicorr": [
        "block_size=4", "lilicorr_hidden_size=64", "lilicorr_num_heads=4", "lilicorr_factor_dim=64",
        "conv_kernel_size=2", "conv_group_size=16",
    ],
}  # fmt: skip
"""Draft methods, and their keys of `train.draft` for three draft tokens; `dflash` is the pipeline's own."""
V2_ONLY = {"dflash2", "dspark", "lilicorr"}
ALL = [pytest.param(name, marks=pytest.mark.rare) if name in ("dflash2", "lilicorr") else name for name in METHODS]
"""tests/bench/test_parity_v2.py compares every tensor of the rare ones."""
SHORT = ("--set", "bench.concurrency=[4]", "--set", "bench.num_prompts={4: 6}")


@dataclass(frozen=True)
class Runner:
    """A way to run vLLM: its environment and flags, the model runner it has, and our changes that are active."""

    runner: str
    mends: list[str]
    num_workers: int = 1
    env: dict[str, str] = field(default_factory=dict)
    args: tuple[str, ...] = ()
    tolerance: float = 0.0
    """Largest difference of captured states from those of V1 with one rank."""


RUNNERS = {
    "v2": Runner(
        V2,
        [*CPU_MENDS, "triton: arguments not copied", "triton: scalar masks", "triton: log1p"],
        env={
            "TRITON_INTERPRET": "1",
            "VLLM_USE_V2_MODEL_RUNNER": "1",
            "VLLM_PLUGINS": "draftline_cpu,triton_interpreter,vllm_report",
            "PYTHONPATH": str(ROOT / "tests/v2_runner"),
        },
    ),
    "tp2": Runner(V1, CPU_MENDS, 2, args=("--set", "serve.args.tensor-parallel-size=2"), tolerance=1e-3),
}


@pytest.fixture(params=RUNNERS)
def runner(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Runner]:
    """Run all vLLM processes of a test so; at its end, check that they did."""
    chosen, report = RUNNERS[request.param], tmp_path / "workers.jsonl"
    if request.node.callspec.params.get("trained") in V2_ONLY and chosen.runner != V2:
        pytest.skip("only vLLM's V2 runner serves this method")
    paths = [chosen.env.get("PYTHONPATH", ""), str(ROOT / "tests/vllm_report"), os.environ.get("PYTHONPATH", "")]
    env = {**chosen.env, "PYTHONPATH": os.pathsep.join(path for path in paths if path), "VLLM_REPORT": str(report)}
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    yield chosen
    workers = read_lines(report)
    assert len(workers) % chosen.num_workers == 0 < len(workers)
    for worker in workers:
        assert worker == {"runner": chosen.runner, "mends": chosen.mends}


@dataclass(frozen=True)
class Trained:
    """A draft of the tiny pipeline: the recipe's flags, its run, its export, and the predicted acceptance."""

    method: str
    args: list[str]
    run: Path
    export: Path
    evaluation: Path


@pytest.fixture(scope="module", params=ALL)
def trained(request: pytest.FixtureRequest, pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    args = ["--recipe", str(RECIPE), *overrides(pipeline)]
    if request.param == "dflash":
        return Trained(request.param, args, pipeline / "draft", pipeline / "export", pipeline / "eval.json")
    folder = tmp_path_factory.mktemp(request.param)
    keys = [f"method={request.param}", *METHODS[request.param]]
    args += [word for key in keys for word in ("--set", f"train.draft.{key}")]
    found = Trained(request.param, args, folder / "draft", folder / "export", folder / "eval.json")
    run("train", "offline", *args, "--store", pipeline / "store/train", "--output", found.run)
    places = ("--store", pipeline / "store/held_out", "--output", found.evaluation)
    run_here("train", "eval", *args, "--run", found.run, *places)
    evaluated = ("--eval", found.evaluation)
    run_here("train", "export", *args, "--run", found.run, "--output", found.export, *evaluated)
    return found


def test_captured_states_are_those_of_v1_with_one_rank(pipeline: Path, runner: Runner, tmp_path: Path) -> None:
    args = ["--recipe", str(RECIPE), *overrides(pipeline), *runner.args]
    places = ("--conversations", pipeline / "synth/held_out", "--output", tmp_path / "store")
    printed = run("dump", "run", *args, *places).stdout
    equal = "the states are whole" if runner.num_workers == 1 else "the states are equal on 2 ranks"
    assert f"its layers are transformers'; {equal}" in printed
    expected, found = Store(pipeline / "store/held_out"), Store(tmp_path / "store")
    assert found.sample_ids() == expected.sample_ids() != []
    for sample_id in found.sample_ids():
        ours, theirs = expected.read_sample(sample_id), found.read_sample(sample_id)
        assert torch.equal(ours.input_ids, theirs.input_ids)
        for name in ("hidden_states", "aux_hidden_states"):
            torch.testing.assert_close(getattr(theirs, name), getattr(ours, name), rtol=0, atol=runner.tolerance)
    assert "all layers of 8 samples" in run_here("dump", "verify", *args, "--store", tmp_path / "store").stdout


def test_the_draft_is_accepted_as_predicted_and_changes_no_greedy_reply(
    pipeline: Path, runner: Runner, trained: Trained, tmp_path: Path
) -> None:
    own = json.loads((trained.export / "draftline.json").read_text())["num_speculative_tokens"]
    few = (*SHORT, "--draft-tokens", own)
    places = ("--conversations", pipeline / "synth/held_out", "--draft", trained.export, "--output", tmp_path / "bench")
    # It compares vLLM's counters with the sums over the requests.
    printed = run("bench", "acceptance", *trained.args, *runner.args, *few, *places).stdout
    report = json.loads((tmp_path / "bench/acceptance.json").read_text())
    assert report["greedy_identical"] == report["greedy_total"] == 6
    assert report["acceptance_length"] > 1.2
    predicted = {walk["sample"]: walk["accepted"] for walk in json.loads(trained.evaluation.read_text())["walks"]}
    same = [walk["accepted"] in predicted[walk["turn"].rsplit("-", 1)[0]] for walk in report["walks"]]
    assert sum(same) >= len(same) - 1  # rounding may break a tie of two draft logits the other way
    if runner.num_workers > 1:
        assert "preflight: the draft reads the same states on 2 tensor-parallel ranks" in printed


# EAGLE3 on V1: tests/bench/test_parity.py; the other methods: tests/bench/test_parity_v2.py.
@pytest.mark.parametrize("trained", ["dflash", pytest.param("eagle3", marks=pytest.mark.rare)], indirect=True)
def test_trainer_and_engine_agree_on_every_tensor_on_the_way_to_the_draft_logits(
    pipeline: Path, runner: Runner, trained: Trained, tmp_path: Path
) -> None:
    places = ("--run", trained.run, "--draft", trained.export, "--store", pipeline / "store/held_out")
    run("bench", "parity", *trained.args, *runner.args, *places, "--output", tmp_path / "parity", "--samples", "2")
    report = json.loads((tmp_path / "parity/parity.json").read_text())
    stages = [stage["stage"] for stage in report["stages"]]
    assert {"teacher argmax", "draft slot 1", "draft slot 3"} < set(stages)
    assert max(stage["difference"] for stage in report["stages"]) < 1e-3


@pytest.mark.parametrize("runner", ["v2"], indirect=True)
def test_the_connector_of_gpus_writes_the_states_of_each_rank_for_a_preflight_only(
    runner: Runner, target_folder: Path, tmp_path: Path
) -> None:
    script = [sys.executable, str(ROOT / "tests/serve/engine_probe.py"), "gpu_connector"]
    result = subprocess.run(
        [*script, str(target_folder), str(tmp_path / "states")], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert result.stdout.endswith("fine\n"), result.stdout + result.stderr


@pytest.mark.parametrize("stage", ["dump", "bench"])
def test_partial_sums_of_two_ranks_are_named_where_no_preflight_saw_them(
    pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    args = ["--recipe", str(RECIPE), *overrides(pipeline), "--set", "serve.args.tensor-parallel-size=2"]
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "tests/seeded_defects"))
    monkeypatch.setenv("SEEDED_DEFECT", "partial sums")
    if stage == "bench":
        places = ("--conversations", pipeline / "synth/held_out", "--draft", pipeline / "export")
        refused = run("bench", "acceptance", *args, *SHORT, *places, "--output", tmp_path / "bench", check=False)
        assert refused.returncode == 2
        assert "the draft's input on tensor-parallel rank 1: found states" in refused.stderr
        assert not list((tmp_path / "bench").glob("draft-k*.json"))
    else:
        places = ("--conversations", pipeline / "synth/held_out", "--output", tmp_path / "store")
        run("dump", "run", *args, *places, "--no-preflight")
        refused = run_here("dump", "verify", *args, "--store", tmp_path / "store", check=False)
        assert refused.returncode == 1
        assert "(the engine had 2 ranks, docs/tensor-parallel.md)" in refused.stderr
    assert "partial sums of tensor parallelism" in refused.stderr
