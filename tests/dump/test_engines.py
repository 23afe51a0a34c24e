"""Claims about several engines: each has its own GPUs, all work, a dead one ends the run, and nothing is lost."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import pytest
import torch
from conftest import ROOT, command, read_lines, run_here
from warm import Warm
from written import write_conversations

import dump.gpus
from common.errors import IncompleteError, UserError
from contracts.conversation import read_conversations
from contracts.store import Store
from dump.backends import make_backend
from dump.capture import CaptureBackend, Staged, Staging, load_staged
from dump.gpus import divide_gpus
from recipe.check import check_recipe
from recipe.load import load_recipe
from target.layers import captured_layers
from target.target import Target

COUNT = 200
STAGING_GIB = 20 * 30 * 3 * 64 * 4 / 2**30  # about 20 samples: engines cannot run far ahead of the writers
GPUS = "dump.env.CUDA_VISIBLE_DEVICES"


def divide(recipe_path: Path, *sets: str) -> list[str | None]:
    return divide_gpus(load_recipe(recipe_path, sets))


def test_assigned_gpus_are_divided_in_their_order_and_the_recipes_assignment_wins(
    recipe_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,3,GPU-8d1f,7,6")
    two = "dump.args.tensor-parallel-size=2"
    assert divide(recipe_path, "dump.engines=2") == ["5", "3"]
    assert divide(recipe_path, "dump.engines=2", two) == ["5,3", "GPU-8d1f,7"]
    assert divide(recipe_path, "dump.engines=0", two) == ["5,3", "GPU-8d1f,7"]
    assert divide(recipe_path, "dump.engines=0", two, "serve.args.pipeline_parallel_size=2") == [None]
    assert divide(recipe_path, "dump.engines=0", two, f"{GPUS}='1,0,2,3'") == ["1,0", "2,3"]


def test_one_engine_has_all_gpus_and_without_gpus_there_are_as_many_engines_as_asked_for(
    recipe_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(dump.gpus.torch.cuda, "device_count", lambda: 8)
    assert divide(recipe_path) == [None]
    assert divide(recipe_path, "dump.engines=0", "dump.args.tensor-parallel-size=8") == [None]
    assert divide(recipe_path, "dump.engines=0") == [str(number) for number in range(8)]
    assert divide(recipe_path, "dump.engines=0", "dump.backend=server") == [None]
    monkeypatch.setattr(dump.gpus.torch.cuda, "device_count", lambda: 0)
    assert divide(recipe_path, "dump.engines=3") == [None, None, None]
    assert divide(recipe_path, "dump.engines=0") == [None]


def test_more_engines_than_the_gpus_allow_and_engines_of_other_backends_are_refused(recipe_path: Path) -> None:
    sets = ["dump.engines=3", "serve.args.tensor-parallel-size=2", f"{GPUS}='4,5,6,7'"]
    with pytest.raises(UserError, match=r"found 3 engines of 2 GPUs each, expected at most the 4 GPUs .*4,5,6,7"):
        divide(recipe_path, *sets)
    with pytest.raises(UserError, match=r"found 2 engines with dump\.backend: hf, expected 1"):
        check_recipe(load_recipe(recipe_path, ["dump.engines=2", "dump.backend=hf"]))


def find_engines(parent: int) -> list[int]:
    """The ids of the engines' processes of a stage, in the order in which they were started."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                words = (folder / "cmdline").read_bytes().split(b"\0")
                above = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
            if above == parent and b"dump.engine_process" in words:
                found.append(int(folder.name))
    return sorted(found)


def is_running(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def environment(process: int) -> dict[str, str]:
    words = Path(f"/proc/{process}/environ").read_bytes().decode().split("\0")
    return dict(word.split("=", 1) for word in words if "=" in word)


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    while not condition():
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)


@pytest.fixture
def many(target_folder: Path, tmp_path: Path) -> Path:
    return write_conversations(target_folder, tmp_path / "conversations", COUNT)


Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start(recipe_path: Path, many: Path, tmp_path: Path) -> Iterator[Start]:
    """Starts `dump run` with two engines on the GPUs 5 and 3, of which the CPU build takes no notice."""
    started: list[subprocess.Popen[str]] = []

    def start() -> subprocess.Popen[str]:
        words = ("-r", recipe_path, "--conversations", many, "--output", tmp_path / "store", "--engines", 2)
        words += ("--set", f"dump.staging_gib={STAGING_GIB}")
        process = subprocess.Popen(
            command("dump", "run", *words), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
            env={**os.environ, "CUDA_VISIBLE_DEVICES": "5,3"},
        )  # fmt: skip
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.mark.vllm
@pytest.mark.long
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc")
def test_a_killed_engine_ends_the_run_and_the_next_one_completes_the_store_of_one_engine(
    start: Start, engine: Warm, recipe_path: Path, many: Path, tmp_path: Path
) -> None:
    store, ledger = Store(tmp_path / "store"), tmp_path / "store/ledger.jsonl"
    killed = start()
    wait_until(lambda: len(find_engines(killed.pid)) == 2, killed)
    processes = find_engines(killed.pid)
    assert [environment(process)["CUDA_VISIBLE_DEVICES"] for process in processes] == ["5", "3"]
    wait_until(lambda: len(read_lines(ledger)) >= 5, killed)
    os.kill(processes[1], signal.SIGKILL)
    _, stderr = killed.communicate(timeout=300)
    assert killed.returncode == 1
    assert "error: engine 1 (GPUs 3): found a process that ended with exit code -9 (was it out of memory?)" in stderr
    assert "Traceback" not in stderr
    assert not any(map(is_running, processes))
    kept = len(read_lines(ledger))
    assert 5 <= kept < COUNT
    stdout, stderr = (resumed := start()).communicate(timeout=300)
    assert resumed.returncode == 0, stderr
    assert f"{kept} of {COUNT} samples are there already" in stdout
    assert len(read_lines(ledger)) == len({line["id"] for line in read_lines(ledger)}) == COUNT
    assert f"{COUNT} files whole" in run_here("dump", "verify", "-r", recipe_path, "--store", store.folder).stdout
    engine.run("dump", "run", "-r", recipe_path, "--conversations", many, "--output", tmp_path / "one")
    one = Store(tmp_path / "one")
    assert store.sample_ids() == one.sample_ids()
    for sample_id in one.sample_ids():
        a, b = store.read_sample(sample_id), one.read_sample(sample_id)
        assert torch.equal(a.input_ids, b.input_ids)
        assert torch.equal(a.loss_mask, b.loss_mask)
        for states in ("hidden_states", "aux_hidden_states"):
            assert (getattr(a, states) - getattr(b, states)).norm() / getattr(b, states).norm() < 1e-5


@pytest.mark.vllm
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs prctl")
def test_engines_end_with_a_killed_stage(start: Start) -> None:
    stage = start()
    wait_until(lambda: len(find_engines(stage.pid)) == 2, stage)
    processes = find_engines(stage.pid)
    stage.kill()
    deadline = time.monotonic() + 120
    while any(map(is_running, processes)):
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.fixture
def backend(recipe_path: Path, tmp_path: Path) -> Iterator[CaptureBackend]:
    recipe = load_recipe(recipe_path, ["dump.engines=2"])
    target = Target.here(recipe.target)
    layer_ids = captured_layers(recipe.target, target)
    started = make_backend(recipe, target, layer_ids, Staging(tmp_path, 1 << 30))
    yield started
    started.close()


@pytest.mark.vllm
@pytest.mark.long
def test_all_engines_share_the_samples_within_the_staging_limit_and_each_can_be_given_its_own(
    backend: CaptureBackend, conversations: Path, tmp_path: Path
) -> None:
    rows = {record.id: record.samples[0].token_ids for record in read_conversations(conversations)}
    limit = 20 * 50 * backend.token_bytes  # 20 samples of the longest
    staging, most = Staging(tmp_path, limit), 0

    def load(staged: Staged, by: CaptureBackend = backend) -> str:
        """Check the states' file, delete it, and return the name of the engine's folder."""
        nonlocal most
        most = max(most, staging.taken_bytes)
        assert staged.path is not None
        load_staged(staged, rows[staged.sample_id], 2, 64)
        staging.give(len(rows[staged.sample_id]) * by.token_bytes)
        return staged.path.parent.name

    for number, one in enumerate(backend.engines):
        alone = [load(staged, one) for staged in one.capture(islice(iter(rows.items()), 5), staging)]
        assert alone == [f"engine-{number}"] * 5
    found = [(staged.sample_id, load(staged)) for staged in backend.capture(iter(rows.items()), staging)]
    assert sorted(sample_id for sample_id, _ in found) == sorted(rows)
    assert {folder for _, folder in found} == {"engine-0", "engine-1"}
    assert staging.taken_bytes == 0
    assert limit // 2 < most <= limit


@pytest.mark.vllm
def test_an_engine_that_cannot_start_is_named_with_its_last_lines(recipe_path: Path, tmp_path: Path) -> None:
    recipe = load_recipe(recipe_path, ["dump.engines=2", "dump.args.no-such-argument=1"])
    target = Target.here(recipe.target)
    with pytest.raises(IncompleteError, match=r"engine \d: found a process that ended with exit code 1, .*no_such_arg"):
        make_backend(recipe, target, captured_layers(recipe.target, target), Staging(tmp_path, 1 << 30))
