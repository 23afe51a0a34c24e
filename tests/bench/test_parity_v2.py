"""Claims about `bench parity` on vLLM's V2 runner, for the drafts that only it serves: seeded defects are named."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, run_here
from safetensors.torch import load_file, save_file
from warm import Warm, start_warm
from written import write_conversations

from contracts.draft import DraftRun

pytestmark = [pytest.mark.vllm, pytest.mark.long, pytest.mark.timeout(900)]
SIZES = "num_attention_heads: 2, num_key_value_heads: 1, head_dim: 32, intermediate_size: 64"
CONVOLUTIONS = "conv_kernel_size: 2, conv_group_size: 16"
HEAD = "lilicorr_candidate_topk: 4, lilicorr_hidden_size: 32, lilicorr_num_heads: 2, lilicorr_factor_dim: 32"
DRAFTS = {
    "dspark": f"method: dspark, num_speculative_tokens: 3, num_layers: 1, markov_rank: 16, {SIZES}",
    "dflash2": f"method: dflash2, block_size: 4, num_layers: 1, selector_rank: 16, {CONVOLUTIONS}, {SIZES}",
    "lilicorr": f"method: lilicorr, block_size: 4, num_layers: 1, {HEAD}, {CONVOLUTIONS}, {SIZES}",
    "windows": "method: dflash, block_size: 4, num_layers: 2, sliding_window: 8, "
    f"layer_types: [sliding_attention, full_attention], {SIZES}",
}
"""Values of `train.draft`; `windows` is a DFlash draft whose first layer slides and is causal, the second not."""
LAYERS = ["layer 1", "layer 2", "teacher argmax", "mask token", "mask embedding"]
SLOTS = [f"draft slot {number}" for number in (1, 2, 3)]
CANDIDATES = [f"candidate slot {number}" for number in (1, 2, 3)]
STAGES = {
    "dspark": [*LAYERS, "markov bias", *SLOTS, "confidence"],
    "dflash2": [*LAYERS, *SLOTS, *CANDIDATES],
    "lilicorr": [*LAYERS, *SLOTS, *CANDIDATES],
    "windows": [*LAYERS, *SLOTS],
}
V2 = {
    "TRITON_INTERPRET": "1",
    "VLLM_USE_V2_MODEL_RUNNER": "1",
    "VLLM_PLUGINS": "draftline_cpu,triton_interpreter",
    "PYTHONPATH": str(ROOT / "tests/v2_runner"),
}

Weights = dict[str, torch.Tensor]
Change = Callable[[dict[str, Any], Weights], None]


class Case:
    """A trained draft of one of `DRAFTS`, its export, and the store that it was trained on."""

    def __init__(self, name: str, folder: Path, recipe_path: Path, store: Path) -> None:
        self.store, self.folder, self.name = store, folder, name
        self.args: list[object] = ["--recipe", recipe_path, "--set", f"train.draft={{{DRAFTS[name]}}}"]
        self.args += ["--set", "train.num_steps=2"]
        run_here("train", "offline", *self.args, "--store", store, "--output", folder / "draft")
        path = DraftRun(folder / "draft").chosen_weights()
        # Far from their first values, where biases would drown in rounding.
        save_file({name: 4 * t if t.dim() > 1 else t for name, t in load_file(path).items()}, path)
        report = folder / "eval.json"
        run_here("train", "eval", *self.args, "--run", folder / "draft", "--store", store, "--output", report)
        # Its confidences are calibrated, the checkpoint's are not.
        words = ["--run", folder / "draft", "--output", folder / "export", "--eval", report]
        run_here("train", "export", *self.args, *words)

    def compare(self, engine: Warm, change: Change | None, output: Path) -> subprocess.CompletedProcess[str]:
        """Run bench parity on the export after a change."""
        export = output / "export"
        shutil.copytree(self.folder / "export", export)
        if change is not None:
            config = json.loads((export / "config.json").read_text())
            weights = load_file(export / "model.safetensors")
            change(config, weights)
            (export / "config.json").write_text(json.dumps(config))
            save_file(weights, export / "model.safetensors")
        words = ["bench", "parity", *self.args, "--run", self.folder / "draft", "--draft", export]
        words += ["--store", self.store, "--output", output / "parity", "--samples", "1"]
        return engine.run(*words, check=False)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Warm]:
    """A process whose engines have the V2 runner."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in V2.items():
            patch.setenv(name, value)
        with start_warm(tmp_path_factory.mktemp("v2") / "log") as process:
            yield process


@pytest.fixture(scope="module", params=DRAFTS)
def case(request: Any, recipe_path: Path, target_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = tmp_path_factory.mktemp(request.param)
    conversations = write_conversations(target_folder, folder / "synth", 12)
    args = ["--recipe", recipe_path, "--backend", "hf", "--conversations", conversations]
    run_here("dump", "run", *args, "--output", folder / "store")
    return Case(request.param, folder, recipe_path, folder / "store")


def test_trainer_and_engine_agree_on_every_stage(engine: Warm, case: Case, tmp_path: Path) -> None:
    result = case.compare(engine, None, tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    report = json.loads((tmp_path / "parity/parity.json").read_text())
    stages = [stage["stage"] for stage in report["stages"]]
    assert stages == STAGES[case.name]
    assert max(stage["difference"] for stage in report["stages"]) < 1e-4


def shift_slots(config: dict[str, Any], _: Weights) -> None:
    config["sample_from_anchor"] = False


def swap_factors(_: dict[str, Any], weights: Weights) -> None:
    names = [f"markov_head.markov_w{number}.weight" for number in (1, 2)]
    weights[names[0]], weights[names[1]] = weights[names[1]].clone(), weights[names[0]].clone()


def take_the_wrong_predecessor(_: dict[str, Any], weights: Weights) -> None:
    """Row i is that of token i - 1: as if the bias came from another token than the one before the slot."""
    weights["markov_head.markov_w1.weight"] = weights["markov_head.markov_w1.weight"].roll(1, 0)


def drop_the_confidence_bias(_: dict[str, Any], weights: Weights) -> None:
    weights["confidence_head.proj.bias"] -= 3.0


def change_the_mask(config: dict[str, Any], _: Weights) -> None:
    config["mask_token_id"] = 7


def reverse_a_projection(_: dict[str, Any], weights: Weights) -> None:
    """Exchange rows of one of the selector's projections: scores are of other tokens."""
    names = [name for name in weights if name.startswith("candidate_selector.") and weights[name].dim() > 1]
    weights[names[0]] = weights[names[0]].flip(0)


def skip_the_convolutions(_: dict[str, Any], weights: Weights) -> None:
    for name in weights:
        if "_conv." in name:
            weights[name] = torch.zeros_like(weights[name])


def change_the_scale(config: dict[str, Any], _: Weights) -> None:
    config["dflash_config"]["lilicorr_logit_scale"] = 4.0


def widen_the_window(config: dict[str, Any], _: Weights) -> None:
    config["sliding_window"] = 12


def see_the_whole_block(config: dict[str, Any], _: Weights) -> None:
    config["is_causal"] = False


RARE = pytest.mark.rare
DEFECTS = [
    ("dspark", shift_slots, ["draft slot 1", "sample_from_anchor: the export says False, training had True"]),
    pytest.param("dspark", swap_factors, ["found markov bias of sample", "Markov factors"], marks=RARE),
    (
        "dspark",
        take_the_wrong_predecessor,
        ["found markov bias of sample", "the token that it takes as the one before"],
    ),
    ("dspark", drop_the_confidence_bias, ["found confidence of sample", "confidence head's weight or bias"]),
    pytest.param("dspark", change_the_mask, ["found mask token of sample", "the export says 7"], marks=RARE),
    ("dflash2", reverse_a_projection, ["found candidate slot 1 of sample", "the head that scores candidates"]),
    pytest.param("dflash2", skip_the_convolutions, ["found draft slot 1 of sample"], marks=RARE),
    ("lilicorr", change_the_scale, ["found candidate slot 1", "lilicorr_logit_scale: the export says 4.0, training"]),
    pytest.param("lilicorr", skip_the_convolutions, ["found draft slot 1 of sample"], marks=RARE),
    ("windows", widen_the_window, ["found draft slot 1", "sliding_window: the export says 12, training had 8"]),
    ("windows", see_the_whole_block, ["found draft slot", "is_causal: the export says False, training had None"]),
]


@pytest.mark.parametrize(("case", "change", "expected"), DEFECTS, indirect=["case"])
def test_a_seeded_defect_is_named(
    engine: Warm, case: Case, change: Change, expected: list[str], tmp_path: Path
) -> None:
    result = case.compare(engine, change, tmp_path)
    assert result.returncode == 1, result.stdout + result.stderr
    for text in expected:
        assert text in result.stderr
