"""Drafts of every kind, trained on a small store when a test first asks for them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from conftest import run_here
from safetensors.torch import load_file, save_file
from written import write_store

from contracts.draft import DraftRun
from contracts.store import Store
from drafts.draft import Draft
from target.head import read_head
from target.target import Target

SIZES = "num_attention_heads: 2, num_key_value_heads: 1, head_dim: 32, intermediate_size: 64"
SETS = {
    "dflash": ["--set", "train.draft.num_anchors=60"],
    "eagle3": ["--set", f"train.draft={{method: eagle3, ttt_length: 3, {SIZES}}}"],
    "eagle3 reduced": ["--set", f"train.draft={{method: eagle3, ttt_length: 3, draft_vocab_size: 400, {SIZES}}}"],
}
IDS = "eagle_aux_hidden_state_layer_ids"
STEPS = 160
FAST = (f"num_steps={STEPS}", "learning_rate=0.01", "global_batch_size=10", f"checkpoint_every={STEPS - 1}")
DSPARK = f"method: dspark, num_speculative_tokens: 3, num_layers: 1, num_anchors: 60, markov_rank: 16, {SIZES}"
SETS["dspark"] = ["--set", f"train.draft={{{DSPARK}}}"]
SETS["dspark fill-in"] = ["--set", f"train.draft={{{DSPARK}, sample_from_anchor: false}}"]
PEAGLE = f"method: peagle, num_speculative_tokens: 3, objective: tokens, {SIZES}"
SETS["peagle"] = ["--set", f"train.draft={{{PEAGLE}, num_layers: 2}}"]
SETS["peagle reduced"] = ["--set", f"train.draft={{{PEAGLE}, num_layers: 1, draft_vocab_size: 400}}"]
BLOCKS = f"num_layers: 1, num_anchors: 60, block_size: 4, {SIZES}"
SELECTOR = "conv_group_size: 8, selector_rank: 16, selector_top_k: 8"
LATTICE = "lilicorr_hidden_size: 32, lilicorr_num_heads: 2, lilicorr_factor_dim: 32, lilicorr_candidate_topk: 4"
SETS["dflash2"] = ["--set", f"train.draft={{method: dflash2, objective: tokens, {BLOCKS}, {SELECTOR}}}"]
SETS["lilicorr"] = ["--set", f"train.draft={{method: lilicorr, {BLOCKS}, {LATTICE}}}"]
SETS["lilicorr convolution"] = [
    "--set", f"train.draft={{method: lilicorr, {BLOCKS}, {LATTICE}, conv_kernel_size: 2, conv_group_size: 8}}"
]  # fmt: skip
SETS["eagle3 low"] = SETS["eagle3"]
NATIVE_ONLY = ("dflash2", "lilicorr", "lilicorr convolution")
LAYERS = {
    **dict.fromkeys(("dflash", "dspark", "dspark fill-in", *NATIVE_ONLY), (1, 2)),
    **dict.fromkeys(("eagle3", "eagle3 reduced", "peagle", "peagle reduced"), (1, 2, 3)),
    "eagle3 low": (0, 1, 2),
}


class Trained:
    """A store and a draft trained on it, by the name of its settings."""

    def __init__(self, folder: Path, recipe_path: Path, target: Target) -> None:
        self.folder, self.recipe_path, self.target = folder, recipe_path, target

    def args(self, kind: str) -> list[object]:
        return ["--recipe", self.recipe_path, *SETS[kind]]

    def store(self, kind: str) -> Path:
        path = self.folder / f"store-{kind}"
        return path if path.exists() else write_store(path, self.target, layer_ids=LAYERS[kind])

    def run(self, kind: str) -> DraftRun:
        run = DraftRun(self.folder / f"run-{kind}")
        if not run.config_path.exists():
            fast = [word for one in FAST for word in ("--set", f"train.{one}")]
            args = [*self.args(kind), *fast, "--store", self.store(kind), "--output", run.folder]
            run_here("train", "offline", *args)
        return run

    def export(self, kind: str, layout: str = "native") -> Path:
        path = self.folder / f"export-{kind}-{layout}"
        if not path.exists():
            args = [*self.args(kind), "--run", self.run(kind).folder, "--format", layout, "--output", path]
            run_here("train", "export", *args)
        return path

    def eval(self, kind: str, output: Path, *words: object, check: bool = True) -> Any:
        args = ["train", "eval", *self.args(kind), "--output", output, *words]
        return run_here(*args, check=check)

    def start(self, kind: str, folder: Path, output: Path, *words: object, check: bool = True) -> Any:
        """Start one step of training from a folder."""
        args = [*self.args(kind), "--set", "train.num_steps=1", "--set", f"train.init_from={folder}", *words]
        return run_here("train", "offline", *args, "--store", self.store(kind), "--output", output, check=check)

    def changed(self, kind: str, folder: Path, change: Callable[[dict[str, Any], dict[str, Any]], None]) -> Path:
        """Copy the native export to `folder` with another config and other tensors."""
        shutil.copytree(self.export(kind), folder)
        config, tensors = json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")
        change(config, tensors)
        (folder / "config.json").write_text(json.dumps(config))
        save_file(tensors, folder / "model.safetensors")
        return folder


def logits_of_first_reply(draft: Draft, store: Path, target: Target) -> torch.Tensor:
    sample = Store(store).read_sample(Store(store).sample_ids()[0])
    return draft.taps(sample, read_head(target), 12)["draft_logits"]


def set_key(*path: str, value: object) -> Callable[[dict[str, Any], dict[str, Any]], None]:
    def change(config: dict[str, Any], tensors: dict[str, Any]) -> None:
        for key in path[:-1]:
            config = config[key]
        config[path[-1]] = value

    return change
