"""Weights of a block's slots in the loss: static, or from how likely the slots before are accepted."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch

from drafts.chunks import CPU
from drafts.method import SlotWeights

Weights = torch.Tensor | Callable[[slice, torch.Tensor], torch.Tensor]
"""Weights (N,), or a function from a slice of rows and their losses to their weights."""


class HasSlots(Protocol):
    """What is needed of a plan. Shapes: valid (A, K); slots (N,), flat indices of the valid ones; `ends[a]`: their
    number up to block a."""

    @property
    def valid(self) -> torch.Tensor: ...
    @property
    def slots(self) -> torch.Tensor: ...
    @property
    def ends(self) -> list[int]: ...


class BlockWeights(NamedTuple):
    """Weights of a step's supervised slots. `bounds`: the rows where a chunk of the loss may end; None for any."""

    weights: Weights
    bounds: list[int] | None = None


def make_block_weights(kind: SlotWeights, by_slot: torch.Tensor, smoothing: float, plan: HasSlots) -> BlockWeights:
    """Return the weights of the supervised slots of a plan. Shapes: by_slot (K,), the static weights.

    `dpace` and `e2e_tv` need the losses of whole blocks.
    """
    width = len(by_slot)
    if kind == "decay":
        return BlockWeights(by_slot[plan.slots % width])
    ends = [0, *plan.ends]

    def of_rows(rows: slice, losses: torch.Tensor) -> torch.Tensor:
        low, high = bisect_left(ends, rows.start), bisect_left(ends, rows.stop)
        part, inside = plan.valid[low:high], plan.slots[rows] - low * width
        dense = losses.new_zeros(part.numel()).index_copy(0, inside, losses).view(part.shape)
        found = dpace_weights(dense, part, smoothing) if kind == "dpace" else e2e_tv_weights(dense, part)
        return found.view(-1)[inside]

    return BlockWeights(of_rows, plan.ends)


def slot_decay(num_slots: int, decay: float, device: torch.device = CPU) -> torch.Tensor:
    """Return `w_k = exp(-k/gamma)`, k = 0..K-1, shape (K,): the first draft token weighs 1."""
    return torch.exp(-torch.arange(num_slots, device=device).float() / decay)


def dpace_weights(losses: torch.Tensor, valid: torch.Tensor, smoothing: float) -> torch.Tensor:
    """Return D-PACE's weights (arXiv 2605.18810): slot j's contribution to the expected acceptance.

    With q_i = exp(-loss_i) and q~ = (1-a)*q + a: w_j = sum over m >= j of prod over i <= m of q~_i. An invalid slot and
    all slots after it have weight 0. Shapes: losses and valid (A, K) -> (A, K).
    """
    q = (1.0 - smoothing) * torch.exp(-losses) + smoothing
    reach = (q * valid).cumprod(dim=1)
    return reach.flip(1).cumsum(dim=1).flip(1) * valid


def e2e_tv_weights(distances: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Return weights with which total variation has the gradient of the expected share of accepted tokens.

    With a_i = 1 - distance_i, the loss 1 - (1/K) sum_j prod_{i<=j} a_i has, by a_m, the gradient -W_m,
    W_m = (1/K) * prod_{i<m} a_i * (1 + a_{m+1} + a_{m+1}*a_{m+2} + ...). K: the block's valid slots.
    Source: arXiv 2607.25852. Shapes: distances and valid (A, K) -> (A, K).
    """
    accepted = (1.0 - distances) * valid
    before = torch.cat([torch.ones_like(accepted[:, :1]), accepted[:, :-1]], dim=1).cumprod(dim=1)
    after = torch.ones_like(accepted)
    for slot in range(accepted.shape[1] - 2, -1, -1):
        after[:, slot] = 1.0 + accepted[:, slot + 1] * after[:, slot + 1]
    return before * after * valid / valid.sum(1, keepdim=True).clamp(min=1)
