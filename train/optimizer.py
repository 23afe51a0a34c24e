"""The optimizers of a training run: AdamW for everything, or Muon for the hidden matrices and AdamW for the rest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from recipe.train import TrainSection

BETAS = (0.9, 0.95)


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
    optimizers: list[Optimizer] = [torch.optim.AdamW(others, betas=BETAS, fused=True, **shared)]
    if matrices:
        optimizers.append(torch.optim.Muon(matrices, adjust_lr_fn="match_rms_adamw", **shared))
    return optimizers
