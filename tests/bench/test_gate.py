"""Claims about what the gate says when served and predicted acceptance differ (that it notices is test_pipeline's)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import run, run_here
from written import write_conversations, write_store

from bench.gate import explain
from contracts.acceptance import Acceptance
from contracts.draft import DraftRun
from contracts.store import Store
from target.target import Target

PREDICTED, SERVED = Acceptance.from_steps([3, 3, 2], 3), Acceptance.from_steps([3, 0, 1], 3)


@pytest.fixture(scope="module", params=["dflash", "eagle3"])
def trained(request: Any, recipe_path: Path, target_folder: Path, tmp_path_factory: Any) -> tuple[str, Path]:
    folder = tmp_path_factory.mktemp("gate")
    args = ["--recipe", recipe_path, "--set", f"train.draft.method={request.param}", "--set", "train.num_steps=1"]
    store = write_store(folder / "store", Target.read(target_folder))
    run_here("train", "offline", *args, "--store", store, "--output", folder / "draft")
    run_here("train", "export", *args, "--run", folder / "draft", "--output", folder / "export")
    return request.param, folder


def explain_with(trained: tuple[str, Path], tmp_path: Path, **changes: Any) -> str:
    _, folder = trained
    config = json.loads((folder / "export/config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **changes}))
    return explain(tmp_path, DraftRun(folder / "draft"), Store(folder / "store"), PREDICTED, SERVED)


YARN = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 128}
CAUSES = [
    (
        {"rope_parameters": {**YARN, "rope_theta": 500.0}},
        "rope (rope_theta): the export says 500.0, training had 10000.0",
    ),
    ({"rope_parameters": {"rope_theta": 10000.0}}, "rope (YaRN factor): the export says None, training had 2.0"),
    ({"rms_norm_eps": 0.1}, "norm (rms_norm_eps): the export says 0.1, training had 1e-06"),
    ({}, "are not the store's. Run `bench parity`"),
]


@pytest.mark.parametrize(("changes", "named"), CAUSES)
def test_each_cause_is_named(trained: tuple[str, Path], tmp_path: Path, changes: dict[str, Any], named: str) -> None:
    assert named in explain_with(trained, tmp_path, **changes)


def test_layers_and_mask_token_are_compared_as_each_method_writes_them(
    trained: tuple[str, Path], tmp_path: Path
) -> None:
    if trained[0] == "eagle3":
        changes: dict[str, Any] = {"eagle_aux_hidden_state_layer_ids": [1, 2]}
        assert "layers that it reads: the export says [0, 1], training had [1, 2]" in explain_with(
            trained, tmp_path, **changes
        )
        return
    for changes, named in (
        ({"target_layer_ids": [2, 3], "mask_token_id": 1000}, "layers that it reads: the export says [2, 3]"),
        (
            {"target_layer_ids": [1, 2], "mask_token_id": 5},
            "mask token: the export says 5",
        ),
    ):
        assert named in explain_with(trained, tmp_path, dflash_config=changes)


def test_a_recipe_that_does_not_fit_is_refused_before_a_server_starts(
    recipe_path: Path, target_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    conversations = write_conversations(target_folder, tmp_path / "synth", 2)
    store = Store(write_store(tmp_path / "store", Target.read(target_folder)))
    store.write_manifest(store.read_manifest().model_copy(update={"conversations_folder": str(conversations)}))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(10**7))  # so many processes share this machine's memory
    refused = run(
        "bench", "gate", "-r", recipe_path, "--store", store.folder, "--output", tmp_path / "gate", check=False
    )
    assert refused.returncode == 1
    assert "train offline on this machine: found 0.00 GB free for one process, expected" in refused.stderr
    assert not (tmp_path / "gate/draft").exists()
