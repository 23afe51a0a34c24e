"""The terms of training objectives: functions of a draft's distribution, the target's, and the generated token.

Of a target that is known by its top k tokens alone, both distributions have k+1 outcomes: these tokens, and any other
one. Terms are those of the two coarser distributions, of which every f-divergence (KL, reverse KL, total variation) is
at most that of the finer ones (data processing inequality); the acceptance probability is at least theirs. `tokens` and
`top_k_kl` are exact. Leaving the other tokens out, with or without renormalizing, would teach a distribution with too
little mass in the tail (arXiv 2503.16870).

With d the draft's distribution and t the target's at a slot, a = sum_v min(d_v, t_v) is the probability that the
slot's draft token is accepted if it is drawn from d; total variation is 1 - a. A term returns each row's loss and its
gradient by the draft's logits. Names are those of the recipe's `train.draft.objective`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch

from drafts.method import TOKENS, DraftSection, ObjectiveName
from drafts.teacher import Probabilities, TopProbabilities

SMALLEST = 1e-5
"""Acceptance probabilities are not taken to be smaller in a logarithm or a divisor."""

IMPOSSIBLE = -1e4
"""The log-probability of what has probability 0: finite, so that its product with 0 is 0."""

RowsResult = tuple[torch.Tensor, torch.Tensor]
"""Losses (n,) and their gradients by the logits (n, V)."""


@dataclass
class Rows:
    """One chunk of slots. Shapes: log_d and t (n, V), labels (n,). `top_k`, `lk_eta`: of the terms that have them.

    `has_rest`: the last of the V columns stands for all tokens that have no column.
    """

    log_d: torch.Tensor
    t: torch.Tensor | None
    labels: torch.Tensor
    top_k: int = 0
    lk_eta: float = 0.0
    has_rest: bool = False

    @cached_property
    def d(self) -> torch.Tensor:
        """The draft's probabilities."""
        return self.log_d.exp()

    @property
    def teacher(self) -> torch.Tensor:
        """The target's probabilities."""
        assert self.t is not None
        return self.t

    @cached_property
    def accepted(self) -> torch.Tensor:
        """The probability that each slot's draft token is accepted, (n,)."""
        return torch.minimum(self.d, self.teacher).sum(-1)

    @cached_property
    def distance_gradient(self) -> torch.Tensor:
        """The gradient of total variation by the logits: d * (s - <d, s>) with s = sign(d - t) / 2."""
        slope = torch.sub(self.d, self.teacher).sign_().mul_(0.5)
        mean = (self.d * slope).sum(-1, keepdim=True)  # vecdot would round to bf16 under autocast
        return slope.sub_(mean).mul_(self.d)


def cross_entropy(rows: Rows) -> RowsResult:
    """-log d(generated token)."""
    place = rows.labels[:, None]
    gradient = rows.d.clone()
    gradient.scatter_add_(1, place, gradient.new_full((len(gradient), 1), -1.0))
    return -rows.log_d.gather(1, place)[:, 0], gradient


def distillation(rows: Rows) -> RowsResult:
    """-sum_v t log d: the forward KL divergence up to a constant."""
    return -(rows.teacher * rows.log_d).sum(-1), rows.d - rows.teacher


def reverse_kl(rows: Rows) -> RowsResult:
    """sum_v d (log d - log t)."""
    ratio = rows.log_d - rows.teacher.clamp(min=torch.finfo(rows.log_d.dtype).tiny).log()
    losses = (rows.d * ratio).sum(-1)
    return losses, ratio.sub_(losses[:, None]).mul_(rows.d)


def total_variation(rows: Rows) -> RowsResult:
    """0.5 * sum_v |d - t| = 1 - a."""
    return 1.0 - rows.accepted, rows.distance_gradient


def negative_log_acceptance(rows: Rows) -> RowsResult:
    """-log a (LK-alpha of arXiv 2602.23881)."""
    accepted = rows.accepted.clamp(min=SMALLEST)
    return -accepted.log(), rows.distance_gradient / accepted[:, None]


def lk_hybrid(rows: Rows) -> RowsResult:
    """l * KL(t || d) + (1 - l) * TV with l = exp(-eta * a), a constant for the gradient (arXiv 2602.23881)."""
    share = torch.exp(-rows.lk_eta * rows.accepted)
    logs = rows.teacher.clamp(min=torch.finfo(rows.log_d.dtype).tiny).log().sub_(rows.log_d)
    divergence = (rows.teacher * logs).sum(-1)
    losses = share * divergence + (1.0 - share) * (1.0 - rows.accepted)
    gradient = torch.sub(rows.d, rows.teacher).mul_(share[:, None])
    return losses, gradient.add_(rows.distance_gradient * (1.0 - share)[:, None])


def top_k_kl(rows: Rows) -> RowsResult:
    """sum over the target's k most likely tokens of t (log t - log d), without renormalizing either."""
    t = rows.teacher[:, :-1] if rows.has_rest else rows.teacher
    t, places = t.topk(min(rows.top_k, t.shape[-1]), dim=-1)
    losses = (t * (t.clamp(min=torch.finfo(t.dtype).tiny).log() - rows.log_d.gather(1, places))).sum(-1)
    gradient = rows.d * t.sum(-1, keepdim=True)
    return losses, gradient.scatter_add_(1, places, -t)


TERMS: Mapping[ObjectiveName, Callable[[Rows], RowsResult]] = {
    TOKENS: cross_entropy,
    "distill": distillation,
    "reverse_kl": reverse_kl,
    "tv": total_variation,
    "nla": negative_log_acceptance,
    "lk_hybrid": lk_hybrid,
    "top_k_kl": top_k_kl,
}


@dataclass(frozen=True)
class Objective:
    """A weighted sum of terms. `top_k`, `lk_eta`: see `top_k_kl` and `lk_hybrid`."""

    weights: Mapping[ObjectiveName, float] = field(default_factory=lambda: {TOKENS: 1.0})
    top_k: int = 10
    lk_eta: float = 3.0

    @classmethod
    def of(cls, section: DraftSection) -> Objective:
        """Return the objective of a recipe's `train.draft`."""
        return cls(section.objective_weights, section.objective_top_k, section.lk_eta)

    @property
    def single_term(self) -> ObjectiveName | None:
        """The only term, if its weight is 1."""
        return next(iter(self.weights)) if list(self.weights.values()) == [1.0] else None

    def compute(
        self, log_d: torch.Tensor, t: Probabilities | None, labels: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
        """Return losses, acceptance probabilities (None without `t`) and the gradient by the logits.

        Shapes: log_d and t (n, V), labels (n,) -> (n,), (n,), (n, V).
        """
        if isinstance(t, TopProbabilities):
            return self._compute_coarse(log_d, t, labels)
        rows = Rows(log_d, t, labels, self.top_k, self.lk_eta)
        (name, weight), *others = self.weights.items()
        losses, gradient = TERMS[name](rows)
        if weight != 1.0:  # not in place: another term may need the same tensor
            losses, gradient = losses * weight, gradient * weight
        for name, weight in others:
            more, slope = TERMS[name](rows)
            losses.add_(more, alpha=weight)
            gradient.add_(slope, alpha=weight)
        return losses, None if t is None else rows.accepted, gradient

    def _compute_coarse(
        self, log_d: torch.Tensor, top: TopProbabilities, labels: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        coarse = Coarse.of(log_d, top)
        rows = Rows(coarse.log_d, top.t, labels, self.top_k, self.lk_eta, has_rest=True)
        losses, slope = torch.zeros_like(log_d[:, 0]), torch.zeros_like(coarse.log_d)
        for name, weight in self.weights.items():
            if name != TOKENS:
                more, gradient = TERMS[name](rows)
                losses.add_(more, alpha=weight)
                slope.add_(gradient, alpha=weight)
        found = coarse.spread(slope)
        if TOKENS in self.weights:
            more, gradient = cross_entropy(Rows(log_d, None, labels))
            losses.add_(more, alpha=self.weights[TOKENS])
            found.add_(gradient, alpha=self.weights[TOKENS])
        return losses, rows.accepted, found


@dataclass(frozen=True)
class Coarse:
    """A draft's distribution over the target's top k tokens and the rest.

    Shapes: log_d (n, k+1), `IMPOSSIBLE` for tokens that the draft does not have; in_rest (n, V), each token's
    probability if the draft chooses one of the rest, 0 for the top k.
    """

    log_d: torch.Tensor
    in_rest: torch.Tensor
    top: TopProbabilities

    @classmethod
    def of(cls, log_d: torch.Tensor, top: TopProbabilities) -> Coarse:
        """Return the coarser distribution of `log_d (n, V)`."""
        own = log_d.gather(1, top.columns).masked_fill(~top.known, IMPOSSIBLE)
        hidden = torch.zeros_like(own).masked_fill(top.known, float("-inf"))
        # Tokens that the draft does not have add 0 to column 0.
        others = log_d.scatter_add(1, top.columns, hidden)
        rest = others.logsumexp(-1, keepdim=True).clamp(min=IMPOSSIBLE)
        return cls(torch.cat([own, rest], dim=1), others.sub_(rest).exp_(), top)

    def spread(self, gradient: torch.Tensor) -> torch.Tensor:
        """Return the gradient by the logits `(n, V)` for that by the coarser distribution's logits `(n, k+1)`.

        The rest's logit is the logarithm of the sum of exp of its tokens' logits.
        """
        spread = self.in_rest.mul_(gradient[:, -1:])
        return spread.scatter_add_(1, self.top.columns, gradient[:, :-1] * self.top.known)
