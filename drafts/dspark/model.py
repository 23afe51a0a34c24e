"""The DSpark draft: one pass over a block, then a sequential head that makes each slot depend on the token before it.

With h_k the state of the slot of draft token k (from 0) and x_k the token before it (x_0 is the anchor):
    e_k = W1[x_k]; logits_k = lm_head h_k + W2 e_k                                            (vanilla Markov head)
    confidence_k = sigmoid(w . [h_k ; e_k] + b), the probability that draft token k is accepted if those before it are
In training x_k are the generated tokens, so one pass computes all slots; in drafting x_k is the token drafted before.

Source: DSpark (arXiv 2607.05147) as vLLM serves it (vllm/model_executor/models/qwen3_dspark.py). Parameter names are
those of the exported checkpoint. Shapes: A anchors, K draft tokens, N supervised slots, H hidden size, r Markov rank.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional

from contracts.store import StoredSample
from drafts.batch import Batch
from drafts.block import BlockDraft, Blocks
from drafts.chunks import chunks
from drafts.draft import Drafted
from drafts.dspark.config import DSparkConfig, DSparkSection
from drafts.loss_terms import Objective
from drafts.moving import to_device
from drafts.objective import Bias, LossOptions, StepLoss, fused_loss, label_log_probs
from drafts.teacher import make_teacher
from target.head import TargetHead, logits_of


class MarkovHead(nn.Module):
    """A low-rank bias of the logits that depends on the token before the slot."""

    def __init__(self, vocab_size: int, rank: int) -> None:
        super().__init__()
        self.markov_w1 = nn.Embedding(vocab_size, rank)
        self.markov_w2 = nn.Linear(rank, vocab_size, bias=False)


class ConfidenceHead(nn.Module):
    """The logit of the probability that a slot's draft token is accepted."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, 1)

    def forward(self, hidden: torch.Tensor, embedded: torch.Tensor) -> torch.Tensor:
        """Return logits in fp32. Shapes: hidden (..., H), embedded (..., r) -> (...)."""
        logits: torch.Tensor = self.proj(torch.cat([hidden, embedded.to(hidden.dtype)], dim=-1))
        return logits[..., 0].float()


class DSpark(BlockDraft):
    """The draft without embedding and lm_head, which are the target's."""

    config: DSparkConfig
    section: DSparkSection | None

    def __init__(
        self, config: DSparkConfig, section: DSparkSection | None = None, *, gradient_checkpointing: bool = False
    ) -> None:
        super().__init__(config, section, gradient_checkpointing=gradient_checkpointing)
        self.markov_head = MarkovHead(config.vocab_size, config.markov_rank)
        self.confidence_head = None
        if config.confidence_head:
            self.confidence_head = ConfidenceHead(config.hidden_size + config.markov_rank)

    def initialize(self, seed: int, head: TargetHead, count_tokens: Callable[[], torch.Tensor]) -> str:
        message = super().initialize(seed, head, count_tokens)
        if self.confidence_head is not None:
            nn.init.zeros_(self.confidence_head.proj.bias)
        return message

    def outer_modules(self) -> list[nn.Module]:
        return [self.markov_head, *([] if self.confidence_head is None else [self.confidence_head])]

    def weight_sum(self, slots: torch.Tensor) -> float | None:
        assert self.section is not None
        return float(self.static_weights(slots).sum()) if self.section.slot_weights == "decay" else None

    def forward(self, batch: Batch, blocks: Blocks, head: TargetHead) -> StepLoss:
        """Return the training loss of a batch with planned blocks."""
        assert self.section is not None
        hidden = self.hidden(batch.token_ids, batch.aux_hidden_states, blocks, head.embedding)
        hidden = hidden.flatten(0, 1).index_select(0, blocks.slots)
        embedded = self._embed_before(batch.token_ids, blocks).flatten(0, 1).index_select(0, blocks.slots)
        weights, bounds = self.block_weights(blocks)
        teacher = None if blocks.teacher is None else make_teacher(head, batch.final, blocks.teacher)
        found = fused_loss(
            hidden,
            head.lm_head,
            blocks.labels.view(-1)[blocks.slots],
            weights,
            LossOptions(Objective.of(self.section), teacher, bounds, self.confidence_head is not None),
            Bias(embedded, self.markov_head.markov_w2.weight),
        )
        loss_sum = found.total
        if self.confidence_head is not None:
            logits = self.confidence_head(hidden, embedded)
            losses = functional.binary_cross_entropy_with_logits(logits, found.accepted, reduction="none")
            loss_sum = loss_sum + self.section.confidence_weight * (losses * self.static_weights(blocks.slots)).sum()
        return StepLoss.of_blocks(loss_sum, found.hits, blocks.slots, blocks.valid)

    def draft_planned(
        self, token_ids: torch.Tensor, aux_hidden_states: torch.Tensor, plan: Blocks, head: TargetHead
    ) -> Drafted:
        hidden = self.hidden(token_ids, aux_hidden_states, plan, head.embedding)
        anchors = token_ids[plan.anchor_rows]
        parts = chunks(len(anchors), head.lm_head.shape[0], device=anchors.device, parts=4)
        found = [self._walk(hidden[rows], anchors[rows], head) for rows in parts]
        tokens, confidence = (torch.cat(part) for part in zip(*found, strict=True))
        return Drafted(tokens, confidence if self.confidence_head is not None else None)

    def score_planned(
        self,
        token_ids: torch.Tensor,
        aux_hidden_states: torch.Tensor,
        plan: Blocks,
        head: TargetHead,
        temperature: float,
    ) -> torch.Tensor:
        hidden = self.hidden(token_ids, aux_hidden_states, plan, head.embedding)
        bias = Bias(self._embed_before(token_ids, plan).flatten(0, 1), self.markov_head.markov_w2.weight)
        return label_log_probs(hidden, head.lm_head, plan.labels, temperature, bias).exp()

    def _embed_before(self, token_ids: torch.Tensor, blocks: Blocks) -> torch.Tensor:
        """Return the Markov embedding of the generated token before each slot, (A, K, r)."""
        embedded: torch.Tensor = self.markov_head.markov_w1(self.before(token_ids, blocks))
        return embedded

    def _walk(self, hidden: torch.Tensor, anchors: torch.Tensor, head: TargetHead) -> tuple[torch.Tensor, torch.Tensor]:
        """Draft greedily, slot by slot; return tokens and confidences, which are 0 without the head.

        Shapes: hidden (A, K, H), anchors (A,) -> (A, K), (A, K).
        """
        tokens, confidences, before = list[torch.Tensor](), list[torch.Tensor](), anchors
        for slot in range(hidden.shape[1]):
            logits, _, confidence = self._slot(hidden[:, slot], before, head)
            before = logits.argmax(-1)
            tokens.append(before)
            confidences.append(confidence)
        return torch.stack(tokens, 1), torch.stack(confidences, 1)

    def _slot(
        self, hidden: torch.Tensor, before: torch.Tensor, head: TargetHead
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return logits (A, V), their Markov bias (A, V) and confidences (A,) of one slot of each block."""
        weight = self.markov_head.markov_w2.weight
        embedded = self.markov_head.markov_w1(before)
        bias = logits_of(embedded.to(weight.dtype), weight)
        confidence = bias.new_zeros(len(before))
        if self.confidence_head is not None:
            confidence = self.confidence_head(hidden, embedded).sigmoid()
        return logits_of(hidden.to(head.lm_head.dtype), head.lm_head) + bias, bias, confidence

    @torch.inference_mode()
    def taps(self, sample: StoredSample, head: TargetHead, start: int) -> dict[str, torch.Tensor]:
        ids, device = sample.input_ids.long(), head.lm_head.device
        blocks = to_device(self.plan_drafting(ids, sample.loss_mask, torch.tensor([start])), device)
        hidden = self.hidden(ids.to(device), sample.aux_hidden_states.to(device), blocks, head.embedding)
        slots, before = [], ids[start : start + 1].to(device)
        for slot in range(hidden.shape[1]):
            slots.append(self._slot(hidden[:, slot], before, head))
            before = slots[-1][0].argmax(-1)
        logits, biases, confidences = (torch.cat(part).cpu() for part in zip(*slots, strict=True))
        confidence = {} if self.confidence_head is None else {"confidence": confidences}
        return {**self.mask_taps(head), "markov_bias": biases, **confidence, "draft_logits": logits}
