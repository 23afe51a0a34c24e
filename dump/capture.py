"""The protocol of capture backends: samples in, staged files of hidden states out.

A staged file is what vLLM's connector writes: safetensors with `hidden_states (T, n+1, H)`, the captured layers in
order and last the final state before the final norm, and `token_ids (T,)`. Beside it lies a `.lock` file that the
writer holds until the file is whole.
"""

from __future__ import annotations

import fcntl
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from common.errors import UserError


@dataclass(frozen=True)
class Staged:
    """A sample whose states are in a file, or the `error` that prevented it."""

    sample_id: str
    path: Path | None
    error: str = ""


class CaptureBackend(Protocol):
    """What runs the target; made with `(recipe, target, layer_ids, staging)`. `dump/backends.py` lists all."""

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's states while they are staged."""
        ...

    def capture(self, samples: Iterator[tuple[str, list[int]]], staging: Staging) -> Iterator[Staged]:
        """Yield each `(sample id, token ids)` once it is captured, in any order.

        Takes samples only as fast as it can use them, and never stages more bytes than `staging` allows.
        """
        ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class Captured:
    """One sample's states: `layers (T, n, H)` in the recipe's order, `final (T, H)` before the final norm."""

    layers: torch.Tensor
    final: torch.Tensor


class CaptureError(Exception):
    """A backend's answer for one sample is unusable; the message is the reason."""


class Staging:
    """The folder in which states wait until they are stored, and the bytes of them that may wait."""

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        self.folder = folder
        self.limit_bytes = limit_bytes
        self.taken_bytes = 0
        self._changed = threading.Condition()

    def take(self, num_bytes: int) -> bool:
        """Reserve room for a sample; return False if there is none. A sample larger than the limit gets in alone."""
        with self._changed:
            if self.taken_bytes and self.taken_bytes + num_bytes > self.limit_bytes:
                return False
            self.taken_bytes += num_bytes
            return True

    def give(self, num_bytes: int) -> None:
        """Free the room of a sample that is stored."""
        with self._changed:
            self.taken_bytes -= num_bytes
            self._changed.notify_all()

    def wait(self, timeout_s: float = 0.05) -> None:
        """Wait until room is freed, at most `timeout_s`: the engine may have work."""
        with self._changed:
            self._changed.wait(timeout_s)


def load_staged(staged: Staged, token_ids: Sequence[int], num_layers: int, hidden_size: int) -> Captured:
    """Wait until a staged file is whole, read and check it, and delete it.

    vLLM only logs a failed write. Hence the checks: presence, shape, token ids, finite values. Raises CaptureError with
    the reason.
    """
    if staged.path is None:
        raise CaptureError(staged.error or "the engine named no file of hidden states")
    lock_path = Path(f"{staged.path}.lock")
    try:
        with lock_path.open() as lock:
            fcntl.flock(lock, fcntl.LOCK_SH)
            tensors = load_file(staged.path)
        states, stored_ids = tensors["hidden_states"], tensors["token_ids"].tolist()
    except (OSError, LookupError, ValueError, SafetensorError) as error:
        raise CaptureError(f"its hidden states cannot be read: {error}") from None
    finally:
        discard(staged.path)
    expected = (len(token_ids), num_layers + 1, hidden_size)
    if tuple(states.shape) != expected:
        raise CaptureError(f"hidden states of shape {tuple(states.shape)}, expected {expected}")
    if stored_ids != list(token_ids):
        raise CaptureError("hidden states of other token ids than were asked for")
    if not bool(states.sum(dtype=torch.float32).isfinite()):  # a value that is not finite makes the sum so
        raise CaptureError("hidden states that are not finite")
    return Captured(layers=states[:, :-1], final=states[:, -1])


def staged_path(kv_transfer_params: Mapping[str, Any] | None, folder: Path, engine: str) -> Path | None:
    """Return the staged file that an answer of vLLM names, or None where it names none.

    Raises UserError for a file outside of `folder`, symlinks resolved: it is neither read nor deleted.
    """
    named = (kv_transfer_params or {}).get("hidden_states_path")
    if not named:
        return None
    try:
        path, lock, root = (Path(name).resolve() for name in (str(named), f"{named}.lock", folder))
    except (OSError, RuntimeError, ValueError):  # a loop of symlinks, a null byte
        path = lock = root = folder
    if root not in path.parents or root not in lock.parents:
        raise UserError(
            engine,
            found=f"hidden states in {named!r}",
            expected=f"a file in {folder}",
            fix="Set dump.server_staging_dir to the folder that the servers write to (`serve command --extract`).",
        )
    return path


def discard(path: Path | None) -> None:
    """Delete a staged file and its lock."""
    for file in () if path is None else (path, Path(f"{path}.lock")):
        file.unlink(missing_ok=True)
