"""The two sides of `train_step.py --method peagle`: our P-EAGLE step and speculators', K = `--block`.

The loss is the KL divergence to the target's distribution. Both compute the same rollouts: those that speculators
draws, without the few whose first position is in the prompt. Embeddings are frozen on both sides; speculators' default
trains them.

speculators supervises every position whose input token is generated, also the one after the last token: ours has a loss
mask that is shifted by one and a token more, which no other position sees.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from benchmarks import train_step_eagle3
from benchmarks.train_step_dflash import make_inputs, shared_fields
from benchmarks.train_step_dspark import list_entropies

if TYPE_CHECKING:
    from drafts.batch import Batch

Rollouts = tuple[torch.Tensor, torch.Tensor]
"""The first position and the depth of each row that is computed, in a sequence without its first token."""


def draw_rollouts(dims: argparse.Namespace) -> Rollouts:
    """Draw rollouts as speculators does, without those that begin in the prompt."""
    from speculators.models.peagle.data import generate_cod_sample_indices

    mask = (torch.arange(1, dims.seq) >= dims.prompt).long()[None]
    first, depth = generate_cod_sample_indices(dims.seq - 1, mask, dims.block)
    kept = (depth == 0) | (first + 1 >= dims.prompt)
    return first[kept], depth[kept]


def build_ours(ctx: dict[str, Any]) -> tuple[torch.nn.Module, Callable[[], torch.Tensor]]:
    """Return our model and its loss on `ctx["batch"]`. Draws speculators' rollouts unless `there` is false."""
    from drafts.peagle.config import PEagleConfig, PEagleSection
    from drafts.peagle.model import PEagle, draw_depths

    dims, state = ctx["dims"], ctx["state"]
    config = PEagleConfig(num_speculative_tokens=dims.block, **shared_fields(ctx))
    section = PEagleSection(
        num_speculative_tokens=dims.block, num_layers=dims.draft_layers, num_attention_heads=dims.heads,
        num_key_value_heads=dims.kv_heads, intermediate_size=dims.inter, num_anchors=dims.seq, objective="distill",
    )  # fmt: skip
    model = PEagle(config, section)
    model.load_state_dict({name: state[name] for name, _ in model.named_parameters()})
    head, packed = make_inputs(ctx, config.rms_norm_eps)
    entropies, places = list_entropies(head, packed.hidden_states), torch.arange(dims.prompt, dims.seq)
    longer = _lengthen(packed)

    def compute_loss() -> torch.Tensor:
        if ctx.get("there", True):
            first, depth = draw_rollouts(dims)
            depths = torch.zeros(dims.seq, dtype=torch.long).scatter_reduce(0, first + 1, depth, "amax")[places]
        else:
            depths = draw_depths(len(places), section, torch.Generator().manual_seed(0))
        rollouts = model.lay_out(longer.token_ids, longer.loss_mask, longer.lengths, [places], [depths])
        found = model(longer, rollouts, head)
        rows = (places[:, None] + torch.arange(dims.block)).flatten()[rollouts.slots]
        # Our loss, a cross-entropy, exceeds the KL divergence by the target's entropy.
        loss: torch.Tensor = (found.loss_sum - entropies[rows].sum()) / (found.num_slots + 1e-5)
        return loss

    return model, compute_loss


def _lengthen(batch: Batch) -> Batch:
    """Return the batch with one more token, and a mask that takes the tokens after those of the old one."""
    none = torch.zeros(1, dtype=torch.long)
    return replace(
        batch,
        token_ids=torch.cat([batch.token_ids, none]),
        loss_mask=torch.cat([none.bool(), batch.loss_mask]),
        aux_hidden_states=torch.cat([batch.aux_hidden_states, batch.aux_hidden_states[:1]]),
        hidden_states=torch.cat([batch.hidden_states, batch.hidden_states[:1]]),
        lengths=[len(batch.token_ids) + 1],
    )


def build_peer(ctx: dict[str, Any], model: Any) -> Callable[[], torch.Tensor]:
    """Return speculators' loss, as its trainer computes it, on `draw_rollouts`."""
    from speculators.losses import resolve_loss_config
    from speculators.models.eagle3.data import shift_batch
    from speculators.models.peagle import core

    dims = ctx["dims"]
    unpacked = {name: values[0] for name, values in ctx["batch"].items() if name != "document_ids"}
    shifted = shift_batch(unpacked | {"lengths": torch.tensor([dims.seq])})
    batch = {name: values[None] for name, values in shifted.items() if name != "lengths"}
    batch["document_ids"] = torch.zeros(1, dims.seq - 1, dtype=torch.long)
    call = {"loss_config": resolve_loss_config("kl_div", "eager"), "num_depths": dims.block}
    core.generate_cod_sample_indices = lambda **_: draw_rollouts(dims)

    def compute_loss() -> torch.Tensor:
        loss: torch.Tensor = model(**batch, **call)[1]
        return loss

    return compute_loss


def make_peer_model(dims: argparse.Namespace) -> Any:
    """Make speculators' random model."""
    from speculators.models.peagle.config import PEagleSpeculatorConfig
    from speculators.models.peagle.core import PEagleDraftModel

    config = PEagleSpeculatorConfig(
        transformer_layer_config=train_step_eagle3.make_llama_config(dims, dims.draft_layers),
        draft_vocab_size=dims.vocab, embed_requires_grad=False,
        eagle_aux_hidden_state_layer_ids=list(range(2, 2 + dims.n_aux)), mask_token_id=dims.vocab - 1,
    )  # fmt: skip
    return PEagleDraftModel(config)


def list_sizes(dims: argparse.Namespace) -> dict[str, tuple[int, ...]]:
    """Return the sizes of the draft's parameters, by speculators' names."""
    sizes = {**train_step_eagle3.list_sizes(dims), "mask_hidden": (1, 1, dims.n_aux * dims.hidden)}
    first = {name: size for name, size in sizes.items() if name.startswith("layers.0.")}
    for layer in range(1, dims.draft_layers):
        for name, size in first.items():
            is_input = name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight"))
            if not name.endswith(".hidden_norm.weight"):
                sizes[name.replace("layers.0.", f"layers.{layer}.")] = (size[0], dims.hidden) if is_input else size
    return sizes


def list_products(dims: argparse.Namespace) -> list[tuple[int, int, int, int]]:
    """Return (rows, in, out, times) of a step's matrix products, forward and backward, rollouts with their prefix."""
    hidden, positions = dims.hidden, dims.seq - dims.prompt
    q_size, kv_size = dims.heads * dims.head_dim, dims.kv_heads * dims.head_dim
    masks = sum(int(positions * max(0.7**depth, 0.2)) for depth in range(1, dims.block))
    shapes = [(dims.seq, dims.n_aux * hidden, hidden, 2)]
    for layer in range(dims.draft_layers):
        inner, is_last = (1 + (layer == 0)) * hidden, layer == dims.draft_layers - 1
        rows = (positions if is_last else dims.seq) + masks
        shapes += [(dims.seq + masks, inner, kv_size, 6), (rows, inner, q_size, 3), (rows, q_size, hidden, 3)]
        shapes += [(rows, hidden, dims.inter, 9), (rows, dims.head_dim, (dims.seq + dims.prompt) // 2, 5 * dims.heads)]
    return [*shapes, (positions + masks, hidden, dims.vocab, 2), (positions, hidden, dims.vocab, 1)]


def describe(dims: argparse.Namespace) -> str:
    """Return the dimensions that a result is reported with."""
    return f"seq {dims.seq}, K = {dims.block}, {dims.draft_layers} layers, vocabulary {dims.vocab}, kl_div"
