"""Claims about `bench parity`: trainer and engine agree on a good draft; each seeded defect is named for what it is."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import run_here
from safetensors.torch import load_file, save_file
from warm import Warm
from written import write_conversations

from contracts.draft import DraftRun

pytestmark = [pytest.mark.vllm, pytest.mark.proves("trace"), pytest.mark.timeout(300)]
KNOWN = 300


@pytest.fixture(scope="module")
def store(recipe_path: Path, target_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parity-store")
    conversations = write_conversations(target_folder, folder / "synth", 12)
    args = ["--recipe", recipe_path, "--backend", "hf", "--conversations", conversations]
    run_here("dump", "run", *args, "--output", folder / "store")
    return folder / "store"


@pytest.fixture(scope="module", params=["dflash", "eagle3", "peagle"])
def trained(
    request: Any, recipe_path: Path, store: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, list[object], Path]:
    """A method, its flags, and a folder with a run and its export, whose weights are far from their first values."""
    folder = tmp_path_factory.mktemp("parity")
    args: list[object] = ["--recipe", recipe_path, "--set", f"train.draft.method={request.param}"]
    args += ["--set", "train.num_steps=2"]
    args += ["--set", f"train.draft.draft_vocab_size={KNOWN}"] if request.param in ("eagle3", "peagle") else []
    more = ("num_speculative_tokens=3", "num_layers=2") if request.param == "peagle" else ()
    args += [word for key in more for word in ("--set", f"train.draft.{key}")]
    run_here("train", "offline", *args, "--store", store, "--output", folder / "draft")
    weights_path = DraftRun(folder / "draft").chosen_weights()
    weights = {name: 4 * t if t.dim() > 1 else t for name, t in load_file(weights_path).items()}
    save_file(weights, weights_path)
    run_here("train", "export", *args, "--run", folder / "draft", "--output", folder / "export")
    return request.param, args, folder


def compare(engine: Warm, trained: tuple[str, list[object], Path], store: Path, export: Path, output: Path) -> Any:
    _, args, folder = trained
    words = ["--run", folder / "draft", "--draft", export, "--store", store, "--output", output, "--samples", 2]
    return engine.run("bench", "parity", *args, *words, check=False)


def change_config(export: Path, **changes: Any) -> None:
    config = json.loads((export / "config.json").read_text())
    for key, value in changes.items():
        if isinstance(value, dict):
            config[key] = {**config[key], **value}
        else:
            config[key] = value
    (export / "config.json").write_text(json.dumps(config))


def test_trainer_and_engine_agree_on_a_good_draft(
    engine: Warm, trained: tuple[str, list[object], Path], store: Path, tmp_path: Path
) -> None:
    result = compare(engine, trained, store, trained[2] / "export", tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    report = json.loads((tmp_path / "parity.json").read_text())
    stages = [stage["stage"] for stage in report["stages"]]
    expected = {
        "dflash": ["layer 1", "layer 2", "teacher argmax", "mask token", "mask embedding"],
        "eagle3": ["layer 1", "layer 2", "teacher argmax", "vocabulary map"],
        "peagle": ["layer 1", "layer 2", "teacher argmax", "mask token", "mask embedding", "vocabulary map"],
    }
    assert stages == [*expected[trained[0]], "draft slot 1", "draft slot 2", "draft slot 3"]
    assert max(stage["difference"] for stage in report["stages"]) < 1e-4


DEFECTS = [
    *(("dflash", defect) for defect in ("layers", "rope_theta", "norm weight", "final norm", "mask token")),
    *(("eagle3", defect) for defect in ("layers", "vocabulary")),
    *(("peagle", defect) for defect in ("mask hidden", "mask token")),
]


@pytest.mark.parametrize(("trained", "defect"), DEFECTS, indirect=["trained"])
def test_a_seeded_defect_is_named(
    engine: Warm, trained: tuple[str, list[object], Path], store: Path, tmp_path: Path, defect: str
) -> None:
    method, _, folder = trained
    export = tmp_path / "export"
    shutil.copytree(folder / "export", export)
    weights = load_file(export / "model.safetensors")
    if defect == "layers":
        changes: dict[str, Any] = {"dflash_config": {"target_layer_ids": [2, 3]}}
        change_config(export, **(changes if method == "dflash" else {"eagle_aux_hidden_state_layer_ids": [3, 4]}))
        expected = ["found layer 1 of sample", "layers that it reads: the export says [2, 3], training had [1, 2]"]
    elif defect == "rope_theta":
        theta = {"rope_theta": 500.0}
        change_config(export, rope_theta=500.0, rope_parameters=theta, rope_scaling=theta)
        expected = ["draft slot", "rope (rope_theta): the export says 500.0, training had 10000.0"]
    elif defect == "norm weight":
        name = next(name for name in weights if name.endswith("norm.weight") and weights[name].shape == (64,))
        weights[name] = weights[name] + torch.linspace(0, 1, 64)  # as a Gemma norm would be read
        save_file(weights, export / "model.safetensors")
        expected = ["draft slot 1", "look at the draft's norms"]
    elif defect == "final norm":
        store = seed_final_norm(store, tmp_path / "store")
        expected = ["found teacher argmax of sample", "Final norm or lm_head"]
    elif defect == "mask token":
        change_config(
            export, **({"mask_token_id": 7} if method == "peagle" else {"dflash_config": {"mask_token_id": 7}})
        )
        expected = ["found mask token of sample", "the export says 7"]
    elif defect == "mask hidden":
        weights["mask_hidden"] = -weights["mask_hidden"]
        save_file(weights, export / "model.safetensors")
        expected = ["draft slot 2", "look at the draft's norms"]
    else:
        permutation = torch.randperm(KNOWN, generator=torch.Generator().manual_seed(0))
        known = torch.arange(KNOWN) + weights["d2t"]
        weights["d2t"] = known[permutation] - torch.arange(KNOWN)
        save_file(weights, export / "model.safetensors")
        expected = ["found vocabulary map of sample", "The export's d2t is not the trained one"]
    result = compare(engine, (method, trained[1], folder), store, export, tmp_path / "out")
    assert result.returncode == 1, result.stdout + result.stderr
    for text in expected:
        assert text in result.stderr


def seed_final_norm(store: Path, folder: Path) -> Path:
    """A copy of a store whose final states went through another norm."""
    shutil.copytree(store, folder)
    scale = torch.linspace(-1, 3, 64)
    for path in folder.glob("samples/*/*.safetensors"):
        tensors = load_file(path)
        tensors["hidden_states"] = torch.nn.functional.rms_norm(tensors["hidden_states"], (64,), scale)
        rewrite(path, tensors)
    return folder


def rewrite(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    save_file(tensors, path, metadata=metadata)
