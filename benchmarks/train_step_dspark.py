"""The two sides of `train_step.py --method dspark`: our DSpark step and speculators', in the anchor layout.

The loss is speculators' default: the KL divergence between target and draft, and the cross-entropy of the confidence
with the acceptance probability. Not total variation: the sign in its gradient is decided by rounding where draft and
target nearly agree, so gradients of equal steps may differ.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from benchmarks import train_step_dflash
from benchmarks.train_step_dflash import draw_anchors, make_inputs, make_layer_config, shared_fields

if TYPE_CHECKING:
    from target.head import TargetHead

RANK = 64


def build_ours(ctx: dict[str, Any]) -> tuple[torch.nn.Module, Callable[[], torch.Tensor]]:
    """Return our model and its loss on `ctx["batch"]`. Draws speculators' anchors unless `there` is false."""
    from drafts.dspark.config import DSparkConfig, DSparkSection
    from drafts.dspark.model import DSpark
    from drafts.teacher import TeacherRows

    dims, state = ctx["dims"], ctx["state"]
    config = DSparkConfig(
        num_speculative_tokens=dims.block, sample_from_anchor=True, markov_rank=RANK, confidence_head=True,
        **shared_fields(ctx),
    )  # fmt: skip
    section = DSparkSection(
        num_attention_heads=dims.heads, num_key_value_heads=dims.kv_heads, intermediate_size=dims.inter,
        objective="distill", loss_decay=dims.gamma, num_anchors=dims.anchors,
    )  # fmt: skip
    model = DSpark(config, section)
    model.load_state_dict({name: state[name] for name, _ in model.named_parameters()})
    head, packed = make_inputs(ctx, config.rms_norm_eps)
    entropies = list_entropies(head, packed.hidden_states)

    def compute_loss() -> torch.Tensor:
        anchors = draw_anchors(ctx)
        blocks = model.lay_out(packed.token_ids, packed.loss_mask, [len(packed.token_ids)], [anchors])
        # speculators supervises slot k by the mask of the token before the one it predicts.
        places = anchors[:, None] + torch.arange(dims.block)
        valid = packed.loss_mask[places]
        slots = valid.view(-1).nonzero()[:, 0]
        teacher = TeacherRows.of_slots(places[valid])
        found = model(packed, replace(blocks, valid=valid, slots=slots, teacher=teacher), head)
        # Our loss, a cross-entropy, exceeds the KL divergence by the target's entropy.
        constant = (model.static_weights(slots) * entropies[places[valid]]).sum()
        loss: torch.Tensor = (found.loss_sum - constant) / (found.num_slots + 1e-5)
        return loss

    return model, compute_loss


def list_entropies(head: TargetHead, hidden_states: torch.Tensor) -> torch.Tensor:
    """Return the entropy of the target's distribution after each position: (T, H) -> (T,)."""
    parts = (head.logits(rows).log_softmax(-1) for rows in hidden_states.split(64))
    return torch.cat([-(log_p.exp() * log_p).sum(-1) for log_p in parts])


def build_peer(ctx: dict[str, Any], model: Any) -> Callable[[], torch.Tensor]:
    """Return speculators' loss, as its trainer computes it."""
    from speculators.losses import resolve_loss_config

    dims = ctx["dims"]
    call = {
        "loss_config": resolve_loss_config("kl_div", "eager"),
        "tv_loss_fn": resolve_loss_config("tv", "eager")["tv"][0], "gamma": dims.gamma,
        "max_anchors": dims.anchors, "per_position_loss_weight": "fixed-exp-decay",
    }  # fmt: skip

    def compute_loss() -> torch.Tensor:
        loss: torch.Tensor = model(**ctx["batch"], **call)[1]
        return loss

    return compute_loss


def make_peer_model(dims: argparse.Namespace) -> Any:
    """Make speculators' random model."""
    from speculators.models.dspark.config import DSparkSpeculatorConfig
    from speculators.models.dspark.core import DSparkDraftModel

    config = DSparkSpeculatorConfig(
        transformer_layer_config=make_layer_config(dims), draft_vocab_size=dims.vocab, block_size=dims.block,
        aux_hidden_state_layer_ids=list(range(2, 2 + dims.n_aux)), mask_token_id=dims.vocab - 1, markov_rank=RANK,
    )  # fmt: skip
    return DSparkDraftModel(config)


def list_sizes(dims: argparse.Namespace) -> dict[str, tuple[int, ...]]:
    """Return the sizes of the draft's parameters, by speculators' names."""
    return {
        **train_step_dflash.list_sizes(dims),
        "markov_head.markov_w1.weight": (dims.vocab, RANK),
        "markov_head.markov_w2.weight": (dims.vocab, RANK),
        "confidence_head.proj.weight": (1, dims.hidden + RANK),
        "confidence_head.proj.bias": (1,),
    }


def list_products(dims: argparse.Namespace) -> list[tuple[int, int, int, int]]:
    """Return (rows, in, out, times) of a step's matrix products, forward and backward, blocks with their prefix."""
    slots = dims.anchors * dims.block
    of_dflash = train_step_dflash.list_products(dims)
    return [*of_dflash, (slots, RANK, dims.vocab, 3)]


def describe(dims: argparse.Namespace) -> str:
    """Return the dimensions that a result is reported with."""
    return f"{train_step_dflash.describe(dims)}, rank {RANK}"
