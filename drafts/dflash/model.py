"""The DFlash draft: a block draft of the fill-in layout, in which slot k predicts the token at p+k.

Source: DFlash as z-lab publishes it and vLLM serves it (vllm/model_executor/models/qwen3_dflash.py).
"""

from __future__ import annotations

import torch

from contracts.store import StoredSample
from drafts.batch import Batch
from drafts.block import BlockDraft, Blocks
from drafts.draft import Drafted
from drafts.loss_terms import Objective
from drafts.moving import to_device
from drafts.objective import LossOptions, StepLoss, fused_loss, greedy_tokens, label_log_probs
from drafts.teacher import make_teacher
from target.head import TargetHead, logits_of


class DFlash(BlockDraft):
    """The draft without embedding and lm_head, which are the target's."""

    def forward(self, batch: Batch, blocks: Blocks, head: TargetHead) -> StepLoss:
        """Return the training loss of a batch with planned blocks."""
        assert self.section is not None
        hidden = self.hidden(batch.token_ids, batch.aux_hidden_states, blocks, head.embedding)
        weights, bounds = self.block_weights(blocks)
        teacher = None if blocks.teacher is None else make_teacher(head, batch.final, blocks.teacher)
        found = fused_loss(
            hidden.flatten(0, 1).index_select(0, blocks.slots),
            head.lm_head,
            blocks.labels.view(-1)[blocks.slots],
            weights,
            LossOptions(Objective.of(self.section), teacher, bounds),
        )
        return StepLoss.of_blocks(found.total, found.hits, blocks.slots, blocks.valid)

    def draft_planned(
        self, token_ids: torch.Tensor, aux_hidden_states: torch.Tensor, plan: Blocks, head: TargetHead
    ) -> Drafted:
        return Drafted(greedy_tokens(self.hidden(token_ids, aux_hidden_states, plan, head.embedding), head.lm_head))

    def score_planned(
        self,
        token_ids: torch.Tensor,
        aux_hidden_states: torch.Tensor,
        plan: Blocks,
        head: TargetHead,
        temperature: float,
    ) -> torch.Tensor:
        hidden = self.hidden(token_ids, aux_hidden_states, plan, head.embedding)
        return label_log_probs(hidden, head.lm_head, plan.labels, temperature).exp()

    @torch.inference_mode()
    def taps(self, sample: StoredSample, head: TargetHead, start: int) -> dict[str, torch.Tensor]:
        ids, device = sample.input_ids.long(), head.lm_head.device
        blocks = to_device(self.plan_drafting(ids, sample.loss_mask, torch.tensor([start])), device)
        hidden = self.hidden(ids.to(device), sample.aux_hidden_states.to(device), blocks, head.embedding)
        logits = logits_of(hidden[0].to(head.lm_head.dtype), head.lm_head).cpu()
        return {**self.mask_taps(head), "draft_logits": logits}
