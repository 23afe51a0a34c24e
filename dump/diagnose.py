"""Name the defect of final states that do not predict the sample's tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import get_args

import torch

from contracts.sample_file import STATES, StoredSample
from target.final_norm import FinalNorm
from target.head import TargetHead

ENOUGH = 0.9
"""Share of the tokens that a hypothesis must predict."""
MOST = 0.6
"""Share that rounded states still predict."""


@torch.inference_mode()
def find_plain_defect(head: TargetHead, sample: StoredSample) -> str:
    """Return a defect that states may have although they predict their tokens; "" if there is none.

    Zero states make all logits equal, and a norm with weights near 1 hardly changes states that are already normed.
    """
    has_final, has_layers = (sample.has(name).to(sample.input_ids.device) for name in STATES)
    zero = (sample.aux_hidden_states == 0).all(-1) & has_layers
    if sample.hidden_states.shape[1]:
        zero |= (sample.hidden_states == 0).all(-1) & has_final
    if bool(zero.any()):
        return f"the states of {int(zero.sum())} of {len(zero)} tokens are all zero"
    if not sample.hidden_states.shape[1]:
        return ""
    states = sample.hidden_states[has_final].float()
    weights = {"no weights": torch.ones_like(head.norm), "rms": head.norm, "gemma": 1.0 + head.norm}
    for kind, weight in weights.items():
        usable = weight.abs() > 1e-3
        squares = (states[:, usable] / weight[usable]).square().mean(-1)
        if bool(((squares - 1).abs() < 0.02).all()):
            own = "" if kind in ("no weights", head.norm_kind) else f", and by a {kind} norm, not {head.norm_kind}"
            return f"the final state is normed already{own}, instead of un-normed"
    return ""


@torch.inference_mode()
def name_defect(head: TargetHead, sample: StoredSample, layer_ids: Sequence[int], tensor_parallel_size: int = 1) -> str:
    """Return the hypothesis under which the states predict the tokens, else the most likely one.

    `tensor_parallel_size` of the engine; 0 if it is unknown.
    """
    states = sample.hidden_states.float()
    places = sample.loss_mask.nonzero()[:, 0]
    tokens = sample.input_ids.long()

    def explains(logits: torch.Tensor, wanted: torch.Tensor) -> bool:
        return float((logits.argmax(-1) == wanted).float().mean()) >= ENOUGH

    own = float((head.logits(states[places - 1]).argmax(-1) == tokens[places]).float().mean())
    # States that predict most of the tokens have no other norm, which may predict them as well.
    norms = set(get_args(FinalNorm)) - {head.norm_kind} if own < MOST else ()
    for other in norms:
        if explains(replace(head, norm_kind=other).logits(states[places - 1]), tokens[places]):
            return f"the states fit a {other} norm, the target is read as having a {head.norm_kind} norm"
    for shift, words in ((1, "later"), (-1, "earlier")):
        inside = places[(places - 1 + shift >= 0) & (places - 1 + shift < len(states))]
        if len(inside) and explains(head.logits(states[inside - 1 + shift]), tokens[inside]):
            return f"the states are one token {words} than their tokens"
    width = states.shape[1]
    both = (sample.has("aux_hidden_states") & sample.has("hidden_states")).to(states.device)
    for number, layer_id in enumerate(layer_ids):
        aux = sample.aux_hidden_states[:, number * width : (number + 1) * width].float()
        if torch.equal(aux[both], states[both]):
            return f"the final state is the output of layer {layer_id}"
    if tensor_parallel_size != 1:
        ranks = f"the engine had {tensor_parallel_size} ranks" if tensor_parallel_size else "if the engine had several"
        return (
            f"they are partial sums of tensor parallelism ({ranks}, docs/tensor-parallel.md), or states of another "
            "conversation, layer or checkpoint"
        )
    if own >= MOST:
        return "they predict most of the tokens, so they are rounded: a quantized KV cache, or quantized weights"
    return "they are states of another conversation, of another layer or of another checkpoint of the target"
