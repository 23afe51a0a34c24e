"""The head of LiLiCorr: a block's candidates attend to each other, then pairs of neighbors are scored.

A candidate's first state is the sum of its projected embedding, its slot's projected state, an MLP of five features of
its log-probability l (l, exp l, l - largest l of the slot, rank / (k - 1), whether it is the first), and embeddings of
slot and rank. After the layers, with x a candidate's state and a the normed, projected features of the last context
token:
    e = silu(W [x; a; x * a]); out, in = unit vectors of (O e, I e); start = unit vector of S a
    score of candidate j in the first slot: s * <start, in_j>; of j after i in the slot before: s * <out_i, in_j>
The candidates' logits are not added: they enter by the features only.

Source: LiLiCorr (arXiv 2608.20530) as vLLM serves it (vllm/model_executor/models/lilicorr.py), whose parameter names
these are. Shapes: A blocks, K slots, k candidates, H the draft's hidden size, h the head's.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional

from drafts.draft import as_input
from drafts.layers import RMSNorm
from drafts.lilicorr.config import LiLiCorrConfig

NUM_FEATURES = 5


class Lattice(NamedTuple):
    """Candidates of blocks. Shapes: embeddings (A, K, k, H), log_probs (A, K, k), descending, hidden (A, K, H).

    `context` (A, H): the backbone's features of the last context token; `has_context` (A,): whether there is one.
    """

    embeddings: torch.Tensor
    log_probs: torch.Tensor
    hidden: torch.Tensor
    context: torch.Tensor
    has_context: torch.Tensor


class LatticeMLP(nn.Module):
    """`down_proj(silu(up_proj(x)))`, with biases."""

    def __init__(self, size: int, width: int, output_size: int) -> None:
        super().__init__()
        self.up_proj = nn.Linear(size, width)
        self.down_proj = nn.Linear(width, output_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        product: torch.Tensor = self.down_proj(functional.silu(self.up_proj(x)))
        return product


class LatticeAttention(nn.Module):
    """Attention among all candidates of a block, with an additive bias."""

    def __init__(self, size: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * size, size))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * size))
        self.out_proj = nn.Linear(size, size)

    def forward(self, x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        """Shapes: x (A, K*k, h), bias (heads, K*k, K*k) -> (A, K*k, h)."""
        parts = functional.linear(x, self.in_proj_weight, self.in_proj_bias).chunk(3, dim=-1)
        query, key, value = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        # torch's own attention gives no gradient for the bias if there are no blocks.
        shares = (query * query.shape[-1] ** -0.5 @ key.transpose(-1, -2) + bias).softmax(-1)
        projected: torch.Tensor = self.out_proj((shares.to(value.dtype) @ value).transpose(1, 2).flatten(2))
        return projected


class LatticeLayer(nn.Module):
    """One pre-norm layer of the head."""

    def __init__(self, config: LiLiCorrConfig) -> None:
        super().__init__()
        size = config.lilicorr_hidden_size
        self.attn_norm = RMSNorm(size, eps=config.rms_norm_eps)
        self.attn = LatticeAttention(size, config.lilicorr_num_heads)
        self.mlp_norm = RMSNorm(size, eps=config.rms_norm_eps)
        self.mlp = LatticeMLP(size, int(size * config.lilicorr_mlp_ratio), size)

    def forward(self, x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(self.attn_norm(x), bias)
        y: torch.Tensor = x + self.mlp(self.mlp_norm(x))
        return y


class LiLiCorrHead(nn.Module):
    """Scores of each slot's candidates after each candidate of the slot before."""

    def __init__(self, config: LiLiCorrConfig) -> None:
        super().__init__()
        self.config = config
        hidden, size, factors = config.hidden_size, config.lilicorr_hidden_size, config.lilicorr_factor_dim
        self.token_proj = nn.Identity() if hidden == size else nn.Linear(hidden, size)
        self.pass_hidden_proj = nn.Linear(hidden, size)
        self.feature_norm = nn.LayerNorm(NUM_FEATURES)
        self.feature_mlp = LatticeMLP(NUM_FEATURES, size, size)
        self.slot_embedding = nn.Parameter(torch.empty(1, 1, config.num_draft_tokens, 1, size))
        self.rank_embedding = nn.Parameter(torch.empty(1, 1, 1, config.lilicorr_candidate_topk, size))
        self.relative_slot_bias = nn.Parameter(torch.empty(config.lilicorr_num_heads, 2 * config.block_size - 1))
        self.same_slot_bias = nn.Parameter(torch.empty(config.lilicorr_num_heads))
        self.context_proj = nn.Linear(hidden, size)
        self.layers = nn.ModuleList(LatticeLayer(config) for _ in range(config.lilicorr_num_layers))
        self.output_norm = RMSNorm(size, eps=config.rms_norm_eps)
        self.anchor_norm = RMSNorm(size, eps=config.rms_norm_eps)
        self.factor_input_proj = nn.Linear(3 * size, size)
        self.out_head = nn.Linear(size, factors)
        self.in_head = nn.Linear(size, factors)
        self.anchor_out_head = nn.Linear(size, factors)

    @torch.no_grad()
    def zero_biases(self) -> None:
        """Set all biases, and the embeddings of slots and ranks, to 0."""
        for name, parameter in self.named_parameters():
            if name.endswith(("bias", "_embedding")):
                parameter.zero_()

    def forward(self, lattice: Lattice) -> torch.Tensor:
        """Return the scores in fp32, (A, K, k, k): dimension 2 is the candidate before, equal in the first slot."""
        config, shape = self.config, lattice.log_probs.shape
        x = self._first_states(lattice).flatten(1, 2)
        bias = self._attention_bias(x.device)
        for layer in self.layers:
            x = layer(x, bias)
        x = self.output_norm(x).unflatten(1, shape[1:])
        anchor = self.context_proj(lattice.context)
        anchor = self.anchor_norm(anchor * lattice.has_context[:, None].to(anchor.dtype))
        joined = functional.silu(self._join(x, anchor[:, None, None]))
        out, entering = (self._unit(head(joined)) for head in (self.out_head, self.in_head))
        start = self._unit(self.anchor_out_head(anchor))[:, None, None]
        first = (start * entering[:, :1]).float().sum(-1)[:, :, None].expand(-1, -1, shape[2], -1)
        later = (out[:, :-1] @ entering[:, 1:].transpose(-1, -2)).float()
        return config.lilicorr_logit_scale * torch.cat([first, later], dim=1)

    def _first_states(self, lattice: Lattice) -> torch.Tensor:
        """Return the candidates' states before the layers, (A, K, k, h)."""
        log_probs = lattice.log_probs.float()
        ranks = torch.arange(log_probs.shape[-1], device=log_probs.device)
        per_rank = (ranks / (len(ranks) - 1), (ranks == 0).float())
        gap = log_probs - log_probs.amax(-1, keepdim=True)
        features = torch.stack([log_probs, log_probs.exp(), gap, *(row.expand_as(gap) for row in per_rank)], dim=-1)
        weight = self.pass_hidden_proj.weight
        x = self.token_proj(as_input(lattice.embeddings, weight))
        x = x + self.pass_hidden_proj(as_input(lattice.hidden, weight)).unsqueeze(2)
        x = x + self.feature_mlp(self.feature_norm(as_input(features, weight)))
        states: torch.Tensor = x + (self.slot_embedding + self.rank_embedding)[0].to(x.dtype)
        return states

    def _attention_bias(self, device: torch.device) -> torch.Tensor:
        """Return the bias of each head by the distance of the slots, (heads, K*k, K*k)."""
        config = self.config
        slots = torch.arange(config.num_draft_tokens, device=device)
        slots = slots.repeat_interleave(config.lilicorr_candidate_topk)
        apart = slots[:, None] - slots
        same = (apart == 0).to(self.same_slot_bias.dtype) * self.same_slot_bias[:, None, None]
        return self.relative_slot_bias[:, apart + config.block_size - 1] + same

    def _join(self, x: torch.Tensor, anchor: torch.Tensor) -> torch.Tensor:
        """Return `factor_input_proj([x; anchor; x * anchor])` without making that tensor."""
        of_x, of_anchor, of_both = self.factor_input_proj.weight.chunk(3, dim=1)
        joined = functional.linear(x, of_x, self.factor_input_proj.bias) + functional.linear(anchor, of_anchor)
        return joined + functional.linear(x * anchor, of_both)

    def _unit(self, x: torch.Tensor) -> torch.Tensor:
        return functional.normalize(x, dim=-1, eps=self.config.lilicorr_vector_eps)
