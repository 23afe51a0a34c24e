"""Positions that serving can draft from, and spans of generated tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from common.errors import UserError
from drafts.batch import Batch


def anchor_places(loss_mask: torch.Tensor) -> torch.Tensor:
    """Return the positions that serving can draft from: a generated token followed by another. Ascending, (N,)."""
    return (loss_mask[:-1] & loss_mask[1:]).nonzero()[:, 0]


def chain_places(loss_mask: torch.Tensor) -> torch.Tensor:
    """Return `anchor_places` without position 0, for drafts that need the feature of the token before. Shape (N,)."""
    places = anchor_places(loss_mask)
    return places[places > 0]


def chain_places_of(batch: Batch) -> list[torch.Tensor]:
    """Return the `chain_places` of each document. Raises UserError, with the sample's id, for one that has none."""
    places = []
    for sample_id, mask in zip(batch.sample_ids, batch.loss_mask.split(batch.lengths), strict=True):
        found = chain_places(mask)
        if not len(found):
            raise UserError(
                f"sample {sample_id}",
                found="no place to draft from",
                expected="two generated tokens in a row",
                fix="Dump again: `dump run` leaves such samples out.",
            )
        places.append(found)
    return places


def predicting_spans(generated: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return the spans of positions whose next token was generated: those of the distributions drafts learn from."""
    spans = [(max(start - 1, 0), end - 1) for start, end in generated]
    return [(start, end) for start, end in spans if start < end]


def seen_spans(generated: Sequence[tuple[int, int]], reach: int | None) -> list[tuple[int, int]]:
    """Return the spans of positions whose captured states a block or chain from any place can see.

    `generated`: the spans of generated tokens. A block sees positions before its anchor, at most `reach` of them; None:
    all. The others change no loss and no gradient, and serving drafts from the same places.
    """
    found = list[tuple[int, int]]()
    for start, end in generated:
        if end - start < 2:
            continue
        low, high = 0 if reach is None else max(0, start - reach), end - 2  # the last anchor
        if found and low <= found[-1][1]:
            low = found.pop()[0]
        if low < high:
            found.append((low, high))
    return found


def spans_of(loss_mask: torch.Tensor) -> list[tuple[int, int]]:
    """Return the runs of True as half-open spans."""
    edges = torch.diff(loss_mask.int(), prepend=torch.zeros(1, dtype=torch.int), append=torch.zeros(1, dtype=torch.int))
    starts, ends = (edges == 1).nonzero()[:, 0], (edges == -1).nonzero()[:, 0]
    return list(zip(starts.tolist(), ends.tolist(), strict=True))
