"""vLLM's sampler as a function of logits: penalties, temperature, min_p, top_k, top_p, in its order.

Penalties depend on the preceding tokens; they change the argmax, so they apply at temperature 0 too.
Source: vllm/v1/sample/sampler.py and ops/penalties.py (vLLM 0.32). Both of its model runners compute the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from contracts.conversation import NO_FILTERS, NO_PENALTIES


@dataclass(frozen=True)
class Context:
    """The tokens before each row of logits: row i follows `token_ids[:ends[i]]`.

    The first `prompt_lengths[i]` of them were the prompt of the request that generated the row's token. The
    presence and frequency penalties count only the tokens after it.
    """

    token_ids: torch.Tensor
    ends: torch.Tensor
    prompt_lengths: torch.Tensor

    @classmethod
    def of_generated(cls, token_ids: torch.Tensor, loss_mask: torch.Tensor) -> Context:
        """Return the context of every generated token of a sample, in order.

        Shapes: token_ids (T,), loss_mask (T,) bool. Each run of True is the reply of one request.
        """
        places = loss_mask.nonzero()[:, 0]
        first = loss_mask & ~functional.pad(loss_mask[:-1], (1, 0), value=False)
        starts = first.nonzero()[:, 0][first.cumsum(0)[places] - 1]
        return cls(token_ids, places, starts)

    def to(self, device: torch.device) -> Context:
        """Return the context on a device."""
        return Context(self.token_ids.to(device), self.ends.to(device), self.prompt_lengths.to(device))

    def rows(self, start: int, end: int) -> Context:
        """Return the context of rows `start` to `end` alone."""
        return Context(self.token_ids, self.ends[start:end], self.prompt_lengths[start:end])


def has_penalties(sampling: Mapping[str, Any]) -> bool:
    """Return whether the sampling parameters of a record have a penalty that changes logits."""
    return any(_value(sampling, name, neutral) != neutral for name, neutral in NO_PENALTIES.items())


def follows_from_top(sampling: Mapping[str, Any], num_tokens: int) -> bool:
    """Return whether the distribution sampled from follows from the log-probabilities of the top `num_tokens` alone.

    It does for greedy sampling, and with a `top_k` of at most that many; not with penalties, after which others may be
    the most likely ones.
    """
    top_k = sampling.get("top_k")
    is_cut = top_k is not None and 0 < top_k <= num_tokens
    return not has_penalties(sampling) and (float(sampling["temperature"]) == 0.0 or is_cut)


def penalize(logits: torch.Tensor, sampling: Mapping[str, Any], context: Context) -> torch.Tensor:
    """Return logits after repetition, frequency and presence penalties; `logits` itself if there are none.

    Shapes: logits (t, V), context of t rows -> (t, V) float32.
    """
    if not has_penalties(sampling):
        return logits
    repetition, presence, frequency = (float(_value(sampling, *item)) for item in NO_PENALTIES.items())
    penalized = logits.float().clone()
    for row, end, prompt_length in zip(penalized, context.ends.tolist(), context.prompt_lengths.tolist(), strict=True):
        seen = context.token_ids[:end].unique().long()
        scores = row[seen]
        row[seen] = scores * torch.where(scores > 0, 1.0 / repetition, repetition)
        generated, counts = context.token_ids[prompt_length:end].unique(return_counts=True)
        row[generated.long()] -= frequency * counts
        row[generated.long()] -= presence
    return penalized


def probabilities_of(sampling: Mapping[str, Any], logits: torch.Tensor, context: Context | None = None) -> torch.Tensor:
    """Return the distribution from which vLLM draws each next token under a record's sampling parameters.

    One-hot at the argmax for temperature 0. Shapes: logits (t, V), context of t rows -> (t, V).
    Raises ValueError for penalties without a context.
    """
    if has_penalties(sampling):
        if context is None:
            raise ValueError("penalties need the tokens before each row")
        logits = penalize(logits, sampling, context)
    top_p, top_k, min_p = (sampling.get(name) for name in NO_FILTERS)
    return sampling_probabilities(logits, float(sampling["temperature"]), top_p, top_k, min_p)


def sampling_probabilities(
    logits: torch.Tensor,
    temperature: float,
    top_p: float | None = None,
    top_k: int | None = None,
    min_p: float | None = None,
) -> torch.Tensor:
    """Return the distribution `(t, V)` under temperature, min_p, top_k, top_p; one-hot for temperature 0."""
    if temperature == 0.0:
        return functional.one_hot(logits.argmax(-1), logits.shape[-1]).float()
    q = (logits / temperature).softmax(-1)
    if _filters(top_p, top_k, min_p):
        q = q * kept_by(q, top_p, top_k, min_p)
        q = q / q.sum(-1, keepdim=True)
    return q


def kept_by(q: torch.Tensor, top_p: float | None, top_k: int | None, min_p: float | None = None) -> torch.Tensor:
    """Return which tokens `(t, V)` of probabilities `q` remain after min_p, then top_k, then top_p."""
    if not _filters(top_p, top_k, min_p):
        return torch.ones_like(q, dtype=torch.bool)
    ordered, order = q.sort(-1, descending=True)
    kept = torch.ones_like(ordered, dtype=torch.bool)
    if min_p:
        kept &= ordered >= min_p * ordered[:, :1]
    if top_k is not None and 0 < top_k < q.shape[-1]:
        kept &= ordered >= ordered[:, top_k - 1 : top_k]  # vLLM keeps ties of the last one
    if top_p is not None and top_p < 1.0:
        mass = (ordered * kept).cumsum(-1) / (ordered * kept).sum(-1, keepdim=True)
        kept &= torch.cat([torch.zeros_like(mass[:, :1]), mass[:, :-1]], -1) < top_p
    return torch.zeros_like(kept).scatter(-1, order, kept)


def _filters(top_p: float | None, top_k: int | None, min_p: float | None) -> bool:
    return bool(min_p) or (top_k is not None and top_k > 0) or (top_p is not None and top_p < 1.0)


def _value(sampling: Mapping[str, Any], name: str, neutral: float) -> float:
    value = sampling.get(name)
    return neutral if value is None else value
