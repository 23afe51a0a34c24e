"""Walk recorded replies as speculative decoding does: which draft tokens each step would have accepted."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from common.errors import UserError
from contracts.store import StoredSample
from drafts.places import spans_of
from target.head import TargetHead
from target.sampling import Context, follows_from_top, probabilities_of

ROWS_PER_CHUNK = 1024


@dataclass
class Walk:
    """Accepted draft tokens of each step, by reply, and the place of each step's anchor; and each draft token that was
    tried, with the row of the state that verifies it and its slot in the block, from 0."""

    replies: list[list[int]] = field(default_factory=list)
    places: list[int] = field(default_factory=list)
    tried_rows: list[int] = field(default_factory=list)
    tried_tokens: list[int] = field(default_factory=list)
    tried_slots: list[int] = field(default_factory=list)

    @property
    def steps(self) -> list[int]:
        return [accepted for reply in self.replies for accepted in reply]


def walk(sample: StoredSample, drafted: torch.Tensor) -> list[list[int]]:
    """Return the accepted draft tokens of each step, by reply. `drafted` is `(T, K)`, from `Draft.draft`."""
    return walk_sample(sample, drafted).replies


def walk_sample(sample: StoredSample, drafted: torch.Tensor) -> Walk:
    """Walk all replies of a sample. `drafted` is `(T, K)`: the draft tokens after each position."""
    tokens = sample.input_ids.tolist()
    found = Walk()
    for start, end in spans_of(sample.loss_mask):
        accepted = []
        place = start
        while place < end - 1:
            block = drafted[place].tolist()
            count = 0
            while count < len(block) and place + 1 + count < end:
                found.tried_rows.append(place + count)
                found.tried_tokens.append(block[count])
                found.tried_slots.append(count)
                if block[count] != tokens[place + 1 + count]:
                    break
                count += 1
            accepted.append(count)
            found.places.append(place)
            place += count + 1
        found.replies.append(accepted)
    return found


def proposals_of(found: Walk, drafted: torch.Tensor) -> np.ndarray:
    """Return the steps of a walk with their draft tokens, (S, 2 + K) int32: see contracts/proposals.py."""
    columns = torch.tensor([found.places, found.steps], dtype=torch.int32).reshape(2, -1).T
    return torch.cat([columns, drafted[found.places].to(torch.int32)], dim=1).numpy()


def temperature_of(sample: StoredSample) -> float:
    """Return the temperature of a sample's replies, 0 for greedy or rendered ones."""
    return float(sample.metadata.get("temperature", "") or 0.0)


def refuse_inexact(sample: StoredSample, sample_id: str) -> None:
    """Raise UserError for a sampled reply if its distribution does not follow from the stored tokens alone."""
    temperature = temperature_of(sample)
    if sample.top is None or temperature == 0.0 or follows_from_top(_sampling_of(sample), sample.top.k):
        return
    raise UserError(
        f"sample {sample_id}",
        found=f"a reply sampled at temperature {temperature:g}, and {sample.top.k} log-probabilities of each position",
        expected="sampling with a top_k of at most that many and without penalties: else its distribution is not known",
        fix="Give a store of greedy replies, or one that was dumped with dump.final_states=keep.",
    )


def _sampling_of(sample: StoredSample) -> dict[str, Any]:
    return {**json.loads(sample.metadata.get("sampling") or "{}"), "temperature": temperature_of(sample)}


def expected_acceptances(found: Walk, sample: StoredSample, head: TargetHead) -> float:
    """Return the target's summed probability of all tried tokens; for a greedy sample, the accepted ones."""
    if not found.tried_rows:
        return 0.0
    if temperature_of(sample) == 0.0:
        return float(sum(found.steps))
    rows, tokens = torch.tensor(found.tried_rows), torch.tensor(found.tried_tokens)
    return float(sum(float(part.sum()) for part in _target_probabilities(sample, head, rows, tokens)))


def ratios_of(sample: StoredSample, head: TargetHead, scores: torch.Tensor) -> np.ndarray:
    """Return q / p of a sampled reply's tokens, (T, K), as `train.sampled_drafts.expect_steps` takes them.

    `scores`: q, (T, K), from `Draft.score`. p: the target's probability under the sampling parameters of the reply.
    """
    rows = sample.loss_mask.nonzero()[:, 0] - 1
    rows = rows[rows >= 0]
    p = torch.ones(sample.num_tokens + scores.shape[1])
    p[rows + 1] = torch.cat(_target_probabilities(sample, head, rows, sample.input_ids[rows + 1].long()))
    after = torch.arange(sample.num_tokens)[:, None] + torch.arange(1, scores.shape[1] + 1)
    ratios: np.ndarray = (scores / p[after].clamp(min=torch.finfo(p.dtype).tiny)).numpy()
    return ratios


@torch.inference_mode()
def _target_probabilities(
    sample: StoredSample, head: TargetHead, rows: torch.Tensor, tokens: torch.Tensor
) -> list[torch.Tensor]:
    """Return the probability with which the target samples each of `tokens` after `rows`, both (n,), in chunks."""
    sampling = _sampling_of(sample)
    starts = torch.tensor([start for start, _ in spans_of(sample.loss_mask)])
    found = []
    for part, wanted in zip(rows.split(ROWS_PER_CHUNK), tokens.split(ROWS_PER_CHUNK), strict=True):
        # Row start - 1 is the prompt's last: its state gives the reply's first token.
        prompt_lengths = starts[torch.searchsorted(starts, part + 1, right=True) - 1]
        context = Context(sample.input_ids, part + 1, prompt_lengths)
        if sample.top is None:
            logits = head.logits(sample.hidden_states[part].to(head.lm_head.device))
        else:
            logits = sample.top.at(part).logits(head.lm_head.shape[0])
        probabilities = probabilities_of(sampling, logits, context.to(logits.device)).cpu()
        found.append(probabilities.gather(1, wanted[:, None])[:, 0])
    return found
