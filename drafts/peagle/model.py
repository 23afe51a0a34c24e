"""The P-EAGLE draft: EAGLE3's layers, run once for all draft tokens.

Source: P-EAGLE (arXiv 2602.01469) as vLLM serves it (vllm/model_executor/models/llama_eagle3.py with
`parallel_drafting`); parameter names are those of the exported checkpoint. The draft is a causal transformer. With p
the last known token, its inputs are
    position t < p: the embedding of token t+1, and fc(concat(captured layers)) of token t;
    position p-1+k, k = 1..K-1: the embedding of the mask token, and fc(mask_hidden), for all k the same.
Layer 0 attends with [norm(embedding) ; norm(features)] and adds to the features; further layers are Llama's. Position
p-1+k predicts token p+1+k: depth k.

Depth 0 of all places is one pass over the *known* positions. The masks after a place p are a *rollout*: they attend to
all known positions before p and causally to one another. Training draws which rollouts reach which depth (COD sampling:
a share of max(r^k, r_min) of the places reaches depth k).

Shapes: T packed tokens, N places, A rollouts, M masks of all rollouts, K draft tokens, U supervised slots, H hidden
size, n captured layers, D head size, W input width of a layer's attention.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from contracts.store import StoredSample
from drafts.attention import KeyValues, Layout, attend, lay_out
from drafts.attention_rule import AttentionRule
from drafts.batch import Batch
from drafts.draft import Drafted, Plan, as_input
from drafts.layers import GatedMLP, RMSNorm
from drafts.loss_terms import Objective
from drafts.moving import to_device
from drafts.objective import LossOptions, StepLoss, fused_loss, greedy_tokens, label_log_probs
from drafts.peagle.config import PEagleConfig, PEagleSection
from drafts.places import chain_places, chain_places_of
from drafts.rope import Rope, Tables, rotate
from drafts.slot_weights import make_block_weights
from drafts.teacher import TeacherRows
from drafts.vocabulary import VocabularyDraft
from target.head import TargetHead, logits_of

Streams = tuple[torch.Tensor, torch.Tensor]
"""States of the known positions and of the masks, (T, H) and (M, H); masks that are all equal are one row."""


@dataclass(frozen=True)
class Reach:
    """Rollouts of about the same length, which attention computes as `width` cells each.

    Shapes: cells (m,), the places of their masks in a x width, of a rollouts.
    """

    width: int
    cells: torch.Tensor
    layout: Layout

    def lay_out(self, x: torch.Tensor) -> torch.Tensor:
        """Return the masks' `x (m, heads, D)` as (a, width, heads, D); no mask sees the cells after a rollout's end."""
        cells = x.new_zeros((len(self.layout.anchor_rows) * self.width, *x.shape[1:]))
        return cells.index_copy(0, self.cells, x).unflatten(0, (-1, self.width))


@dataclass(frozen=True)
class Rollouts(Plan):
    """The places of a batch and the masks after them; planned on the CPU.

    Shapes: rows (N,) of depth 0, p-1, in the pack; labels and valid (N, K), whether a slot is supervised; slots (U,),
    flat indices of the valid ones, of which `ends[a]` are of places up to a; source (U,), their states among those of
    depth 0 and of the masks, N + M; whole (N,), whether all slots that have a label are valid; mask_positions (M,) and
    known_positions (T,), in the documents. Layouts: `known` of all known positions, `places` of depth 0 alone, which is
    all that the last layer needs. `reaches`: the rollouts by length; masks are in the order of these. `teacher`: the
    states that the slots learn from, if they do.
    """

    rows: torch.Tensor
    labels: torch.Tensor
    valid: torch.Tensor
    slots: torch.Tensor
    ends: list[int]
    source: torch.Tensor
    whole: torch.Tensor
    mask_positions: torch.Tensor
    known_positions: torch.Tensor
    known: Layout | None
    places: Layout
    reaches: list[Reach]
    teacher: TeacherRows | None = None

    @property
    def num_slots(self) -> int:
        return len(self.slots)


@dataclass(frozen=True)
class Sight:
    """What a layer needs of a step: rotary tables, and who sees whom. `rows`: see `Rollouts`; None: all positions."""

    known_rope: Tables
    mask_rope: Tables
    known: Layout
    reaches: list[Reach]
    rows: torch.Tensor | None


class Attention(nn.Module):
    """Known positions attend causally; masks to the known positions before their place, and causally to their own."""

    def __init__(self, config: PEagleConfig, width: int) -> None:
        super().__init__()
        size = config.head_dim
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.q_proj = nn.Linear(width, self.heads * size, bias=False)
        self.k_proj = nn.Linear(width, self.kv_heads * size, bias=False)
        self.v_proj = nn.Linear(width, self.kv_heads * size, bias=False)
        self.o_proj = nn.Linear(self.heads * size, config.hidden_size, bias=False)

    def forward(self, known: torch.Tensor, masks: torch.Tensor, sight: Sight) -> Streams:
        """Return the outputs of the known positions, or of `sight.rows` alone, and of the masks.

        Shapes: known (T, W); masks (M, W) or (1, W) -> (T or N, H), (M, H).
        """
        key = rotate(self._split(self.k_proj(known), self.kv_heads), sight.known_rope)
        value = self._split(self.v_proj(known), self.kv_heads)
        asking, rope, own_key, own_value = known, sight.known_rope, key, value
        if sight.rows is not None:
            asking, own_key, own_value = (x.index_select(0, sight.rows) for x in (known, key, value))
            rope = (rope[0].index_select(0, sight.rows), rope[1].index_select(0, sight.rows))
        query = rotate(self._split(self.q_proj(asking), self.heads), rope)
        pairs = KeyValues(key, value, own_key[:, None], own_value[:, None])
        seen = attend(query[:, None], pairs, sight.known).flatten(1)

        query, own_key = (
            rotate(self._of_masks(project(masks), heads, sight), sight.mask_rope)
            for project, heads in ((self.q_proj, self.heads), (self.k_proj, self.kv_heads))
        )
        own_value = self._of_masks(self.v_proj(masks), self.kv_heads, sight)
        counts, rolled = [len(reach.cells) for reach in sight.reaches], []
        for reach, *of_masks in zip(
            sight.reaches, *(x.split(counts) for x in (query, own_key, own_value)), strict=True
        ):
            asking, *own = map(reach.lay_out, of_masks)
            found = attend(asking, KeyValues(key, value, *own), reach.layout)
            rolled.append(found.flatten(0, 1).index_select(0, reach.cells).flatten(1))
        return self.o_proj(seen), self.o_proj(torch.cat(rolled))

    @staticmethod
    def _split(x: torch.Tensor, heads: int) -> torch.Tensor:
        return x.unflatten(-1, (heads, -1))

    def _of_masks(self, x: torch.Tensor, heads: int, sight: Sight) -> torch.Tensor:
        """Return `x (M or 1, heads*D)` as (M, heads, D)."""
        return self._split(x, heads).expand(len(sight.mask_rope[0]), -1, -1)


class Layer(nn.Module):
    """One layer; the first one takes the embeddings as well."""

    def __init__(self, config: PEagleConfig, is_first: bool) -> None:
        super().__init__()
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self.self_attn = Attention(config, (1 + is_first) * hidden)
        self.mlp = GatedMLP(hidden, config.intermediate_size)
        self.input_layernorm = RMSNorm(hidden, eps=eps)
        self.hidden_norm = RMSNorm(hidden, eps=eps) if is_first else None
        self.post_attention_layernorm = RMSNorm(hidden, eps=eps)

    def forward(
        self, known: torch.Tensor, masks: torch.Tensor, sight: Sight, embedded: Streams | None = None
    ) -> Streams:
        """Return the next layer's input. Shapes: see `Streams`; `embedded` is the first layer's alone."""
        if self.hidden_norm is None:
            inputs = [self.input_layernorm(x) for x in (known, masks)]
        else:
            assert embedded is not None
            pairs = zip(embedded, (known, masks), strict=True)
            inputs = [torch.cat([self.input_layernorm(e), self.hidden_norm(x)], dim=-1) for e, x in pairs]
        seen, rolled = self.self_attn(*inputs, sight)
        if sight.rows is not None:
            known = known.index_select(0, sight.rows)
        known, masks = known + seen, masks + rolled
        first, second = (x + self.mlp(self.post_attention_layernorm(x)) for x in (known, masks))
        return first, second


class PEagle(VocabularyDraft):
    """The draft without embedding and lm_head, which are the target's; a reduced vocabulary has its own lm_head."""

    config: PEagleConfig

    def __init__(
        self, config: PEagleConfig, section: PEagleSection | None = None, *, gradient_checkpointing: bool = False
    ) -> None:
        super().__init__()
        self.config, self.section, self.gradient_checkpointing = config, section, gradient_checkpointing
        hidden, features = config.hidden_size, len(config.layer_ids) * config.hidden_size
        self.fc = nn.Linear(features, hidden, bias=False)
        self.mask_hidden = nn.Parameter(torch.zeros(1, 1, features))
        self.layers = nn.ModuleList(Layer(config, number == 0) for number in range(config.num_layers))
        self.norm = RMSNorm(hidden, eps=config.rms_norm_eps)
        self.rope = Rope(config)
        self.add_vocabulary()

    def layers_to_compile(self) -> list[nn.Module]:
        return list(self.layers)

    def layers_to_shard(self) -> list[nn.Module]:
        return list(self.layers)

    def places(self, loss_mask: torch.Tensor) -> torch.Tensor:
        return chain_places(loss_mask)

    def plan(self, batch: Batch) -> Rollouts:
        """Supervise depth 0 at every place that serving can draft from, and draw the rollouts of further depths.

        Raises UserError, with the sample's id, for a document that has no place.
        """
        assert self.section is not None
        places = chain_places_of(batch)
        pairs = zip(places, batch.seeds, strict=True)
        depths = [draw_depths(len(part), self.section, torch.Generator().manual_seed(seed)) for part, seed in pairs]
        return self.lay_out(batch.token_ids, batch.loss_mask, batch.lengths, places, depths)

    def plan_drafting(self, token_ids: torch.Tensor, loss_mask: torch.Tensor, places: torch.Tensor) -> Rollouts:
        return self.lay_out(token_ids, loss_mask, [len(token_ids)], [places])

    def lay_out(
        self,
        token_ids: torch.Tensor,
        loss_mask: torch.Tensor,
        lengths: Sequence[int],
        places: Sequence[torch.Tensor],
        depths: Sequence[torch.Tensor] | None = None,
    ) -> Rollouts:
        """Return the rollouts at `places[i]`, ascending positions in document i of the pack.

        `depths[i]`: how many masks to compute after each; a rollout ends with the labels, that is with the run of
        generated tokens or before a token outside the vocabulary. Default: all K-1, labels or not.
        """
        device, num_tokens = self.fc.weight.device, self.config.num_draft_tokens
        layout = lay_out(lengths, [part - 1 for part in places], 1, device)
        wanted = (layout.anchor_rows + 2)[:, None] + torch.arange(num_tokens)
        inside = wanted < len(token_ids)
        wanted = wanted.clamp(max=len(token_ids) - 1)
        labels, valid = self.number_labels(token_ids[wanted], loss_mask[wanted] & inside)
        valid = valid.long().cumprod(dim=1).bool()
        num_masks, whole = torch.full((len(wanted),), num_tokens - 1), torch.ones(len(wanted), dtype=torch.bool)
        if depths is not None:
            num_masks = torch.cat(_end_with_labels(depths, (valid.sum(1) - 1).split([len(part) for part in places])))
            reached = valid & (torch.arange(num_tokens) <= num_masks[:, None])
            valid, whole = reached, (reached == valid).all(1)
        slots = valid.view(-1).nonzero()[:, 0]
        source = torch.arange(len(wanted))[:, None].repeat(1, num_tokens)
        positions, reaches = _plan_reaches(lengths, places, num_masks, source, device)
        everywhere = [torch.arange(length) for length in lengths]
        learns_from_states = self.section is not None and self.section.needs_final_states
        return Rollouts(
            rows=layout.anchor_rows,
            labels=labels,
            valid=valid,
            slots=slots,
            ends=valid.sum(1).cumsum(0).tolist(),
            source=source.view(-1)[slots] if depths is not None else source.view(-1),
            whole=whole,
            mask_positions=positions,
            known_positions=torch.cat(everywhere),
            known=lay_out(lengths, everywhere, 1, device) if len(self.layers) > 1 else None,
            places=layout,
            reaches=reaches,
            teacher=TeacherRows.of_slots(wanted[valid] - 1) if learns_from_states else None,
        )

    def hidden(
        self, token_ids: torch.Tensor, aux_hidden_states: torch.Tensor, rollouts: Rollouts, embedding: torch.Tensor
    ) -> torch.Tensor:
        """Return the states of `rollouts.source`, after the final norm.

        Shapes: token_ids (T,), aux_hidden_states (T, n*H), embedding (V, H) -> (U, H).
        """
        for layout in (rollouts.known, rollouts.places, *[reach.layout for reach in rollouts.reaches]):
            if layout is not None:
                layout.make_masks()
        mask_token = embedding[self.config.mask_token_id or 0][None]
        # Position t takes token t+1. The last position of a document has none, and no other position sees it.
        embedded = functional.embedding(token_ids.roll(-1), embedding), mask_token
        known = self.fc(as_input(aux_hidden_states, self.fc.weight))
        masks = self.fc(as_input(self.mask_hidden.view(1, -1), self.fc.weight))
        ropes = self.rope.at(rollouts.known_positions), self.rope.at(rollouts.mask_positions)
        save_memory = self.training and self.gradient_checkpointing
        for number, layer in enumerate(self.layers):
            is_last = number == len(self.layers) - 1
            layout, rows = (rollouts.places, rollouts.rows) if is_last else (rollouts.known, None)
            assert layout is not None
            sight = Sight(*ropes, layout, rollouts.reaches, rows)
            arguments = known, masks, sight, None if number else embedded
            known, masks = checkpoint(layer, *arguments, use_reentrant=False) if save_memory else layer(*arguments)
        normed: torch.Tensor = self.norm(torch.cat([known, masks]).index_select(0, rollouts.source))
        return normed

    def forward(self, batch: Batch, rollouts: Rollouts, head: TargetHead) -> StepLoss:
        """Return the training loss of all depths; static weights are `depth_loss_decay ** k` for depth k."""
        assert self.section is not None
        slots = rollouts.slots
        hidden = self.hidden(batch.token_ids, batch.aux_hidden_states, rollouts, head.embedding)
        depths = torch.arange(self.config.num_draft_tokens, device=slots.device)
        by_depth = (self.section.depth_loss_decay**depths).float()
        weights, bounds = make_block_weights(
            self.section.slot_weights, by_depth, self.section.dpace_smoothing, rollouts
        )
        found = fused_loss(
            hidden,
            self.own_lm_head(head),
            rollouts.labels.view(-1)[slots],
            weights,
            LossOptions(Objective.of(self.section), self.teach(head, batch, rollouts.teacher), bounds),
        )
        return StepLoss.of_blocks(found.total, found.hits, slots, rollouts.valid, rollouts.whole)

    def draft_planned(
        self, token_ids: torch.Tensor, aux_hidden_states: torch.Tensor, plan: Rollouts, head: TargetHead
    ) -> Drafted:
        hidden = self.hidden(token_ids, aux_hidden_states, plan, head.embedding)
        tokens = self.target_ids(greedy_tokens(hidden, self.own_lm_head(head)))
        return Drafted(tokens.unflatten(0, (-1, self.config.num_draft_tokens)))

    def score_planned(
        self,
        token_ids: torch.Tensor,
        aux_hidden_states: torch.Tensor,
        plan: Rollouts,
        head: TargetHead,
        temperature: float,
    ) -> torch.Tensor:
        hidden = self.hidden(token_ids, aux_hidden_states, plan, head.embedding).unflatten(0, plan.labels.shape)
        scores = label_log_probs(hidden, self.own_lm_head(head), plan.labels.clamp(min=0), temperature).exp()
        return scores * plan.valid  # 0 at and after a token that the draft does not know

    @torch.inference_mode()
    def taps(self, sample: StoredSample, head: TargetHead, start: int) -> dict[str, torch.Tensor]:
        ids, device, lm_head = sample.input_ids.long(), head.lm_head.device, self.own_lm_head(head)
        plan = to_device(self.plan_drafting(ids, sample.loss_mask, torch.tensor([start])), device)
        hidden = self.hidden(ids.to(device), sample.aux_hidden_states.to(device), plan, head.embedding)
        logits = logits_of(hidden.to(lm_head.dtype), lm_head).cpu()
        return {**self.mask_taps(head), **self.vocabulary_taps(logits, head)}


def draw_depths(num_places: int, section: PEagleSection, generator: torch.Generator) -> torch.Tensor:
    """Draw how many masks to compute after each place: a share of max(r^k, r_min) of them gets at least k. Shape (N,).

    The shares are of `num_anchors` places, if there are more.
    """
    number = min(num_places, section.num_anchors)
    depths, order = torch.zeros(num_places, dtype=torch.long), torch.randperm(num_places, generator=generator)
    for depth in range(1, section.num_draft_tokens):
        share = max(section.depth_share**depth, section.min_depth_share)
        depths[order[: math.ceil(share * number)]] = depth
    return depths


def _plan_reaches(
    lengths: Sequence[int],
    places: Sequence[torch.Tensor],
    num_masks: torch.Tensor,
    source: torch.Tensor,
    device: torch.device,
) -> tuple[torch.Tensor, list[Reach]]:
    """Group the rollouts of `num_masks (N,)` masks by length, so that half of a group's cells or more are masks.

    Returns the positions (M,) of the masks in their documents, in the order of the groups, and the groups; writes into
    `source (N, K)` where the masks' states will be: after those of all places.
    """
    positions, reaches = list[torch.Tensor](), list[Reach]()
    all_places, width, next_row = torch.cat(list(places)), source.shape[1] - 1, len(source)
    while width:
        chosen = (num_masks > width // 2) & (num_masks <= width)
        masked = torch.arange(width) < num_masks[chosen, None]
        rows, columns = masked.nonzero(as_tuple=True)
        if len(rows):
            numbers = chosen.nonzero()[rows, 0]
            source[numbers, columns + 1] = next_row + torch.arange(len(rows))
            positions.append(all_places[numbers] + columns)
            parts = zip(places, chosen.split([len(part) for part in places]), strict=True)
            layout = lay_out(
                lengths, [part[is_in] for part, is_in in parts], width, device, rule=AttentionRule(causal=True)
            )
            reaches.append(Reach(width, masked.view(-1).nonzero()[:, 0], layout))
            next_row += len(rows)
        width //= 2
    return torch.cat(positions), reaches


def _end_with_labels(depths: Sequence[torch.Tensor], labelled: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return the depths, none deeper than its labels; but one rollout in each document, so that none has no masks."""
    found = [torch.minimum(*pair).clamp(min=0) for pair in zip(depths, labelled, strict=True)]
    for part in found:
        if not part.any():
            part[0] = 1
    return found
