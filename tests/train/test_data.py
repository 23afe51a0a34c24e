"""Claims about reading a store: what is read, in which dtype and order, and by how many threads and processes."""

from __future__ import annotations

import json
import pickle
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import run, run_here
from safetensors.torch import load_file
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from written import write_store

from contracts.draft import DraftRun
from contracts.sample_file import StoredSample
from contracts.store import Store
from recipe.load import load_recipe
from target.target import Target
from train import evaluate
from train.checkpoint import Checkpoints
from train.data import Samples, read_ahead
from train.processes import Processes


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


@pytest.mark.parametrize(("dtype", "stored_as"), [("fp8_e4m3", torch.float8_e4m3fn), ("int4", torch.uint8)])
def test_a_gpu_gets_coded_states_as_they_are_stored_and_decodes_them_to_the_same(
    recipe_path: Path, store: Store, dtype: str, stored_as: torch.dtype
) -> None:
    section = load_recipe(recipe_path, ["train.draft.objective=distill"]).training()
    for id_ in store.sample_ids():
        store.write_sample(id_, store.read_sample(id_), dtype)
    stored = Samples(store, section, 256, on_gpu=True).batch(0)
    assert stored.aux_hidden_states.dtype == stored_as
    assert stored.hidden_states.dtype == torch.float8_e4m3fn
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
    walk = evaluate.walk

    def count(sample: StoredSample, drafted: torch.Tensor) -> list[list[int]]:
        walked.append(sample)
        return walk(sample, drafted)

    monkeypatch.setattr(evaluate, "walk", count)
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


class Touch:
    """Unpickled, this creates a file."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self._path,)


def test_a_checkpoint_cannot_run_code_when_a_run_goes_on_from_it(
    recipe_path: Path, store: Store, tmp_path: Path
) -> None:
    sets = ("--recipe", recipe_path, "--set", "train.num_steps=4", "--store", store.folder)
    args = ["train", "offline", *sets, "--output", tmp_path / "run"]
    run_here(*args)
    folder = DraftRun(tmp_path / "run").step_folder(4) / "state"
    metadata = FileSystemReader(folder).read_metadata()
    assert all(isinstance(entry, TensorStorageMetadata) for entry in metadata.state_dict_metadata.values())
    (folder / ".metadata").write_bytes(pickle.dumps(Touch(tmp_path / "ran")))
    state = json.loads((tmp_path / "run/run.json").read_text())
    (tmp_path / "run/run.json").write_text(json.dumps({**state, "complete": False}))
    refused = run_here(*args, check=False)
    assert refused.returncode == 2
    assert "found unexpected content" in refused.stderr
    assert not (tmp_path / "ran").exists()


def test_a_step_that_writes_beside_a_checkpoint_does_not_change_it(
    recipe_path: Path, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = list[dict[str, torch.Tensor]]()
    save = Checkpoints.save

    def save_and_overwrite(self: Checkpoints, step: int, best_length: float | None = None) -> None:
        model = self._training.model
        saved.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
        save(self, step, best_length)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()

    monkeypatch.setattr(Checkpoints, "save", save_and_overwrite)
    args = ["--recipe", recipe_path, "--set", "train.num_steps=1", "--store", store.folder]
    run_here("train", "offline", *args, "--output", tmp_path / "run")
    found = load_file(DraftRun(tmp_path / "run").step_folder(1) / "weights.safetensors")
    assert found.keys() == saved[0].keys()
    assert all(torch.equal(found[name], saved[0][name]) for name in found)


def test_batches_of_a_step_come_one_by_one_with_the_normalizer_of_all(recipe_path: Path, store: Store) -> None:
    sets = ["train.gradient_accumulation_steps=2", "train.global_batch_size=4", "train.num_steps=2"]
    recipe = load_recipe(recipe_path, sets)
    samples = Samples(store, recipe.training(), 256)

    @dataclass
    class Weighed:
        normalizer: float

    batches = read_ahead(samples, 0, Processes(0, 1, torch.device("cpu")), lambda batch: Weighed(len(batch.token_ids)))
    found = [(planned.plan.normalizer, planned.normalizer) for planned in batches]
    assert len(found) == 4
    for first, second in zip(found[::2], found[1::2], strict=True):
        assert first[1] == second[1] == first[0] + second[0]


def test_a_full_disk_ends_a_run_in_one_line_and_with_room_it_goes_on(
    recipe_path: Path, store: Store, small_disk: Path
) -> None:
    def resize(size: str) -> None:
        subprocess.run(["mount", "-o", f"remount,size={size}", small_disk], check=True)

    sets = ("--set", "train.num_steps=40", "--set", "train.checkpoint_every=10", "--set", "train.keep_checkpoints=1")
    args = ["train", "offline", "--recipe", recipe_path, *sets, "--store", store.folder, "--output", small_disk / "run"]
    resize("1m")
    full = run(*args, check=False)
    assert full.returncode == 1
    assert full.stderr.splitlines()[-1].startswith("error: ")
    assert "o space left" in full.stderr
    assert "Traceback" not in full.stderr
    resize("64m")
    run(*args)
    assert DraftRun(small_disk / "run").steps() == [40]
