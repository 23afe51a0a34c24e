"""Training objectives: cross-entropy with the generated tokens or with the target's own distribution.

Logits are [rows, vocabulary]; with 200,000 tokens they would dominate the memory of a step. They are computed a chunk
of rows at a time: forward, loss and gradient of a chunk while it is in cache; only the gradient of the rows is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from target.head import TargetHead, logits_of

CHUNK_ELEMENTS = 1 << 20
MIN_CHUNK_ROWS = 64
CPU = torch.device("cpu")
DEVICE_CHUNK_ROWS = 2048
"""Rows of a chunk on GPUs: enough to fill them. At 200,000 tokens a chunk's logits take 1.6 GB in fp32."""

Weights = torch.Tensor | Callable[[slice, torch.Tensor], torch.Tensor]
"""Weights (N,), or a function from a slice of rows and their losses to their weights."""
Teacher = Callable[[slice], torch.Tensor]
"""A function from a slice of rows to the target's probabilities `(n, V)`."""


@dataclass
class StepLoss:
    """The result of one forward pass. `loss_sum / num_slots` is the loss; the rest is only logged.

    Shapes: scalars, but right and total (K,): supervised slots whose argmax is the label, and all of them, by position.
    `accepted`: draft tokens up to the first wrong one, summed over `num_blocks` blocks.
    """

    loss_sum: torch.Tensor
    num_slots: torch.Tensor
    right: torch.Tensor
    total: torch.Tensor
    accepted: torch.Tensor
    num_blocks: torch.Tensor

    @classmethod
    def of_blocks(
        cls, loss_sum: torch.Tensor, hits: torch.Tensor, slots: torch.Tensor, valid: torch.Tensor
    ) -> StepLoss:
        """Return the result of A blocks of K slots, without waiting for the device.

        Shapes: valid (A, K), which slots have a label; slots (N,), their flat indices; hits (N,), which are right.
        """
        right = torch.zeros_like(valid).view(-1).index_copy(0, slots, hits).view(valid.shape)
        return cls(
            loss_sum=loss_sum,
            num_slots=valid.sum(),
            right=right.sum(0),
            total=valid.sum(0),
            accepted=right.long().cumprod(1).sum(),
            num_blocks=valid.new_full((), len(valid), dtype=torch.long),
        )

    def counts(self) -> torch.Tensor:
        """Return all fields in one vector `(4 + 2K,)`, to be summed over batches and processes."""
        parts = [getattr(self, field.name).detach().reshape(-1) for field in fields(self)]
        return torch.cat([part.to(self.loss_sum.device, torch.float64) for part in parts])


@torch.compiler.disable  # loops over chunks of matrix products: nothing to fuse
def fused_cross_entropy(
    hidden: torch.Tensor,
    lm_head: torch.Tensor,
    labels: torch.Tensor,
    weights: Weights,
    teacher: Teacher | None = None,
    bounds: Sequence[int] | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the weighted sum of the rows' cross-entropies, whether each label is the argmax, and each row's loss.

    Shapes: hidden (N, H), lm_head (V, H), labels (N,) -> scalar, (N,), (N,). With a teacher, a row's loss is
    -sum_v q_v log p_v instead of -log p_label. `bounds`: the rows at which a chunk may end (default: any), for weights
    that need whole blocks.
    """
    total, hits, losses = _FusedCrossEntropy.apply(hidden, lm_head, labels, weights, teacher, bounds)
    return total, hits, losses


class _FusedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        lm_head: torch.Tensor,
        labels: torch.Tensor,
        weights: Weights,
        teacher: Teacher | None,
        bounds: Sequence[int] | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        num_rows = len(hidden)
        wants_hidden, wants_head = ctx.needs_input_grad[:2]
        # Both sides are cast once, not in every chunk; a frozen head has its dtype already.
        dtype = _compute_dtype(lm_head)
        x, weight_of_head = hidden.to(dtype), lm_head.to(dtype)
        grad_hidden = torch.empty_like(x) if wants_hidden else None
        grad_head = torch.zeros_like(lm_head, dtype=torch.float32) if wants_head else None
        hits = torch.empty(num_rows, dtype=torch.bool, device=hidden.device)
        losses = torch.empty(num_rows, dtype=torch.float32, device=hidden.device)
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        for rows in chunks(num_rows, lm_head.shape[0], bounds, hidden.device):
            log_p = functional.log_softmax(logits_of(x[rows], weight_of_head), dim=-1)
            own = log_p.gather(1, labels[rows, None])[:, 0]
            hits[rows] = own >= log_p.amax(-1)  # far cheaper than argmax
            q = None if teacher is None else teacher(rows)
            if q is None:
                losses[rows] = -own
            else:
                losses[rows] = -(q * log_p).sum(-1)
            weight = weights(rows, losses[rows]) if callable(weights) else weights[rows]
            total += (losses[rows] * weight).sum()
            if grad_hidden is None and grad_head is None:
                continue
            # d loss / d logits = p - q, with q one-hot at the label without a teacher.
            gradient = log_p.exp_()
            if q is None:
                gradient.scatter_add_(1, labels[rows, None], gradient.new_full((len(weight), 1), -1.0))
            else:
                gradient -= q
            gradient *= weight[:, None]
            gradient = gradient.to(dtype)
            if grad_hidden is not None:
                torch.mm(gradient, weight_of_head, out=grad_hidden[rows])
            if grad_head is not None:
                grad_head += gradient.t() @ x[rows]
        ctx.save_for_backward(
            None if grad_hidden is None else grad_hidden.to(hidden.dtype),
            None if grad_head is None else grad_head.to(lm_head.dtype),
        )
        ctx.mark_non_differentiable(hits, losses)
        return total, hits, losses

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[torch.Tensor | None, ...]:
        grad_hidden, grad_head = ctx.saved_tensors
        scale = gradients[0]
        return (
            None if grad_hidden is None else grad_hidden * scale.to(grad_hidden.dtype),
            None if grad_head is None else grad_head * scale.to(grad_head.dtype),
            *[None] * 4,
        )


def _compute_dtype(weight: torch.Tensor) -> torch.dtype:
    """Return the dtype of products with a weight: autocast's, else the weight's."""
    kind = weight.device.type
    return torch.get_autocast_dtype(kind) if kind != "meta" and torch.is_autocast_enabled(kind) else weight.dtype


def chunks(
    num_rows: int, vocab_size: int, bounds: Sequence[int] | None = None, device: torch.device = CPU
) -> list[slice]:
    """Return slices of rows whose logits fit into a CPU's cache, or that fill another device.

    With `bounds`, each slice ends at one of them.
    """
    size = max(MIN_CHUNK_ROWS, CHUNK_ELEMENTS // vocab_size) if device.type == "cpu" else DEVICE_CHUNK_ROWS
    ends = [*range(size, num_rows, size), num_rows] if bounds is None else []
    start = 0
    for bound in bounds or []:
        if bound - start >= size or bound == num_rows:
            ends.append(bound)
            start = bound
    return [slice(a, b) for a, b in zip([0, *ends[:-1]], ends, strict=True) if b > a]


@torch.no_grad()
def greedy_tokens(hidden: torch.Tensor, lm_head: torch.Tensor) -> torch.Tensor:
    """Return the most likely token of each row; never holds the logits of more rows than a chunk.

    Shapes: hidden (..., H), lm_head (V, H) -> (...).
    """
    rows = hidden.flatten(0, -2).to(lm_head.dtype)
    parts = chunks(len(rows), lm_head.shape[0], device=rows.device)
    return torch.cat([logits_of(rows[part], lm_head).argmax(-1) for part in parts]).view(hidden.shape[:-1])


@dataclass(frozen=True)
class TeacherRows:
    """The rows of target states that a step's slots learn from, each once; planned on the CPU.

    Shapes: rows (U,), ascending; index (N,), each slot's place among them; `on_host`: the same index, for the host.
    """

    rows: torch.Tensor
    index: torch.Tensor
    on_host: np.ndarray

    @classmethod
    def of_slots(cls, rows: torch.Tensor) -> TeacherRows:
        """Plan for slots that learn from the states `rows (N,)`."""
        distinct, index = rows.unique(return_inverse=True)
        return cls(distinct, index, index.numpy())


def make_teacher(
    head: TargetHead, hidden_states: torch.Tensor, needed: TeacherRows, known: torch.Tensor | None = None
) -> Teacher:
    """Return the target's distribution for each slot, from states `(T, H)` before the final norm.

    Slots next to each other mostly share rows, since blocks and chains overlap: a chunk computes each row once.
    `known (n,)`: the only tokens of the draft; the distribution is the target's given that it chooses one of them.
    """
    if known is not None:  # renormalized probabilities are the softmax of these logits alone
        head = head.of_tokens(known)

    def teacher(part: slice) -> torch.Tensor:
        low, high = int(needed.on_host[part].min()), int(needed.on_host[part].max()) + 1
        q = head.logits(hidden_states[needed.rows[low:high]]).softmax(-1)
        return q.index_select(0, needed.index[part] - low)

    return teacher


@torch.no_grad()
def teacher_argmax(head: TargetHead, hidden_states: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Return the target's greedy token after each of `places`; duplicates are computed once.

    Shapes: hidden_states (T, H) before the final norm, places (N,) -> (N,).
    """
    needed, inverse = places.unique(return_inverse=True)
    parts = chunks(len(needed), head.lm_head.shape[0], device=needed.device)
    found = [head.logits(hidden_states[needed[rows]]).max(-1).indices for rows in parts]
    return torch.cat(found)[inverse]


def slot_weights(block_size: int, decay: float, device: torch.device = CPU) -> torch.Tensor:
    """Return `w_k = exp(-(k-1)/gamma)`, k = 1..B-1, shape (B-1,); slot 0, the anchor, has no loss."""
    return torch.exp(-torch.arange(block_size - 1, device=device).float() / decay)


def dpace_weights(losses: torch.Tensor, valid: torch.Tensor, smoothing: float) -> torch.Tensor:
    """Return D-PACE's weights (arXiv 2605.18810): slot j's contribution to the expected acceptance.

    With q_i = exp(-loss_i) and q~ = (1-a)*q + a: w_j = sum over m >= j of prod over i <= m of q~_i. An invalid slot and
    all slots after it have weight 0. Shapes: losses and valid (A, K) -> (A, K).
    """
    q = (1.0 - smoothing) * torch.exp(-losses) + smoothing
    reach = (q * valid).cumprod(dim=1)
    return reach.flip(1).cumsum(dim=1).flip(1) * valid
