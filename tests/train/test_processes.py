"""Claims about the start of a training's processes: time-outs, devices, and the same initial weights on all of them."""

from __future__ import annotations

import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT
from written import write_store

from contracts.draft import DraftRun
from contracts.store import Store
from drafts import METHODS
from drafts.draft import Draft
from recipe.load import load_recipe
from recipe.recipe import Recipe
from serve.server import find_port
from target.head import TargetHead, read_head
from target.target import Target
from train.draft import make_config
from train.offline import Job, _prepare
from train.processes import TIMEOUT, Processes, start_processes

CODE = """
import torch
import torch.distributed as dist
from train.processes import start_processes

with start_processes() as processes:
    backend = dist.distributed_c10d._get_default_group()._get_backend(processes.device)
    print(dist.get_backend(), backend.options._timeout.total_seconds(), float(processes.sum(torch.tensor(1.0))))
"""
EAGLE3 = "train.draft={method: eagle3, num_attention_heads: 2, num_key_value_heads: 1, intermediate_size: 64}"


def test_two_processes_wait_for_one_another_as_long_as_a_checkpoint_may_take() -> None:
    group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(find_port("127.0.0.1", None))}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", CODE], cwd=ROOT, stdout=subprocess.PIPE, text=True,
            env={**os.environ, **group, "RANK": str(rank)},
        )
        for rank in range(2)
    ]  # fmt: skip
    for process in started:
        last = process.communicate()[0].splitlines()[-1]  # torch 2.9 prints lines of its own before
        assert last.split() == ["gloo", "3600.0", "2.0"]
    assert timedelta(seconds=3600) == TIMEOUT


def test_each_gpu_process_takes_its_own_and_both_groups_have_the_time_out(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: dict[str, Any] = {}

    def new_group(**options: Any) -> str:
        calls["control"] = options
        return "control"

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: calls.update(device=device))
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **options: calls.update(default=(backend, options)))
    monkeypatch.setattr(dist, "new_group", new_group)
    monkeypatch.setattr(dist, "destroy_process_group", lambda: None)
    for name, value in {"WORLD_SIZE": "16", "RANK": "11", "LOCAL_RANK": "3"}.items():
        monkeypatch.setenv(name, value)
    own = torch.device("cuda", 3)
    with start_processes() as processes:
        assert (processes.rank, processes.world, processes.device, processes.control) == (11, 16, own, "control")
    assert calls == {
        "device": own,
        "default": ("nccl", {"timeout": TIMEOUT, "device_id": own}),
        "control": {"backend": "gloo", "timeout": TIMEOUT},
    }


@pytest.fixture(scope="module")
def store(target_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Store:
    return Store(write_store(tmp_path_factory.mktemp("store"), Target.read(target_folder)))


def build(recipe: Recipe, store: Store, head: TargetHead, seed: int) -> Draft:
    config = make_config(recipe, Target.read(recipe.target.path), store.read_manifest())
    draft = METHODS[config.method].build(config, recipe.training().draft, gradient_checkpointing=False)
    draft.initialize(seed, head, lambda: torch.ones(config.vocab_size))
    return draft


@pytest.mark.parametrize("changes", [[], [EAGLE3]], ids=["dflash", "eagle3"])
def test_a_seed_gives_the_same_weights_wherever_the_head_lies_and_whatever_was_drawn_before(
    recipe_path: Path, target_folder: Path, store: Store, changes: list[str]
) -> None:
    recipe, head = load_recipe(recipe_path, changes), read_head(Target.read(target_folder))
    torch.manual_seed(1)
    expected = build(recipe, store, head, seed=7).state_dict()
    torch.manual_seed(2)
    found = build(recipe, store, head.to(torch.device("meta")), seed=7).state_dict()  # as if the head were on a GPU
    other = build(recipe, store, head, seed=8).state_dict()
    assert {value.device.type for value in found.values()} == {"cpu"}
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert not torch.equal(other["fc.weight"], expected["fc.weight"])


def test_a_training_draws_its_weights_on_the_cpu_and_moves_them_then(
    recipe_path: Path, target_folder: Path, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, target, told = load_recipe(recipe_path), Target.read(target_folder), []
    initialize = Draft.initialize

    def note_weights(draft: Draft, seed: int, *rest: Any) -> str:
        told.append(("drawn", seed, {parameter.device.type for parameter in draft.parameters()}))
        return initialize(draft, seed, *rest)

    def note_move(draft: Draft, device: torch.device) -> Draft:
        told.append(("moved", device.type))
        raise InterruptedError

    monkeypatch.setattr(Draft, "initialize", note_weights)
    monkeypatch.setattr(Draft, "to", note_move)
    config = make_config(recipe, target, store.read_manifest())
    job: Any = Job(recipe, config, None, DraftRun(tmp_path), None)  # type: ignore[arg-type]
    gpu = Processes(0, 1, torch.device("meta"))  # any device but the CPU
    with pytest.raises(InterruptedError):
        _prepare(job, read_head(target), gpu)
    assert told == [("drawn", recipe.training().seed, {"cpu"}), ("moved", "meta")]
