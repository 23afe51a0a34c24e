"""Chunks of rows: logits are [rows, vocabulary], and only those of one chunk exist at a time."""

from __future__ import annotations

from collections.abc import Sequence

import torch

CHUNK_ELEMENTS = 1 << 19
MIN_CHUNK_ROWS = 128
"""With 64 rows, a training step of EAGLE3 lost a sixth of its speed at a vocabulary of 8,192."""
CPU = torch.device("cpu")
DEVICE_CHUNK_ROWS = 2048
"""Rows of a chunk on GPUs: enough to fill them. At 200,000 tokens a chunk's logits take 1.6 GB in fp32."""


def chunks(
    num_rows: int,
    vocab_size: int,
    bounds: Sequence[int] | None = None,
    device: torch.device = CPU,
    parts: int = 1,
) -> list[slice]:
    """Return slices of rows whose logits fit into a CPU's cache, or that fill another device.

    With `bounds`, each slice ends at one of them. `parts`: on another device, by how many times fewer rows a slice has.
    """
    size = max(MIN_CHUNK_ROWS, CHUNK_ELEMENTS // vocab_size) if device.type == "cpu" else DEVICE_CHUNK_ROWS // parts
    ends = [*range(size, num_rows, size), num_rows] if bounds is None else []
    start = 0
    for bound in bounds or []:
        if bound - start >= size or bound == num_rows:
            ends.append(bound)
            start = bound
    return [slice(a, b) for a, b in zip([0, *ends[:-1]], ends, strict=True) if b > a]
