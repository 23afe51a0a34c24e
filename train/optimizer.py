"""The optimizers of a training run: AdamW for everything, or Muon for the hidden matrices and AdamW for the rest."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from recipe.train import TrainSection

LM_HEAD = "lm_head."
BETAS = (0.9, 0.95)


def make_optimizers(model: nn.Module, section: TrainSection) -> list[Optimizer]:
    """Return the optimizers that `train.optimizer` names, each for its share of the parameters.

    Muon orthogonalizes the momentum of a hidden matrix (https://kellerjordan.github.io/posts/muon/). Its steps are
    scaled to the size of AdamW's (arXiv 2502.16982), so one learning rate and weight decay serve both. Norms and an
    lm_head of the draft's own are AdamW's.
    """
    shared: dict[str, Any] = {"lr": section.learning_rate, "weight_decay": section.weight_decay}
    named = list(model.named_parameters())
    matrices = [p for name, p in named if p.dim() == 2 and LM_HEAD not in name] if section.optimizer == "muon" else []
    chosen = {id(p) for p in matrices}
    others = [p for _, p in named if id(p) not in chosen]
    optimizers: list[Optimizer] = [torch.optim.AdamW(others, betas=BETAS, fused=True, **shared)]
    if matrices:
        optimizers.append(torch.optim.Muon(matrices, adjust_lr_fn="match_rms_adamw", **shared))
    return optimizers
