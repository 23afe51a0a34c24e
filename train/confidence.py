"""How reliable a draft's confidences are: the predicted and the actual acceptance of its draft tokens.

A confidence is the probability that a draft token is accepted if those before it were, so only tokens that a walk has
tried count. Calibration fits one scale and one shift of the confidence's logit (Platt scaling) to them; both fold into
the weight and the bias of the head, which is all that vLLM reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

BINS = 10
ITERATIONS = 50
LARGEST_LOGIT = 20.0
RIDGE = 1e-3
"""Weight of a prior at scale 1 and shift 0: keeps both finite when all tokens, or none, are accepted."""


@dataclass(frozen=True)
class Tried:
    """Draft tokens that a walk tried: their slots from 0, their confidences, and whether they were accepted, (n,)."""

    slots: np.ndarray
    confidences: np.ndarray
    accepted: np.ndarray

    @classmethod
    def pool(cls, parts: Sequence[Tried]) -> Tried:
        return cls(*(np.concatenate([getattr(part, name) for part in parts]) for name in cls.__dataclass_fields__))


def tried_of(rows: Sequence[int], slots: Sequence[int], confidence: torch.Tensor, accepted: Sequence[bool]) -> Tried:
    """Return the tried tokens of one sample. `rows`: the positions before each; confidence: (T, K)."""
    places, columns = np.array(rows, dtype=int) - np.array(slots, dtype=int), np.array(slots, dtype=int)
    return Tried(columns, confidence.numpy()[places, columns].astype(float), np.array(accepted, dtype=bool))


def summarize_confidence(parts: Sequence[Tried]) -> dict[str, Any]:
    """Return the report: reliability by position, expected calibration error, and the calibration that lowers it."""
    tried = Tried.pool(parts)
    scale, shift = fit_calibration(tried.confidences, tried.accepted)
    calibrated = apply_calibration(tried.confidences, scale, shift)
    by_position = []
    for slot in range(int(tried.slots.max(initial=-1)) + 1):
        here = tried.slots == slot
        if here.any():
            by_position.append({
                "position": slot + 1,
                "tried": int(here.sum()),
                "accepted": round(float(tried.accepted[here].mean()), 4),
                "confidence": round(float(tried.confidences[here].mean()), 4),
                "calibrated": round(float(calibrated[here].mean()), 4),
            })  # fmt: skip
    return {
        "by_position": by_position,
        "calibration_error": round(calibration_error(tried.confidences, tried.accepted), 4),
        "calibrated_error": round(calibration_error(calibrated, tried.accepted), 4),
        "scale": round(scale, 6),
        "shift": round(shift, 6),
    }


def calibration_error(confidences: np.ndarray, accepted: np.ndarray) -> float:
    """Return the expected calibration error: the mean gap between confidence and acceptance over 10 equal bins."""
    if not len(confidences):
        return 0.0
    bins = np.minimum((confidences * BINS).astype(int), BINS - 1)
    gaps = np.bincount(bins, weights=confidences - accepted, minlength=BINS)
    return float(np.abs(gaps).sum() / len(confidences))


def fit_calibration(confidences: np.ndarray, accepted: np.ndarray) -> tuple[float, float]:
    """Return the scale and the shift of the logits with the lowest cross-entropy, by Newton's method."""
    logits = _logits(confidences)
    inputs = np.stack([logits, np.ones_like(logits)], axis=1)
    start = np.array([1.0, 0.0])
    parameters = start.copy()
    for _ in range(ITERATIONS):
        p = _sigmoid(inputs @ parameters)
        gradient = inputs.T @ (p - accepted) + RIDGE * (parameters - start)
        curvature = (inputs * (p * (1 - p))[:, None]).T @ inputs + RIDGE * np.eye(2)
        step = np.linalg.solve(curvature, gradient)
        parameters -= step * min(1.0, 1.0 / max(1e-12, float(np.abs(step).max())))
    return float(parameters[0]), float(parameters[1])


def apply_calibration(confidences: np.ndarray, scale: float, shift: float) -> np.ndarray:
    """Return calibrated confidences."""
    return _sigmoid(scale * _logits(confidences) + shift)


def _logits(p: np.ndarray) -> np.ndarray:
    smallest = 1.0 / (1.0 + np.exp(LARGEST_LOGIT))
    p = np.clip(p, smallest, 1.0 - smallest)
    logits: np.ndarray = np.log(p / (1.0 - p))
    return logits


def _sigmoid(x: np.ndarray) -> np.ndarray:
    result: np.ndarray = 1.0 / (1.0 + np.exp(-x))
    return result
