"""Claims about SGLang: each method's flags, and which layouts it reads.

SGLang 0.5.23's own argument parser took these flags; which keys it reads was compared with its source. Here they are
compared with what was found then.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import run_here
from written import write_store

from drafts.published import read_draft
from target.target import Target

SIZES = "num_attention_heads: 2, num_key_value_heads: 1, head_dim: 32, intermediate_size: 64"
DRAFTS = {
    "dflash": f"method: dflash, block_size: 4, num_layers: 1, {SIZES}",
    "dspark": f"method: dspark, num_speculative_tokens: 3, num_layers: 1, markov_rank: 16, {SIZES}",
    "fill-in": "method: dspark, num_speculative_tokens: 3, num_layers: 1, markov_rank: 16, sample_from_anchor: false, "
    + SIZES,
    "eagle3": f"method: eagle3, draft_vocab_size: 400, ttt_length: 3, {SIZES}",
    "whole": f"method: eagle3, ttt_length: 3, {SIZES}",
}
FLAGS = {
    "dflash": ["--speculative-algorithm", "DFLASH", "--speculative-num-draft-tokens", "4"],
    "dspark": ["--speculative-algorithm", "DSPARK", "--speculative-dspark-block-size", "3"],
    "eagle3": [
        "--speculative-algorithm", "EAGLE3", "--speculative-num-steps", "3", "--speculative-eagle-topk", "1",
        "--speculative-num-draft-tokens", "4",
    ],
}  # fmt: skip


class Exports:
    """Drafts after two steps of training, exported."""

    def __init__(self, folder: Path, recipe_path: Path, target: Target) -> None:
        self.folder, self.recipe_path, self.target = folder, recipe_path, target

    def args(self, kind: str) -> list[object]:
        return ["--recipe", self.recipe_path, "--set", f"train.draft={{{DRAFTS[kind]}}}"]

    def export(self, kind: str, layout: str) -> Path:
        folder = self.folder / kind
        if not folder.exists():
            layers = (1, 2, 3) if kind in ("eagle3", "whole") else (1, 2)
            store = write_store(folder / "store", self.target, layer_ids=layers)
            steps = ["--set", "train.num_steps=2", "--store", store, "--output", folder / "run"]
            run_here("train", "offline", *self.args(kind), *steps)
        path = folder / layout
        if not path.exists():
            run_here("train", "export", *self.args(kind), "--run", folder / "run", "--format", layout, "--output", path)
        return path

    def serve(self, kind: str, layout: str, *, check: bool = True) -> Any:
        words = ["--set", "serve.backend=sglang", "--draft", self.export(kind, layout), "--format", "json"]
        return run_here("serve", "command", *self.args(kind), *words, check=check)


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory, recipe_path: Path, target_folder: Path) -> Exports:
    return Exports(tmp_path_factory.mktemp("sglang"), recipe_path, Target.read(target_folder))


@pytest.mark.parametrize(("kind", "layout"), [("dflash", "native"), ("dspark", "native"), ("eagle3", "sglang")])
def test_each_method_is_served_with_its_flags(exports: Exports, kind: str, layout: str) -> None:
    command = json.loads(exports.serve(kind, layout).stdout)["command"]
    start = command.index("--speculative-algorithm")
    assert command[start : start + len(FLAGS[kind])] == FLAGS[kind]
    assert command[command.index("--speculative-draft-model-path") + 1] == str(exports.export(kind, layout))
    assert "--speculative-config" not in command


def test_layers_are_where_sglang_looks_for_them(exports: Exports) -> None:
    configs = {
        kind: json.loads((exports.export(kind, layout) / "config.json").read_text())
        for kind, layout in (("dflash", "native"), ("dspark", "native"), ("eagle3", "sglang"), ("whole", "sglang"))
    }
    assert configs["dflash"]["dflash_config"]["target_layer_ids"] == [1, 2]
    assert (configs["dspark"]["target_layer_ids"], configs["dspark"]["block_size"]) == ([1, 2], 3)
    assert configs["eagle3"]["eagle_config"]["eagle_aux_hidden_state_layer_ids"] == [1, 2, 3]
    assert configs["eagle3"]["draft_vocab_size"] == 400
    assert configs["whole"]["draft_vocab_size"] is None  # then SGLang shares the target's lm_head
    _, found = read_draft(exports.export("eagle3", "sglang"), 6)
    assert found.layers.ids == [1, 2, 3]


@pytest.mark.parametrize(
    ("kind", "layout", "told"),
    [
        ("dflash", "speculators", "train export --format native"),
        ("eagle3", "native", "train export --format sglang"),
        ("fill-in", "native", "expected true: SGLang reads DSpark blocks in the anchor layout alone"),
    ],
)
def test_what_sglang_would_read_otherwise_is_refused(exports: Exports, kind: str, layout: str, told: str) -> None:
    result = exports.serve(kind, layout, check=False)
    assert result.returncode == 2
    assert told in result.stderr
