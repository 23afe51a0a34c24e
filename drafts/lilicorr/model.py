"""The LiLiCorr draft: DFlash, optionally with convolutions along the block, and a head that scores its candidates.

Drafting takes each slot's k most likely tokens, scores every pair of neighbors (drafts/lilicorr/head.py), and walks
from the first slot to the best candidate of each.

The loss is that of the paper (arXiv 2608.20530) as ModelOpt trains it: the objective's on the slots' logits, plus the
mean over some slots of the following. With g the data's token of a slot, z the scores of its candidates after the
data's token before, and t the target's logits:
    candidate_weight * -log softmax(z)_g + penalty_weight * sum over candidates c of softmax(z)_c * max(0, t_g - t_c)
    + margin_weight * max(0, margin - (z_g - the largest other z))
These slots are those of blocks with K labels in which g, and the data's tokens of all slots before, are candidates. The
mean is over one batch's slots; the step weighs it as the batch's share of the objective. Gradients of the scores reach
the backbone through its states and the candidates' log-probabilities.

Shapes: A anchors, K draft tokens, N supervised slots, F blocks with K labels, k candidates, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from contracts.store import StoredSample
from drafts.batch import Batch
from drafts.block import BlockDraft, Blocks
from drafts.candidates import (
    Candidates,
    by_token,
    chosen_logits,
    label_probs,
    log_partition,
    top_candidates,
    walk,
)
from drafts.draft import Drafted
from drafts.lilicorr.config import LiLiCorrConfig, LiLiCorrSection
from drafts.lilicorr.head import Lattice, LiLiCorrHead
from drafts.loss_terms import Objective
from drafts.moving import to_device
from drafts.objective import LossOptions, StepLoss, fused_loss
from drafts.teacher import make_teacher
from target.head import TargetHead, logits_of

BLOCKS_AT_ONCE = 128
"""Blocks whose candidates' embeddings are held together."""


@dataclass(frozen=True, kw_only=True)
class WholeBlocks(Blocks):
    """Blocks, and those with K labels. Shapes: whole (F,); rows (F, K), their slots among the supervised ones."""

    whole: torch.Tensor
    rows: torch.Tensor


class LiLiCorr(BlockDraft):
    """The draft without embedding and lm_head, which are the target's."""

    config: LiLiCorrConfig
    section: LiLiCorrSection | None

    def __init__(
        self, config: LiLiCorrConfig, section: LiLiCorrSection | None = None, *, gradient_checkpointing: bool = False
    ) -> None:
        super().__init__(config, section, gradient_checkpointing=gradient_checkpointing)
        self.lilicorr = LiLiCorrHead(config)

    def initialize(self, seed: int, head: TargetHead, count_tokens: Callable[[], torch.Tensor]) -> str:
        message = super().initialize(seed, head, count_tokens)
        self.lilicorr.zero_biases()
        return message

    def outer_modules(self) -> list[nn.Module]:
        return [self.lilicorr]

    def weight_sum(self, slots: torch.Tensor) -> float | None:
        assert self.section is not None
        return float(self.static_weights(slots).sum()) if self.section.slot_weights == "decay" else None

    def lay_out(
        self, token_ids: torch.Tensor, loss_mask: torch.Tensor, lengths: Sequence[int], anchors: Sequence[torch.Tensor]
    ) -> WholeBlocks:
        blocks = super().lay_out(token_ids, loss_mask, lengths, anchors)
        values = {field.name: getattr(blocks, field.name) for field in fields(blocks)}
        whole = blocks.valid.all(1).nonzero()[:, 0]
        starts = torch.tensor([0, *blocks.ends])[whole]
        return WholeBlocks(**values, whole=whole, rows=starts[:, None] + torch.arange(self.config.num_draft_tokens))

    def forward(self, batch: Batch, blocks: WholeBlocks, head: TargetHead) -> StepLoss:
        """Return the training loss of a batch with planned blocks."""
        assert self.section is not None
        context = self.context(batch.aux_hidden_states)
        hidden = self.hidden_after(batch.token_ids, context, blocks, head.embedding)
        hidden = hidden.flatten(0, 1).index_select(0, blocks.slots)
        labels = blocks.labels.view(-1)[blocks.slots]
        weights, bounds = self.block_weights(blocks)
        teacher = None if blocks.teacher is None else make_teacher(head, batch.final, blocks.teacher)
        options = LossOptions(
            Objective.of(self.section), teacher, bounds, num_candidates=self.config.lilicorr_candidate_topk
        )
        found = fused_loss(hidden, head.lm_head, labels, weights, options)
        tokens, labels = found.candidates[blocks.rows], labels[blocks.rows]
        rows = hidden.index_select(0, blocks.rows.flatten())
        log_probs = chosen_logits(rows, head.lm_head, tokens.flatten(0, 1)) - log_partition(rows, head.lm_head)[:, None]
        candidates = Candidates(tokens, log_probs.view(tokens.shape))
        last_context = self._last_context(context, blocks, blocks.whole)
        scores = self._scores(candidates, rows.view(*labels.shape, rows.shape[1]), last_context, head)
        rejected = self._rejections(batch, blocks, candidates.tokens, labels, head)
        mean, right = self._head_loss(scores, tokens, labels, rejected)
        hits = found.hits.index_copy(0, blocks.rows.flatten(), right.flatten())
        return StepLoss.of_blocks(found.total + blocks.normalizer * mean, hits, blocks.slots, blocks.valid)

    def _head_loss(
        self, scores: torch.Tensor, tokens: torch.Tensor, labels: torch.Tensor, rejected: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the mean loss of the scores, and which slots they choose rightly after the data's token, (F, K).

        Shapes: scores (F, K, k, k), tokens and rejected (F, K, k), labels (F, K).
        """
        section = self.section
        assert section is not None
        is_label = tokens == labels[:, :, None]
        place = is_label.long().argmax(-1)
        known = is_label.any(-1).long().cumprod(1).bool()
        found = _after_labels(scores, place)
        losses = section.candidate_weight * functional.cross_entropy(
            found.flatten(0, 1), place.flatten(), reduction="none"
        ).view(place.shape)
        if rejected is not None:
            losses = losses + section.penalty_weight * (found.softmax(-1) * rejected).sum(-1)
        if section.margin_weight:
            own = found.gather(2, place[:, :, None])[:, :, 0]
            other = found.scatter(2, place[:, :, None], float("-inf")).amax(-1)
            losses = losses + section.margin_weight * (section.margin - (own - other)).relu()
        mean = (losses * known).sum() / known.sum().clamp(min=1)
        return mean, known & (found.argmax(-1) == place)

    def _rejections(
        self,
        batch: Batch,
        blocks: WholeBlocks,
        tokens: torch.Tensor,
        labels: torch.Tensor,
        head: TargetHead,
    ) -> torch.Tensor | None:
        """Return how far the target's logit of each candidate is below that of the data's token, (F, K, k)."""
        assert self.section is not None
        if not self.section.penalty_weight:
            return None
        assert blocks.teacher is not None
        places = blocks.teacher.rows[blocks.teacher.index[blocks.rows.flatten()]]
        states = head.normalize(batch.hidden_states[places]).to(head.lm_head.dtype)
        wanted = torch.cat([tokens, labels[:, :, None]], dim=2)
        logits = head.finish(chosen_logits(states, head.lm_head, wanted.flatten(0, 1))).view(wanted.shape)
        return (logits[:, :, -1:] - logits[:, :, :-1]).relu()

    def _last_context(
        self, context: torch.Tensor, blocks: Blocks, chosen: torch.Tensor | slice
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the features of the token before each anchor (A, H), and whether its document has one (A,)."""
        rows = (blocks.anchor_rows[chosen] - 1).clamp(min=0)
        return context.index_select(0, rows), blocks.positions[chosen] > 0

    def _scores(
        self,
        candidates: Candidates,
        hidden: torch.Tensor,
        last_context: tuple[torch.Tensor, torch.Tensor],
        head: TargetHead,
    ) -> torch.Tensor:
        """Return the candidates' scores (A, K, k, k), some blocks at a time. Shapes: hidden (A, K, H)."""
        save_memory = self.training and self.gradient_checkpointing

        def score(tokens: torch.Tensor, log_probs: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
            embeddings = functional.embedding(tokens, head.embedding)
            scores: torch.Tensor = self.lilicorr(Lattice(embeddings, log_probs, *others))
            return scores

        tensors = (*candidates, hidden, *last_context)
        parts = zip(*(tensor.split(BLOCKS_AT_ONCE) for tensor in tensors), strict=True)
        # Without any block the head runs, too: its parameters need gradients in every process.
        found = [checkpoint(score, *part, use_reentrant=False) if save_memory else score(*part) for part in parts]
        return torch.cat(found)

    def draft_planned(
        self, token_ids: torch.Tensor, aux_hidden_states: torch.Tensor, plan: WholeBlocks, head: TargetHead
    ) -> Drafted:
        _, candidates, scores = self._score_all(token_ids, aux_hidden_states, plan, head)
        return Drafted(walk(candidates.tokens, scores).tokens)

    def score_planned(
        self,
        token_ids: torch.Tensor,
        aux_hidden_states: torch.Tensor,
        plan: WholeBlocks,
        head: TargetHead,
        temperature: float,
    ) -> torch.Tensor:
        _, candidates, scores = self._score_all(token_ids, aux_hidden_states, plan, head)
        # After a token that is no candidate any scores will do: it has probability 0.
        place = (candidates.tokens == plan.labels[:, :, None]).long().argmax(-1)
        return label_probs(candidates.tokens, _after_labels(scores, place), plan.labels, temperature)

    def _score_all(
        self, token_ids: torch.Tensor, aux_hidden_states: torch.Tensor, blocks: Blocks, head: TargetHead
    ) -> tuple[torch.Tensor, Candidates, torch.Tensor]:
        """Return the slots' states (A, K, H), their candidates (A, K, k), and the scores of these (A, K, k, k)."""
        context = self.context(aux_hidden_states)
        hidden = self.hidden_after(token_ids, context, blocks, head.embedding)
        found = top_candidates(hidden, head.lm_head, self.config.lilicorr_candidate_topk, log_probs=True)
        scores = self._scores(found, hidden, self._last_context(context, blocks, slice(None)), head)
        return hidden, found, scores

    @torch.inference_mode()
    def taps(self, sample: StoredSample, head: TargetHead, start: int) -> dict[str, torch.Tensor]:
        ids, device = sample.input_ids.long(), head.lm_head.device
        blocks = to_device(self.plan_drafting(ids, sample.loss_mask, torch.tensor([start])), device)
        hidden, found, scores = self._score_all(ids.to(device), sample.aux_hidden_states.to(device), blocks, head)
        walked = walk(found.tokens, scores)
        return {
            **self.mask_taps(head),
            "draft_logits": logits_of(hidden[0].to(head.lm_head.dtype), head.lm_head).cpu(),
            "candidate_scores": by_token(found.tokens[0], walked.scores[0], self.config.vocab_size).cpu(),
        }


def _after_labels(scores: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
    """Return the scores after the data's token of the slot before, which is candidate `place`; any row of the first.

    Shapes: scores (A, K, k, k), place (A, K) -> (A, K, k).
    """
    before = torch.cat([torch.zeros_like(place[:, :1]), place[:, :-1]], dim=1)
    return scores.gather(2, before[:, :, None, None].expand(-1, -1, 1, scores.shape[3]))[:, :, 0]
