"""The backbone of block drafts: all slots of a block are predicted in one pass over the target's captured features.

A block starts at an anchor, a known token, and fills the slots after it with the mask token. The context before the
anchor is the target's captured hidden states: their concatenation is projected once (`fc`, `hidden_norm`) and injected
into every draft layer as keys and values.

Source: DFlash as z-lab publishes it and vLLM serves it (vllm/model_executor/models/qwen3_dflash.py). Parameter names
are those of the exported checkpoint. Layout of one block of B slots, anchor at position p:
    queries [token p, mask x (B-1)] at positions p..p+B-1;
    keys: context strictly before p, and the whole own block in both directions;
    slot k predicts the token at p+k, slot 0 nothing (fill-in layout); or slot k the token at p+k+1 (anchor layout).

Shapes: T tokens of the packed documents, A anchors, B slots, K draft tokens, H hidden size, n captured layers, D head
size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from common.errors import UserError
from drafts.attention import KeyValues, Layout, attend, lay_out
from drafts.attention_rule import AttentionRule
from drafts.batch import Batch
from drafts.block_config import BlockConfig, BlockSection
from drafts.convolution import BlockConvolution
from drafts.draft import Draft, Plan, as_input
from drafts.layers import GatedMLP, RMSNorm
from drafts.places import anchor_places
from drafts.rope import Rope, Tables, rotate
from drafts.slot_weights import BlockWeights, make_block_weights, slot_decay
from drafts.teacher import TeacherRows
from target.head import TargetHead


@dataclass(frozen=True)
class Blocks(Plan):
    """The blocks of a batch, planned on the CPU once per step.

    Shapes: positions (A,) of the anchors in their documents; context_positions (T,); labels (A, K), the tokens after
    the anchor, which the slots must predict; valid (A, K), whether the target generated them, in the same run of
    generated tokens; slots (N,), flat indices of the valid ones. `ends[a]`: number of valid slots up to block a.
    `teacher`: the states that they learn from, if they do. `weight_sum`: what divides the loss in place of the slots'
    number, if not None. `layouts`: by the rule of the layers' attention.
    """

    positions: torch.Tensor
    context_positions: torch.Tensor
    labels: torch.Tensor
    valid: torch.Tensor
    slots: torch.Tensor
    ends: list[int]
    layouts: dict[AttentionRule, Layout]
    teacher: TeacherRows | None = None
    weight_sum: float | None = None

    @property
    def anchor_rows(self) -> torch.Tensor:
        """Rows of the anchors in the packed context, (A,)."""
        return next(iter(self.layouts.values())).anchor_rows

    @property
    def num_slots(self) -> int:
        return len(self.slots)

    @property
    def normalizer(self) -> float:
        return self.num_slots if self.weight_sum is None else self.weight_sum


@dataclass(frozen=True)
class Places:
    """What a layer needs of a batch's blocks: rotary tables, and the attention's layout."""

    query_rope: Tables
    context_rope: Tables
    layout: Layout


def spread(rows: torch.Tensor, width: int) -> torch.Tensor:
    """Return blocks of an anchor and masks. Shapes: rows (A+1, ...), of the anchors and of all masks -> (A, B, ...)."""
    masks = rows[-1:, None].expand(len(rows) - 1, width - 1, *rows.shape[1:])
    return torch.cat([rows[:-1, None], masks], dim=1)


class Attention(nn.Module):
    """Block queries over context keys and the block's own."""

    def __init__(self, config: BlockConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        hidden, size = config.hidden_size, config.head_dim
        self.q_proj = nn.Linear(hidden, self.heads * size, bias=False)
        self.k_proj = nn.Linear(hidden, self.kv_heads * size, bias=False)
        self.v_proj = nn.Linear(hidden, self.kv_heads * size, bias=False)
        self.o_proj = nn.Linear(self.heads * size, hidden, bias=False)
        self.q_norm = RMSNorm(size, eps=config.rms_norm_eps)
        self.k_norm = RMSNorm(size, eps=config.rms_norm_eps)

    def forward(self, x: torch.Tensor, context: torch.Tensor, places: Places, skip: int) -> torch.Tensor:
        """Return the outputs from slot `skip` on; x (A, B, H) or rows to `spread`, context (T, H) -> (A, B-skip, H)."""
        are_rows = x.dim() == 2
        query = self.q_norm(self._split(self.q_proj(x if are_rows else x[:, skip:]), self.heads))
        block_key = self.k_norm(self._split(self.k_proj(x), self.kv_heads))
        block_value, context_value = (self._split(self.v_proj(y), self.kv_heads) for y in (x, context))
        if are_rows:
            width = places.query_rope[0].shape[1]
            query, block_key, block_value = (spread(y, width) for y in (query, block_key, block_value))
            query = query[:, skip:]
        query_rope = tuple(table[:, skip:] for table in places.query_rope)
        query = rotate(query, query_rope)  # type: ignore[arg-type]
        block_key = rotate(block_key, places.query_rope)
        context_key = rotate(self.k_norm(self._split(self.k_proj(context), self.kv_heads)), places.context_rope)
        pairs = KeyValues(context_key, context_value, block_key, block_value)
        output = attend(query, pairs, places.layout)
        projected: torch.Tensor = self.o_proj(output.flatten(2))
        return projected

    @staticmethod
    def _split(x: torch.Tensor, heads: int) -> torch.Tensor:
        return x.unflatten(-1, (heads, -1))


class Layer(nn.Module):
    """One pre-norm draft layer: attention and a gated MLP."""

    def __init__(self, config: BlockConfig) -> None:
        super().__init__()
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self.self_attn = Attention(config)
        self.mlp = GatedMLP(hidden, config.intermediate_size)
        self.input_layernorm = RMSNorm(hidden, eps=eps)
        self.post_attention_layernorm = RMSNorm(hidden, eps=eps)

    def forward(self, x: torch.Tensor, context: torch.Tensor, places: Places, skip: int) -> torch.Tensor:
        """Return the next layer's input; x (A, B, H), or before the first layer rows to `spread` (A+1, H)."""
        attended = self.self_attn(self.input_layernorm(x), context, places, skip)
        x = spread(x, places.query_rope[0].shape[1]) if x.dim() == 2 else x
        x = x[:, skip:] + attended
        return x + self.mlp(self.post_attention_layernorm(x))


class ConvolvedLayer(Layer):
    """A draft layer with convolutions along the block around attention and MLP."""

    def __init__(self, config: BlockConfig, convolution: tuple[int, int]) -> None:
        super().__init__(config)
        self.attention_conv = BlockConvolution(config.hidden_size, *convolution)
        self.mlp_conv = BlockConvolution(config.hidden_size, *convolution)

    def forward(self, x: torch.Tensor, context: torch.Tensor, places: Places, skip: int) -> torch.Tensor:
        # The convolutions of slot 1 read slot 0: no slot is left out before the last of them.
        y, dynamic = self.attention_conv.before(self.input_layernorm(x))
        x = x + self.attention_conv.after(self.self_attn(y, context, places, 0), dynamic)
        y, dynamic = self.mlp_conv.before(self.post_attention_layernorm(x))
        x = x + self.mlp_conv.after(self.mlp(y), dynamic)
        return x[:, skip:]


def make_layer(config: BlockConfig) -> Layer:
    """Return a draft layer, with convolutions if the config has them."""
    return Layer(config) if config.convolution is None else ConvolvedLayer(config, config.convolution)


class BlockDraft(Draft):
    """A block draft without embedding and lm_head, which are the target's. `section` says how it is trained."""

    config: BlockConfig
    section: BlockSection | None

    def __init__(
        self, config: BlockConfig, section: BlockSection | None = None, *, gradient_checkpointing: bool = False
    ) -> None:
        super().__init__()
        assert config.mask_token_id is not None
        self.config, self.section, self.gradient_checkpointing = config, section, gradient_checkpointing
        hidden = config.hidden_size
        self.fc = nn.Linear(len(config.layer_ids) * hidden, hidden, bias=False)
        self.hidden_norm = RMSNorm(hidden, eps=config.rms_norm_eps)
        self.layers = nn.ModuleList(make_layer(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(hidden, eps=config.rms_norm_eps)
        self.rope = Rope(config)

    def initialize(self, seed: int, head: TargetHead, count_tokens: Callable[[], torch.Tensor]) -> str:
        message = super().initialize(seed, head, count_tokens)
        for module in self.modules():
            if isinstance(module, BlockConvolution):
                module.make_identity()
        return message

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
        masks = batch.loss_mask.split(batch.lengths)
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
        width = self.config.num_queries
        skips_anchor = not self.config.anchor_predicts and self.config.convolution is None  # in the last attention
        queries = (width, width - 1) if skips_anchor else (width,)
        device = self.fc.weight.device
        layouts = {
            rule: lay_out(lengths, anchors, width, device, queries, rule=rule)
            for rule in dict.fromkeys(self.config.rules)
        }
        places = layouts[self.config.rules[0]].anchor_rows[:, None] + torch.arange(1, self.config.num_draft_tokens + 1)
        inside = places < len(token_ids)
        places = places.clamp(max=len(token_ids) - 1)
        valid = (loss_mask[places] & inside).long().cumprod(dim=1).bool()
        slots = valid.view(-1).nonzero()[:, 0]
        learns_from_states = self.section is not None and self.section.needs_final_states
        return Blocks(
            positions=torch.cat(list(anchors)),
            context_positions=torch.cat([torch.arange(length) for length in lengths]),
            labels=token_ids[places],
            valid=valid,
            slots=slots,
            ends=valid.sum(1).cumsum(0).tolist(),
            layouts=layouts,
            teacher=TeacherRows.of_slots(places[valid] - 1) if learns_from_states else None,
            weight_sum=None if self.section is None else self.weight_sum(slots),
        )

    def static_weights(self, slots: torch.Tensor) -> torch.Tensor:
        """Return the weights of slots by their place in the block: (N,) -> (N,)."""
        assert self.section is not None
        num_tokens = self.config.num_draft_tokens
        return slot_decay(num_tokens, self.section.loss_decay, slots.device)[slots % num_tokens]

    def before(self, token_ids: torch.Tensor, blocks: Blocks) -> torch.Tensor:
        """Return the token before each slot's label, all of them of the data: (T,) -> (A, K)."""
        anchors = token_ids[blocks.anchor_rows][:, None]
        return torch.cat([anchors, blocks.labels[:, :-1]], dim=1)

    def weight_sum(self, slots: torch.Tensor) -> float | None:  # noqa: ARG002 (a method may need them)
        """Return what divides the loss of the supervised `slots (N,)`; None for their number."""
        return None

    def hidden(
        self, token_ids: torch.Tensor, aux_hidden_states: torch.Tensor, blocks: Blocks, embedding: torch.Tensor
    ) -> torch.Tensor:
        """Return the states of the slots that predict, after the final norm.

        lm_head turns them into the draft's logits. Shapes: token_ids (T,), aux_hidden_states (T, n*H), embedding (V, H)
        -> (A, K, H).
        """
        return self.hidden_after(token_ids, self.context(aux_hidden_states), blocks, embedding)

    def context(self, aux_hidden_states: torch.Tensor) -> torch.Tensor:
        """Return the projected features of the context that all layers read. Shapes: (T, n*H) -> (T, H)."""
        context: torch.Tensor = self.hidden_norm(self.fc(as_input(aux_hidden_states, self.fc.weight)))
        return context

    def hidden_after(
        self, token_ids: torch.Tensor, context: torch.Tensor, blocks: Blocks, embedding: torch.Tensor
    ) -> torch.Tensor:
        """Return what `hidden` does, from the context's projected features (T, H)."""
        width, anchor_rows, rules = self.config.num_queries, blocks.anchor_rows, self.config.rules
        offsets = torch.arange(width, device=anchor_rows.device)
        query_rope = self.rope.at(blocks.positions[:, None] + offsets)
        context_rope = self.rope.at(blocks.context_positions)
        places = {rule: Places(query_rope, context_rope, layout) for rule, layout in blocks.layouts.items()}
        for layout in blocks.layouts.values():
            layout.make_masks()
        inputs = functional.pad(token_ids[anchor_rows], (0, 1), value=self.config.mask_token_id or 0)
        x = functional.embedding(inputs, embedding)  # the masks are all alike, so the first layer projects one of them
        if self.config.convolution is not None:
            x = spread(x, width)
        save_memory = self.training and self.gradient_checkpointing
        for number, layer in enumerate(self.layers):
            # In the fill-in layout, the last layer's output at the anchor is not used.
            skip = int(number == len(self.layers) - 1 and not self.config.anchor_predicts)
            x = (
                checkpoint(layer, x, context, places[rules[number]], skip, use_reentrant=False)
                if save_memory
                else layer(x, context, places[rules[number]], skip)
            )
        hidden: torch.Tensor = self.norm(x)
        return hidden

    def block_weights(self, blocks: Blocks) -> BlockWeights:
        """Return the weights of the supervised slots, and the rows where a chunk of the loss may end."""
        assert self.section is not None
        by_slot = slot_decay(self.config.num_draft_tokens, self.section.loss_decay, blocks.slots.device)
        return make_block_weights(self.section.slot_weights, by_slot, self.section.dpace_smoothing, blocks)

    def plan_drafting(self, token_ids: torch.Tensor, loss_mask: torch.Tensor, places: torch.Tensor) -> Blocks:
        return self.lay_out(token_ids, loss_mask, [len(token_ids)], [places])
