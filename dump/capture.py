"""The protocol of capture backends: samples in, staged files of hidden states out.

A staged file has the format of vLLM's connector: safetensors with `hidden_states (T, n+1, H)`, the captured layers in
order followed by the final state before the final norm, and `token_ids (T,)`. The writer holds a `.lock` file beside it
until the file is complete.
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


class Engine(Protocol):
    """One engine of a backend."""

    @property
    def name(self) -> str:
        """What messages call it."""
        ...

    @property
    def is_reference(self) -> bool:
        """Whether it is transformers itself, which computes one sample at a time and caches nothing."""
        ...

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's states while they are staged."""
        ...

    def capture(self, samples: Iterator[tuple[str, list[int]]], staging: Staging) -> Iterator[Staged]:
        """Yield each of `samples`, `(sample id, token ids)`, once it is captured, in any order.

        Takes samples only as it can use them, and never stages more bytes than `staging` allows. The engine sees a
        sample's id in the id of its request.
        """
        ...


class CaptureBackend(Engine, Protocol):
    """Runs the target; constructed with `(recipe, target, layer_ids, staging)`. `dump/backends.py` lists all."""

    @property
    def engines(self) -> Sequence[Engine]:
        """Its engines, each of which a preflight must see."""
        ...

    @property
    def settings(self) -> Mapping[str, Any] | None:
        """What its engines were started with; a preflight is repeated if it changes. None: unknown."""
        ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class Captured:
    """One sample's states: `layers (T, n, H)` in the recipe's order, `final (T, H)` before the final norm."""

    layers: torch.Tensor
    final: torch.Tensor


class CaptureError(Exception):
    """An unusable answer of a backend for one sample; the message is the reason."""


class Staging:
    """The folder in which states wait to be stored, and the limit of their bytes."""

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        self.folder = folder
        self.limit_bytes = limit_bytes
        self.taken_bytes = 0
        self._changed = threading.Condition()

    def take(self, num_bytes: int) -> bool:
        """Reserve room for a sample; return False if there is none. One above the limit is admitted alone."""
        with self._changed:
            if self.taken_bytes and self.taken_bytes + num_bytes > self.limit_bytes:
                return False
            self.taken_bytes += num_bytes
            return True

    def give(self, num_bytes: int) -> None:
        """Free the room of a stored sample."""
        with self._changed:
            self.taken_bytes -= num_bytes
            self._changed.notify_all()

    def wait(self, timeout_s: float = 0.05) -> None:
        """Wait until room is freed, at most `timeout_s`, since the engine may have work."""
        with self._changed:
            self._changed.wait(timeout_s)


def load_staged(staged: Staged, token_ids: Sequence[int], num_layers: int, hidden_size: int) -> Captured:
    """Wait until a staged file is complete, read and check it, and delete it.

    vLLM only logs a failed write, so presence, shape, token ids and finite values are checked. Raises CaptureError with
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
    if len(states) < len(token_ids) and tuple(states.shape[1:]) == expected[1:]:
        raise CaptureError(
            f"hidden states of {len(states)} of {len(token_ids)} tokens (a prefix cache that shortens states?)"
        )
    if tuple(states.shape) != expected:
        raise CaptureError(f"hidden states of shape {tuple(states.shape)}, expected {expected}")
    if stored_ids != list(token_ids):
        raise CaptureError("hidden states of other token ids than were asked for")
    if not bool(states.sum(dtype=torch.float32).isfinite()):  # one such value makes the sum not finite
        raise CaptureError("hidden states that are not finite")
    return Captured(layers=states[:, :-1], final=states[:, -1])


def staged_path(kv_transfer_params: Mapping[str, Any] | None, folder: Path, engine: str) -> Path | None:
    """Return the staged file that an answer of vLLM names, or None.

    Raises UserError for a file outside `folder` after resolving symlinks: it is neither read nor deleted.
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
