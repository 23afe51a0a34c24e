"""Compare a sample's final states with the tokens that the target generated from them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import torch

from contracts.store import StoredSample
from contracts.top_tokens import TopTokens
from target.head import TargetHead
from target.sampling import Context, kept_by, penalize

TOKENS_PER_CHUNK = 2048


def sampling_of(sample: StoredSample) -> dict[str, Any] | None:
    """Return the sampling parameters of a sample; None if its temperature was not recorded."""
    sampling = {
        "temperature": sample.metadata.get("temperature"),
        **json.loads(sample.metadata.get("sampling") or "{}"),
    }
    return None if sampling["temperature"] in (None, "") else sampling


@torch.inference_mode()
def top_gaps(top: TopTokens, sample: StoredSample) -> torch.Tensor:
    """Return how far each generated token's log-probability is below the largest one, `(generated tokens,)`.

    0 is the first of the stored tokens; of one that is not stored, the gap to the last of them, which is smaller.
    """
    places = sample.loss_mask.nonzero()[:, 0]
    places = places[places > 0]
    found, tokens = top.at(places - 1), sample.input_ids[places]
    is_token, own = found.ids == tokens[:, None], found.log_probs[:, :-1].float()
    stored = torch.where(is_token.any(1), own.masked_fill(~is_token, -torch.inf).amax(1), own[:, -1])
    gaps = own[:, 0] - stored
    # fp16 may round a smaller log-probability up to the largest one.
    return gaps.where(is_token[:, 0], gaps.clamp(min=torch.finfo(gaps.dtype).tiny))


@torch.inference_mode()
def logit_gaps(head: TargetHead, sample: StoredSample, sampling: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return how far each generated token's logit is below the largest, and that one, `(generated tokens,)` both.

    A gap of 0 is the argmax.
    """
    gaps, largest = [], []
    for logits, tokens in predict(head, sample, sampling):
        largest.append(logits.amax(-1))
        gaps.append(largest[-1] - logits.gather(1, tokens[:, None])[:, 0])
    return torch.cat(gaps), torch.cat(largest)


@torch.inference_mode()
def sampled_deviations(head: TargetHead, sample: StoredSample, sampling: dict[str, Any]) -> tuple[float, int]:
    """Return the summed log-probability's deviation in standard deviations, and the number of tokens.

    With q the sampled distribution, the mean of log q(token) is -H(q); variances add up over the tokens. A token that
    the filters (top_p, top_k, min_p) exclude, by more than rounding explains, gives infinity.
    """
    total = variance = 0.0
    count = 0
    filters = sampling.get("top_p"), sampling.get("top_k"), sampling.get("min_p")
    for logits, tokens in predict(head, sample, sampling):
        log_q = (logits / float(sampling["temperature"])).log_softmax(-1)
        keep = kept_by(log_q.exp(), *filters)
        own = log_q.gather(1, tokens[:, None])[:, 0]
        outside = ~keep.gather(1, tokens[:, None])[:, 0]
        if bool((outside & (own < -10.0)).any()):
            return float("inf"), len(tokens)
        keep.scatter_(1, tokens[:, None], True)  # at the edge of a filter, rounding decides
        log_q = log_q.masked_fill(~keep, -torch.inf).log_softmax(-1)
        q, finite = log_q.exp(), log_q.nan_to_num(neginf=0.0)
        mean = (q * finite).sum(-1)
        total += float((log_q.gather(1, tokens[:, None])[:, 0] - mean).sum())
        variance += float(((q * finite**2).sum(-1) - mean**2).clamp_min(0).sum())
        count += len(tokens)
    return total / max(variance, 1e-6) ** 0.5 if count else 0.0, count


def predict(
    head: TargetHead, sample: StoredSample, sampling: dict[str, Any]
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield in chunks the penalized logits `(t, V)` before generated tokens, and these tokens `(t,)`."""
    context = Context.of_generated(sample.input_ids, sample.loss_mask)
    for start in range(0, len(context.ends), TOKENS_PER_CHUNK):
        rows = context.rows(start, start + TOKENS_PER_CHUNK)
        tokens = sample.input_ids[rows.ends].long()
        if sample.top is None:
            logits = head.logits(sample.hidden_states[rows.ends - 1])
        else:
            logits = _top_logits(sample.top.at(rows.ends - 1), tokens, head.lm_head.shape[0])
        yield penalize(logits, sampling, rows), tokens


def _top_logits(top: TopTokens, tokens: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Return logits `(t, V)`; a generated token that is not stored counts like the last stored one.

    It may have been just before that one in the engine's rounding.
    """
    logits, last = top.logits(vocab_size), top.log_probs[:, -2].float()
    own = logits.gather(1, tokens[:, None])[:, 0]
    return logits.scatter_(1, tokens[:, None], torch.where(own.isinf(), last, own)[:, None])
