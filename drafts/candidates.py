"""Candidates: the most likely tokens of each slot, which a draft scores by the candidate before and walks through.

Source of the walk: vLLM's V2 runner (vllm/v1/worker/gpu/spec_decode/dflash2/speculator.py). Shapes: N rows, each with k
candidates in descending order of their logits; A blocks of K slots.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from drafts.chunks import chunks
from drafts.objective import compute_dtype
from target.head import logits_of


class Candidates(NamedTuple):
    """Shapes: tokens and values (..., k), the tokens' logits or log-probabilities."""

    tokens: torch.Tensor
    values: torch.Tensor


class Walked(NamedTuple):
    """Shapes: tokens (A, K); scores (A, K, k), those of each slot's candidates after the token chosen before."""

    tokens: torch.Tensor
    scores: torch.Tensor


@torch.no_grad()
def top_candidates(hidden: torch.Tensor, lm_head: torch.Tensor, count: int, *, log_probs: bool = False) -> Candidates:
    """Return the most likely tokens of each row; never holds the logits of more rows than a chunk.

    Shapes: hidden (..., H), lm_head (V, H) -> (..., count).
    """
    rows = hidden.flatten(0, -2).to(lm_head.dtype)
    tokens, values = [], []
    for part in chunks(len(rows), lm_head.shape[0], device=rows.device):
        logits = logits_of(rows[part], lm_head)
        found = logits.topk(count, dim=-1)
        tokens.append(found.indices)
        values.append(found.values - logits.logsumexp(-1, keepdim=True) if log_probs else found.values)
    shape = (*hidden.shape[:-1], count)
    return Candidates(torch.cat(tokens).view(shape), torch.cat(values).view(shape))


def chosen_logits(states: torch.Tensor, weight: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Return `states @ weight.T` at some tokens of each row, in fp32, without holding the rows of `weight`.

    Shapes: states (N, r), weight (V, r), tokens (N, k) -> (N, k).
    """
    found: torch.Tensor = _ChosenLogits.apply(states, weight, tokens)
    return found


def log_partition(hidden: torch.Tensor, lm_head: torch.Tensor) -> torch.Tensor:
    """Return the logarithm of the sum of exp(logits) over the vocabulary; no gradient for lm_head.

    Shapes: hidden (N, H), lm_head (V, H) -> (N,).
    """
    found: torch.Tensor = _LogPartition.apply(hidden, lm_head)
    return found


def walk(tokens: torch.Tensor, scores: torch.Tensor) -> Walked:
    """Choose the best candidate of each slot given the one chosen before, from left to right.

    Shapes: tokens (A, K, k); scores (A, K, k, k), from the candidate before (dimension 2) to the slot's own. The rows
    of the first slot are equal.
    """
    chosen, found = list[torch.Tensor](), list[torch.Tensor]()
    before = torch.zeros(len(tokens), 1, 1, dtype=torch.long, device=tokens.device)
    for slot in range(tokens.shape[1]):
        found.append(scores[:, slot].gather(1, before.expand(-1, -1, tokens.shape[2]))[:, 0])
        before = found[-1].argmax(-1)[:, None, None]
        chosen.append(tokens[:, slot].gather(1, before[:, 0])[:, 0])
    return Walked(torch.stack(chosen, 1), torch.stack(found, 1))


def label_probs(tokens: torch.Tensor, scores: torch.Tensor, labels: torch.Tensor, temperature: float) -> torch.Tensor:
    """Return the probabilities of labels that are sampled by the scores; 0 for those that are no candidates.

    Shapes: tokens and scores (A, K, k), labels (A, K) -> (A, K).
    """
    return ((scores / temperature).softmax(-1) * (tokens == labels[:, :, None])).sum(-1)


def by_token(tokens: torch.Tensor, scores: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Return scores by token, -inf for tokens that are no candidates. Shapes: (K, k) and (K, k) -> (K, V)."""
    empty = scores.new_full((len(scores), vocab_size), float("-inf"))
    return empty.scatter_(1, tokens, scores)


def engine_candidates(
    noted: Mapping[str, list[torch.Tensor]], model: nn.Module, scorer: str
) -> dict[str, torch.Tensor]:
    """Return `bench parity`'s tensors of a vLLM draft model with candidates; `scorer`: the method that scores them.

    vLLM computes no other logits than the candidates'; all are computed here from its states, by its lm_head.
    """
    mask = {"mask_token": noted["slots"][0][1].long(), "mask_embedding": noted["embeddings"][0][1]}
    edges = noted[scorer][0][:1]  # of one request
    tokens = noted["compute_candidates"][0][: edges.shape[1]].long()
    walked = walk(tokens[None], edges)
    lm_head: Any = model.lm_head
    states = noted["compute_candidates.input"][0][: len(tokens)].to(lm_head.weight.device, lm_head.weight.dtype)
    logits = model.compute_logits(states)  # type: ignore[operator]
    if logits is None:  # on ranks that do not hold the logits
        return mask
    logits = logits.float().cpu()
    scores = by_token(tokens, walked.scores[0], logits.shape[-1])
    return {**mask, "draft_logits": logits, "candidate_scores": scores}


class _ChosenLogits(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: torch.Tensor, weight: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(states, weight, tokens)
        found = torch.empty(tokens.shape, dtype=torch.float32, device=states.device)
        for rows in _gathers(weight, tokens):
            # No matrix product: autocast would round its sums.
            found[rows] = (weight[tokens[rows]].float() * states[rows].float().unsqueeze(1)).sum(-1)
        return found

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[torch.Tensor | None, ...]:
        states, weight, tokens = ctx.saved_tensors
        wide = torch.float32
        grad_states = torch.empty(states.shape, dtype=wide, device=states.device) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros(weight.shape, dtype=wide, device=weight.device) if ctx.needs_input_grad[1] else None
        for rows in _gathers(weight, tokens):
            gradient = gradients[0][rows].unsqueeze(-1)
            if grad_states is not None:
                grad_states[rows] = (gradient * weight[tokens[rows]].float()).sum(1)
            if grad_weight is not None:
                parts = gradient * states[rows].float().unsqueeze(1)
                grad_weight.index_add_(0, tokens[rows].flatten(), parts.flatten(0, 1))
        return (
            None if grad_states is None else grad_states.to(states.dtype),
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None,
        )


def _gathers(weight: torch.Tensor, tokens: torch.Tensor) -> list[slice]:
    return chunks(len(tokens), tokens.shape[1] * weight.shape[1], device=weight.device)


class _LogPartition(torch.autograd.Function):
    """Saves the expected row of lm_head, which is the gradient by the states, in place of the probabilities."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, lm_head: torch.Tensor) -> torch.Tensor:
        dtype = compute_dtype(lm_head)
        states, weight = hidden.to(dtype), lm_head.to(dtype)
        found = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        expected = torch.empty_like(states)
        for rows in chunks(len(hidden), lm_head.shape[0], device=hidden.device):
            logits = logits_of(states[rows], weight)
            found[rows] = logits.logsumexp(-1)
            torch.mm(logits.softmax(-1).to(dtype), weight, out=expected[rows])
        ctx.save_for_backward(expected)
        ctx.dtype = hidden.dtype
        return found

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[torch.Tensor | None, ...]:
        (expected,) = ctx.saved_tensors
        return (gradients[0].unsqueeze(-1) * expected).to(ctx.dtype), None
