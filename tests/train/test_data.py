"""Claims about reading a store: what is read, in which dtype and order, and by how many threads and processes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import run, run_here
from written import write_store

from contracts.draft import DraftRun
from contracts.sample_file import StoredSample
from contracts.store import Store
from recipe.load import load_recipe
from target.target import Target
from train import offline
from train.data import Samples


@pytest.fixture
def store(target_folder: Path, tmp_path: Path) -> Store:
    return Store(write_store(tmp_path / "store", Target.read(target_folder)))


@pytest.mark.parametrize(("objective", "width"), [("tokens", 0), ("distill", 1)])
def test_final_states_are_read_only_if_the_objective_needs_them(
    recipe_path: Path, store: Store, objective: str, width: int
) -> None:
    section = load_recipe(recipe_path, [f"train.draft.objective={objective}"]).training()
    batch = Samples(store, section, 256).batch(0)
    hidden = store.read_manifest().hidden_size
    assert batch.hidden_states.shape == (len(batch.token_ids), width * hidden)
    assert batch.aux_hidden_states.shape[1] > 0


def test_a_gpu_gets_fp8_states_as_they_are_stored_and_decodes_them_to_the_same(recipe_path: Path, store: Store) -> None:
    section = load_recipe(recipe_path, ["train.draft.objective=distill"]).training()
    for id_ in store.sample_ids():
        store.write_sample(id_, store.read_sample(id_), "fp8_e4m3")
    stored = Samples(store, section, 256, on_gpu=True).batch(0)
    assert stored.aux_hidden_states.dtype == stored.hidden_states.dtype == torch.float8_e4m3fn
    expected = Samples(store, section, 256).batch(0)
    assert expected.aux_hidden_states.dtype == torch.float32
    decoded = stored.decoded()
    assert not decoded.scales
    assert torch.equal(decoded.aux_hidden_states.float(), expected.aux_hidden_states)
    assert torch.equal(decoded.hidden_states.float(), expected.hidden_states)


def test_threads_that_read_ahead_change_neither_order_nor_losses(
    recipe_path: Path, store: Store, tmp_path: Path
) -> None:
    args = ["--recipe", recipe_path, "--store", store.folder, "--set", "train.num_steps=20"]
    found = []
    for readers, gib in ((1, 1e-9), (3, 4.0)):
        folder = tmp_path / str(readers)
        sets = ("--set", f"train.num_readers={readers}", "--set", f"train.read_ahead_gib={gib}")
        run_here("train", "offline", *args, *sets, "--output", folder)
        lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
        found.append([(line["step"], line["loss"], line["grad_norm"]) for line in lines])
    assert len(found[0]) == 2
    assert found[0] == found[1]


def test_an_evaluation_during_training_walks_at_most_the_given_number_of_samples(
    recipe_path: Path, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    walked = list[StoredSample]()
    walk = offline.walk

    def count(sample: StoredSample, drafted: torch.Tensor) -> list[list[int]]:
        walked.append(sample)
        return walk(sample, drafted)

    monkeypatch.setattr(offline, "walk", count)
    sets = ("num_steps=4", "evaluate_every=2", "evaluate_samples=2", "held_out_fraction=0.49")
    words = [word for one in sets for word in ("--set", f"train.{one}")]
    run_here("train", "offline", "--recipe", recipe_path, *words, "--store", store.folder, "--output", tmp_path / "run")
    assert len(walked) == 2 * 2


def test_processes_share_out_an_evaluation_and_report_the_same(recipe_path: Path, store: Store, tmp_path: Path) -> None:
    args = ["--recipe", recipe_path, "--set", "train.num_steps=3", "--set", "train.num_threads=1"]
    run_here("train", "offline", *args, "--store", store.folder, "--output", tmp_path / "run")
    places = ["--run-folder", tmp_path / "run", "--store", store.folder]
    run_here("train", "eval", *args, *places, "--output", tmp_path / "one.json")
    torchrun = ["torchrun", "--standalone", "--nproc-per-node=2", "--module", "train.cli"]
    run(*torchrun, "eval", *args, *places, "--output", tmp_path / "two.json")
    one, two = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "two"))
    assert one == two
    assert len(one["walks"]) == len(store.sample_ids())


def test_a_checkpoint_is_complete_when_it_has_its_name(recipe_path: Path, store: Store, tmp_path: Path) -> None:
    args = ["--recipe", recipe_path, "--set", "train.num_steps=6", "--set", "train.checkpoint_every=2"]
    unfinished = tmp_path / "run/.step-000004.tmp/state"
    unfinished.mkdir(parents=True)
    run_here("train", "offline", *args, "--store", store.folder, "--output", tmp_path / "run")
    found = DraftRun(tmp_path / "run")
    assert found.steps() == [4, 6]
    for step in found.steps():
        names = {path.name for path in found.step_folder(step).iterdir()}
        assert names == {"state", "weights.safetensors", "position.json", "recipe.yaml"}
    assert not list((tmp_path / "run").glob(".step-*"))
