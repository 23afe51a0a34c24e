"""Divide this machine's GPUs among the vLLM engines of a dump."""

from __future__ import annotations

import os

import torch

from common.errors import UserError
from recipe.recipe import Recipe
from serve.flags import count_gpus, normalize

VISIBLE = "CUDA_VISIBLE_DEVICES"


def divide_gpus(recipe: Recipe) -> list[str | None]:
    """Return the GPUs of each engine as CUDA_VISIBLE_DEVICES has them; None for those of this process.

    Without GPUs there are as many engines as the recipe says. Raises UserError for more engines than the GPUs allow.
    """
    section = recipe.dump
    if section.backend != "vllm" or section.engines == 1:
        return [None]
    gpus, each = _visible_gpus(recipe), count_gpus(normalize({**recipe.serve.args, **section.args}))
    engines = section.engines or max(1, len(gpus) // each)
    if engines == 1 or not gpus:
        return [None] * engines
    if engines * each > len(gpus):
        raise UserError(
            "dump.engines",
            found=f"{engines} engines of {each} GPUs each",
            expected=f"at most the {len(gpus)} GPUs of this process ({','.join(gpus)})",
            fix="Lower --engines (0: as many as fit), or assign more GPUs.",
        )
    return [",".join(gpus[number * each : (number + 1) * each]) for number in range(engines)]


def _visible_gpus(recipe: Recipe) -> list[str]:
    """Return the names of the GPUs that an engine in this process would see."""
    assigned = {**os.environ, **recipe.serve.env, **recipe.dump.env}.get(VISIBLE)
    if assigned is None:
        return [str(number) for number in range(torch.cuda.device_count())]
    return [name.strip() for name in assigned.split(",") if name.strip()]
