"""The two sides of `train_step.py --method eagle3`: our EAGLE3 step and speculators'.

Both unroll `--ttt-length` steps and end after the last token; step i weighs DECAY^i. `--loss ce`: cross-entropy with
the target's greedy tokens; `kl_div`: with its distribution. The full vocabulary; speculators' `norm_before_fc` and
`norm_output` are off.

speculators supervises every slot whose input token is generated: also the later steps of chains that begin in the
prompt, and the slots after the last token. Ours are replaced by those. Each step then has as many slots as there are
generated tokens, so speculators' mean over each step is our sum divided by that number.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.train_step_dflash import make_inputs

if TYPE_CHECKING:
    from target.head import TargetHead

DECAY = 0.8


def build_ours(ctx: dict[str, Any]) -> tuple[torch.nn.Module, Callable[[], torch.Tensor]]:
    """Return our model and its loss on `ctx["batch"]`."""
    from drafts.eagle3.config import Eagle3Config, Eagle3Section
    from drafts.eagle3.model import Eagle3
    from drafts.teacher import TeacherRows, teacher_argmax

    dims, state = ctx["dims"], ctx["state"]
    assert dims.prompt >= dims.ttt_length, "each step must have as many slots"
    config = Eagle3Config(
        hidden_size=dims.hidden, vocab_size=dims.vocab, num_target_layers=16, layer_ids=list(range(dims.n_aux)),
        num_speculative_tokens=3, ttt_length=dims.ttt_length, num_attention_heads=dims.heads,
        num_key_value_heads=dims.kv_heads, head_dim=dims.head_dim, intermediate_size=dims.inter, rms_norm_eps=1e-6,
        max_position_embeddings=4096, yarn=None, rope_theta=ctx["layer_config"].rope_parameters["rope_theta"],
        target_fingerprint="", store="",
    )  # fmt: skip
    section = Eagle3Section(
        num_attention_heads=dims.heads, num_key_value_heads=dims.kv_heads, intermediate_size=dims.inter,
        ttt_length=dims.ttt_length, ttt_step_loss_decay=DECAY, objective="tokens" if dims.loss == "ce" else "distill",
    )  # fmt: skip
    model = Eagle3(config, section)
    names = {name: name.replace("midlayer.", "layers.0.") for name, _ in model.named_parameters()}
    model.load_state_dict({name: state[peer_name] for name, peer_name in names.items()})
    head, packed = make_inputs(ctx, config.rms_norm_eps)
    token_ids, mask = packed.token_ids, packed.loss_mask
    constant = 0.0 if dims.loss == "ce" else weigh_entropy(dims, head, packed.hidden_states)

    def compute_loss() -> torch.Tensor:
        places = torch.arange(dims.prompt - dims.ttt_length + 1, dims.seq)
        chains = model.lay_out(token_ids, mask, [len(token_ids)], [places], dims.ttt_length)
        inputs = places[:, None] + torch.arange(dims.ttt_length)
        valid = (inputs >= dims.prompt) & (inputs < dims.seq)
        chains = replace(chains, valid=valid, slots=valid.view(-1).nonzero()[:, 0])
        if chains.teacher is not None:
            chains = replace(chains, teacher=TeacherRows.of_slots(inputs[valid]))
        if dims.loss == "ce":
            labels = teacher_argmax(head, packed.hidden_states, inputs.clamp(max=dims.seq - 1).flatten())
            chains = replace(chains, labels=labels.view(inputs.shape))
        loss: torch.Tensor = model(packed, chains, head).loss_sum / (dims.seq - dims.prompt + 1e-5) - constant
        return loss

    return model, compute_loss


def weigh_entropy(dims: argparse.Namespace, head: TargetHead, hidden_states: torch.Tensor) -> float:
    """Return by how much our loss, a cross-entropy, exceeds the KL divergence: the target's entropy."""
    entropy = 0.0
    for rows in hidden_states[dims.prompt :].split(64):
        log_p = head.logits(rows).log_softmax(-1)
        entropy -= float((log_p.exp() * log_p).sum())
    return entropy / (dims.seq - dims.prompt) * sum(DECAY**step for step in range(dims.ttt_length))


def build_peer(ctx: dict[str, Any], model: Any) -> Callable[[], torch.Tensor]:
    """Return speculators' loss, as its trainer computes it; its batches pair token t+1 with the states of token t."""
    from speculators.losses import resolve_loss_config
    from speculators.models.eagle3.data import shift_batch

    dims = ctx["dims"]
    unpacked = {name: values[0] for name, values in ctx["batch"].items() if name != "document_ids"}
    shifted = shift_batch(unpacked | {"lengths": torch.tensor([dims.seq])})
    batch = {name: values[None] for name, values in shifted.items() if name != "lengths"}
    batch["document_ids"] = torch.zeros(1, dims.seq - 1, dtype=torch.long)
    call = {
        "loss_config": resolve_loss_config(dims.loss, "eager"), "ttt_steps": dims.ttt_length,
        "ttt_step_loss_decay": DECAY,
    }  # fmt: skip

    def compute_loss() -> torch.Tensor:
        loss: torch.Tensor = model(**batch, **call)[1]
        return loss

    return compute_loss


def make_llama_config(dims: argparse.Namespace, num_layers: int) -> Any:
    """Make the config of speculators' layers."""
    from transformers.models.llama.modeling_llama import LlamaConfig

    layer_config = LlamaConfig(
        vocab_size=dims.vocab, hidden_size=dims.hidden, intermediate_size=dims.inter, num_hidden_layers=num_layers,
        num_attention_heads=dims.heads, num_key_value_heads=dims.kv_heads, head_dim=dims.head_dim, rms_norm_eps=1e-6,
        max_position_embeddings=4096, tie_word_embeddings=False, pad_token_id=None,
    )  # fmt: skip
    layer_config._attn_implementation = dims.peer_attention
    return layer_config


def make_peer_model(dims: argparse.Namespace) -> Any:
    """Make speculators' random model."""
    from speculators.models.eagle3 import Eagle3SpeculatorConfig
    from speculators.models.eagle3.core import Eagle3DraftModel

    config = Eagle3SpeculatorConfig(
        transformer_layer_config=make_llama_config(dims, 1), draft_vocab_size=dims.vocab,
        eagle_aux_hidden_state_layer_ids=list(range(2, 2 + dims.n_aux)),
    )  # fmt: skip
    return Eagle3DraftModel(config)


def list_sizes(dims: argparse.Namespace) -> dict[str, tuple[int, ...]]:
    """Return the sizes of the draft's parameters, by speculators' names."""
    hidden, queries, pairs = dims.hidden, dims.heads * dims.head_dim, dims.kv_heads * dims.head_dim
    parts: dict[str, tuple[int, ...]] = {
        "self_attn.q_proj": (queries, 2 * hidden), "self_attn.k_proj": (pairs, 2 * hidden),
        "self_attn.v_proj": (pairs, 2 * hidden), "self_attn.o_proj": (hidden, queries),
        "mlp.gate_proj": (dims.inter, hidden), "mlp.up_proj": (dims.inter, hidden),
        "mlp.down_proj": (hidden, dims.inter), "input_layernorm": (hidden,), "hidden_norm": (hidden,),
        "post_attention_layernorm": (hidden,),
    }  # fmt: skip
    sizes = {f"layers.0.{name}.weight": size for name, size in parts.items()}
    return {"fc.weight": (hidden, dims.n_aux * hidden), "norm.weight": (hidden,)} | sizes


def list_products(dims: argparse.Namespace) -> list[tuple[int, int, int, int]]:
    """Return (rows, in, out, times) of a step's matrix products, forward and backward, chains with their prefix."""
    hidden, positions = dims.hidden, dims.seq - dims.prompt
    q_size, kv_size = dims.heads * dims.head_dim, dims.kv_heads * dims.head_dim
    rows = positions + dims.ttt_length - 1
    shapes = [(dims.seq, dims.n_aux * hidden, hidden, 2), (dims.seq, 2 * hidden, kv_size, 6)]
    for _ in range(dims.ttt_length):
        shapes += [(rows, 2 * hidden, q_size, 3), (rows, 2 * hidden, kv_size, 6), (rows, q_size, hidden, 3)]
        shapes += [(rows, hidden, dims.inter, 9)]
        shapes += [(rows, dims.head_dim, (dims.seq + dims.prompt) // 2, 5 * dims.heads)]
        shapes += [(positions, hidden, dims.vocab, 2)]
    return [*shapes, (positions, hidden, dims.vocab, 1)]


def describe(dims: argparse.Namespace) -> str:
    """Return the dimensions that a result is reported with."""
    return f"seq {dims.seq}, {dims.ttt_length} steps, vocabulary {dims.vocab}, loss {dims.loss}"
