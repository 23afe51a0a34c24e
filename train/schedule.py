"""Learning rates by step."""

from __future__ import annotations

import math

from recipe.train import TrainSection


def learning_rate(section: TrainSection, step: int) -> float:
    """Linear warm-up, then a cosine or a line to zero, or constant and a line to zero over the last fifth (wsd)."""
    if step < section.warmup_steps:
        return section.learning_rate * (step + 1) / section.warmup_steps
    done = (step - section.warmup_steps) / max(1, section.num_steps - section.warmup_steps)
    if section.lr_schedule == "cosine":
        return section.learning_rate * 0.5 * (1.0 + math.cos(math.pi * done))
    return section.learning_rate * (1.0 - done if section.lr_schedule == "linear" else min(1.0, (1.0 - done) / 0.2))
