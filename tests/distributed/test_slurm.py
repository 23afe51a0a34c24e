"""Claims about runs on SLURM, a real one of a single node: outputs are one process's, whatever happens to tasks.

The tiny recipe as it ships, its target trained briefly.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, command, read_lines, run
from slurm import is_installed, run_slurm
from written import write_store

from contracts.conversation import read_conversations
from contracts.store import Store
from target.target import Target

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not is_installed(), reason="needs root and Debian's slurm-wlm and munge"),
]
NUM_ROWS = 24
RECIPE = ROOT / "recipes/Tiny-DFlash/recipe.yaml"
MODES = "enabled,disabled"
SETTINGS = ("synth.max_tokens=128", "train.num_steps=40", "train.checkpoint_every=20")


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    with run_slurm(tmp_path_factory.mktemp("slurm")) as environment:
        yield environment


@pytest.fixture(scope="module")
def tiny(trained_target: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recipe's target and prompts, and what one process makes of them: conversations and a store."""
    folder = tmp_path_factory.mktemp("tiny")
    shutil.copytree(trained_target, folder, dirs_exist_ok=True)
    prompts = folder / "prompts/train.jsonl"
    prompts.write_text("".join(prompts.read_text().splitlines(keepends=True)[:NUM_ROWS]))
    args = ("--recipe", RECIPE, *overrides(folder))
    run("synth", "generate", *args, "--prompts", prompts, "--output", folder / "synth", "--thinking-modes", MODES)
    run("dump", "run", *args, "--conversations", folder / "synth", "--output", folder / "store")
    return folder


def overrides(tiny: Path) -> list[str]:
    return [word for value in (f"target.path={tiny}/target", *SETTINGS) for word in ("--set", value)]


def say(environment: dict[str, str], *words: object) -> str:
    """Run a command that must succeed; what it prints."""
    result = subprocess.run(
        [str(word) for word in words], env=environment, capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert result.returncode == 0, (words, result.stdout[-2000:], result.stderr[-2000:])
    return result.stdout


def wait_until(condition: Callable[[], Any], timeout_s: float = 300.0) -> Any:
    deadline = time.monotonic() + timeout_s
    while not (found := condition()):
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.2)
    return found


def queue(environment: dict[str, str], states: str = "PENDING,RUNNING,COMPLETING,REQUEUED,CONFIGURING") -> list[str]:
    return say(environment, "squeue", "-h", "-r", "-t", states, "-o", "%i").split()


def all_ended(environment: dict[str, str]) -> bool:
    """Whether the queue is empty, and stays so: a job that is queued again leaves it for a moment."""
    if queue(environment):
        return False
    time.sleep(3)
    return not queue(environment)


def start_again_now(environment: dict[str, str], job: str) -> None:
    """SLURM lets a job that is queued again wait for two minutes; not here."""
    wait_until(lambda: "BeginTime" in say(environment, "squeue", "-h", "-r", "-j", job, "-o", "%r"), 60)
    say(environment, "scontrol", "update", f"JobId={job}", "StartTime=now")


def processes_of(variable: str, *words: str) -> list[int]:
    """Processes with such a variable in their environment ("SHARD=0/4") and these words in their command line."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            environment = (folder / "environ").read_bytes().decode(errors="replace")
            line = (folder / "cmdline").read_bytes().decode(errors="replace")
        except OSError:
            continue
        if f"{variable}\0" in environment and all(word in line for word in words):
            found.append(int(folder.name))
    return found


def logs_of(folder: Path) -> str:
    return "\n".join(path.read_text(errors="replace")[-3000:] for path in sorted(folder.glob("jobs/*.[oe]*")))


def equal_conversations(folder: Path, alone: Path) -> None:
    """Same ids, counts and greedy replies; merged in the order of the input, one process's in that of their ends."""
    merged, expected = list(read_conversations(folder)), sorted(read_conversations(alone), key=lambda c: c.index)
    assert len(expected) == NUM_ROWS
    assert [c.id for c in merged] == [c.id for c in expected]
    assert [c.samples for c in merged] == [c.samples for c in expected]
    counts = [json.loads((path / "run.json").read_text())["summary"] for path in (folder, alone)]
    assert {key: counts[0][key] for key in counts[1]} == counts[1]


def equal_stores(folder: Path, alone: Path) -> None:
    """Same ids, tokens and masks; states within tolerance."""
    store, whole = Store(folder), Store(alone)
    assert store.sample_ids() == whole.sample_ids()
    assert len(whole.sample_ids()) > NUM_ROWS // 2  # the others were cut
    assert store.read_manifest().conversations == whole.read_manifest().conversations
    for sample_id in whole.sample_ids():
        a, b = store.read_sample(sample_id), whole.read_sample(sample_id)
        assert torch.equal(a.input_ids, b.input_ids)
        assert torch.equal(a.loss_mask, b.loss_mask)
        for name in ("hidden_states", "aux_hidden_states"):
            assert (getattr(a, name) - getattr(b, name)).norm() / getattr(b, name).norm() < 1e-5


@pytest.mark.long
def test_arrays_of_workers_write_and_dump_what_one_process_does(
    slurm: dict[str, str], tiny: Path, tmp_path: Path
) -> None:
    environment = {
        **slurm, "THINKING_MODES": MODES, "DRAFTLINE_ROOT": str(ROOT),
        "VLLM_SERVE_EXTRA_ARGS": """--hf-overrides '{"a b": "c d"}'""",
    }  # fmt: skip
    worker = ROOT / "distributed/worker.sh"
    printed = say(environment, "sbatch", "--array=0-3%2", "--output", tmp_path / "log-%a", worker,
                  RECIPE, tiny / "prompts/train.jsonl", tmp_path / "out", *overrides(tiny))  # fmt: skip
    job = printed.split()[-1]
    options = ("--array=0-3%2", f"--dependency=aftercorr:{job}", "--output", tmp_path / "dump-%a")
    dumped = (worker, RECIPE, tmp_path / "out", tmp_path / "store", *overrides(tiny))
    say({**environment, "STAGE": "dump"}, "sbatch", *options, *dumped)
    mine = f"SLURM_CONF={slurm['SLURM_CONF']}"
    wait_until(lambda: processes_of(mine, "serve.vllm_main"))
    # As SLURM does before the end of a task's time; scancel would wait for the task that it sees queued again.
    os.kill(min(processes_of("SLURM_ARRAY_TASK_ID=0", "slurm_script", str(tmp_path))), signal.SIGUSR2)
    start_again_now(slurm, f"{job}_0")
    wait_until(lambda: all_ended(slurm))
    assert "worker: the time is nearly over; queued again" in (tmp_path / "log-0").read_text()
    logs = {path.name: path.read_text()[-2000:] for path in tmp_path.glob("*-[0-3]")}
    assert "joined 4 shards" in "".join(logs.values()), logs
    say(slurm, *command("synth", "merge", tmp_path / "out"))
    equal_conversations(tmp_path / "out", tiny / "synth")
    equal_stores(tmp_path / "store", tiny / "store")
    server = (tmp_path / "out/shards/worker-1-of-4/server-0.log").read_text()
    assert "'a b': 'c d'" in server  # an argument with spaces went through three shells
    assert not processes_of(f"SLURM_CONF={slurm['SLURM_CONF']}", "serve.vllm_main")


@pytest.mark.long
def test_a_pipeline_survives_a_cancelled_task_a_killed_server_and_a_requeue_and_equals_one_process(
    slurm: dict[str, str], tiny: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    synth = folder / "synth"
    args = ["--recipe", RECIPE, *overrides(tiny), "--set", f"synth.thinking_modes=[{MODES}]"]
    more = ["--time", 30, "--max-running", 2]
    places = ["--input", tiny / "prompts/train.jsonl", "--output", folder, "--shards", 4]
    printed = say(slurm, *command("distributed", "submit", "pipeline", *args, *more, *places))
    for stage, count in (("synth", 4), ("dump", 4), ("train", 1)):
        assert f"{stage}: {count} of {count} tasks to do" in printed
    job = re.findall(r"synth: job (\d+)", printed)[0]

    wait_until(lambda: processes_of("SHARD=0/4", "serve.vllm_main"))
    say(slurm, "scancel", f"{job}_0")
    server = wait_until(lambda: processes_of("SHARD=1/4", "serve.vllm_main"))
    for pid in server:
        os.kill(pid, signal.SIGKILL)
    wait_until(lambda: processes_of("SHARD=2/4", "serve.vllm_main"))
    say(slurm, "scontrol", "requeue", f"{job}_2")
    start_again_now(slurm, f"{job}_2")
    wait_until(lambda: all_ended(slurm))  # what waited for the two that failed is gone, too
    states = say(slurm, *command("distributed", "status", folder))
    sizes = Counter(int(record.id, 16) % 4 for record in read_conversations(tiny / "synth"))
    lost = sizes[0] + sizes[1]
    assert re.search(rf"synth: 2 done, .*; {lost} of {NUM_ROWS} rows remain", states), states + logs_of(synth)
    # Those two shards are dumped, without waiting for the others.
    assert f"dump: 2 done, 2 waiting; {NUM_ROWS - lost} rows; {lost} of {NUM_ROWS} rows remain" in states, states
    assert "train: 1 waiting" in states

    printed = say(slurm, *command("distributed", "retry", folder))
    assert "synth: 2 of 4 tasks to do" in printed
    job = re.findall(r"synth: job (\d+)", printed)[0]
    assert "TimeLimit=00:30:00" in say(slurm, "scontrol", "show", "job", job)  # as submitted
    assert "dump: 2 of 4 tasks to do" in printed
    wait_until(lambda: all_ended(slurm))
    states = say(slurm, *command("distributed", "status", folder))
    for line in (
        f"synth: 4 done; {NUM_ROWS} rows; 0 of {NUM_ROWS} rows remain",
        f"dump: 4 done; {NUM_ROWS} rows; 0 of {NUM_ROWS} rows remain",
        "train: 1 done; 40 steps",
    ):
        assert line in states, states + logs_of(folder / line.partition(":")[0])
    ledgers = [line for path in synth.glob("shards/*-of-*/ledger.jsonl") for line in read_lines(path)]
    assert sorted(line["index"] for line in ledgers) == list(range(NUM_ROWS))  # every row exactly once
    equal_conversations(synth, tiny / "synth")
    equal_stores(folder / "dump", tiny / "store")


def test_a_worker_whose_server_cannot_start_ends_with_its_last_lines(
    slurm: dict[str, str], recipe_path: Path, prompts_path: Path, tmp_path: Path
) -> None:
    environment = {**slurm, "SHARD": "0/1", "DRAFTLINE_ROOT": str(ROOT), "VLLM_SERVE_EXTRA_ARGS": "--no-such-flag 3"}
    worker = ("--output", tmp_path / "log", ROOT / "distributed/worker.sh", recipe_path, prompts_path, tmp_path / "out")
    job = say(environment, "sbatch", *worker).split()[-1]
    wait_until(lambda: not queue(slurm), 120)
    assert "JobState=FAILED" in say(slurm, "scontrol", "show", "job", job)
    log = (tmp_path / "log").read_text()
    assert "worker: server 0 did not start, its last lines" in log
    assert "unrecognized arguments: --no-such-flag" in log


@pytest.mark.long
def test_two_agents_of_torchrun_resume_after_a_kill_with_the_same_losses(
    slurm: dict[str, str], recipe_path: Path, target_folder: Path, tmp_path: Path
) -> None:
    store = write_store(tmp_path / "store", Target.read(target_folder))
    args = ["--recipe", recipe_path, "--set", "train.num_steps=300", "--set", "train.checkpoint_every=10"]
    args += ["--set", "train.num_threads=1"]
    say(slurm, *command("train", "offline", *args, "--store", store, "--output", tmp_path / "alone"))
    output, mine = tmp_path / "draft", f"SLURM_CONF={slurm['SLURM_CONF']}"
    more = ["--time", 30, "--tasks-per-node", 2, "--input", store, "--output", output]
    printed = say(slurm, *command("distributed", "submit", "train", *args, *more))
    job = re.findall(r"train: job (\d+)", printed)[0]
    wait_until(lambda: any(output.glob("step-*")), 120)
    workers = processes_of(mine, "train.cli\0offline", str(output))
    os.kill(workers[-1], signal.SIGKILL)  # torchrun starts all of them again
    agents = wait_until(lambda: set(processes_of(mine, "torchrun", str(output))) - set(workers), 60)
    again = wait_until(lambda: set(processes_of(mine, "train.cli\0offline", str(output))) - {*workers, *agents}, 120)
    assert again
    steps = len(list(output.glob("step-*")))
    wait_until(lambda: max(int(path.name[5:]) for path in output.glob("step-*")) >= 10 * steps, 120)
    say(slurm, "scancel", "--signal=USR2", job)  # as before the end of its time: saved, and queued again by itself
    start_again_now(slurm, job)
    wait_until(lambda: json.loads((output / "run.json").read_text())["complete"] or all_ended(slurm))
    about = say(slurm, "scontrol", "show", "job", job)
    assert json.loads((output / "run.json").read_text())["complete"], about + logs_of(output)
    wait_until(lambda: all_ended(slurm))
    assert "this job is preempted" in logs_of(output)
    folders = (tmp_path / "alone", output)
    losses = [[line["loss"] for line in read_lines(folder / "metrics.jsonl")] for folder in folders]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)
