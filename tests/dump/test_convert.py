"""Claims about other trainers' layouts: the same samples, states and masks, readable without running code of theirs."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import pytest
import torch
from conftest import run
from safetensors.torch import load_file

from contracts.store import Store


@pytest.fixture(scope="module")
def store(recipe_path: Path, conversations: Path, tmp_path_factory: pytest.TempPathFactory) -> Store:
    folder = tmp_path_factory.mktemp("store") / "store"
    args = ("-r", recipe_path, "--conversations", conversations, "--output", folder, "--set", "dump.backend=hf")
    run("dump", "run", *args)
    return Store(folder)


def test_modelopts_layout_holds_the_same_samples(store: Store, tmp_path: Path) -> None:
    for _ in range(2):  # the second time nothing is left to do
        run("dump", "convert", store.folder, "--to", "modelopt", "--output", tmp_path)
    files = sorted(tmp_path.glob("*.pt"))
    assert [file.stem for file in files] == store.sample_ids()
    for file in files[::10]:
        found, sample = torch.load(file, weights_only=True), store.read_sample(file.stem)
        assert found["conversation_id"] == file.stem
        assert found["input_ids"].tolist() == sample.input_ids.tolist()
        assert found["loss_mask"].tolist() == sample.loss_mask.int().tolist()
        assert torch.equal(found["hidden_states"], sample.hidden_states)
        assert torch.equal(found["aux_hidden_states"], sample.aux_hidden_states)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert (manifest["final_state"], manifest["layout"], manifest["samples"]) == ("pre-norm", "modelopt", 60)


def test_speculators_layout_holds_the_same_samples_row_by_row(store: Store, tmp_path: Path) -> None:
    run("dump", "convert", store.folder, "--to", "speculators", "--output", tmp_path)
    rows = datasets.load_from_disk(str(tmp_path))
    assert len(rows) == 60
    for number in range(0, 60, 10):
        sample = store.read_sample(store.sample_ids()[number])
        found = load_file(tmp_path / f"hidden_states/hs_{number}.safetensors")
        assert rows[number]["input_ids"] == found["token_ids"].tolist() == sample.input_ids.tolist()
        assert rows[number]["loss_mask"] == sample.loss_mask.int().tolist()
        assert rows[number]["seq_len"] == sample.num_tokens
        states = found["hidden_states"]
        assert torch.equal(states[:, -1], sample.hidden_states)
        assert torch.equal(states[:, :-1].flatten(1), sample.aux_hidden_states)


def test_an_unknown_layout_and_an_unfinished_store_are_refused(store: Store, tmp_path: Path) -> None:
    result = run("dump", "convert", store.folder, "--to", "pickle", "--output", tmp_path / "out", check=False)
    assert result.returncode == 2
    assert "expected one of modelopt, speculators" in result.stderr
    result = run("dump", "convert", tmp_path, "--to", "modelopt", "--output", tmp_path / "out", check=False)
    assert result.returncode == 2
