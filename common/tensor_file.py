"""Write a safetensors file with one copy of its data: tensors are cast and copied straight to their place in it.

`safetensors.torch.save` makes two more copies in fresh memory and an ordinary write a third one in the page cache.
Getting fresh pages from the kernel takes longer than filling them.

Format (github.com/huggingface/safetensors): the header's length in 8 bytes, little endian; the header, JSON padded with
spaces, with dtype, shape and data_offsets of each tensor; the data.
"""

from __future__ import annotations

import json
import mmap
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

DTYPE_NAMES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.uint16: "U16",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float32: "F32",
    torch.float8_e4m3fn: "F8_E4M3",
}
ALIGNMENT = 4096  # direct writes need it for offset, length and memory


@dataclass(frozen=True)
class Slot:
    """A tensor's dtype and shape, and its first byte in the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int

    def view(self, buffer: Any) -> torch.Tensor:
        """Return the tensor as a view of a buffer that holds the file."""
        count = 1
        for size in self.shape:
            count *= size
        return torch.frombuffer(buffer, dtype=self.dtype, count=count, offset=self.start).view(self.shape)


@dataclass(frozen=True)
class Layout:
    """A file's header, the places of its tensors, and its size in bytes."""

    header: bytes
    slots: dict[str, Slot]
    size: int


def plan_file(
    tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], metadata: Mapping[str, str] | None = None
) -> Layout:
    """Lay out tensors of these dtypes and shapes, the widest dtypes first so that all are aligned."""
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offsets, end = {}, 0
    for name in sorted(tensors, key=lambda name: (-tensors[name][0].itemsize, name)):
        dtype, shape = tensors[name]
        size = dtype.itemsize
        for length in shape:
            size *= length
        entries[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [end, end + size]}
        offsets[name], end = end, end + size
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    header = struct.pack("<Q", len(text)) + text
    slots = {name: Slot(*tensors[name], len(header) + offsets[name]) for name in tensors}
    return Layout(header, slots, len(header) + end)


class Buffer:
    """Memory that holds one file after another; grows when a file needs more."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, ALIGNMENT)

    def fill(self, layout: Layout, tensors: Mapping[str, torch.Tensor]) -> memoryview:
        """Return the file's bytes, valid until the next call. Raises ValueError for a tensor of another shape."""
        if len(self._memory) < layout.size + ALIGNMENT:
            self._memory = mmap.mmap(-1, (layout.size // ALIGNMENT + 2) * ALIGNMENT)
        self._memory[: len(layout.header)] = layout.header
        for name, slot in layout.slots.items():
            if tuple(tensors[name].shape) != slot.shape:
                raise ValueError(f"{name} has shape {tuple(tensors[name].shape)}, its place {slot.shape}")
            slot.view(self._memory).copy_(tensors[name])
        return memoryview(self._memory)[: layout.size]

    def write(self, path: Path, size: int) -> None:
        """Write the first `size` bytes to a new file and sync it, past the page cache if the file system can."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        try:
            descriptor = os.open(path, flags | os.O_DIRECT, 0o644)
            rounded = -(-size // ALIGNMENT) * ALIGNMENT
        except (OSError, AttributeError):  # no direct writes: tmpfs of older kernels, other systems than Linux
            descriptor, rounded = os.open(path, flags, 0o644), size
        try:
            _write_all(descriptor, memoryview(self._memory)[:rounded])
            os.ftruncate(descriptor, size)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _write_all(descriptor: int, data: memoryview) -> None:
    while data:
        data = data[os.write(descriptor, data) :]
