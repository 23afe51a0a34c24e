"""The EAGLE3 draft: one Llama layer that drafts token by token, trained on its own outputs (training-time test).

Source: EAGLE-3 (arXiv 2503.01840) as vLLM serves it (vllm/model_executor/models/llama_eagle3.py); parameter names are
those of the exported checkpoint. At position t the layer takes the embedding of token t+1 and the feature of token t,
and predicts token t+2. The features of tokens that the target has seen are fc(concat(captured layers)); those of
drafted tokens are the layer's own output before its final norm.

A *chain* starts at a place p, the last known token: step 0 stands at position p-1, step i at p-1+i, where it takes
token p+i and the output of step i-1. It sees what serving sees: the keys of all known positions up to p-1, and its own
later ones. Training unrolls `ttt_steps` steps from every place at once, with generated tokens in the place of drafted.

Shapes: T packed tokens, N chains, S steps, H hidden size, n captured layers, D head size.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import nn
from torch.nn import functional

from contracts.draft import DraftConfig
from contracts.errors import UserError
from contracts.recipe import TrainSection
from contracts.store import StoredSample
from contracts.target_weights import TargetHead
from train.batch import Batch
from train.dflash import anchor_places
from train.norm import RMSNorm, gated
from train.objective import StepLoss, Teacher, fused_cross_entropy, make_teacher
from train.rope import Rope, rotate

Pair = tuple[torch.Tensor, torch.Tensor]
"""Keys and values, both (rows, KV heads, D)."""


@dataclass(frozen=True)
class Chains:
    """The chains of one batch, document by document.

    `documents` has for each the rows of its tokens in the pack and the first positions (N,) of its chains. Shapes over
    all chains: labels and valid (N, S), places (N,) rows of the last known tokens.
    """

    documents: list[tuple[slice, torch.Tensor]]
    places: torch.Tensor
    labels: torch.Tensor
    valid: torch.Tensor

    @property
    def num_slots(self) -> int:
        """Supervised slots."""
        return int(self.valid.sum())


class Attention(nn.Module):
    """A chain's query over the known positions' keys and the chain's own later ones."""

    def __init__(self, config: DraftConfig) -> None:
        super().__init__()
        hidden, size = config.hidden_size, config.head_dim
        self.heads, self.kv_heads, self.head_dim = config.num_attention_heads, config.num_key_value_heads, size
        self.q_proj = nn.Linear(2 * hidden, self.heads * size, bias=False)
        self.k_proj = nn.Linear(2 * hidden, self.kv_heads * size, bias=False)
        self.v_proj = nn.Linear(2 * hidden, self.kv_heads * size, bias=False)
        self.o_proj = nn.Linear(self.heads * size, hidden, bias=False)

    def forward(self, query: torch.Tensor, known: Pair, last: torch.Tensor, own: list[Pair]) -> torch.Tensor:
        """Shapes: query (N, heads, D), known (T, KV, D), last (N,) the last position seen, own (N, KV, D) each."""
        query = query.unflatten(1, (self.kv_heads, -1)) * self.head_dim**-0.5  # (N, KV, R, D)
        scores = torch.einsum("ngrd,tgd->ngrt", query, known[0])
        hidden = torch.arange(len(known[0]), device=last.device)[None] > last[:, None]
        scores = scores.masked_fill(hidden[:, None, None], -torch.inf)
        later = [torch.einsum("ngrd,ngd->ngr", query, key) for key, _ in own]
        weights = torch.cat([scores, *(part[..., None] for part in later)], dim=-1).softmax(-1)
        length = len(known[0])
        output = torch.einsum("ngrt,tgd->ngrd", weights[..., :length], known[1])
        for place, (_, value) in enumerate(own):
            output = output + weights[..., length + place, None] * value[:, :, None]
        projected: torch.Tensor = self.o_proj(output.flatten(1))
        return projected


class Layer(nn.Module):
    """The one layer. `input` and `output` are the two sides of its attention."""

    def __init__(self, config: DraftConfig) -> None:
        super().__init__()
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self.self_attn = Attention(config)
        self.mlp = nn.ModuleDict(
            {
                "gate_proj": nn.Linear(hidden, config.intermediate_size, bias=False),
                "up_proj": nn.Linear(hidden, config.intermediate_size, bias=False),
                "down_proj": nn.Linear(config.intermediate_size, hidden, bias=False),
            }
        )
        self.input_layernorm = RMSNorm(hidden, eps=eps)
        self.hidden_norm = RMSNorm(hidden, eps=eps)
        self.post_attention_layernorm = RMSNorm(hidden, eps=eps)

    def input(self, embedded: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        """`(rows, H)` both -> `(rows, 2H)`."""
        return torch.cat([self.input_layernorm(embedded), self.hidden_norm(features)], dim=-1)

    def output(self, features: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        """The layer's output before the final norm: what the next step takes as its feature."""
        x = features + attended
        y = self.post_attention_layernorm(x)
        return x + self.mlp["down_proj"](gated(self.mlp["gate_proj"](y), self.mlp["up_proj"](y)))


class Eagle3(nn.Module):
    """The draft without embedding and lm_head, which are the target's; one that knows fewer tokens has its own lm_head.

    Such a draft's `lm_head` starts from the target's rows and is trained; d2t and t2d are as train/vocabulary.py says.
    """

    d2t: torch.Tensor
    t2d: torch.Tensor

    def __init__(self, config: DraftConfig, section: TrainSection | None = None) -> None:
        super().__init__()
        self.config, self.section = config, section
        hidden = config.hidden_size
        self.fc = nn.Linear(len(config.layer_ids) * hidden, hidden, bias=False)
        self.midlayer = Layer(config)
        self.norm = RMSNorm(hidden, eps=config.rms_norm_eps)
        self.rope = Rope(config)
        self.lm_head = None
        if config.draft_vocab_size is not None:
            self.lm_head = nn.Linear(hidden, config.draft_vocab_size, bias=False)
            self.register_buffer("d2t", torch.zeros(config.draft_vocab_size, dtype=torch.long))
            self.register_buffer("t2d", torch.zeros(config.vocab_size, dtype=torch.bool))

    def set_vocabulary(self, kept: torch.Tensor, head: TargetHead) -> None:
        """Know only the tokens `kept (n,)`, ascending."""
        assert self.lm_head is not None
        with torch.no_grad():
            self.lm_head.weight.copy_(head.lm_head[kept])
        self.d2t.copy_(kept - torch.arange(len(kept), device=kept.device))
        self.t2d.zero_()
        self.t2d[kept] = True

    def plan(self, batch: Batch) -> Chains:
        """Start a chain at every place that serving can draft from.

        Raises UserError, with the sample's id, for a document that has none.
        """
        steps, documents, places = self.config.ttt_steps or 1, [], []
        offsets = [0, *accumulate(batch.lengths)]
        for sample_id, offset, length in zip(batch.sample_ids, offsets, batch.lengths, strict=False):
            rows = slice(offset, offset + length)
            found = anchor_places(batch.loss_mask[rows])
            if not len(found):
                raise UserError(
                    f"sample {sample_id}",
                    found="no place to draft from",
                    expected="two generated tokens in a row",
                    fix="Dump again: such samples are worth nothing.",
                )
            documents.append((rows, found - 1))
            places.append(offset + found)
        rows_of_places = torch.cat(places)
        wanted = rows_of_places[:, None] + torch.arange(1, steps + 1, device=rows_of_places.device)
        inside = wanted < len(batch.token_ids)
        wanted = wanted.clamp(max=len(batch.token_ids) - 1)
        # A chain ends with its run of generated tokens; documents begin with a prompt, which ends it, too.
        valid, labels = batch.loss_mask[wanted] & inside, batch.token_ids[wanted]
        if self.lm_head is not None:  # a token that the draft does not know ends what it can draft
            valid = valid & self.t2d[labels]
            labels = (self.t2d.long().cumsum(0) - 1)[labels]
        return Chains(documents, rows_of_places, labels, valid.long().cumprod(dim=1).bool())

    def forward(self, batch: Batch, chains: Chains, head: TargetHead) -> StepLoss:
        """The training loss: cross-entropy of every step, step i weighing `ttt_decay ** i`."""
        assert self.section is not None
        steps = chains.labels.shape[1]
        features = self.fc(batch.aux_hidden_states)
        parts = []
        for rows, first in chains.documents:
            tokens = batch.token_ids[rows]
            run = self._known(tokens, features[rows], head.embedding)
            outputs = []
            hidden = features[rows][first]
            own: list[Pair] = []
            for step in range(steps):
                # Beyond the document's end there is nothing to learn; any token will do.
                known_token = tokens[(first + 1 + step).clamp(max=len(tokens) - 1)]
                hidden = self._step(known_token, hidden, run, first, own, step, head.embedding)
                outputs.append(hidden)
            parts.append(torch.stack(outputs, dim=1))
        normed = self.norm(torch.cat(parts))  # (N, S, H)
        valid = chains.valid
        weights = (self.section.ttt_decay ** torch.arange(steps, device=valid.device)).expand(valid.shape)[valid]
        teacher = None
        if self.section.objective == "distill":
            before = chains.places[:, None] + torch.arange(steps, device=valid.device)
            teacher = make_teacher(head, batch.hidden_states, before[valid])
            if self.lm_head is not None:
                teacher = keep_known(teacher, self.t2d)
        lm_head = head.lm_head if self.lm_head is None else self.lm_head.weight
        loss_sum, hits, _ = fused_cross_entropy(normed[valid], lm_head, chains.labels[valid], weights.float(), teacher)
        right = torch.zeros_like(valid).masked_scatter(valid, hits)
        return StepLoss(
            loss_sum=loss_sum,
            num_slots=valid.sum(),
            right=right.sum(0),
            total=valid.sum(0),
            accepted=right.long().cumprod(1).sum(),
            num_blocks=torch.tensor(len(valid)),
        )

    def _known(self, tokens: torch.Tensor, features: torch.Tensor, embedding: torch.Tensor) -> Pair:
        """Keys and values of the known positions: position t takes token t+1, so that the last token has none."""
        positions = torch.arange(len(tokens) - 1, device=tokens.device)
        x = self.midlayer.input(functional.embedding(tokens[1:], embedding), features[:-1])
        return self._keys(x, positions)

    def _keys(self, x: torch.Tensor, positions: torch.Tensor) -> Pair:
        attention = self.midlayer.self_attn
        key = rotate(attention.k_proj(x).unflatten(-1, (attention.kv_heads, -1)), self.rope.at(positions))
        return key, attention.v_proj(x).unflatten(-1, (attention.kv_heads, -1))

    def _step(
        self,
        tokens: torch.Tensor,
        hidden: torch.Tensor,
        known: Pair,
        first: torch.Tensor,
        own: list[Pair],
        step: int,
        embedding: torch.Tensor,
    ) -> torch.Tensor:
        """One step of all chains of a document: their outputs `(N, H)`. Adds the chains' own keys to `own`."""
        attention, positions = self.midlayer.self_attn, first + step
        x = self.midlayer.input(functional.embedding(tokens, embedding), hidden)
        if step:  # step 0 stands on a known position, whose key is among those already
            own.append(self._keys(x, positions))
        query = rotate(attention.q_proj(x).unflatten(-1, (attention.heads, -1)), self.rope.at(positions))
        return self.midlayer.output(hidden, attention(query, known, first, own))

    @torch.inference_mode()
    def draft(self, sample: StoredSample, head: TargetHead) -> torch.Tensor:
        """The greedy chains from every position that serving could draft from: `(T, block_size - 1)`, -1 elsewhere."""
        return self.draft_logits(sample, head)[0]

    @torch.inference_mode()
    def draft_logits(self, sample: StoredSample, head: TargetHead) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """`draft`, and the logits `(N, V)` of each step of its N chains; over the tokens that it knows."""
        places = anchor_places(sample.loss_mask)
        num_tokens = self.config.block_size - 1
        drafted, logits = torch.full((sample.num_tokens, num_tokens), -1), []
        if len(places):
            device = head.lm_head.device
            token_ids, features = (
                sample.input_ids.long().to(device),
                self.fc(sample.aux_hidden_states.float().to(device)),
            )
            known = self._known(token_ids, features, head.embedding)
            first = places.to(device) - 1
            hidden, tokens, own = features[first], token_ids[first + 1], list[Pair]()
            for step in range(num_tokens):
                hidden = self._step(tokens, hidden, known, first, own, step, head.embedding)
                lm_head = head.lm_head if self.lm_head is None else self.lm_head.weight
                logits.append(functional.linear(self.norm(hidden), lm_head))
                tokens = logits[-1].argmax(-1)
                if self.lm_head is not None:
                    tokens = tokens + self.d2t[tokens]
                drafted[places, step] = tokens.cpu()
        return drafted, logits


def keep_known(teacher: Teacher, known: torch.Tensor) -> Teacher:
    """A teacher's distribution over the tokens `known (V,)` alone, summing to 1."""

    def restricted(rows: slice) -> torch.Tensor:
        q = teacher(rows)[:, known]
        return q / q.sum(-1, keepdim=True).clamp_min(1e-20)

    return restricted
