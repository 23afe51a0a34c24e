"""Claims about the optimizers: which parameters are whose, the same steps as torch's, and no compiler for them."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from conftest import ROOT
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict
from written import write_store

from recipe.load import load_recipe
from target.target import Target
from train.optimizer import AdamW, make_optimizers, read_plain_state


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 8, bias=False)
        self.norm = nn.RMSNorm(8)
        self.lm_head = nn.Linear(8, 16, bias=False)


def test_muon_updates_the_hidden_matrices_and_adamw_norms_and_lm_head(recipe_path: Path) -> None:
    model = Model()
    adamw, muon = make_optimizers(model, load_recipe(recipe_path, ["train.optimizer=muon"]).training(), [model.lm_head])
    assert isinstance(adamw, torch.optim.AdamW)
    assert isinstance(muon, torch.optim.Muon)
    of_adamw, of_muon = ({id(p) for group in o.param_groups for p in group["params"]} for o in (adamw, muon))
    assert of_muon == {id(model.fc.weight)}
    assert of_adamw == {id(model.norm.weight), id(model.lm_head.weight)}


def test_adamw_updates_everything_by_default(recipe_path: Path) -> None:
    model = Model()
    (adamw,) = make_optimizers(model, load_recipe(recipe_path).training())
    assert isinstance(adamw, torch.optim.AdamW)
    assert {id(p) for group in adamw.param_groups for p in group["params"]} == {id(p) for p in model.parameters()}


def take_steps(model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> None:
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        for optimizer in optimizers:
            optimizer.step()


def test_adamw_makes_the_steps_of_torch_bit_for_bit() -> None:
    torch.manual_seed(0)
    ours = Model()
    theirs = copy.deepcopy(ours)
    options: dict[str, Any] = {"lr": 0.01, "weight_decay": 0.1, "fused": True}
    take_steps(ours, [AdamW(ours.parameters(), **options)])
    take_steps(theirs, [torch.optim.AdamW(theirs.parameters(), **options)])
    for name, parameter in ours.named_parameters():
        assert torch.equal(parameter, theirs.get_parameter(name))


def test_the_plain_state_is_that_of_torchs_checkpoint_functions(recipe_path: Path) -> None:
    model = Model()
    optimizers = make_optimizers(model, load_recipe(recipe_path, ["train.optimizer=muon"]).training(), [model.lm_head])
    take_steps(model, optimizers)
    weights, moments = read_plain_state(model, optimizers)
    assert_same(weights, get_model_state_dict(model))
    expected = get_optimizer_state_dict(model, optimizers)
    assert_same(moments["state"], expected["state"])
    assert moments["param_groups"] == expected["param_groups"]


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if isinstance(value, dict):
            assert_same(found[name], value)
        else:
            assert torch.equal(found[name], value)


def test_a_training_on_a_cpu_does_not_load_torchs_compiler(
    recipe_path: Path, target_folder: Path, tmp_path: Path
) -> None:
    store = write_store(tmp_path / "store", Target.read(target_folder))
    options = ["train.num_steps=4", "train.checkpoint_every=2", "train.held_out_fraction=0.2", "train.evaluate_every=2"]
    arguments = ["offline", "--recipe", recipe_path, "--store", store, "--output", tmp_path / "draft"]
    for option in options:
        arguments += ["--set", option]
    program = "import sys; from train.cli import app; app(standalone_mode=False); "
    program += "sys.exit('torch._dynamo' in sys.modules)"
    subprocess.run([sys.executable, "-c", program, *map(str, arguments)], cwd=ROOT, check=True)
    assert (tmp_path / "draft" / "step-000004").is_dir()
