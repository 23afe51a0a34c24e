"""Claims about targets with scaled embeddings and logits: the engine's draft has neither factor, and ours neither."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import RECIPE_TEXT, run, run_here
from safetensors.torch import load_file, save_file
from scaled_targets import SOFT_CAP, build_scaled_target
from warm import Warm
from written import write_conversations

from contracts.draft import DraftRun
from contracts.trace import read_traces
from target.head import read_head
from target.target import Target

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(300)]


@pytest.fixture(scope="module", params=["gemma4", "granite"])
def dumped(request: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A family, and a folder with its target, a recipe, and a store that vLLM's extraction filled."""
    folder = tmp_path_factory.mktemp(request.param)
    target = build_scaled_target(request.param, folder / "target")
    (folder / "recipe.yaml").write_text(RECIPE_TEXT.format(target=target))
    conversations = write_conversations(target, folder / "synth", 12)
    args = ["--recipe", folder / "recipe.yaml", "--backend", "vllm", "--conversations", conversations]
    run("dump", "run", *args, "--output", folder / "store")  # a second engine in its process would find its connector
    return request.param, folder


def test_extracted_states_give_the_targets_greedy_tokens(dumped: tuple[str, Path]) -> None:
    _, folder = dumped
    printed = run_here("dump", "verify", "--recipe", folder / "recipe.yaml", "--store", folder / "store").stdout
    assert "120 of 120 generated tokens of 12 greedy samples are the states' argmax" in printed
    assert "all layers of 8 samples are as transformers computes them" in printed


@pytest.mark.parametrize("method", ["dflash", "eagle3"])
def test_draft_logits_of_the_engine_are_the_trainers(
    engine: Warm, dumped: tuple[str, Path], tmp_path: Path, method: str
) -> None:
    family, folder = dumped
    args = ["--recipe", folder / "recipe.yaml", "--set", f"train.draft.method={method}", "--set", "train.num_steps=2"]
    places = ["--store", folder / "store", "--output"]
    run_here("train", "offline", *args, *places, tmp_path / "draft")
    weights_path = DraftRun(tmp_path / "draft").chosen_weights()
    weights = {name: 4 * tensor if tensor.dim() > 1 else tensor for name, tensor in load_file(weights_path).items()}
    save_file({**weights, "norm.weight": 8 * weights["norm.weight"]}, weights_path)  # logits far above the cap
    run_here("train", "export", *args, "--run", tmp_path / "draft", "--output", tmp_path / "export")
    words = ["--run", tmp_path / "draft", "--draft", tmp_path / "export", "--samples", 2]
    engine.run("bench", "parity", *args, *words, *places, tmp_path / "out")
    report = json.loads((tmp_path / "out/parity.json").read_text())
    assert {"teacher argmax", "draft slot 1", "draft slot 3"} <= {stage["stage"] for stage in report["stages"]}
    assert max(stage["difference"] for stage in report["stages"]) < 1e-4

    (trace, _) = read_traces(tmp_path / "out/trainer.safetensors")
    logits = trace.tensors["draft_logits"]
    assert logits.abs().max() > 2 * SOFT_CAP  # neither capped nor scaled as the target's logits are
    head = read_head(Target.read(folder / "target"))
    assert (head.softcap, head.scale) == {"gemma4": (SOFT_CAP, 1.0), "granite": (None, 0.125)}[family]
    if method == "dflash":  # EAGLE3 normalizes embeddings first, which removes a factor
        assert torch.equal(trace.tensors["mask_embedding"], head.embedding[int(trace.tensors["mask_token"])])
