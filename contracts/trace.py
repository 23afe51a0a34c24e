"""Intermediate tensors of the trainer or the engine, from a prompt to the draft's logits, for `bench parity`.

Format: one safetensors file, `<number>.<name>` for each sample's tensors, metadata `samples`: JSON of ids and starts.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from common.errors import UserError
from common.files import explain_unwritable


@dataclass
class Trace:
    """One sample, whose reply begins at `start`; T = start, n layers, H hidden, V vocabulary, K draft tokens.

    `tensors`: token_ids, the prompt and the reply's first R tokens (trainer only); layers (T, n, H), the prompt's
    captured states; teacher (R,), the target's greedy tokens of the reply; mask_token () and mask_embedding (H,) if the
    method has them; vocabulary (D,), the target's ids of a reduced vocabulary; draft_logits (K, V) after the reply's
    first token, -inf for tokens outside the draft's vocabulary; markov_bias (K, V), the part of them that depends on
    the token before, candidate_scores (K, V), from which the draft tokens are chosen, -inf for tokens that are no
    candidates, and confidence (K,), if the method has them.
    """

    sample_id: str
    start: int
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)


def write_traces(path: Path, traces: Sequence[Trace]) -> None:
    """Write traces to `path`. Raises UserError if it cannot be written."""
    from safetensors.torch import save_file

    tensors = {
        f"{number}.{name}": tensor.cpu().clone(memory_format=torch.contiguous_format)
        for number, trace in enumerate(traces)
        for name, tensor in trace.tensors.items()
    }
    metadata = {"samples": json.dumps([(trace.sample_id, trace.start) for trace in traces])}
    with explain_unwritable(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, path, metadata=metadata)


def read_traces(path: Path) -> list[Trace]:
    """Read the traces of `path`. Raises UserError if it is not a trace file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            traces = [Trace(sample_id, start) for sample_id, start in json.loads(file.metadata()["samples"])]
            for key in file.keys():  # noqa: SIM118 (not a mapping)
                number, _, name = key.partition(".")
                traces[int(number)].tensors[name] = file.get_tensor(key)
    except (OSError, SafetensorError, KeyError, TypeError) as error:
        raise UserError(path, found=str(error), expected="a trace", fix="Write it again.") from None
    return traces
