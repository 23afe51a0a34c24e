"""The two sides of `train_step.py --method dflash`: our DFlash step and speculators'.

Both compute the labels, the target's greedy tokens, from its final states.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from drafts.batch import Batch
    from target.head import TargetHead


def make_inputs(ctx: dict[str, Any], eps: float) -> tuple[TargetHead, Batch]:
    """Return the target's head and the batch, as our drafts take them."""
    from drafts.batch import Batch
    from target.head import TargetHead

    state, batch = ctx["state"], ctx["batch"]
    head = TargetHead(state["embed_tokens.weight"], state["lm_head.weight"], state["verifier_norm.weight"], "rms", eps)
    token_ids, mask = batch["input_ids"][0], batch["loss_mask"][0].bool()
    packed = Batch(
        token_ids, mask, batch["hidden_states"][0].float(), batch["verifier_last_hidden_states"][0].float(),
        [len(token_ids)], [""], [0],
    )  # fmt: skip
    return head, packed


def shared_fields(ctx: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of our config that block drafts share."""
    dims = ctx["dims"]
    return {
        "hidden_size": dims.hidden, "vocab_size": dims.vocab, "num_target_layers": 16,
        "layer_ids": list(range(dims.n_aux)), "mask_token_id": ctx["mask_token_id"], "num_layers": dims.draft_layers,
        "num_attention_heads": dims.heads, "num_key_value_heads": dims.kv_heads, "head_dim": dims.head_dim,
        "intermediate_size": dims.inter, "rms_norm_eps": 1e-6, "max_position_embeddings": 4096, "yarn": None,
        "rope_theta": ctx["layer_config"].rope_parameters["rope_theta"], "target_fingerprint": "", "store": "",
    }  # fmt: skip


def draw_anchors(ctx: dict[str, Any]) -> torch.Tensor:
    """Draw anchors as speculators does, or any where `there` is false, without importing it."""
    dims = ctx["dims"]
    if not ctx.get("there", True):
        return torch.randperm(dims.seq - dims.prompt - dims.block)[: dims.anchors].sort().values + dims.prompt
    from speculators.models.dflash.utils import select_anchors

    anchors, valid = select_anchors(ctx["batch"]["loss_mask"], dims.anchors, dims.block)
    drawn: torch.Tensor = anchors.flatten()[valid.flatten()].sort().values
    return drawn


def build_ours(ctx: dict[str, Any]) -> tuple[torch.nn.Module, Callable[[], torch.Tensor]]:
    """Return our model and its loss on `ctx["batch"]`. Draws speculators' anchors unless `there` is false."""
    from drafts.dflash.config import DFlashConfig, DFlashSection
    from drafts.dflash.model import DFlash
    from drafts.teacher import teacher_argmax

    dims, state = ctx["dims"], ctx["state"]
    config = DFlashConfig(block_size=dims.block, **shared_fields(ctx))
    section = DFlashSection(
        num_attention_heads=dims.heads, num_key_value_heads=dims.kv_heads, intermediate_size=dims.inter,
        slot_weights="decay", loss_decay=dims.gamma, num_anchors=dims.anchors,  # as build_peer sets it
    )  # fmt: skip
    model = DFlash(config, section)
    model.load_state_dict({name: state[name] for name, _ in model.named_parameters()})
    head, packed = make_inputs(ctx, config.rms_norm_eps)
    token_ids, mask = packed.token_ids, packed.loss_mask

    def compute_loss() -> torch.Tensor:
        anchors = draw_anchors(ctx)
        blocks = model.lay_out(token_ids, mask, [len(token_ids)], [anchors])
        places = anchors[:, None] + torch.arange(dims.block - 1)
        labels = teacher_argmax(head, packed.hidden_states, places.flatten()).view(places.shape)
        found = model(packed, replace(blocks, labels=labels), head)
        loss: torch.Tensor = found.loss_sum / (found.num_slots + 1e-5)
        return loss

    return model, compute_loss


def build_peer(ctx: dict[str, Any], model: Any) -> Callable[[], torch.Tensor]:
    """Return speculators' loss, as its trainer computes it."""
    from speculators.losses import resolve_loss_config

    dims = ctx["dims"]
    call = {
        "loss_config": resolve_loss_config("ce", "eager"), "gamma": dims.gamma, "max_anchors": dims.anchors,
        "per_position_loss_weight": "fixed-exp-decay",
    }  # fmt: skip

    def compute_loss() -> torch.Tensor:
        loss: torch.Tensor = model(**ctx["batch"], **call)[1]
        return loss

    return compute_loss


def make_layer_config(dims: argparse.Namespace) -> Any:
    """Make the config of speculators' layers."""
    from transformers.models.qwen3.modeling_qwen3 import Qwen3Config

    layer_config = Qwen3Config(
        vocab_size=dims.vocab, hidden_size=dims.hidden, intermediate_size=dims.inter,
        num_hidden_layers=dims.draft_layers, num_attention_heads=dims.heads, num_key_value_heads=dims.kv_heads,
        head_dim=dims.head_dim, max_position_embeddings=4096, tie_word_embeddings=False, use_sliding_window=False,
        layer_types=["full_attention"] * dims.draft_layers,
    )  # fmt: skip
    layer_config._attn_implementation = "sdpa"
    return layer_config


def make_peer_model(dims: argparse.Namespace) -> Any:
    """Make speculators' random model."""
    from speculators.models.dflash import DFlashSpeculatorConfig
    from speculators.models.dflash.core import DFlashDraftModel

    config = DFlashSpeculatorConfig(
        transformer_layer_config=make_layer_config(dims), draft_vocab_size=dims.vocab, block_size=dims.block,
        aux_hidden_state_layer_ids=list(range(2, 2 + dims.n_aux)), mask_token_id=dims.vocab - 1,
    )  # fmt: skip
    return DFlashDraftModel(config)


def list_sizes(dims: argparse.Namespace) -> dict[str, tuple[int, ...]]:
    """Return the sizes of the draft's parameters, by speculators' names."""
    hidden, queries, pairs = dims.hidden, dims.heads * dims.head_dim, dims.kv_heads * dims.head_dim
    sizes: dict[str, tuple[int, ...]] = {
        "fc.weight": (hidden, dims.n_aux * hidden), "hidden_norm.weight": (hidden,), "norm.weight": (hidden,),
    }  # fmt: skip
    for layer in range(dims.draft_layers):
        parts = {
            "self_attn.q_proj": (queries, hidden), "self_attn.k_proj": (pairs, hidden),
            "self_attn.v_proj": (pairs, hidden), "self_attn.o_proj": (hidden, queries),
            "self_attn.q_norm": (dims.head_dim,), "self_attn.k_norm": (dims.head_dim,),
            "mlp.gate_proj": (dims.inter, hidden), "mlp.up_proj": (dims.inter, hidden),
            "mlp.down_proj": (hidden, dims.inter), "input_layernorm": (hidden,),
            "post_attention_layernorm": (hidden,),
        }  # fmt: skip
        sizes |= {f"layers.{layer}.{name}.weight": size for name, size in parts.items()}
    return sizes


def list_products(dims: argparse.Namespace) -> list[tuple[int, int, int, int]]:
    """Return (rows, in, out, times) of a step's matrix products, forward and backward, blocks with their prefix."""
    queries, slots, hidden = dims.anchors * dims.block, dims.anchors * (dims.block - 1), dims.hidden
    q_size, kv_size = dims.heads * dims.head_dim, dims.kv_heads * dims.head_dim
    shapes = [(dims.seq, dims.n_aux * hidden, hidden, 2)]  # fc has no gradient of its input
    for layer in range(dims.draft_layers):
        asked = slots if layer == dims.draft_layers - 1 else queries
        inputs, asking = (dims.anchors + 1, dims.anchors + 1) if layer == 0 else (queries, asked)  # one mask for all
        shapes += [(inputs, hidden, kv_size, 6), (dims.seq, hidden, kv_size, 6), (asking, hidden, q_size, 3)]
        shapes += [(asked, q_size, hidden, 3), (asked, hidden, dims.inter, 9)]
        prefix = (dims.seq + dims.prompt) // 2 + dims.block
        shapes += [(asked, dims.head_dim, prefix, 5 * dims.heads)]
    return [*shapes, (slots, hidden, dims.vocab, 2), (min(slots, dims.seq - dims.prompt), hidden, dims.vocab, 1)]


def describe(dims: argparse.Namespace) -> str:
    """Return the dimensions that a result is reported with."""
    return f"seq {dims.seq}, {dims.anchors} anchors, vocabulary {dims.vocab}"
