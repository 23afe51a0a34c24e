"""The EAGLE3 draft: one Llama layer that drafts token by token, trained on its own outputs (training-time test).

Source: EAGLE-3 (arXiv 2503.01840) as vLLM serves it (vllm/model_executor/models/llama_eagle3.py); parameter names are
those of the exported checkpoint. At position t the layer takes the embedding of token t+1 and the feature of token t,
and predicts token t+2. The features of tokens that the target has seen are fc(concat(captured layers)); those of
drafted tokens are the layer's own output before its final norm.

A *chain* starts at a place p, the last known token: step 0 is at position p-1, step i at p-1+i, where it takes token
p+i and the output of step i-1. As in serving, it attends to the keys of all known positions before p-1 and to its own
keys from p-1 on. Training unrolls `ttt_length` steps from every place at once, with the generated tokens as inputs.

Shapes: T packed tokens, N chains, S steps, H hidden size, n captured layers, D head size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from contracts.store import StoredSample
from drafts.attention import KeyValues, Layout, attend, lay_out
from drafts.batch import Batch
from drafts.draft import Drafted, Plan, as_input
from drafts.eagle3.config import Eagle3Config, Eagle3Section
from drafts.layers import GatedMLP, RMSNorm
from drafts.loss_terms import Objective
from drafts.moving import to_device
from drafts.objective import LossOptions, StepLoss, fused_loss, greedy_tokens, label_log_probs
from drafts.places import chain_places, chain_places_of
from drafts.rope import Rope, Tables, rotate
from drafts.slot_weights import make_block_weights
from drafts.teacher import TeacherRows
from drafts.vocabulary import VocabularyDraft
from target.head import TargetHead, logits_of

Pair = tuple[torch.Tensor, torch.Tensor]
"""Keys and values, both (rows, KV heads, D)."""


@dataclass(frozen=True)
class Chains(Plan):
    """The chains of one batch, and the attention layout of each of their steps; planned on the CPU.

    Shapes: places (N,) rows of the last known tokens in the pack; positions (N,) of step 0, in the document; labels and
    valid (N, S); slots (M,), flat indices of the valid ones; context_positions (T,). `ends[a]`: number of valid slots
    up to chain a. `teacher`: the states that the slots learn from, if they do.
    """

    places: torch.Tensor
    positions: torch.Tensor
    labels: torch.Tensor
    valid: torch.Tensor
    slots: torch.Tensor
    ends: list[int]
    context_positions: torch.Tensor
    layouts: list[Layout]
    teacher: TeacherRows | None = None

    @property
    def num_slots(self) -> int:
        return len(self.slots)


class Attention(nn.Module):
    """A chain's query attends to the keys of known positions before step 0, and to the chain's own keys from there."""

    def __init__(self, config: Eagle3Config) -> None:
        super().__init__()
        hidden, size = config.hidden_size, config.head_dim
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.q_proj = nn.Linear(2 * hidden, self.heads * size, bias=False)
        self.k_proj = nn.Linear(2 * hidden, self.kv_heads * size, bias=False)
        self.v_proj = nn.Linear(2 * hidden, self.kv_heads * size, bias=False)
        self.o_proj = nn.Linear(self.heads * size, hidden, bias=False)

    def keys(self, x: torch.Tensor, rope: Tables) -> Pair:
        """Return the keys and values of `x (rows, 2H)`."""
        key = rotate(self.k_proj(x).unflatten(-1, (self.kv_heads, -1)), rope)
        return key, self.v_proj(x).unflatten(-1, (self.kv_heads, -1))

    def forward(self, x: torch.Tensor, rope: Tables, known: Pair, own: list[Pair], layout: Layout) -> torch.Tensor:
        """Return the attention output of one step; x (N, 2H), known (T, KV, D), own (N, KV, D) each -> (N, H)."""
        query = rotate(self.q_proj(x).unflatten(-1, (self.heads, -1)), rope)
        key, value = (torch.stack(part, dim=1) for part in zip(*own, strict=True))
        output = attend(query[:, None], KeyValues(*known, key, value), layout)
        projected: torch.Tensor = self.o_proj(output.flatten(1))
        return projected


class Layer(nn.Module):
    """The draft's only layer."""

    def __init__(self, config: Eagle3Config) -> None:
        super().__init__()
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self.self_attn = Attention(config)
        self.mlp = GatedMLP(hidden, config.intermediate_size)
        self.input_layernorm = RMSNorm(hidden, eps=eps)
        self.hidden_norm = RMSNorm(hidden, eps=eps)
        self.post_attention_layernorm = RMSNorm(hidden, eps=eps)

    def input(self, embedded: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        """Return the attention's input: `(rows, H)` both -> `(rows, 2H)`."""
        return torch.cat([self.input_layernorm(embedded), self.hidden_norm(features)], dim=-1)

    def forward(
        self,
        embedded: torch.Tensor,
        features: torch.Tensor,
        rope: Tables,
        known: Pair,
        earlier: tuple[Pair, ...],
        layout: Layout,
    ) -> tuple[torch.Tensor, Pair]:
        """Run one step of all chains; return its outputs and its keys and values.

        The outputs `(N, H)` are before the final norm: they are the next step's features.
        """
        attention, x = self.self_attn, self.input(embedded, features)
        pair = attention.keys(x, rope)
        x = features + attention(x, rope, known, [*earlier, pair], layout)
        return x + self.mlp(self.post_attention_layernorm(x)), pair


class Eagle3(VocabularyDraft):
    """The draft without embedding and lm_head, which are the target's; a reduced vocabulary has its own lm_head."""

    config: Eagle3Config

    def __init__(
        self, config: Eagle3Config, section: Eagle3Section | None = None, *, gradient_checkpointing: bool = False
    ) -> None:
        super().__init__()
        self.config, self.section, self.gradient_checkpointing = config, section, gradient_checkpointing
        hidden = config.hidden_size
        self.fc = nn.Linear(len(config.layer_ids) * hidden, hidden, bias=False)
        self.midlayer = Layer(config)
        self.norm = RMSNorm(hidden, eps=config.rms_norm_eps)
        self.rope = Rope(config)
        self.add_vocabulary()

    def layers_to_compile(self) -> list[nn.Module]:
        return [self.midlayer]

    def plan(self, batch: Batch) -> Chains:
        """Start a chain at every position that serving can draft from.

        Raises UserError, with the sample's id, for a document that has none.
        """
        return self.lay_out(
            batch.token_ids, batch.loss_mask, batch.lengths, chain_places_of(batch), self.config.ttt_length
        )

    def lay_out(
        self,
        token_ids: torch.Tensor,
        loss_mask: torch.Tensor,
        lengths: Sequence[int],
        places: Sequence[torch.Tensor],
        steps: int,
    ) -> Chains:
        """Return chains of `steps` steps from `places[i]`, ascending positions in document i of the pack.

        A chain's labels end with its run of generated tokens: the next tokens are another turn's prompt. Documents need
        no explicit boundary, as each begins with its prompt.
        """
        device = self.fc.weight.device
        firsts = [part - 1 for part in places]
        layouts = [lay_out(lengths, firsts, step + 1, device, (1,)) for step in range(steps)]
        rows = layouts[0].anchor_rows + 1
        wanted = rows[:, None] + torch.arange(1, steps + 1)
        inside = wanted < len(token_ids)
        wanted = wanted.clamp(max=len(token_ids) - 1)
        labels, valid = self.number_labels(token_ids[wanted], loss_mask[wanted] & inside)
        valid = valid.long().cumprod(dim=1).bool()  # a token outside the vocabulary ends the chain
        distills = self.section is not None and self.section.needs_final_states
        return Chains(
            places=rows,
            positions=torch.cat(firsts),
            labels=labels,
            valid=valid,
            slots=valid.view(-1).nonzero()[:, 0],
            ends=valid.sum(1).cumsum(0).tolist(),
            context_positions=torch.cat([torch.arange(length) for length in lengths]),
            layouts=layouts,
            teacher=TeacherRows.of_slots(wanted[valid] - 1) if distills else None,
        )

    def forward(self, batch: Batch, chains: Chains, head: TargetHead) -> StepLoss:
        """Return the training loss of all steps; static weights are `ttt_step_loss_decay ** i` for step i."""
        assert self.section is not None
        steps = chains.labels.shape[1]
        outputs = list[torch.Tensor]()

        def given(step: int) -> torch.Tensor:
            # Steps beyond the last token have no label, so any token will do.
            return batch.token_ids[(chains.places + step).clamp(max=len(batch.token_ids) - 1)]

        for hidden in self._unroll(batch.token_ids, batch.aux_hidden_states, chains, head.embedding, given):
            outputs.append(hidden)
        normed = self.norm(torch.stack(outputs, dim=1))  # (N, S, H)
        slots = chains.slots
        by_step = (self.section.ttt_step_loss_decay ** torch.arange(steps, device=slots.device)).float()
        weights, bounds = make_block_weights(self.section.slot_weights, by_step, self.section.dpace_smoothing, chains)
        found = fused_loss(
            normed.flatten(0, 1).index_select(0, slots),
            self.own_lm_head(head),
            chains.labels.view(-1)[slots],
            weights,
            LossOptions(Objective.of(self.section), self.teach(head, batch, chains.teacher), bounds),
        )
        return StepLoss.of_blocks(found.total, found.hits, slots, chains.valid)

    def _unroll(
        self,
        token_ids: torch.Tensor,
        aux_hidden_states: torch.Tensor,
        chains: Chains,
        embedding: torch.Tensor,
        token_of_step: Callable[[int], torch.Tensor],
    ) -> Iterator[torch.Tensor]:
        """Yield all chains' outputs `(N, H)` per step; `token_of_step(i)` returns the input tokens (N,)."""
        layer, attention = self.midlayer, self.midlayer.self_attn
        save_memory = self.training and self.gradient_checkpointing
        for layout in chains.layouts:
            layout.make_masks()
        features = self.fc(as_input(aux_hidden_states, self.fc.weight))
        # Position t takes token t+1. The last position of a document has none, and no chain attends to it.
        following = functional.embedding(token_ids.roll(-1), embedding)
        known = attention.keys(layer.input(following, features), self.rope.at(chains.context_positions))
        hidden, own = features[chains.places - 1], list[Pair]()
        for step, layout in enumerate(chains.layouts):
            embedded = functional.embedding(token_of_step(step), embedding)
            arguments = embedded, hidden, self.rope.at(chains.positions + step), known, tuple(own), layout
            hidden, pair = checkpoint(layer, *arguments, use_reentrant=False) if save_memory else layer(*arguments)
            own.append(pair)
            yield hidden

    def places(self, loss_mask: torch.Tensor) -> torch.Tensor:
        return chain_places(loss_mask)

    def plan_drafting(self, token_ids: torch.Tensor, loss_mask: torch.Tensor, places: torch.Tensor) -> Chains:
        return self.lay_out(token_ids, loss_mask, [len(token_ids)], [places], self.config.num_draft_tokens)

    def draft_planned(
        self, token_ids: torch.Tensor, aux_hidden_states: torch.Tensor, plan: Chains, head: TargetHead
    ) -> Drafted:
        lm_head = self.own_lm_head(head)
        tokens = self._unroll_greedily(
            token_ids, aux_hidden_states, plan, head, lambda hidden: greedy_tokens(hidden, lm_head)
        )
        return Drafted(tokens)

    def score_planned(
        self,
        token_ids: torch.Tensor,
        aux_hidden_states: torch.Tensor,
        plan: Chains,
        head: TargetHead,
        temperature: float,
    ) -> torch.Tensor:
        def given(step: int) -> torch.Tensor:
            return token_ids[(plan.places + step).clamp(max=len(token_ids) - 1)]

        hidden = torch.stack(list(self._unroll(token_ids, aux_hidden_states, plan, head.embedding, given)), dim=1)
        scores = label_log_probs(self.norm(hidden), self.own_lm_head(head), plan.labels.clamp(min=0), temperature).exp()
        return scores * plan.valid  # 0 at and after a token that the draft does not know

    @torch.inference_mode()
    def draft_logits(
        self, sample: StoredSample, head: TargetHead, places: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the greedy chains from `places (N,)`, and their logits over the draft's vocabulary.

        Shapes: (N, K) and (N, K, V), on the CPU.
        """
        device, ids, lm_head = head.lm_head.device, sample.input_ids.long(), self.own_lm_head(head)
        steps = list[torch.Tensor]()

        def choose(hidden: torch.Tensor) -> torch.Tensor:
            steps.append(logits_of(hidden.to(lm_head.dtype), lm_head))
            return steps[-1].argmax(-1)

        chains = to_device(self.plan_drafting(ids, sample.loss_mask, places), device)
        drafted = self._unroll_greedily(ids.to(device), sample.aux_hidden_states.to(device), chains, head, choose)
        return drafted.cpu(), torch.stack(steps, dim=1).cpu()

    def _unroll_greedily(
        self,
        token_ids: torch.Tensor,
        aux: torch.Tensor,
        chains: Chains,
        head: TargetHead,
        choose: Callable[[torch.Tensor], torch.Tensor],
    ) -> torch.Tensor:
        """Return the tokens `(N, K)` of all chains; `choose` takes a step's token from its states (N, H)."""
        drafted = list[torch.Tensor]()

        def latest(step: int) -> torch.Tensor:
            return drafted[step - 1] if step else token_ids[chains.places]

        for hidden in self._unroll(token_ids, aux, chains, head.embedding, latest):
            drafted.append(self.target_ids(choose(self.norm(hidden))))
        return torch.stack(drafted, dim=1)

    @torch.inference_mode()
    def taps(self, sample: StoredSample, head: TargetHead, start: int) -> dict[str, torch.Tensor]:
        return self.vocabulary_taps(self.draft_logits(sample, head, torch.tensor([start]))[1][0], head)
