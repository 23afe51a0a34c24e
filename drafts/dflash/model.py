"""The DFlash draft: block diffusion over the target's captured features, in plain torch.

A block starts at an anchor, a known token, and fills the slots after it with the mask token. All slots are predicted at
once. The context before the anchor is the target's captured hidden states: their concatenation is projected once (`fc`,
`hidden_norm`) and injected into every draft layer as keys and values.

Source: DFlash as z-lab publishes it and vLLM serves it (vllm/model_executor/models/qwen3_dflash.py). Parameter names
are those of the exported checkpoint. Layout of one block, block_size B, anchor at position p:
    queries [token p, mask x (B-1)] at positions p..p+B-1; slot k predicts the token at p+k;
    keys: context strictly before p, and the whole own block in both directions.

Shapes: T tokens of the packed documents, A anchors, B block size, H hidden size, n captured layers, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from common.errors import UserError
from contracts.store import StoredSample
from drafts.attention import KeyValues, Layout, attend, lay_out
from drafts.batch import Batch
from drafts.dflash.config import DFlashConfig, DFlashSection
from drafts.draft import Draft
from drafts.layers import GatedMLP, RMSNorm
from drafts.objective import StepLoss, Weights, dpace_weights, fused_cross_entropy, make_teacher, slot_weights
from drafts.places import anchor_places
from drafts.rope import Rope, Tables, rotate
from target.head import TargetHead


@dataclass(frozen=True)
class Blocks:
    """The blocks of a batch, laid out once per step and used by every layer.

    Shapes: anchor_rows (A,), rows of the anchors in the packed tokens; labels (A, B-1), the tokens that the slots after
    the anchor must predict; valid (A, B-1), whether the target generated them, in the same run of generated tokens.
    """

    anchor_rows: torch.Tensor
    labels: torch.Tensor
    valid: torch.Tensor
    query_rope: Tables
    context_rope: Tables
    layout: Layout

    @property
    def num_slots(self) -> int:
        """Supervised slots."""
        return int(self.valid.sum())


class Attention(nn.Module):
    """Block queries over context keys and the block's own."""

    def __init__(self, config: DFlashConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        hidden, size = config.hidden_size, config.head_dim
        self.q_proj = nn.Linear(hidden, self.heads * size, bias=False)
        self.k_proj = nn.Linear(hidden, self.kv_heads * size, bias=False)
        self.v_proj = nn.Linear(hidden, self.kv_heads * size, bias=False)
        self.o_proj = nn.Linear(self.heads * size, hidden, bias=False)
        self.q_norm = RMSNorm(size, eps=config.rms_norm_eps)
        self.k_norm = RMSNorm(size, eps=config.rms_norm_eps)

    def forward(self, x: torch.Tensor, context: torch.Tensor, blocks: Blocks, skip: int) -> torch.Tensor:
        """Return the outputs from slot `skip` on; x (A, B, H), context (T, H) -> (A, B - skip, H)."""
        query_rope = tuple(table[:, skip:] for table in blocks.query_rope)
        query = rotate(self.q_norm(self._split(self.q_proj(x[:, skip:]), self.heads)), query_rope)  # type: ignore[arg-type]
        block_key = rotate(self.k_norm(self._split(self.k_proj(x), self.kv_heads)), blocks.query_rope)
        context_key = rotate(self.k_norm(self._split(self.k_proj(context), self.kv_heads)), blocks.context_rope)
        block_value, context_value = (self._split(self.v_proj(y), self.kv_heads) for y in (x, context))
        pairs = KeyValues(context_key, context_value, block_key, block_value)
        output = attend(query, pairs, blocks.layout)
        projected: torch.Tensor = self.o_proj(output.flatten(2))
        return projected

    @staticmethod
    def _split(x: torch.Tensor, heads: int) -> torch.Tensor:
        return x.unflatten(-1, (heads, -1))


class Layer(nn.Module):
    """One pre-norm draft layer: attention and a gated MLP."""

    def __init__(self, config: DFlashConfig) -> None:
        super().__init__()
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self.self_attn = Attention(config)
        self.mlp = GatedMLP(hidden, config.intermediate_size)
        self.input_layernorm = RMSNorm(hidden, eps=eps)
        self.post_attention_layernorm = RMSNorm(hidden, eps=eps)

    def forward(self, x: torch.Tensor, context: torch.Tensor, blocks: Blocks, skip: int) -> torch.Tensor:
        x = x[:, skip:] + self.self_attn(self.input_layernorm(x), context, blocks, skip)
        return x + self.mlp(self.post_attention_layernorm(x))


class DFlash(Draft):
    """The draft without embedding and lm_head, which are the target's. `section` says how it is trained."""

    config: DFlashConfig

    def __init__(
        self, config: DFlashConfig, section: DFlashSection | None = None, *, gradient_checkpointing: bool = False
    ) -> None:
        super().__init__()
        assert config.mask_token_id is not None
        self.config, self.section, self.gradient_checkpointing = config, section, gradient_checkpointing
        hidden = config.hidden_size
        self.fc = nn.Linear(len(config.layer_ids) * hidden, hidden, bias=False)
        self.hidden_norm = RMSNorm(hidden, eps=config.rms_norm_eps)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(hidden, eps=config.rms_norm_eps)
        self.rope = Rope(config)

    def layers_to_compile(self) -> list[nn.Module]:
        return list(self.layers)

    def layers_to_shard(self) -> list[nn.Module]:
        return list(self.layers)

    def plan(self, batch: Batch) -> Blocks:
        """Draw a training batch's anchors from the positions of each document that serving can draft from.

        Raises UserError, with the sample's id, for a document that has none.
        """
        assert self.section is not None
        anchors = []
        masks = batch.loss_mask.cpu().split(batch.lengths)
        for sample_id, seed, mask in zip(batch.sample_ids, batch.seeds, masks, strict=True):
            places = anchor_places(mask)
            if not len(places):
                raise UserError(
                    f"sample {sample_id}",
                    found="no place for an anchor",
                    expected="two generated tokens in a row",
                    fix="Dump again: `dump run` leaves such samples out.",
                )
            generator = torch.Generator().manual_seed(seed)
            chosen = torch.randperm(len(places), generator=generator)[: self.section.num_anchors]
            anchors.append(places[chosen].sort().values)
        return self.lay_out(batch.token_ids, batch.loss_mask, batch.lengths, anchors)

    def lay_out(
        self, token_ids: torch.Tensor, loss_mask: torch.Tensor, lengths: Sequence[int], anchors: Sequence[torch.Tensor]
    ) -> Blocks:
        """Return the blocks at `anchors[i]`, ascending positions in document i of the pack.

        A block's labels end with its run of generated tokens: the next tokens are another turn's prompt. Documents need
        no explicit boundary, as each begins with its prompt.
        """
        width, device = self.config.block_size, token_ids.device
        positions = torch.cat(list(anchors)).to(device)
        layout = lay_out(lengths, anchors, width, device)
        rows = layout.anchor_rows
        places = rows[:, None] + torch.arange(1, width, device=device)
        inside = places < len(token_ids)
        places = places.clamp(max=len(token_ids) - 1)
        context = torch.cat([torch.arange(length) for length in lengths]).to(device)
        return Blocks(
            anchor_rows=rows,
            labels=token_ids[places],
            valid=(loss_mask[places] & inside).long().cumprod(dim=1).bool(),
            query_rope=self.rope.at(positions[:, None] + torch.arange(width, device=device)),
            context_rope=self.rope.at(context),
            layout=layout,
        )

    def hidden(
        self, token_ids: torch.Tensor, aux_hidden_states: torch.Tensor, blocks: Blocks, embedding: torch.Tensor
    ) -> torch.Tensor:
        """Return the states of all slots but the anchor's, after the final norm.

        lm_head turns them into the draft's logits. Shapes: token_ids (T,), aux_hidden_states (T, n*H), embedding (V, H)
        -> (A, B-1, H).
        """
        context = self.hidden_norm(self.fc(aux_hidden_states))
        shape = (len(blocks.anchor_rows), self.config.block_size)
        slots = torch.full(shape, self.config.mask_token_id or 0, device=token_ids.device)
        slots[:, 0] = token_ids[blocks.anchor_rows]
        x = functional.embedding(slots, embedding)
        save_memory = self.training and self.gradient_checkpointing
        for number, layer in enumerate(self.layers):
            skip = int(number == len(self.layers) - 1)  # the last layer's anchor output is not used
            x = (
                checkpoint(layer, x, context, blocks, skip, use_reentrant=False)
                if save_memory
                else layer(x, context, blocks, skip)
            )
        hidden: torch.Tensor = self.norm(x)
        return hidden

    def forward(self, batch: Batch, blocks: Blocks, head: TargetHead) -> StepLoss:
        """Return the training loss of a batch with planned blocks."""
        assert self.section is not None
        hidden = self.hidden(batch.token_ids, batch.aux_hidden_states, blocks, head.embedding)
        valid, ends = blocks.valid, blocks.valid.sum(1).cumsum(0)
        weights, bounds = self._weights(valid)
        places = (blocks.anchor_rows[:, None] + torch.arange(valid.shape[1], device=valid.device))[valid]
        teacher = make_teacher(head, batch.hidden_states, places) if self.section.objective == "distill" else None
        loss_sum, hits, _ = fused_cross_entropy(
            hidden[valid], head.lm_head, blocks.labels[valid], weights, teacher, ends.tolist() if bounds else None
        )
        return StepLoss.of_blocks(loss_sum, hits, valid)

    def _weights(self, valid: torch.Tensor) -> tuple[Weights, bool]:
        """Return the slots' weights, and whether each chunk of the loss must hold whole blocks."""
        section = self.section
        assert section is not None
        if section.slot_weights == "decay":
            by_slot = slot_weights(self.config.block_size, section.loss_decay).to(valid.device)
            return by_slot.expand(valid.shape)[valid], False
        first = torch.cat([valid.new_zeros(1, dtype=torch.long), valid.sum(1).cumsum(0)])

        def of_rows(rows: slice, losses: torch.Tensor) -> torch.Tensor:
            low, high = torch.searchsorted(first, torch.tensor([rows.start, rows.stop], device=first.device)).tolist()
            part = valid[low:high]
            dense = torch.zeros(part.shape, device=losses.device).masked_scatter(part, losses)
            return dpace_weights(dense, part, section.dpace_smoothing)[part]

        return of_rows, True

    @torch.inference_mode()
    def draft(self, sample: StoredSample, head: TargetHead) -> torch.Tensor:
        """Return the greedy tokens after every position that serving can draft from: `(T, B-1)`, -1 elsewhere."""
        anchors = anchor_places(sample.loss_mask)
        drafted = torch.full((sample.num_tokens, self.config.block_size - 1), -1)
        if len(anchors):
            device = head.lm_head.device
            token_ids, aux = sample.input_ids.long().to(device), sample.aux_hidden_states.float().to(device)
            blocks = self.lay_out(token_ids, sample.loss_mask.to(device), [sample.num_tokens], [anchors])
            hidden = self.hidden(token_ids, aux, blocks, head.embedding)
            drafted[anchors] = functional.linear(hidden, head.lm_head).argmax(-1).cpu()
        return drafted

    @torch.inference_mode()
    def taps(self, sample: StoredSample, head: TargetHead, start: int) -> dict[str, torch.Tensor]:
        mask = self.config.mask_token_id or 0
        ids, aux = sample.input_ids.long(), sample.aux_hidden_states.float()
        blocks = self.lay_out(ids, sample.loss_mask, [len(ids)], [torch.tensor([start])])
        return {
            "mask_token": torch.tensor(mask),
            "mask_embedding": head.embedding[mask],
            "draft_logits": functional.linear(self.hidden(ids, aux, blocks, head.embedding)[0], head.lm_head),
        }
