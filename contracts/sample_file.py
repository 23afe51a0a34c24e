"""One sample of a hidden-state store: its tensors in memory, and reading and writing its file.

`contracts/store.py` documents the format.
"""

from __future__ import annotations

import json
import math
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
from contracts.top_tokens import TopTokens, top_bytes

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
SPAN_BYTES = 8
"""Bytes of the spans of both kinds of states for a token, at most: two tokens lie between the starts of two spans."""
FP16_TINY, FP16_MAX = 6e-8, 65504.0
UNREADABLE = (OSError, ValueError, TypeError, LookupError, SafetensorError)
"""Exceptions from reading a torn file, or one with other tensors."""
STATES = ("hidden_states", "aux_hidden_states")
TOP = ("top_ids", "top_log_probs")
TOP_TOKENS = "top"
"""The name of `TopTokens` among `StoredSample.spans`."""
FINAL_STATES = ("hidden_states", "hidden_states_scale", "hidden_states_spans", *TOP, "top_spans")
"""What is computed from the final states, or they themselves."""
Spans = list[tuple[int, int]]
"""Half-open, ascending and disjoint."""


@dataclass
class StoredSample:
    """One sample in memory. Shapes: (T,) int32; (T,) bool; (T, H); (T, n*H); metadata: str -> str.

    `hidden_states` is (T, 0) where they were not read or not stored. `scales`: of states that are still coded (fp8,
    int4), by the states' name. `top`: the target's most likely next tokens, in place of final states; N is T. `spans`:
    the tokens that states, or `top`, are stored of, by their name; all, if the name is missing. Elsewhere they are 0.
    """

    input_ids: torch.Tensor
    loss_mask: torch.Tensor
    hidden_states: torch.Tensor
    aux_hidden_states: torch.Tensor
    metadata: dict[str, str]
    scales: dict[str, torch.Tensor] = field(default_factory=dict)
    top: TopTokens | None = None
    spans: dict[str, Spans] = field(default_factory=dict)

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
            None if self.top is None else self.top.at(part),
            {name: [(a, min(b, num_tokens)) for a, b in spans if a < num_tokens] for name, spans in self.spans.items()},
        )

    def has(self, name: str) -> torch.Tensor:
        """Return which tokens' states of this name are stored, (T,) bool."""
        if name not in self.spans:
            return torch.ones(self.num_tokens, dtype=torch.bool)
        return mask_of(self.spans[name], self.num_tokens)

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


def mask_of(spans: Spans, num_tokens: int) -> torch.Tensor:
    """Return the mask `(T,)` of spans."""
    mask = torch.zeros(num_tokens, dtype=torch.bool)
    for start, end in spans:
        mask[start:end] = True
    return mask


def fill_sample(sample: StoredSample, dtype: str | None, buffer: Buffer, *, final_states: bool = True) -> memoryview:
    """Return the bytes of a sample's file, in `buffer`.

    The states are stored in `dtype`; None keeps theirs. Without `final_states`, only the captured layers' are, and the
    most likely tokens, if the sample has them. Tokens outside of `sample.spans` are left out.
    """
    layers = sample.aux_hidden_states.unflatten(1, (sample.num_layers, -1))
    coded = {"aux_hidden_states": (dtype, layers)}
    if final_states:
        coded["hidden_states"] = ("fp8_e4m3" if dtype == "int4" else dtype, sample.hidden_states[:, None])
    tensors = {"input_ids": sample.input_ids.to(torch.int32), "loss_mask": sample.loss_mask}
    tensors |= _top_tensors(sample)
    dtypes = {name: tensor.dtype for name, tensor in tensors.items()}
    for name, (stored, states) in coded.items():
        parts = _encode(name, _gather(states, sample.spans.get(name)), stored)
        if name in sample.spans:
            parts[f"{name}_spans"] = _spans_tensor(sample.spans[name])
        tensors |= parts
        dtypes |= {part: tensor.dtype for part, tensor in parts.items()}
        dtypes[name] = DTYPES[stored] if stored else states.dtype
    places = {name: (dtypes[name], tuple(tensor.shape)) for name, tensor in tensors.items()}
    return buffer.fill(plan_file(places, sample.metadata), tensors)


def _top_tensors(sample: StoredSample) -> dict[str, torch.Tensor]:
    if sample.top is None:
        return {}
    spans = sample.spans[TOP_TOKENS]
    parts = zip(TOP, (sample.top.ids, sample.top.log_probs), strict=True)
    return {**{name: _gather(part, spans) for name, part in parts}, "top_spans": _spans_tensor(spans)}


def _gather(rows: torch.Tensor, spans: Spans | None) -> torch.Tensor:
    return rows if spans is None else torch.cat([rows[:0], *(rows[start:end] for start, end in spans)])


def _spread(rows: torch.Tensor, spans: Spans, num_tokens: int) -> torch.Tensor:
    """Return the opposite of `_gather`, with zeros elsewhere. Raises ValueError if the spans have other lengths."""
    size = num_tokens * math.prod(rows.shape[1:]) * rows.element_size()
    spread = torch.zeros(size, dtype=torch.uint8).view(rows.dtype).view(num_tokens, *rows.shape[1:])
    first = 0
    for start, end in spans:
        spread[start:end] = rows[first : first + end - start]
        first += end - start
    if first != len(rows):
        raise ValueError(f"{len(rows)} rows for spans of {first} tokens")
    return spread


def _spans_tensor(spans: Spans) -> torch.Tensor:
    return torch.tensor(spans, dtype=torch.int32).view(-1, 2)


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
    num_tokens, spans = len(tensors["input_ids"]), dict[str, Spans]()
    for name in (*STATES, TOP_TOKENS):
        if f"{name}_spans" in tensors:
            spans[name] = [(start, end) for start, end in tensors.pop(f"{name}_spans").tolist()]
            for part in TOP if name == TOP_TOKENS else (name, f"{name}_scale"):
                if part in tensors:
                    tensors[part] = _spread(tensors[part], spans[name], num_tokens)
    top = TopTokens(*(tensors.pop(name) for name in TOP)) if TOP[0] in tensors else None
    if top is not None:
        top = TopTokens(top.ids.to(torch.int32), top.log_probs)
    scales = {name: tensors.pop(f"{name}_scale") for name in STATES if f"{name}_scale" in tensors}
    if "hidden_states" not in tensors:
        tensors["hidden_states"] = tensors["aux_hidden_states"].new_empty((num_tokens, 0))
    sample = StoredSample(**tensors, metadata=metadata, scales=scales, top=top, spans=spans)
    return sample.decoded() if decode else sample


def read_sample_tensor(path: Path, name: str) -> torch.Tensor:
    """Read one tensor of a sample without the others. Raises UserError if the file is missing or broken."""
    try:
        with safe_open(path, framework="pt") as file:
            tensor: torch.Tensor = file.get_tensor(name)
    except UNREADABLE as error:
        raise _unreadable(path, error) from None
    return tensor


@dataclass(frozen=True)
class SampleForm:
    """The form of a store's samples, from which their sizes follow. `num_layers`: captured ones.

    `final_state`: "pre-norm", "none" or "top-k", with `top_k` tokens of a vocabulary of `vocab_size`, if that is known.
    `has_spans`: states of some tokens may be left out.
    """

    hidden_size: int
    num_layers: int
    dtype: str
    final_state: str = "pre-norm"
    top_k: int | None = None
    vocab_size: int | None = None
    has_spans: bool = False

    @property
    def is_reduced(self) -> bool:
        """Whether rows of some tokens are missing."""
        return self.has_spans or self.final_state == "top-k"

    @property
    def header_bytes(self) -> int:
        """Room for the header of a sample's file, which names its tensors and metadata."""
        return 1536 if self.is_reduced else 1024

    def num_bytes(self, num_tokens: int, num_seen: int | None = None, num_predicting: int | None = None) -> int:
        """Return the bytes of a sample's tensors without the file's header; at most, if the numbers are not given.

        `num_seen`: tokens whose captured layers are stored; `num_predicting`: of `TopTokens`, or of final states.
        """
        num_seen = num_tokens if num_seen is None or not self.has_spans else num_seen
        num_final = num_predicting if self.is_reduced and num_predicting is not None else num_tokens
        total = num_tokens * 5 + num_seen * self.num_layers * _state_bytes(self.hidden_size, self.dtype)
        if self.final_state == "top-k":
            total += num_final * top_bytes(self.top_k or 0, self.vocab_size)
        elif self.final_state != "none":
            final_dtype = "fp8_e4m3" if self.dtype == "int4" else self.dtype
            total += num_final * _state_bytes(self.hidden_size, final_dtype)
        return total + (SPAN_BYTES * num_tokens if self.is_reduced and num_predicting is None else 0)


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
