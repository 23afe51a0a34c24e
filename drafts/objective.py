"""The loss of a training step, computed from hidden states without ever holding all logits.

Logits are [rows, vocabulary]; with 200,000 tokens they would dominate the memory of a step. They are computed a chunk
of rows at a time: forward, loss and gradient of a chunk while it is in cache; only the gradient of the rows is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
from torch.nn import functional

from drafts.chunks import chunks
from drafts.loss_terms import Objective
from drafts.method import TOKENS
from drafts.slot_weights import Weights
from drafts.teacher import Teacher, TopProbabilities
from target.head import logits_of

CROSS_ENTROPY = Objective()


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
        cls,
        loss_sum: torch.Tensor,
        hits: torch.Tensor,
        slots: torch.Tensor,
        valid: torch.Tensor,
        whole: torch.Tensor | None = None,
    ) -> StepLoss:
        """Return the result of A blocks of K slots, without waiting for the device.

        Shapes: valid (A, K), which slots have a label; slots (N,), their flat indices; hits (N,), which are right;
        whole (A,), the blocks to count accepted tokens in, by default all.
        """
        right = torch.zeros_like(valid).view(-1).index_copy(0, slots, hits).view(valid.shape)
        accepted = right.long().cumprod(1)
        return cls(
            loss_sum=loss_sum,
            num_slots=valid.sum(),
            right=right.sum(0),
            total=valid.sum(0),
            accepted=accepted.sum() if whole is None else (accepted * whole[:, None]).sum(),
            num_blocks=valid.new_full((), len(valid), dtype=torch.long) if whole is None else whole.sum(),
        )

    def counts(self) -> torch.Tensor:
        """Return all fields in one vector `(4 + 2K,)`, to be summed over batches and processes."""
        parts = [getattr(self, field.name).detach().reshape(-1) for field in fields(self)]
        return torch.cat([part.to(self.loss_sum.device, torch.float64) for part in parts])


class RowLosses(NamedTuple):
    """Shapes: total (), the weighted sum; N rows: hits (whether the label is the argmax), losses, accepted.

    `accepted`: sum_v min(d_v, t_v) with a teacher, else 0. `candidates` (N, k): the most likely tokens, if they are
    asked for. Only `total` has a gradient.
    """

    total: torch.Tensor
    hits: torch.Tensor
    losses: torch.Tensor
    accepted: torch.Tensor
    candidates: torch.Tensor


class Bias(NamedTuple):
    """A low-rank addition to the logits: `states @ weight.T`. Shapes: states (N, r), weight (V, r)."""

    states: torch.Tensor
    weight: torch.Tensor


class LossOptions(NamedTuple):
    """What a fused loss computes. `teacher`: of all terms but `tokens`.

    `bounds`: the rows at which a chunk may end (default: any), for weights that need whole blocks. `wants_accepted`:
    the acceptance probabilities are needed, too, of `teacher`; all objectives but single cross-entropies give them.
    `num_candidates`: how many of each row's most likely tokens are needed, too.
    """

    objective: Objective = CROSS_ENTROPY
    teacher: Teacher | None = None
    bounds: Sequence[int] | None = None
    wants_accepted: bool = False
    num_candidates: int = 0

    @property
    def fast_term(self) -> str | None:
        """The cross-entropy that is computed in place, if the objective is one alone.

        It is not, if a target's most likely tokens are used.
        """
        term = self.objective.single_term
        return term if term in (TOKENS, "distill") else None

    @property
    def needs_teacher(self) -> bool:
        """Whether the target's distribution is used."""
        return self.teacher is not None and (self.fast_term != TOKENS or self.wants_accepted)


def fused_loss(
    hidden: torch.Tensor,
    lm_head: torch.Tensor,
    labels: torch.Tensor,
    weights: Weights,
    options: LossOptions = LossOptions(),  # noqa: B008 (immutable)
    bias: Bias | None = None,
) -> RowLosses:
    """Return the losses of rows whose logits are `hidden @ lm_head.T`, plus `bias`.

    Shapes: hidden (N, H), lm_head (V, H), labels (N,). Weights that are a function get the rows' losses, or, for a sum
    of several terms, the cross-entropy with the labels.
    """
    parts = (None, None) if bias is None else tuple(bias)
    return RowLosses(*_FusedLoss.apply(hidden, lm_head, *parts, _Task(labels, weights, options)))


class _Task(NamedTuple):
    labels: torch.Tensor
    weights: Weights
    options: LossOptions


class _Factor:
    """One product of the logits: `states @ weight.T`, and the gradients of both.

    `addmm` with `out`: torch's counter of FLOPs, which `train plan` uses, does not know `addmm_`.
    """

    def __init__(self, states: torch.Tensor, weight: torch.Tensor, dtype: torch.dtype, needed: Sequence[bool]) -> None:
        # Both sides are cast once, not in every chunk; a frozen head has its dtype already.
        self.states, self.weight = states.to(dtype), weight.to(dtype)
        self.dtypes = states.dtype, weight.dtype
        self.grad_states = torch.empty_like(self.states) if needed[0] else None
        self.grad_weight = torch.zeros_like(weight, dtype=torch.float32) if needed[1] else None

    def add_logits(self, rows: slice, logits: torch.Tensor | None) -> torch.Tensor:
        """Return a chunk's logits (n, V) in fp32, added to those of another product, if there is one."""
        if logits is None:
            return logits_of(self.states[rows], self.weight)
        if self.weight.dtype == torch.float32:
            return torch.addmm(logits, self.states[rows], self.weight.t(), out=logits)
        return logits.add_(logits_of(self.states[rows], self.weight))

    def add_gradient(self, rows: slice, gradient: torch.Tensor, row_weights: torch.Tensor) -> None:
        """Add the gradient of a chunk's logits (n, V), each row times its weight (n, 1).

        The weights go into the narrow factors: a pass over the logits takes longer.
        """
        if self.grad_states is not None:
            torch.mm(gradient, self.weight, out=self.grad_states[rows])
            self.grad_states[rows] *= row_weights
        if self.grad_weight is not None:
            weighted = (self.states[rows] * row_weights).to(gradient.dtype)
            if gradient.dtype == torch.float32:
                torch.addmm(self.grad_weight, gradient.t(), weighted, out=self.grad_weight)
            else:
                self.grad_weight += gradient.t() @ weighted

    def gradients(self) -> list[torch.Tensor | None]:
        """Return the gradients of states and weight, in their dtypes."""
        pairs = zip((self.grad_states, self.grad_weight), self.dtypes, strict=True)
        return [None if gradient is None else gradient.to(dtype) for gradient, dtype in pairs]


class _FusedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        lm_head: torch.Tensor,
        bias_states: torch.Tensor | None,
        bias_weight: torch.Tensor | None,
        task: _Task,
    ) -> tuple[torch.Tensor, ...]:
        labels, weights, options = task
        dtype, needed = compute_dtype(lm_head), ctx.needs_input_grad
        factors = [_Factor(hidden, lm_head, dtype, needed[:2])]
        if bias_states is not None and bias_weight is not None:
            factors.append(_Factor(bias_states, bias_weight, dtype, needed[2:4]))
        hits = torch.empty(len(hidden), dtype=torch.bool, device=hidden.device)
        losses = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        accepted = torch.zeros_like(losses)
        candidates = torch.empty(len(hidden), options.num_candidates, dtype=torch.long, device=hidden.device)
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        # Other terms than cross-entropy hold about twice as many tensors of the logits' size.
        parts = 1 if options.fast_term else 2
        for rows in chunks(len(hidden), lm_head.shape[0], options.bounds, hidden.device, parts):
            logits = None
            for factor in factors:
                logits = factor.add_logits(rows, logits)
            assert logits is not None
            log_d = functional.log_softmax(logits, dim=-1)
            del logits
            own = log_d.gather(1, labels[rows, None])[:, 0]
            hits[rows] = own >= log_d.amax(-1)  # far cheaper than argmax
            if options.num_candidates:
                candidates[rows] = log_d.topk(options.num_candidates, dim=-1).indices
            t = options.teacher(rows) if options.teacher is not None and options.needs_teacher else None
            if options.fast_term and not isinstance(t, TopProbabilities):
                losses[rows] = -own if options.fast_term == TOKENS or t is None else -(t * log_d).sum(-1)
                found, gradient = _cross_entropy_gradient(log_d, t, labels[rows], options)
            else:
                losses[rows], found, gradient = options.objective.compute(log_d, t, labels[rows])
            if found is not None:
                accepted[rows] = found
            known = losses[rows] if len(options.objective.weights) == 1 else -own
            weight = weights(rows, known) if callable(weights) else weights[rows]
            total += (losses[rows] * weight).sum()
            if not any(needed[:4]):
                continue
            gradient = gradient.to(dtype)
            for factor in factors:
                factor.add_gradient(rows, gradient, weight[:, None])
        ctx.save_for_backward(*(gradient for factor in factors for gradient in factor.gradients()))
        ctx.mark_non_differentiable(hits, losses, accepted, candidates)
        return total, hits, losses, accepted, candidates

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[torch.Tensor | None, ...]:
        saved = [
            None if gradient is None else gradient * gradients[0].to(gradient.dtype) for gradient in ctx.saved_tensors
        ]
        return (*saved, *[None] * (5 - len(saved)))


def _cross_entropy_gradient(
    log_d: torch.Tensor, t: torch.Tensor | None, labels: torch.Tensor, options: LossOptions
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """Return the acceptance probabilities, if they are wanted, and d minus the labels or t; `log_d` is overwritten."""
    d = log_d.exp_()
    accepted = torch.minimum(d, t).sum(-1) if t is not None and options.wants_accepted else None
    if options.fast_term == TOKENS or t is None:
        return accepted, d.scatter_add_(1, labels[:, None], d.new_full((len(labels), 1), -1.0))
    return accepted, d.sub_(t)


def compute_dtype(weight: torch.Tensor) -> torch.dtype:
    """Return the dtype of products with a weight: autocast's, else the weight's."""
    kind = weight.device.type
    return torch.get_autocast_dtype(kind) if kind != "meta" and torch.is_autocast_enabled(kind) else weight.dtype


@torch.no_grad()
def label_log_probs(
    hidden: torch.Tensor, lm_head: torch.Tensor, labels: torch.Tensor, temperature: float, bias: Bias | None = None
) -> torch.Tensor:
    """Return the draft's log-probability of each label at a temperature; never holds the logits of more than a chunk.

    Shapes: hidden (..., H), lm_head (V, H), labels (...), bias of as many rows -> (...).
    """
    rows, flat = hidden.flatten(0, -2).to(lm_head.dtype), labels.flatten()[:, None]
    found = []
    for part in chunks(len(rows), lm_head.shape[0], device=rows.device):
        logits = logits_of(rows[part], lm_head)
        if bias is not None:
            logits += logits_of(bias.states[part].to(bias.weight.dtype), bias.weight)
        found.append(logits.div_(temperature).log_softmax(-1).gather(1, flat[part])[:, 0])
    return torch.cat(found).view(labels.shape)


@torch.no_grad()
def greedy_tokens(hidden: torch.Tensor, lm_head: torch.Tensor) -> torch.Tensor:
    """Return the most likely token of each row; never holds the logits of more rows than a chunk.

    Shapes: hidden (..., H), lm_head (V, H) -> (...).
    """
    rows = hidden.flatten(0, -2).to(lm_head.dtype)
    parts = chunks(len(rows), lm_head.shape[0], device=rows.device)
    return torch.cat([logits_of(rows[part], lm_head).argmax(-1) for part in parts]).view(hidden.shape[:-1])
