"""Claims about `synth.draft`: what cannot be served or would not be used is refused before a server starts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import run_here


def write_draft(folder: Path, hidden_size: int) -> Path:
    """Write the config of a published DFlash draft for the tests' target."""
    config = {
        "architectures": ["DFlashDraftModel"], "hidden_size": hidden_size, "vocab_size": 512, "block_size": 4,
        "num_hidden_layers": 1, "dflash_config": {"mask_token_id": 500, "target_layer_ids": [1, 2]},
    }  # fmt: skip
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("hidden_size", "flags", "told"),
    [
        (32, [], "found hidden_size = 32"),
        (None, ["--endpoint", "http://127.0.0.1:9/v1"], "draft is for the server that synth starts: omit endpoints"),
        (
            None,
            ["--set", "synth.temperature=1.0", "--set", "synth.min_p=0.1"],
            "found a draft, and min_p 0.1, expected",
        ),
    ],
)
def test_a_draft_that_cannot_be_used_is_refused(
    hidden_size: int | None, flags: list[str], told: str, recipe_path: Path, prompts_path: Path, target_folder: Path,
    tmp_path: Path,
) -> None:  # fmt: skip
    target = json.loads((target_folder / "config.json").read_text())
    draft = write_draft(tmp_path / "draft", hidden_size or target["hidden_size"])
    config = json.loads((draft / "config.json").read_text()) | {"vocab_size": target["vocab_size"]}
    (draft / "config.json").write_text(json.dumps(config))
    args = ["--recipe", recipe_path, "--prompts", prompts_path, "--output", tmp_path / "synth", *flags]
    refused = run_here("synth", "generate", *args, "--set", f"synth.draft={draft}", check=False)
    assert refused.returncode == 2
    assert told in refused.stderr
    assert not (tmp_path / "synth/server.log").exists()
