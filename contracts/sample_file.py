"""One sample of a hidden-state store: its tensors in memory, and reading and writing its file.

`contracts/store.py` documents the format.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from common.errors import UserError
from common.files import hash_bytes
from common.tensor_file import Buffer, plan_file

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "fp8_e4m3": torch.float8_e4m3fn}
FP8_MAX = 448.0
UNREADABLE = (OSError, ValueError, TypeError, LookupError, SafetensorError)
"""Exceptions from reading a torn file, or one with other tensors."""
STATES = ("hidden_states", "aux_hidden_states")


@dataclass
class StoredSample:
    """One sample in memory. Shapes: (T,) int32; (T,) bool; (T, H); (T, n*H); metadata: str -> str."""

    input_ids: torch.Tensor
    loss_mask: torch.Tensor
    hidden_states: torch.Tensor
    aux_hidden_states: torch.Tensor
    metadata: dict[str, str]

    @property
    def num_tokens(self) -> int:
        return self.input_ids.shape[0]

    @property
    def num_layers(self) -> int:
        return self.aux_hidden_states.shape[1] // self.hidden_states.shape[1]


def write_sample_file(path: Path, sample: StoredSample, dtype: str | None, buffer: Buffer) -> dict[str, Any]:
    """Write one sample durably (temporary name, sync, rename); return its `{size, sha256}`.

    The states are stored in `dtype`; None keeps theirs. `buffer` is reused for every sample.
    """
    tensors = {
        "input_ids": sample.input_ids.to(torch.int32),
        "loss_mask": sample.loss_mask,
        **_encode("hidden_states", sample.hidden_states[:, None], dtype),
        **_encode("aux_hidden_states", sample.aux_hidden_states.unflatten(1, (sample.num_layers, -1)), dtype),
    }
    stored = DTYPES[dtype] if dtype else sample.hidden_states.dtype
    places = {name: (stored if name in STATES else t.dtype, tuple(t.shape)) for name, t in tensors.items()}
    layout = plan_file(places, sample.metadata)
    data = buffer.fill(layout, tensors)
    fields = {"size": layout.size, "sha256": hash_bytes(data)}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        buffer.write(temporary, layout.size)
    except OSError:
        temporary.unlink(missing_ok=True)  # on a full disk, free the space that the partial file used
        raise
    temporary.rename(path)
    return fields


def read_sample_file(path: Path) -> StoredSample:
    """Read one sample, fp8 states as bf16. Raises UserError if the file is missing or broken."""
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            for name in STATES:
                scale = tensors.pop(f"{name}_scale", None)
                if scale is not None:
                    tensors[name] = _decode(tensors[name], scale)
            return StoredSample(**tensors, metadata=file.metadata() or {})
    except UNREADABLE as error:
        raise _unreadable(path, error) from None


def read_sample_tensor(path: Path, name: str) -> torch.Tensor:
    """Read one tensor of a sample without the others. Raises UserError if the file is missing or broken."""
    try:
        with safe_open(path, framework="pt") as file:
            tensor: torch.Tensor = file.get_tensor(name)
    except UNREADABLE as error:
        raise _unreadable(path, error) from None
    return tensor


def sample_bytes(num_tokens: int, hidden_size: int, num_layers: int, dtype: str) -> int:
    """Return the bytes of a sample's tensors (ids, mask, states, scales) without the file's header.

    `num_layers` is the number of captured layers, without the final state.
    """
    states = (num_layers + 1) * hidden_size * DTYPES[dtype].itemsize
    scales = (num_layers + 1) * 4 if dtype == "fp8_e4m3" else 0
    return num_tokens * (states + scales + 5)


def _unreadable(path: Path, error: Exception) -> UserError:
    return UserError(
        path,
        found=f"an unreadable sample ({error})",
        expected="a sample written by `dump run`",
        fix="Delete the store and dump again; look for a failing disk.",
    )


def _encode(name: str, states: torch.Tensor, dtype: str | None) -> dict[str, torch.Tensor]:
    """Flatten `states (T, n, H)` to `(T, n*H)`; for fp8, scale them and add the scales. The copy to the file casts."""
    if dtype != "fp8_e4m3":
        return {name: states.flatten(1)}
    scale = (states.float().abs().amax(-1) / FP8_MAX).clamp_min(1e-30)
    scaled = (states.float() / scale[..., None]).clamp_(-FP8_MAX, FP8_MAX)
    return {name: scaled.flatten(1), f"{name}_scale": scale}


def _decode(coded: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Return bf16 states `(T, n*H)` from fp8 ones and their scales `(T, n)`."""
    states = coded.float().unflatten(1, (scale.shape[1], -1)) * scale[..., None]
    return states.flatten(1).to(torch.bfloat16)
