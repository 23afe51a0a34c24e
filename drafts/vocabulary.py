"""A draft's reduced vocabulary: the tokens that the target generates most, with an lm_head of the draft's own.

In the weights, as vLLM loads them: lm_head (n, H), which starts from the target's rows and is trained; d2t (n,) int64,
the target's token id minus the draft's; t2d (V,) bool, whether the draft has the target's token.

Shapes: n tokens of the draft, V of the target, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from drafts.batch import Batch
from drafts.draft import Draft
from drafts.feature_config import FeatureConfig
from drafts.teacher import Teacher, TeacherRows, make_teacher
from target.head import TargetHead


@dataclass(frozen=True)
class Vocabulary:
    """The kept tokens (n,), ascending, and the share of the supervised tokens that they cover."""

    kept: torch.Tensor
    coverage: float


def choose_vocabulary(counts: torch.Tensor, size: int) -> Vocabulary:
    """Return the `size` most supervised tokens from their `counts (V,)`; ties go to the lower id."""
    kept = counts.argsort(descending=True, stable=True)[:size].sort().values
    return Vocabulary(kept, float(counts[kept].sum() / counts.sum().clamp(min=1)))


def complete(d2t: torch.Tensor, t2d: torch.Tensor | None, vocab_size: int) -> tuple[torch.Tensor, str]:
    """Return t2d `(V,)` made from `d2t (n,)`, and what is wrong with the two; "" if nothing is."""
    ids, known = torch.arange(len(d2t)) + d2t.long(), torch.zeros(vocab_size, dtype=torch.bool)
    if not bool((ids.diff() > 0).all()) or int(ids[0]) < 0 or int(ids[-1]) >= vocab_size:
        return known, "that gives no ascending token ids of the target"
    known[ids] = True
    wrong = t2d is not None and not torch.equal(t2d.bool(), known)
    return known, "of other tokens than t2d" if wrong else ""


class VocabularyDraft(Draft):
    """A draft that has the target's vocabulary and lm_head, or a reduced vocabulary and its own lm_head."""

    config: FeatureConfig
    lm_head: nn.Linear | None
    d2t: torch.Tensor
    t2d: torch.Tensor

    def add_vocabulary(self) -> None:
        """Add lm_head, d2t and t2d, if the vocabulary is reduced; after all other parameters."""
        self.lm_head = None
        size = self.config.draft_vocab_size
        if size is not None:
            self.lm_head = nn.Linear(self.config.hidden_size, size, bias=False)
            self.register_buffer("d2t", torch.zeros(size, dtype=torch.long))
            self.register_buffer("t2d", torch.zeros(self.config.vocab_size, dtype=torch.bool))
            self._t2d_of_version = (-1, self.t2d)

    def outer_modules(self) -> list[nn.Module]:
        return [] if self.lm_head is None else [self.lm_head]

    def suppose_values(self) -> None:
        if self.lm_head is not None:  # as if the draft knew the first tokens
            self._t2d_of_version = (self.t2d._version, torch.arange(len(self.t2d)) < len(self.d2t))

    def initialize(self, seed: int, head: TargetHead, count_tokens: Callable[[], torch.Tensor]) -> str:
        super().initialize(seed, head, count_tokens)
        if self.lm_head is None:
            return ""
        vocabulary = choose_vocabulary(count_tokens(), self.lm_head.out_features)
        self.set_vocabulary(vocabulary.kept.to(self.d2t.device), head)
        return (
            f"the draft knows {len(vocabulary.kept)} of {self.config.vocab_size} tokens, {vocabulary.coverage:.2%} of "
            "the supervised ones"
        )

    def set_vocabulary(self, kept: torch.Tensor, head: TargetHead) -> None:
        """Restrict the vocabulary to the tokens `kept (n,)`, ascending."""
        assert self.lm_head is not None
        with torch.no_grad():
            self.lm_head.weight.copy_(head.lm_head[kept])
        self.d2t.copy_(kept - torch.arange(len(kept), device=kept.device))
        self.t2d.zero_()
        self.t2d[kept] = True

    def number_labels(self, tokens: torch.Tensor, valid: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the draft's ids of labels, and which labels are valid and known; on the CPU. Shapes: (...) each."""
        if self.lm_head is None:
            return tokens, valid
        known = self._known_tokens()
        return (known.long().cumsum(0) - 1)[tokens], valid & known[tokens]

    def _known_tokens(self) -> torch.Tensor:
        """Return `t2d` on the CPU, where steps are planned; copied again only after it has changed."""
        if self._t2d_of_version[0] != self.t2d._version:
            self._t2d_of_version = (self.t2d._version, self.t2d.cpu())
        return self._t2d_of_version[1]

    def known_ids(self) -> torch.Tensor:
        """Return the target's ids of the draft's tokens, ascending."""
        return torch.arange(len(self.d2t), device=self.d2t.device) + self.d2t

    def own_lm_head(self, head: TargetHead) -> torch.Tensor:
        """Return the rows of the draft's vocabulary: `(n, H)` or `(V, H)`."""
        return head.lm_head if self.lm_head is None else self.lm_head.weight

    def target_ids(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the target's ids of the draft's tokens `(...)`."""
        return tokens if self.lm_head is None else tokens + self.d2t[tokens]

    def teach(self, head: TargetHead, batch: Batch, rows: TeacherRows | None) -> Teacher | None:
        """Return the target's distribution over the draft's vocabulary; None if no state is learned from."""
        if rows is None:
            return None
        known = None if self.lm_head is None else self.known_ids()
        return make_teacher(head, batch.final, rows, known)

    def vocabulary_taps(self, logits: torch.Tensor, head: TargetHead) -> dict[str, torch.Tensor]:
        """Return the draft's logits over the target's vocabulary, and the reduced one. Shapes: logits (K, n)."""
        if self.lm_head is None:
            return {"draft_logits": logits}
        known = self.known_ids().cpu()
        logits = logits.new_full((len(logits), head.lm_head.shape[0]), float("-inf")).index_copy(1, known, logits)
        return {"vocabulary": known, "draft_logits": logits}
