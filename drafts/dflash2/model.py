"""The DFlash2 draft: DFlash with convolutions along the block, and a selector among each slot's candidates.

The candidates of a slot are the k most likely tokens of its logits U. With h the slot's state, the score of candidate b
after token a is
    U(b) + <A[a] * (P h), B[b]>                            (A, B: the predecessor and the successor codebook)
Drafting walks from the anchor to the best candidate of each slot. In training a is the data's token, so one pass
computes all slots. The loss is the objective's on the logits U, plus `selector_weight` times the cross-entropy of the
scores with the data's token, which replaces the last candidate where it is none. The selector's slots are weighted as
the objective's: by D-PACE of the selector's own losses, else by the static decay.

Source: DFlash2 as vLLM serves it (vllm/model_executor/models/qwen3_dflash2.py) and speculators 0.9 trains it. Parameter
names are those of the exported checkpoint. Shapes: A anchors, K draft tokens, N supervised slots, k candidates, H the
hidden size, r the rank.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from contracts.store import StoredSample
from drafts.batch import Batch
from drafts.block import BlockDraft, Blocks
from drafts.candidates import Walked, by_token, chosen_logits, label_probs, top_candidates, walk
from drafts.chunks import chunks
from drafts.dflash2.config import DFlash2Config, DFlash2Section
from drafts.draft import Drafted
from drafts.loss_terms import Objective
from drafts.moving import to_device
from drafts.objective import LossOptions, StepLoss, fused_loss
from drafts.teacher import make_teacher
from target.head import TargetHead, logits_of


class CandidateSelector(nn.Module):
    """The part of a candidate's score that depends on the token before it."""

    def __init__(self, config: DFlash2Config) -> None:
        super().__init__()
        self.predecessor_codebook = nn.Parameter(torch.empty(config.vocab_size, config.selector_rank))
        self.successor_codebook = nn.Parameter(torch.empty(config.vocab_size, config.selector_rank))
        self.hidden_projection = nn.Linear(config.hidden_size, config.selector_rank, bias=False)

    def forward(self, hidden: torch.Tensor, before: torch.Tensor, candidates: torch.Tensor) -> torch.Tensor:
        """Return the scores in fp32. Shapes: hidden (N, H), before (N,), candidates (N, k) -> (N, k)."""
        context = functional.embedding(before, self.predecessor_codebook) * self.hidden_projection(hidden)
        return chosen_logits(context, self.successor_codebook, candidates)

    def edges(self, hidden: torch.Tensor, anchors: torch.Tensor, candidates: torch.Tensor) -> torch.Tensor:
        """Return the scores after each candidate of the slot before, in the first slot after the anchor.

        Shapes: hidden (A, K, H), anchors (A,), candidates (A, K, k) -> (A, K, k, k).
        """
        first = anchors[:, None, None].expand(-1, 1, candidates.shape[2])
        before = torch.cat([first, candidates[:, :-1]], dim=1)
        context = functional.embedding(before, self.predecessor_codebook) * self.hidden_projection(hidden)[:, :, None]
        successors = functional.embedding(candidates, self.successor_codebook)
        return (context @ successors.to(context.dtype).transpose(-1, -2)).float()


class DFlash2(BlockDraft):
    """The draft without embedding and lm_head, which are the target's."""

    config: DFlash2Config
    section: DFlash2Section | None

    def __init__(
        self, config: DFlash2Config, section: DFlash2Section | None = None, *, gradient_checkpointing: bool = False
    ) -> None:
        super().__init__(config, section, gradient_checkpointing=gradient_checkpointing)
        self.candidate_selector = CandidateSelector(config)

    def outer_modules(self) -> list[nn.Module]:
        return [self.candidate_selector]

    def forward(self, batch: Batch, blocks: Blocks, head: TargetHead) -> StepLoss:
        """Return the training loss of a batch with planned blocks."""
        assert self.section is not None
        hidden = self.hidden(batch.token_ids, batch.aux_hidden_states, blocks, head.embedding)
        hidden = hidden.flatten(0, 1).index_select(0, blocks.slots)
        labels = blocks.labels.view(-1)[blocks.slots]
        weights, bounds = self.block_weights(blocks)
        teacher = None if blocks.teacher is None else make_teacher(head, batch.final, blocks.teacher)
        options = LossOptions(Objective.of(self.section), teacher, bounds, num_candidates=self.config.selector_top_k)
        found = fused_loss(hidden, head.lm_head, labels, weights, options)
        is_label = found.candidates == labels[:, None]
        has_label = is_label.any(1)
        place = torch.where(has_label, is_label.long().argmax(1), self.config.selector_top_k - 1)
        candidates = found.candidates.scatter(1, place[:, None], labels[:, None])
        before = self.before(batch.token_ids, blocks).view(-1)[blocks.slots]
        scores = chosen_logits(hidden, head.lm_head, candidates)
        scores = scores + self.candidate_selector(hidden, before, candidates)
        losses = functional.cross_entropy(scores, place, reduction="none")
        if self.section.slot_weights == "dpace":
            assert callable(weights)
            by_slot = weights(slice(0, len(losses)), losses.detach())
        else:
            by_slot = self.static_weights(blocks.slots)
        loss_sum = found.total + self.section.selector_weight * (losses * by_slot).sum()
        hits = has_label & (scores.argmax(1) == place)
        return StepLoss.of_blocks(loss_sum, hits, blocks.slots, blocks.valid)

    def draft_planned(
        self, token_ids: torch.Tensor, aux_hidden_states: torch.Tensor, plan: Blocks, head: TargetHead
    ) -> Drafted:
        hidden = self.hidden(token_ids, aux_hidden_states, plan, head.embedding)
        anchors = token_ids[plan.anchor_rows]
        # The codebooks' rows of all candidates and all predecessors are held for one chunk only.
        size = self.config.num_draft_tokens * self.config.selector_top_k * self.config.selector_rank
        parts = chunks(len(anchors), size, device=anchors.device)
        return Drafted(torch.cat([self._walk(hidden[rows], anchors[rows], head)[1].tokens for rows in parts]))

    def score_planned(
        self,
        token_ids: torch.Tensor,
        aux_hidden_states: torch.Tensor,
        plan: Blocks,
        head: TargetHead,
        temperature: float,
    ) -> torch.Tensor:
        hidden = self.hidden(token_ids, aux_hidden_states, plan, head.embedding)
        candidates, logits = top_candidates(hidden, head.lm_head, self.config.selector_top_k)
        rows = (hidden, self.before(token_ids, plan), candidates)
        scores = logits + self.candidate_selector(*(part.flatten(0, 1) for part in rows)).view(logits.shape)
        return label_probs(candidates, scores, plan.labels, temperature)

    def _walk(self, hidden: torch.Tensor, anchors: torch.Tensor, head: TargetHead) -> tuple[torch.Tensor, Walked]:
        """Return the candidates (A, K, k), and the way through them. Shapes: hidden (A, K, H), anchors (A,)."""
        candidates, logits = top_candidates(hidden, head.lm_head, self.config.selector_top_k)
        scores = logits[:, :, None] + self.candidate_selector.edges(hidden, anchors, candidates)
        return candidates, walk(candidates, scores)

    @torch.inference_mode()
    def taps(self, sample: StoredSample, head: TargetHead, start: int) -> dict[str, torch.Tensor]:
        ids, device = sample.input_ids.long(), head.lm_head.device
        blocks = to_device(self.plan_drafting(ids, sample.loss_mask, torch.tensor([start])), device)
        hidden = self.hidden(ids.to(device), sample.aux_hidden_states.to(device), blocks, head.embedding)
        candidates, walked = self._walk(hidden, ids[start : start + 1].to(device), head)
        return {
            **self.mask_taps(head),
            "draft_logits": logits_of(hidden[0].to(head.lm_head.dtype), head.lm_head).cpu(),
            "candidate_scores": by_token(candidates[0], walked.scores[0], self.config.vocab_size).cpu(),
        }
