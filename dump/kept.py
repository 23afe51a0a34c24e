"""What of a sample's states is stored: the part of the store's form that the recipe decides."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch

from common.errors import UserError
from contracts.sample_file import TOP_TOKENS, SampleForm, Spans, StoredSample, mask_of
from contracts.top_tokens import TopTokens, id_dtype
from drafts.moving import find_device
from drafts.places import predicting_spans, seen_spans, spans_of
from drafts.teacher import find_top_tokens
from recipe.recipe import Recipe
from target.final_norm import FinalNorm
from target.head import TargetHead, read_head
from target.section import TargetSection
from target.target import Target

SPAN_BYTES = 8
"""Bytes of a span in a file."""


@dataclass(frozen=True)
class HeadSource:
    """Where the target's norm and lm_head are. `final_norm`: the recipe's, over the config's."""

    path: Path
    final_norm: FinalNorm | None


@dataclass(frozen=True)
class Kept:
    """What is stored. `final_state`: the manifest's. `top_k`, `vocab_size` and `head`: for the most likely tokens.

    `unseen`: states that no block sees are stored, too; otherwise a block sees `reach` tokens back, or all.
    """

    final_state: str = "pre-norm"
    top_k: int = 0
    vocab_size: int = 0
    head: HeadSource | None = None
    unseen: bool = True
    reach: int | None = None

    @classmethod
    def of(cls, recipe: Recipe, target: Target) -> Kept:
        """Return what a recipe's `dump` section keeps. Raises UserError for more tokens than the target has."""
        section, is_top = recipe.dump, recipe.dump.final_states == "top-k"
        if is_top and section.top_k >= target.vocab_size:
            raise UserError(
                "dump.top_k",
                found=str(section.top_k),
                expected=f"fewer than the target's {target.vocab_size} tokens",
                fix="Lower it.",
            )
        unseen = section.unseen_states == "keep"
        return cls(
            section.final_state,
            section.top_k if is_top else 0,
            target.vocab_size if is_top else 0,
            HeadSource(target.path, target.norm_of_recipe) if is_top else None,
            unseen,
            None if unseen or recipe.train is None else recipe.train.draft.reach,
        )

    def trim(self, sample: StoredSample) -> StoredSample:
        """Return a captured sample as it is stored: its most likely tokens, and the spans of what is kept."""
        generated, spans = spans_of(sample.loss_mask), dict[str, Spans]()
        predicting = predicting_spans(generated)
        if not self.unseen:
            spans["aux_hidden_states"] = seen_spans(generated, self.reach)
            if self.final_state == "pre-norm":
                spans["hidden_states"] = predicting
        if self.head is None:
            return replace(sample, spans=spans)
        wanted = mask_of(predicting, sample.num_tokens).nonzero()[:, 0]
        found = _find_top(self.head, sample.hidden_states[wanted], self.top_k)
        shape = (sample.num_tokens, self.top_k)
        top = TopTokens(
            torch.zeros(shape, dtype=torch.int32).index_copy_(0, wanted, found.ids).to(id_dtype(self.vocab_size)),
            torch.zeros(shape[0], shape[1] + 1, dtype=torch.float16).index_copy_(0, wanted, found.log_probs),
        )
        return replace(sample, spans={**spans, TOP_TOKENS: predicting}, top=top)

    def num_bytes(self, form: SampleForm, num_tokens: int, loss_spans: Spans) -> int:
        """Return the bytes of the tensors of a sample with these loss spans."""
        if not form.is_reduced:
            return form.num_bytes(num_tokens)
        seen, predicting = seen_spans(loss_spans, self.reach), predicting_spans(loss_spans)
        num_seen, num_predicting = (sum(end - start for start, end in spans) for spans in (seen, predicting))
        return form.num_bytes(num_tokens, num_seen, num_predicting) + SPAN_BYTES * (len(seen) + len(predicting))


def _find_top(source: HeadSource, states: torch.Tensor, top_k: int) -> TopTokens:
    """Return the most likely tokens of final states `(N, H)`, computed where the process's device is.

    Raises UserError if a GPU has no room for the lm_head.
    """
    device = find_device()
    try:
        found = find_top_tokens(_load_head(source, device), states.to(device), top_k)
    except torch.OutOfMemoryError:
        raise UserError(
            f"dump.final_states top-k on {device}",
            found="no room for the lm_head and some logits in each of dump.writers processes",
            expected="memory that the engine leaves free",
            fix="Lower gpu-memory-utilization in dump.args, or set dump.writers to 1.",
        ) from None
    return TopTokens(found.ids.cpu(), found.log_probs.cpu())


@cache
def _load_head(source: HeadSource, device: torch.device) -> TargetHead:
    """Return norm and lm_head, read once by each process. The embedding is not needed."""
    head = read_head(Target.of(TargetSection(path=source.path, final_norm=source.final_norm)))
    return replace(head, embedding=head.lm_head).to(device)
