"""What every backend hands out: a staged file of a sample's states, and a bound on how much of it waits.

A backend is a class with `capture(samples, staging)`, a generator of `Staged`, and `close()`. It takes samples as it
can use them, yields each once, and lets no more bytes wait than `staging` allows. A staged file is what vLLM's
connector writes: safetensors with `hidden_states (T, n+1, H)`, the captured layers in order and last the final state
before the final norm, and `token_ids (T,)`; beside it a `.lock` file that its writer holds until it is whole.
"""

from __future__ import annotations

import fcntl
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file


@dataclass(frozen=True)
class Staged:
    """A sample whose states are in a file, or why they are not."""

    sample_id: str
    path: Path | None
    error: str = ""


@dataclass(frozen=True)
class Captured:
    """One sample's states: `layers (T, n, H)` in the recipe's order and `final (T, H)` before the final norm."""

    layers: torch.Tensor
    final: torch.Tensor


class CaptureError(Exception):
    """A backend's answer for one sample is not what was asked for; the message is the reason."""


class Staging:
    """Where states wait until they are stored, and how many bytes of them may wait."""

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        self.folder = folder
        self.limit_bytes = limit_bytes
        self.taken_bytes = 0
        self._changed = threading.Condition()

    def take(self, num_bytes: int) -> bool:
        """Claim room for a sample, if there is any; one that is larger than all of it goes alone."""
        with self._changed:
            if self.taken_bytes and self.taken_bytes + num_bytes > self.limit_bytes:
                return False
            self.taken_bytes += num_bytes
            return True

    def give(self, num_bytes: int) -> None:
        """A sample is stored: its room is free again."""
        with self._changed:
            self.taken_bytes -= num_bytes
            self._changed.notify_all()

    def wait(self, timeout_s: float = 0.05) -> None:
        """Wait until some room was given back, but not long: the engine may have work."""
        with self._changed:
            self._changed.wait(timeout_s)


def load_staged(staged: Staged, token_ids: Sequence[int], num_layers: int, hidden_size: int) -> Captured:
    """Wait for a staged file, read and check it, and remove it.

    A failed write is only logged by vLLM, so everything is checked: presence, shape, token ids, finite values. Raises
    CaptureError with the reason.
    """
    if staged.path is None:
        raise CaptureError(staged.error or "the engine named no file of hidden states")
    lock_path = Path(f"{staged.path}.lock")
    try:
        with lock_path.open() as lock:
            fcntl.flock(lock, fcntl.LOCK_SH)
            tensors = load_file(staged.path)
    except Exception as error:  # whatever a missing or torn file raises, the sample is not there
        raise CaptureError(f"its hidden states cannot be read: {error}") from None
    finally:
        discard(staged.path)
    states = tensors["hidden_states"]
    expected = (len(token_ids), num_layers + 1, hidden_size)
    if tuple(states.shape) != expected:
        raise CaptureError(f"hidden states of shape {tuple(states.shape)}, expected {expected}")
    if tensors["token_ids"].tolist() != list(token_ids):
        raise CaptureError("hidden states of other token ids than were asked for")
    if not bool(states.sum(dtype=torch.float32).isfinite()):  # one value that is not finite makes the sum so
        raise CaptureError("hidden states that are not finite")
    return Captured(layers=states[:, :-1], final=states[:, -1])


def discard(path: Path | None) -> None:
    """Remove a staged file and its lock."""
    for file in () if path is None else (path, Path(f"{path}.lock")):
        file.unlink(missing_ok=True)
