"""A block draft computed directly, one block at a time, from a state dict: what the shared backbone must equal."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch.nn import functional

from contracts.store import StoredSample
from drafts.batch import Batch
from drafts.block_config import BlockConfig
from target.head import TargetHead

VOCABULARY, HIDDEN, LENGTH, MASK = 40, 16, 24, 39
DIMS = {
    "num_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 24,
}  # fmt: skip
SHARED = {
    "hidden_size": HIDDEN, "vocab_size": VOCABULARY, "num_target_layers": 6, "layer_ids": [1, 3],
    "mask_token_id": MASK, "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "max_position_embeddings": 64, "yarn": None,
    "target_fingerprint": "t", "store": "s",
}  # fmt: skip
Weights = Mapping[str, torch.Tensor]


def make_head() -> TargetHead:
    generator = torch.Generator().manual_seed(9)
    embedding, lm_head = (torch.randn(VOCABULARY, HIDDEN, generator=generator) for _ in range(2))
    return TargetHead(embedding, 0.3 * lm_head, torch.rand(HIDDEN, generator=generator), "rms", 1e-6)


def make_batch() -> Batch:
    """One document with two replies, at 5 to 12 and from 16 on."""
    generator = torch.Generator().manual_seed(1)
    mask = torch.zeros(LENGTH, dtype=torch.bool)
    mask[5:13] = mask[16:] = True
    return Batch(
        torch.randint(0, MASK, (LENGTH,), generator=generator),
        mask,
        torch.randn(LENGTH, 2 * HIDDEN, generator=generator),
        torch.randn(LENGTH, HIDDEN, generator=generator),
        [LENGTH],
        ["a"],
        [0],
    )


ANCHORS = [*range(5, 12), *range(16, 23)]
"""Positions of `make_batch` that are generated, as is the next one."""


def as_sample(batch: Batch) -> StoredSample:
    return StoredSample(batch.token_ids, batch.loss_mask, batch.hidden_states, batch.aux_hidden_states, {})


def spread(draft: torch.nn.Module) -> None:
    """Set all weights at random, far from the origin, where everything would look alike."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in draft.named_parameters():
            parameter.normal_(1.0 if name.endswith("norm.weight") else 0.0, 0.3, generator=generator)


def rms(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def turn(x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Rotate heads `(rows, heads, D)`."""
    half = x.shape[-1] // 2
    angles = (positions[:, None] * 10000.0 ** (-torch.arange(half) / half))[:, None]
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], dim=-1)


def convolve_slowly(z: torch.Tensor, x: torch.Tensor, weights: Weights, name: str, side: int) -> torch.Tensor:
    """Convolve one block's rows `z (B, H)`, with the dynamic kernels of `x (B, H)`, number by number."""
    base, projection = weights[f"{name}.base_kernel"], weights[f"{name}.kernel_projection.weight"]
    _, taps, width = base.shape
    groups = len(projection) // (2 * taps)
    rows = []
    for i in range(len(z)):
        dynamic = projection @ x[i]
        sums = []
        for c in range(width):
            kernel = [
                base[side, t, c] + dynamic[(side * taps + t) * groups + c // (width // groups)] for t in range(taps)
            ]
            sums.append(sum((kernel[t] * z[i - t, c] for t in range(min(taps, i + 1))), torch.zeros(())))
        rows.append(torch.stack(sums))
    return torch.stack(rows)


def block_states(
    config: BlockConfig, weights: Weights, batch: Batch, anchor: int, head: TargetHead
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the states of one block's slots after the anchor's, (K, H), and the context's features (anchor, H)."""
    heads, kv_heads, eps = config.num_attention_heads, config.num_key_value_heads, config.rms_norm_eps
    assert eps == 1e-6
    context = rms(batch.aux_hidden_states[:anchor] @ weights["fc.weight"].T, weights["hidden_norm.weight"])
    ids = torch.tensor([int(batch.token_ids[anchor]), *[MASK] * config.num_draft_tokens])
    h = head.embedding[ids]
    place = torch.arange(anchor + len(ids))
    for number in range(config.num_layers):
        w = {name.removeprefix(f"layers.{number}."): value for name, value in weights.items()}
        normed = x = rms(h, w["input_layernorm.weight"])
        if config.convolution:
            x = convolve_slowly(x, normed, w, "attention_conv", 0)
        everything = torch.cat([context, x])
        query, key, value = (
            (rows @ w[f"self_attn.{name}_proj.weight"].T).unflatten(-1, (count, -1))
            for name, rows, count in (("q", x, heads), ("k", everything, kv_heads), ("v", everything, kv_heads))
        )
        query = turn(rms(query, w["self_attn.q_norm.weight"]), place[anchor:])
        key = turn(rms(key, w["self_attn.k_norm.weight"]), place)
        key, value = (part.repeat_interleave(heads // kv_heads, 1) for part in (key, value))
        shares = (torch.einsum("qhd,khd->hqk", query, key) / config.head_dim**0.5).softmax(-1)
        out = torch.einsum("hqk,khd->qhd", shares, value).flatten(1) @ w["self_attn.o_proj.weight"].T
        h = h + (convolve_slowly(out, normed, w, "attention_conv", 1) if config.convolution else out)
        normed = x = rms(h, w["post_attention_layernorm.weight"])
        if config.convolution:
            x = convolve_slowly(x, normed, w, "mlp_conv", 0)
        gate = functional.silu(x @ w["mlp.gate_proj.weight"].T)
        out = (gate * (x @ w["mlp.up_proj.weight"].T)) @ w["mlp.down_proj.weight"].T
        h = h + (convolve_slowly(out, normed, w, "mlp_conv", 1) if config.convolution else out)
    return rms(h, weights["norm.weight"])[1:], context
