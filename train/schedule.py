"""The learning rate of each step."""

from __future__ import annotations

import math

from recipe.train import TrainSection


def learning_rate(section: TrainSection, step: int) -> float:
    """Return the learning rate of a step.

    After a linear warm-up: cosine or linear decay to zero, or (wsd) constant with linear decay over the last fifth.
    """
    if step < section.warmup_steps:
        return section.learning_rate * (step + 1) / section.warmup_steps
    done = (step - section.warmup_steps) / max(1, section.num_steps - section.warmup_steps)
    if section.lr_schedule == "cosine":
        return section.learning_rate * 0.5 * (1.0 + math.cos(math.pi * done))
    return section.learning_rate * (1.0 - done if section.lr_schedule == "linear" else min(1.0, (1.0 - done) / 0.2))
