"""The optimizers of a training run: AdamW for everything, or Muon for the hidden matrices and AdamW for the rest."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from recipe.train import TrainSection

BETAS = (0.9, 0.95)


class AdamW(torch.optim.AdamW):
    """torch's AdamW, but for the option `differentiable`: a step then does not load torch's compiler.

    The compiler takes 100 MiB and most of a second to load, and a training on a CPU compiles nothing by default.
    """

    step = torch.no_grad()(inspect.unwrap(torch.optim.AdamW.step))


def _spare_compiler() -> None:
    """Mark methods of all optimizers as torch does at their first call, when it loads its compiler for that.

    It leaves a function alone that has the mark (torch/_compile.py). None of them is called in compiled code.
    """
    for method in (Optimizer.add_param_group, Optimizer.zero_grad, Optimizer.state_dict, Optimizer.load_state_dict):
        function: Any = inspect.unwrap(method)
        function.__dict__.setdefault("__dynamo_disable", function)


_spare_compiler()


def make_optimizers(model: nn.Module, section: TrainSection, heads: Sequence[nn.Module] = ()) -> list[Optimizer]:
    """Return the optimizers that `train.optimizer` names, each for its share of the parameters.

    Muon orthogonalizes the momentum of a hidden matrix (https://kellerjordan.github.io/posts/muon/). Its steps are
    scaled to the size of AdamW's (arXiv 2502.16982), so one learning rate and weight decay serve both. Norms and the
    parameters of `heads`, the model's embeddings and outputs, are AdamW's.
    """
    shared: dict[str, Any] = {"lr": section.learning_rate, "weight_decay": section.weight_decay}
    parameters, of_heads = list(model.parameters()), {id(p) for head in heads for p in head.parameters()}
    is_muon = section.optimizer == "muon"
    matrices = [p for p in parameters if p.dim() == 2 and id(p) not in of_heads] if is_muon else []
    chosen = {id(p) for p in matrices}
    others = [p for p in parameters if id(p) not in chosen]
    optimizers: list[Optimizer] = [AdamW(others, betas=BETAS, fused=True, **shared)]
    if matrices:
        optimizers.append(torch.optim.Muon(matrices, adjust_lr_fn="match_rms_adamw", **shared))
    return optimizers


def read_plain_state(model: nn.Module, optimizers: Sequence[Optimizer]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what torch.distributed.checkpoint's functions do for one process, without loading torch's compiler."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    state = {names[id(p)]: dict(value) for optimizer in optimizers for p, value in optimizer.state.items()}
    groups = [
        {**group, "params": [names[id(p)] for p in group["params"]]}
        for optimizer in optimizers
        for group in optimizer.param_groups
    ]
    return model.state_dict(), {"state": state, "param_groups": groups}
