"""Claims about other trainers' layouts: the same samples, states and masks, readable without running code of theirs."""

from __future__ import annotations

import json
import pickle
import subprocess
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import datasets
import pytest
import torch
from conftest import run_here
from safetensors.torch import load_file

from contracts.modelopt import ModelOptStore
from contracts.store import Store, StoredSample
from dump.convert import _write_speculators


@pytest.fixture(scope="module")
def store(recipe_path: Path, conversations: Path, tmp_path_factory: pytest.TempPathFactory) -> Store:
    folder = tmp_path_factory.mktemp("store") / "store"
    args = ("-r", recipe_path, "--conversations", conversations, "--output", folder, "--set", "dump.backend=hf")
    run_here("dump", "run", *args)
    return Store(folder)


def test_modelopts_layout_holds_the_same_samples(store: Store, tmp_path: Path) -> None:
    for _ in range(2):  # the second time nothing is left to do
        run_here("dump", "convert", store.folder, "--to", "modelopt", "--output", tmp_path)
    files = sorted(tmp_path.glob("*.pt"))
    assert [file.stem for file in files] == store.sample_ids()
    for file in files[::10]:
        found, sample = torch.load(file, weights_only=True), store.read_sample(file.stem)
        assert found["conversation_id"] == file.stem
        assert found["hidden_states_prenorm"] is True
        assert found["input_ids"].tolist() == sample.input_ids.tolist()
        assert found["loss_mask"].tolist() == sample.loss_mask.int().tolist()
        assert torch.equal(found["hidden_states"], sample.hidden_states)
        assert torch.equal(found["aux_hidden_states"], sample.aux_hidden_states)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert (manifest["final_state"], manifest["layout"], manifest["samples"]) == ("pre-norm", "modelopt", 60)


def test_a_draft_trained_from_modelopts_layout_is_the_very_same(
    store: Store, recipe_path: Path, tmp_path: Path
) -> None:
    run_here("dump", "convert", store.folder, "--to", "modelopt", "--output", tmp_path / "modelopt")
    more = ("-r", recipe_path, "--set", "train.num_steps=4")
    for name, folder in (("ours", store.folder), ("theirs", tmp_path / "modelopt")):
        run_here("train", "offline", *more, "--store", folder, "--output", tmp_path / name)
    weights = [load_file(tmp_path / name / "step-000004/weights.safetensors") for name in ("ours", "theirs")]
    assert weights[0].keys() == weights[1].keys()
    for name, tensor in weights[0].items():
        assert torch.equal(tensor, weights[1][name]), name


def test_a_foreign_modelopt_folder_needs_its_layers_named_and_runs_no_code_and_leaves_no_folder(
    store: Store, recipe_path: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "theirs"
    run_here("dump", "convert", store.folder, "--to", "modelopt", "--output", folder)
    layers = json.loads((folder / "manifest.json").read_text())["layer_ids"]
    (folder / "manifest.json").unlink()

    def train(name: str, *more: str) -> subprocess.CompletedProcess[str]:
        args = ("-r", recipe_path, "--set", "train.num_steps=2", "--store", folder, "--output", tmp_path / name)
        return run_here("train", "offline", *args, *more, check=False)

    refused = train("a")
    assert refused.returncode == 2
    assert "target.aux_layers" in refused.stderr
    named = ("--set", f"target.aux_layers={layers}")
    file = sorted(folder.glob("*.pt"))[0]
    value = torch.load(file, weights_only=True)
    torch.save({**value, "conversation_id": "../../../out\0of/here"}, file)
    assert train("b", *named).returncode == 0
    assert {path.name for path in tmp_path.iterdir()} - {"a"} == {"theirs", "b"}
    one_less = train("c", "--set", f"target.aux_layers={layers[:1]}")
    assert one_less.returncode == 2
    assert "shape" in one_less.stderr
    for path in folder.glob("*.pt"):
        path.write_bytes(pickle.dumps({"input_ids": Path("code")}))
    assert train("d", *named).returncode == 2
    with pytest.raises(ValueError, match="not a file name"):
        ModelOptStore(folder, layers, 64).sample_path("../out")


def test_speculators_layout_holds_the_same_samples_row_by_row(store: Store, tmp_path: Path) -> None:
    run_here("dump", "convert", store.folder, "--to", "speculators", "--output", tmp_path)
    rows = datasets.load_from_disk(str(tmp_path))
    assert len(rows) == 60
    for number in range(0, 60, 10):
        sample = store.read_sample(store.sample_ids()[number])
        found = load_file(tmp_path / f"hidden_states/hs_{number}.safetensors")
        assert torch.equal(rows[number]["input_ids"], found["token_ids"])
        assert torch.equal(rows[number]["input_ids"], sample.input_ids.long())
        assert torch.equal(rows[number]["loss_mask"], sample.loss_mask.long())
        assert rows[number]["seq_len"] == sample.num_tokens
        states = found["hidden_states"]
        assert torch.equal(states[:, -1], sample.hidden_states)
        assert torch.equal(states[:, :-1].flatten(1), sample.aux_hidden_states)


def test_an_unknown_layout_and_an_unfinished_store_are_refused(store: Store, tmp_path: Path) -> None:
    result = run_here("dump", "convert", store.folder, "--to", "pickle", "--output", tmp_path / "out", check=False)
    assert result.returncode == 2
    assert "expected one of modelopt, speculators" in result.stderr
    result = run_here("dump", "convert", tmp_path, "--to", "modelopt", "--output", tmp_path / "out", check=False)
    assert result.returncode == 2


def test_the_rows_of_a_dataset_go_to_disk_as_they_come(tmp_path: Path) -> None:
    def samples(count: int) -> Iterator[tuple[str, StoredSample]]:
        nothing = torch.zeros(8000, 1)
        for number in range(count):
            ids = torch.randint(1000, 200_000, (8000,), dtype=torch.int32)
            yield f"{number}", StoredSample(ids, torch.ones(8000, dtype=torch.bool), nothing, nothing, {})

    peaks = []
    for count in (32, 320):
        output = tmp_path / f"{count}"
        output.mkdir()
        tracemalloc.start()
        _write_speculators(output, samples(count))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert len(datasets.load_from_disk(str(output))) == count
        assert not list(output.glob(".rows-*"))
    assert peaks[1] < 1.5 * peaks[0]


def test_states_of_another_row_are_written_anew(store: Store, tmp_path: Path) -> None:
    ids = store.sample_ids()[:3]
    first, second, third = ((id_, store.read_sample(id_)) for id_ in ids)
    _write_speculators(tmp_path, [first, third])
    _write_speculators(tmp_path, [first, second, third])  # a retry has captured the second one
    for number, (_, sample) in enumerate((first, second, third)):
        found = load_file(tmp_path / f"hidden_states/hs_{number}.safetensors")
        assert torch.equal(found["token_ids"], sample.input_ids.long())
        assert torch.equal(found["hidden_states"][:, -1], sample.hidden_states)
