"""Move planned steps to a device: every tensor inside of dataclasses, lists, tuples and dictionaries."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar

import torch

Value = TypeVar("Value")


def find_device() -> torch.device:
    """Return the device of a single process: its first GPU, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def is_on_gpu(x: torch.Tensor) -> bool:
    """Return whether a layer computes `x` with operations that torch.compile fuses, instead of hand-written ones."""
    return x.is_cuda


def to_device(value: Value, device: torch.device) -> Value:
    """Return `value` with its tensors on `device`; everything else stays as it is. Copies do not block the host."""
    moved: Value = _move(value, device)
    return moved


def tensors_of(value: Any) -> Iterator[torch.Tensor]:
    """Yield every tensor inside of `value`."""
    if isinstance(value, torch.Tensor):
        yield value
    elif is_dataclass(value) and not isinstance(value, type):
        for part in fields(value):
            yield from tensors_of(getattr(value, part.name))
    elif isinstance(value, dict):
        yield from tensors_of(list(value.values()))
    elif isinstance(value, list | tuple):
        for part in value:
            yield from tensors_of(part)


def _move(value: Any, device: torch.device) -> Any:
    if isinstance(value, torch.Tensor):
        if device.type == "cuda" and value.device.type == "cpu":
            value = value.pin_memory()  # only pinned memory is copied while the host goes on
        return value.to(device, non_blocking=True)
    if is_dataclass(value) and not isinstance(value, type):
        return type(value)(**{f.name: _move(getattr(value, f.name), device) for f in fields(value) if f.init})
    if isinstance(value, dict):
        return {key: _move(part, device) for key, part in value.items()}
    if isinstance(value, list):
        return [_move(part, device) for part in value]
    if isinstance(value, tuple) and not hasattr(value, "_fields"):
        return tuple(_move(part, device) for part in value)
    return value
