"""One sample of a hidden-state store: its tensors in memory, and reading and writing its file.

`contracts/store.py` documents the format.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load

from common.errors import UserError
from common.files import hash_bytes
from common.tensor_file import Buffer, plan_file

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "fp8_e4m3": torch.float8_e4m3fn,
    "int4": torch.uint8,
}
"""The dtype of the captured layers' states by its name in the recipe. With int4, final states are fp8_e4m3."""
FP8_MAX = 448.0
INT4_MAX = 7
INT4_BLOCK = 32
"""Neighbouring values of a token's states that share a scale."""
FP16_TINY, FP16_MAX = 6e-8, 65504.0
UNREADABLE = (OSError, ValueError, TypeError, LookupError, SafetensorError)
"""Exceptions from reading a torn file, or one with other tensors."""
STATES = ("hidden_states", "aux_hidden_states")
FINAL_STATES = ("hidden_states", "hidden_states_scale")


@dataclass
class StoredSample:
    """One sample in memory. Shapes: (T,) int32; (T,) bool; (T, H); (T, n*H); metadata: str -> str.

    `hidden_states` is (T, 0) where they were not read or not stored. `scales`: of states that are still coded (fp8,
    int4), by the states' name.
    """

    input_ids: torch.Tensor
    loss_mask: torch.Tensor
    hidden_states: torch.Tensor
    aux_hidden_states: torch.Tensor
    metadata: dict[str, str]
    scales: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def num_tokens(self) -> int:
        return self.input_ids.shape[0]

    @property
    def num_layers(self) -> int:
        return self.aux_hidden_states.shape[1] // self.hidden_states.shape[1]

    def cut(self, num_tokens: int) -> StoredSample:
        """Return the sample's first tokens."""
        part = slice(num_tokens)
        return StoredSample(
            self.input_ids[part],
            self.loss_mask[part],
            self.hidden_states[part],
            self.aux_hidden_states[part],
            self.metadata,
            {name: scale[part] for name, scale in self.scales.items()},
        )

    def of_layers(self, places: Sequence[int], num_layers: int) -> StoredSample:
        """Return the sample with the captured layers at `places` of its `num_layers` ones, decoded."""
        decoded = self.decoded()
        layers = decoded.aux_hidden_states.unflatten(1, (num_layers, -1))[:, list(places)]
        return replace(decoded, aux_hidden_states=layers.flatten(1))

    def decoded(self) -> StoredSample:
        """Return the sample with bf16 states in place of coded ones."""
        decoded: dict[str, Any] = {
            name: decode_states(getattr(self, name), scale) for name, scale in self.scales.items()
        }
        return replace(self, scales={}, **decoded)


def fill_sample(sample: StoredSample, dtype: str | None, buffer: Buffer, *, final_states: bool = True) -> memoryview:
    """Return the bytes of a sample's file, in `buffer`.

    The states are stored in `dtype`; None keeps theirs. Without `final_states`, only the captured layers' are.
    """
    layers = sample.aux_hidden_states.unflatten(1, (sample.num_layers, -1))
    coded = {"aux_hidden_states": (dtype, layers)}
    if final_states:
        coded["hidden_states"] = ("fp8_e4m3" if dtype == "int4" else dtype, sample.hidden_states[:, None])
    tensors = {"input_ids": sample.input_ids.to(torch.int32), "loss_mask": sample.loss_mask}
    dtypes = {name: tensor.dtype for name, tensor in tensors.items()}
    for name, (stored, states) in coded.items():
        parts = _encode(name, states, stored)
        tensors |= parts
        dtypes |= {part: tensor.dtype for part, tensor in parts.items()}
        dtypes[name] = DTYPES[stored] if stored else states.dtype
    places = {name: (dtypes[name], tuple(tensor.shape)) for name, tensor in tensors.items()}
    return buffer.fill(plan_file(places, sample.metadata), tensors)


def write_sample_file(
    path: Path, sample: StoredSample, dtype: str | None, buffer: Buffer, *, final_states: bool = True
) -> dict[str, Any]:
    """Write one sample durably (temporary name, sync, rename); return its `{size, sha256}`. See `fill_sample`."""
    data = fill_sample(sample, dtype, buffer, final_states=final_states)
    fields = {"size": len(data), "sha256": hash_bytes(data)}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        buffer.write(temporary, len(data))
    except OSError:
        temporary.unlink(missing_ok=True)  # on a full disk, free the space that the partial file used
        raise
    temporary.rename(path)
    return fields


def read_sample_file(path: Path, *, final_states: bool = True, decode: bool = True) -> StoredSample:
    """Read one sample, with or without its final states, and with coded states as bf16 if `decode`.

    Raises UserError if the file is missing or broken.
    """
    try:
        with safe_open(path, framework="pt") as file:
            skipped = () if final_states else FINAL_STATES
            tensors = {name: file.get_tensor(name) for name in file.keys() if name not in skipped}  # noqa: SIM118
            return _make_sample(tensors, file.metadata() or {}, decode=decode)
    except UNREADABLE as error:
        raise _unreadable(path, error) from None


def read_sample_tokens(path: Path) -> StoredSample:
    """Read one sample without its states: they are (T, 0). Raises UserError if the file is missing or broken."""
    try:
        with safe_open(path, framework="pt") as file:
            ids, mask = (file.get_tensor(name) for name in ("input_ids", "loss_mask"))
            none = torch.empty((len(ids), 0))
            return StoredSample(ids, mask, none, none, file.metadata() or {})
    except UNREADABLE as error:
        raise _unreadable(path, error) from None


def parse_sample(where: str, data: bytes, *, final_states: bool = True, decode: bool = True) -> StoredSample:
    """Return the sample whose file has the content `data`; see `read_sample_file`."""
    try:
        size = int.from_bytes(data[:8], "little")
        metadata = json.loads(data[8 : 8 + size]).get("__metadata__", {})
        skipped = () if final_states else FINAL_STATES
        tensors = {name: tensor for name, tensor in load(data).items() if name not in skipped}
        return _make_sample(tensors, metadata, decode=decode)
    except UNREADABLE as error:
        raise _unreadable(where, error) from None


def _make_sample(tensors: dict[str, torch.Tensor], metadata: dict[str, str], *, decode: bool) -> StoredSample:
    scales = {name: tensors.pop(f"{name}_scale") for name in STATES if f"{name}_scale" in tensors}
    if "hidden_states" not in tensors:
        tensors["hidden_states"] = tensors["aux_hidden_states"].new_empty((len(tensors["input_ids"]), 0))
    sample = StoredSample(**tensors, metadata=metadata, scales=scales)
    return sample.decoded() if decode else sample


def read_sample_tensor(path: Path, name: str) -> torch.Tensor:
    """Read one tensor of a sample without the others. Raises UserError if the file is missing or broken."""
    try:
        with safe_open(path, framework="pt") as file:
            tensor: torch.Tensor = file.get_tensor(name)
    except UNREADABLE as error:
        raise _unreadable(path, error) from None
    return tensor


def sample_bytes(num_tokens: int, hidden_size: int, num_layers: int, dtype: str, *, final_states: bool = True) -> int:
    """Return the bytes of a sample's tensors (ids, mask, states, scales) without the file's header.

    `num_layers` is the number of captured layers, without the final state.
    """
    layer, final = (_state_bytes(hidden_size, name) for name in (dtype, "fp8_e4m3" if dtype == "int4" else dtype))
    return num_tokens * (num_layers * layer + final_states * final + 5)


def _state_bytes(hidden_size: int, dtype: str) -> int:
    """Return the bytes of one state and its scales."""
    if dtype == "int4":
        return hidden_size // 2 + hidden_size // INT4_BLOCK * 2
    return hidden_size * DTYPES[dtype].itemsize + (4 if dtype == "fp8_e4m3" else 0)


def _unreadable(path: object, error: Exception) -> UserError:
    return UserError(
        path,
        found=f"an unreadable sample ({error})",
        expected="a sample written by `dump run`",
        fix="Delete the store and dump again; look for a failing disk.",
    )


def _encode(name: str, states: torch.Tensor, dtype: str | None) -> dict[str, torch.Tensor]:
    """Flatten `states (T, n, H)` to `(T, n*H)`; code them and add the scales. The copy to the file casts."""
    if dtype == "int4":
        coded, scales = encode_int4(states.flatten(1))
        return {name: coded, f"{name}_scale": scales}
    if dtype != "fp8_e4m3":
        return {name: states.flatten(1)}
    scale = (states.float().abs().amax(-1) / FP8_MAX).clamp_min(1e-30)
    scaled = (states.float() / scale[..., None]).clamp_(-FP8_MAX, FP8_MAX)
    return {name: scaled.flatten(1), f"{name}_scale": scale}


def encode_int4(states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return 4-bit codes `(T, W/2)` uint8 of states `(T, W)`, and the scales `(T, W/32)` fp16 of their blocks.

    A value is (code - 8) * scale, with code - 8 in [-7, 7]. The lower half of a byte has the value of even number.
    """
    blocks = states.float().unflatten(1, (-1, INT4_BLOCK))
    scale = (blocks.abs().amax(-1) / INT4_MAX).clamp_(FP16_TINY, FP16_MAX).half()
    levels = (blocks / scale.float()[..., None]).round_().clamp_(-INT4_MAX, INT4_MAX)
    codes = (levels + 8).to(torch.uint8).flatten(1)
    return codes[:, 0::2] | (codes[:, 1::2] << 4), scale


def _decode_int4(coded: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    values = torch.stack([coded & 15, coded >> 4], dim=-1).flatten(1).to(torch.bfloat16) - 8
    return (values.unflatten(1, (-1, INT4_BLOCK)).float() * scale.float()[..., None]).flatten(1).to(torch.bfloat16)


def decode_states(coded: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Return bf16 states `(T, n*H)` from coded ones and their scales, on their device.

    fp8 ones have scales `(T, n)`, one per token and layer; for int4 see `encode_int4`.
    """
    if coded.dtype == torch.uint8:
        return _decode_int4(coded, scale)
    states = coded.float().unflatten(1, (scale.shape[1], -1)) * scale[..., None]
    return states.flatten(1).to(torch.bfloat16)
