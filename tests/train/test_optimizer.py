"""Claims about the optimizers: which parameters Muon updates, and that every parameter has one optimizer."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from recipe.load import load_recipe
from train.optimizer import make_optimizers


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
