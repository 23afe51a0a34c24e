"""Claims about submissions without a scheduler: which tasks, after which jobs, with which resources and secrets."""

from __future__ import annotations

import json
import os
import pickle
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from conftest import run, run_here
from torch.distributed.launcher.api import LaunchConfig

from common.errors import UserError
from distributed import submit as module
from distributed.plan import StagePlan, read_plan
from distributed.resources import DEFAULTS, Resources
from distributed.secrets import VARIABLE, hide, hide_again, reveal
from distributed.submit import Submitted, submit
from distributed.tasks import Task, TurnsTask
from recipe.load import load_recipe

Job = tuple[str, list[str], str]
SECRET = "hf_secret"


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch) -> list[Job]:
    """What was submitted: the job's name, the shards of its tasks in their order, what it waits for."""
    found: list[Job] = []

    def note(name: str, tasks: Sequence[Task], plan: StagePlan, resources: Resources, after: str = "") -> str:
        if not tasks:
            return ""
        shards = [task.env.get("SHARD") or task.words[-1] for task in tasks]
        found.append((name, shards if name in ("synth", "dump") else [], after))
        return str(len(found))

    monkeypatch.setattr(module, "_submit", note)
    return found


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Resources]]:
    """The name and the resources of every job that was submitted."""
    found: list[tuple[str, Resources]] = []

    def note(name: str, tasks: Sequence[Task], plan: StagePlan, resources: Resources, after: str = "") -> str:
        if tasks:
            found.append((name, resources))
        return str(len(found)) if tasks else ""

    monkeypatch.setattr(module, "_submit", note)
    return found


def stub(path: Path, line: str) -> None:
    """Write a shell script that stands for a program."""
    path.write_text(f"#!/bin/sh\n{line}\n")
    path.chmod(0o755)


def submit_all(folder: Path, synth_done: set[int], dump_done: set[int], shards: int = 4) -> None:
    submitted = Submitted()
    for stage, done in (("synth", synth_done), ("dump", dump_done), ("train", set[int]())):
        plan = StagePlan(stage=stage, recipe="r", overrides=[], input="i", output=str(folder / stage), shards=shards)
        for number in done:
            task_folder = plan.task_folder(number)
            task_folder.mkdir(parents=True)
            (task_folder / "run.json").write_text(json.dumps({"complete": True, "seconds": 1.0}))
        submitted = submit(plan, submitted)


def test_each_shard_is_dumped_after_its_own_synthesis_and_training_comes_last(jobs: list[Job], tmp_path: Path) -> None:
    submit_all(tmp_path, set(), set())
    every = ["0/4", "1/4", "2/4", "3/4"]
    assert jobs == [
        ("synth", every, ""), ("synth-merge", [], "afterok:1"), ("dump", every, "aftercorr:1"),
        ("train", [], "afterok:2:3"),
    ]  # fmt: skip


def test_dumps_of_finished_shards_wait_for_nothing_and_the_others_stand_as_their_syntheses_do(
    jobs: list[Job], tmp_path: Path
) -> None:
    # Shard 3 was dumped before its synthesis was taken up again: it stands in both arrays all the same.
    submit_all(tmp_path, synth_done={0, 2}, dump_done={0, 3})
    assert jobs == [
        ("synth", ["1/4", "3/4"], ""), ("synth-merge", [], "afterok:1"), ("dump", ["1/4", "3/4"], "aftercorr:1"),
        ("dump", ["2/4"], ""), ("train", [], "afterok:2:3:4"),
    ]  # fmt: skip


def test_a_dump_uses_all_gpus_of_its_task_unless_an_override_says_otherwise(recipe_path: Path) -> None:
    for overrides, engines in (([], 0), (["dump.engines=3"], 3)):
        plan = StagePlan(stage="dump", recipe=str(recipe_path), overrides=overrides, input="i", output="o")
        words = plan.task(0).words
        sets = [value for word, value in pairwise(words) if word == "--set"]
        assert load_recipe(recipe_path, sets).dump.engines == engines


def test_a_single_task_is_no_array_and_is_waited_for_as_a_job(jobs: list[Job], tmp_path: Path) -> None:
    submit_all(tmp_path, synth_done={0, 1, 3}, dump_done={0, 1, 3})
    assert jobs[:3] == [("synth", ["2/4"], ""), ("synth-merge", [], "afterok:1"), ("dump", ["2/4"], "afterok:1")]


def submit_pipeline(recipe_path: Path, folder: Path, *more: object) -> None:
    run_here(
        "distributed", "submit", "pipeline", "--recipe", recipe_path, "--input", folder / "prompts.jsonl", "--output",
        folder, "--shards", 2, "--set", "train.global_batch_size=32", *more,
    )  # fmt: skip


def test_a_retry_has_the_resources_of_the_submission_and_its_own_options_replace_them(
    recipe_path: Path, tmp_path: Path, given: list[tuple[str, Resources]]
) -> None:
    sizes = ("--gpus-per-node", 8, "--time", 720, "--nodes", 4, "--max-running", 3, "--cpus-per-task", 16)
    submit_pipeline(recipe_path, tmp_path, *sizes, "--slurm", "partition=gpu", "--slurm", "account=a")
    first = given[:]
    given.clear()
    run_here("distributed", "retry", tmp_path)
    assert given == first
    resources = dict(first)
    assert {name: (r.nodes, r.gpus_per_node, r.time_min, r.max_running) for name, r in resources.items()} == {
        "synth": (1, 8, 720, 3), "synth-merge": (1, 0, 720, 3), "dump": (1, 8, 720, 3), "train": (4, 8, 720, 3),
    }  # fmt: skip
    given.clear()
    for _ in range(2):  # the second retry has what the first one was given
        run_here("distributed", "retry", tmp_path, *(("--time", 60, "--slurm", "partition=b") if not given else ()))
    for _, found in given:
        assert found.time_min == 60
        assert found.slurm_options() == {"partition": "b", "account": "a"}
    assert dict(given)["train"].gpus_per_node == 8


def test_a_retry_with_more_processes_than_samples_of_a_batch_is_refused_before_the_queue(
    recipe_path: Path, tmp_path: Path, given: list[tuple[str, Resources]]
) -> None:
    submit_pipeline(recipe_path, tmp_path, "--gpus-per-node", 8)
    given.clear()
    refused = run_here("distributed", "retry", tmp_path, "--nodes", 8, check=False)
    assert refused.returncode == 2
    assert "expected a sample of each batch for each of the 64 processes" in refused.stderr
    assert given == []


def test_gpus_can_be_taken_back(recipe_path: Path, tmp_path: Path, given: list[tuple[str, Resources]]) -> None:
    submit_pipeline(recipe_path, tmp_path, "--gpus-per-node", 8)
    run_here("distributed", "retry", tmp_path, "--gpus-per-node", 0)
    assert {found.gpus_per_node for _, found in given[4:]} == {0}
    assert "--nproc-per-node=1" in read_plan(tmp_path / "train").task(0).resolve()


def test_wrong_resources_are_refused_before_anything_is_written(recipe_path: Path, tmp_path: Path) -> None:
    for words, telling in ((("--cluster", "pbs"), "slurm, local or debug"), (("--slurm", "gpu"), "name=value")):
        with pytest.raises(AssertionError, match=telling):
            submit_pipeline(recipe_path, tmp_path, *words)
    assert list(tmp_path.iterdir()) == []


def test_a_recipe_without_training_is_submitted_for_synthesis_and_not_for_training(
    recipe_path: Path, tmp_path: Path, given: list[tuple[str, Resources]]
) -> None:
    text = recipe_path.read_text()
    start = text.index("\ntrain:")
    (tmp_path / "recipe.yaml").write_text(text[:start] + text[text.index("\nexport:", start) :])
    words = ("--recipe", tmp_path / "recipe.yaml", "--input", tmp_path / "p.jsonl", "--output", tmp_path / "out")
    run_here("distributed", "submit", "synth", *words)
    assert [name for name, _ in given] == ["synth", "synth-merge"]
    assert "synth: 1 waiting" in run_here("distributed", "status", tmp_path / "out").stdout
    result = run_here("distributed", "submit", "pipeline", *words, check=False)
    assert (result.returncode, "train" in result.stderr) == (2, True)


def test_the_plan_of_another_version_is_named(tmp_path: Path) -> None:
    plan = StagePlan(stage="synth", recipe="r", overrides=[], input="i", output=str(tmp_path)).model_dump(mode="json")
    (tmp_path / "distributed.json").write_text(json.dumps({**plan, "processes_per_node": 8}))
    with pytest.raises(UserError, match=r"distributed\.json \(processes_per_node\).*submit` again"):
        read_plan(tmp_path)


@pytest.fixture
def failed_run(recipe_path: Path, tmp_path: Path) -> Path:
    """A dump in two shards on "local", whose input is missing, submitted with a secret."""
    words = ("--recipe", recipe_path, "--input", tmp_path / "none", "--output", tmp_path / "out")
    secrets = ("--set", f"serve.env.HF_TOKEN={SECRET}", "--set", "synth.seed=3")
    result = run("distributed", "submit", "dump", *words, "--shards", 2, "--cluster", "local", *secrets, check=False)
    assert result.returncode == 1, result.stderr
    assert SECRET not in result.stdout + result.stderr
    return tmp_path / "out"


def test_an_arrays_tasks_can_be_stopped_and_requeued_and_no_file_has_a_secret(failed_run: Path) -> None:
    pickles = sorted(failed_run.glob("jobs/*_submitted.pkl"))
    assert len(pickles) == 2
    for path in pickles:
        task: Any = pickle.loads(path.read_bytes()).function
        assert isinstance(task.checkpoint().function, Task)  # submitit requeues after a time limit only with this
    logs = "".join(path.read_text() for path in failed_run.glob("jobs/*_log.out"))
    assert "serve.env.HF_TOKEN=<redacted>" in logs
    files = [path for path in failed_run.rglob("*") if path.is_file()]
    assert [path.name for path in files if SECRET.encode() in path.read_bytes()] == []


def test_a_retry_asks_for_the_secrets_of_the_submission_again(failed_run: Path) -> None:
    without = run_here("distributed", "retry", failed_run, check=False)
    assert (without.returncode, "secrets are not written to disk" in without.stderr) == (2, True)
    other = run_here("distributed", "retry", failed_run, "--set", "synth.seed=4", check=False)
    assert (other.returncode, "Leave it out" in other.stderr) == (2, True)


def test_a_task_runs_with_the_secrets_that_its_words_lack(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(VARIABLE, "{}")
    words = hide([f"serve.env.A={SECRET}", "synth.seed=3"])
    assert words == ["serve.env.A=<redacted>", "synth.seed=3"]
    Task(("bash", "-c", f'echo "$0" > {tmp_path}/said', words[0]))()
    assert (tmp_path / "said").read_text() == f"serve.env.A={SECRET}\n"
    hide_again(words, [f"serve.env.A=other-{SECRET}"])
    assert reveal(words) == [f"serve.env.A=other-{SECRET}", "synth.seed=3"]
    del os.environ[VARIABLE]
    with pytest.raises(UserError, match="no value in DRAFTLINE_SECRETS"):
        Task(tuple(words))()


def test_more_processes_than_samples_of_a_batch_are_refused_before_anything_is_submitted(
    recipe_path: Path, tmp_path: Path, given: list[tuple[str, Resources]]
) -> None:
    args = ("distributed", "submit", "pipeline", "--recipe", recipe_path, "--input", "p", "--output", tmp_path / "run")
    result = run_here(*args, "--gpus-per-node", 8, check=False)
    assert result.returncode == 2
    assert "train.global_batch_size: found 4 in 1 accumulated batches" in result.stderr
    assert "each of the 8 processes" in result.stderr
    assert not given
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("sizes", [("--gpus-per-node", 5), ("--nodes", 5), ("--nodes", 3, "--tasks-per-node", 2)])
def test_processes_are_counted_over_nodes_and_agents_and_only_for_a_training(
    recipe_path: Path, tmp_path: Path, given: list[tuple[str, Resources]], sizes: tuple[object, ...]
) -> None:
    args = ("--recipe", recipe_path, "--input", tmp_path / "in", "--output", tmp_path / "run", *sizes)
    result = run_here("distributed", "submit", "train", *args, check=False)
    assert (result.returncode, "train.global_batch_size: found 4" in result.stderr) == (2, True)
    assert not given
    run_here("distributed", "submit", "train", *args, "--set", "train.global_batch_size=6")
    run_here("distributed", "submit", "dump", *args)
    assert [name for name, _ in given] == ["train", "dump"]


def test_cores_follow_the_gpus_unless_they_are_given() -> None:
    assert Resources().sbatch_cores() == {}
    assert Resources(gpus_per_node=8).sbatch_cores() == {"slurm_cpus_per_gpu": 8}
    assert Resources(gpus_per_node=8, cpus_per_task=12).sbatch_cores() == {"cpus_per_task": 12}
    assert Resources(gpus_per_node=8, slurm=["cpus-per-gpu=3"]).sbatch_cores() == {}


def test_the_script_for_sbatch_asks_for_gpus_and_the_cores_of_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, line in (("sbatch", 'cp "$1" script; echo Submitted batch job 17'), ("srun", "exit 1")):
        stub(tmp_path / name, line)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.chdir(tmp_path)
    resources = DEFAULTS.override(Resources(gpus_per_node=4))
    submit(StagePlan(stage="train", recipe="r", overrides=[], input="i", output="o", resources=resources))
    options = {line for line in (tmp_path / "script").read_text().splitlines() if line.startswith("#SBATCH")}
    assert {"#SBATCH --gpus-per-node=4", "#SBATCH --cpus-per-gpu=8", "#SBATCH --signal=USR2@180"} <= options


@pytest.mark.parametrize(("signal_delay_s", "timeout"), [(180, "150"), (600, "570"), (40, "30")])
def test_torchrun_leaves_a_checkpoint_the_time_that_slurms_warning_gives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, signal_delay_s: int, timeout: str
) -> None:
    variable = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"
    stub(tmp_path / "torchrun", f"echo ${variable} > {tmp_path}/said")
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    resources = DEFAULTS.override(Resources(signal_delay_s=signal_delay_s))
    StagePlan(stage="train", recipe="r", overrides=[], input="i", output="o", resources=resources).task(0)()
    assert (tmp_path / "said").read_text() == f"{timeout}\n"
    monkeypatch.setenv(variable, timeout)
    assert LaunchConfig(1, 1, 1).shutdown_timeout == int(timeout)  # torchrun's own word for it


def submit_rolling(recipe_path: Path, folder: Path, *more: object, check: bool = True) -> str:
    return run_here(
        "distributed", "submit", "rolling", "--recipe", recipe_path, "--input", folder / "conversations", "--output",
        folder, "--window", 0.5, *more, check=check,
    ).stderr  # fmt: skip


def test_a_rolling_store_is_filled_and_read_by_jobs_that_wait_for_nothing(
    recipe_path: Path, jobs: list[Job], tmp_path: Path
) -> None:
    submit_rolling(recipe_path, tmp_path, "--shards", 2)
    assert jobs == [("dump", ["0/2", "1/2"], ""), ("train", [], "")]
    dump, train = (read_plan(tmp_path / stage) for stage in ("dump", "train"))
    assert "--window 0.5 --shard 1/2" in " ".join(dump.task(1).words)
    assert train.task(0).words[-3:] == ("--output", str(tmp_path / "train"), "--follow")
    assert train.input == dump.output


def test_in_turns_one_task_fills_the_store_and_trains(recipe_path: Path, jobs: list[Job], tmp_path: Path) -> None:
    submit_rolling(recipe_path, tmp_path, "--in-turns")
    assert [job[0] for job in jobs] == ["train"]
    task = read_plan(tmp_path / "train").task(0)
    assert isinstance(task, TurnsTask)
    assert " ".join(task.capture).endswith(f"--output {tmp_path / 'dump'} --window 0.5 --until-full")
    assert task.words[-2:] == ("--follow", "--until-empty")


def test_both_sides_of_a_rolling_store_get_mooncakes_address(
    recipe_path: Path, jobs: list[Job], tmp_path: Path
) -> None:
    submit_rolling(recipe_path, tmp_path, "--mooncake", "node1:50051", "--mooncake-protocol", "rdma")
    words = "--mooncake node1:50051 --mooncake-name draftline --mooncake-protocol rdma"
    dump, train = (read_plan(tmp_path / stage).task(0).words for stage in ("dump", "train"))
    assert " ".join(dump).endswith(f"--window 0.5 {words} --shard 0/1")
    assert " ".join(train).endswith(f"--follow {words}")
    said = submit_rolling(recipe_path, tmp_path / "b", "--in-turns", "--mooncake", "node1:50051", check=False)
    assert "samples vanish with the dump that lent its memory" in said


def test_rolling_at_the_same_time_needs_a_scheduler(recipe_path: Path, tmp_path: Path) -> None:
    assert "Give --in-turns" in submit_rolling(recipe_path, tmp_path, "--cluster", "local", check=False)


def test_turns_go_on_until_the_training_is_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_file, said = tmp_path / "run.json", tmp_path / "said"
    train = f"echo train >> {said}; [ $(wc -l < {said}) -lt 6 ] || echo '{{\"complete\": true}}' > {run_file}"
    task = TurnsTask(("ignored",), capture=("sh", "-c", f"echo capture >> {said}"), output=str(tmp_path))
    monkeypatch.setattr(TurnsTask, "resolve", lambda _: ["sh", "-c", train])
    task()
    assert said.read_text().split() == ["capture", "train"] * 3
