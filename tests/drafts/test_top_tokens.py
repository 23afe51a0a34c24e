"""Claims about a target that is known by its most likely tokens alone, and about states that no block sees."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch

from contracts.sample_file import StoredSample, mask_of
from contracts.top_tokens import TopTokens
from drafts import METHODS
from drafts.batch import Batch
from drafts.draft import Draft, init_weights
from drafts.loss_terms import TERMS, Objective
from drafts.method import ObjectiveName
from drafts.objective import LossOptions, RowLosses, fused_loss
from drafts.places import anchor_places, predicting_spans, seen_spans, spans_of
from drafts.teacher import TeacherRows, find_top_tokens, make_teacher
from target.head import TargetHead

ROWS, WIDTH, VOCABULARY, STATES = 90, 16, 40, 30
KINDS: list[dict[ObjectiveName, float]] = [*({name: 1.0} for name in TERMS), {"tokens": 0.1, "tv": 1.8}]
LAYER = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 24}
DRAFTS: dict[str, dict[str, Any]] = {
    "dflash": {"method": "dflash", "block_size": 4, "num_layers": 2, "num_anchors": 6, "objective": "distill"},
    "dflash, sliding": {
        "method": "dflash", "block_size": 4, "num_layers": 2, "num_anchors": 20, "sliding_window": 6,
        "objective": "nla",
    },
    "dflash2": {"method": "dflash2", "block_size": 4, "num_layers": 1, "selector_top_k": 4},
    "dspark": {"method": "dspark", "num_speculative_tokens": 3, "num_layers": 1, "markov_rank": 4},
    "eagle3": {"method": "eagle3", "ttt_length": 3, "objective": "distill"},
    "eagle3, reduced": {"method": "eagle3", "ttt_length": 3, "draft_vocab_size": 20, "objective": "distill"},
    "lilicorr": {
        "method": "lilicorr", "block_size": 4, "num_layers": 1, "lilicorr_hidden_size": 16, "lilicorr_num_heads": 2,
        "lilicorr_candidate_topk": 4, "penalty_weight": 0.0, "objective": "distill",
    },
    "peagle": {"method": "peagle", "num_layers": 2, "num_speculative_tokens": 3, "objective": "tv"},
}  # fmt: skip


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("drafts.chunks.CHUNK_ELEMENTS", 0)
    monkeypatch.setattr("drafts.chunks.MIN_CHUNK_ROWS", 32)


def random_head(seed: int = 5) -> TargetHead:
    generator = torch.Generator().manual_seed(seed)
    rows = 0.5 * torch.randn(VOCABULARY, WIDTH, generator=generator)
    return TargetHead(rows, rows, torch.ones(WIDTH), "rms", 1e-6)


def top_of(head: TargetHead, states: torch.Tensor, k: int) -> TopTokens:
    """The top tokens in fp32, by another computation."""
    probs = head.logits(states).double().softmax(-1)
    values, ids = probs.topk(k)
    rest = 1 - values.sum(-1, keepdim=True)
    return TopTokens(ids.int(), torch.cat([values, rest], dim=1).log().float())


class Case:
    """A draft's rows, and a target's states; the losses with its whole distribution or with its top tokens."""

    def __init__(self, known: torch.Tensor | None = None) -> None:
        generator = torch.Generator().manual_seed(0)
        self.known, size = known, VOCABULARY if known is None else len(known)
        self.hidden = torch.randn(ROWS, WIDTH, generator=generator, requires_grad=True)
        self.lm_head = (0.5 * torch.randn(size, WIDTH, generator=generator)).requires_grad_()
        self.labels = torch.randint(0, size, (ROWS,), generator=generator)
        self.weights = torch.rand(ROWS, generator=generator)
        self.head, self.states = random_head(), torch.randn(STATES, WIDTH, generator=generator)

    def lose(self, terms: dict[ObjectiveName, float], k: int | None) -> RowLosses:
        final = self.states if k is None else top_of(self.head, self.states, k)
        teacher = make_teacher(self.head, final, TeacherRows.of_slots(torch.arange(ROWS) % STATES), self.known)
        options = LossOptions(Objective(terms, top_k=7, lk_eta=2.0), teacher, wants_accepted=True)
        return fused_loss(self.hidden, self.lm_head, self.labels, self.weights, options)

    def gradients(self, total: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(total, (self.hidden, self.lm_head))

    def compare(self, ours: torch.Tensor, theirs: torch.Tensor) -> None:
        for a, b in zip(self.gradients(ours), self.gradients(theirs), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("terms", KINDS, ids=str)
def test_with_all_tokens_but_one_stored_every_term_is_that_of_the_whole_distribution(
    terms: dict[ObjectiveName, float],
) -> None:
    case = Case()
    whole, top = case.lose(terms, None), case.lose(terms, VOCABULARY - 1)
    torch.testing.assert_close(top.losses, whole.losses, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(top.accepted, whole.accepted, rtol=1e-4, atol=1e-5)
    assert torch.equal(top.hits, whole.hits)
    case.compare(top.total, whole.total)


@pytest.mark.parametrize("name", ["tokens", "top_k_kl"])
def test_terms_that_need_no_other_tokens_are_exact(name: ObjectiveName) -> None:
    case = Case()
    whole, top = case.lose({name: 1.0}, None), case.lose({name: 1.0}, 7)
    torch.testing.assert_close(top.losses, whole.losses, rtol=1e-4, atol=1e-5)
    case.compare(top.total, whole.total)


@pytest.mark.parametrize("terms", KINDS, ids=str)
@pytest.mark.parametrize("known", [None, torch.arange(0, VOCABULARY, 3)], ids=["all", "reduced"])
def test_a_term_is_that_of_two_distributions_over_the_stored_tokens_and_the_rest(
    terms: dict[ObjectiveName, float], known: torch.Tensor | None
) -> None:
    case, k = Case(known), 9
    top, columns = top_of(case.head, case.states, k), torch.arange(VOCABULARY) if known is None else known
    log_d = (case.hidden @ case.lm_head.T).log_softmax(-1)
    losses = []
    for row, label in enumerate(case.labels.tolist()):
        ids, log_t = top.ids[row % STATES].tolist(), top.log_probs[row % STATES]
        stored = {
            int((columns == id_).nonzero()): value for id_, value in zip(ids, log_t, strict=False) if id_ in columns
        }
        others = [place for place in range(len(columns)) if place not in stored]
        coarse = torch.cat([log_d[row, list(stored)], log_d[row, others].logsumexp(0)[None]])
        # Tokens that the draft does not have are left out, and the rest counts as tokens that it has.
        t = torch.stack([*stored.values(), log_t[-1]]).softmax(0)
        losses.append(direct(terms, coarse, t, -log_d[row, label]))
    each, found = torch.stack(losses), case.lose(terms, k)
    torch.testing.assert_close(found.losses, each.detach(), rtol=1e-4, atol=1e-5)
    case.compare(found.total, (each * case.weights).sum())


def direct(
    terms: dict[ObjectiveName, float], log_d: torch.Tensor, t: torch.Tensor, cross_entropy: torch.Tensor
) -> torch.Tensor:
    """The terms of one row, with autograd."""
    d, overlap = log_d.exp(), torch.minimum(log_d.exp(), t).sum()
    largest, share = t[:-1].topk(min(7, len(t) - 1)).indices, torch.exp(-2.0 * overlap.detach())
    values = {
        "tokens": cross_entropy,
        "distill": -(t * log_d).sum(),
        "reverse_kl": (d * (log_d - t.log())).sum(),
        "tv": 1 - overlap,
        "nla": -overlap.clamp(min=1e-5).log(),
        "lk_hybrid": share * (t * (t.log() - log_d)).sum() + (1 - share) * (1 - overlap),
        "top_k_kl": (t[largest] * (t[largest].log() - log_d[largest])).sum(),
    }
    return sum((weight * values[name] for name, weight in terms.items()), torch.zeros(()))


def test_a_draft_that_has_only_stored_tokens_learns_no_rest() -> None:
    case = Case(torch.arange(VOCABULARY)[:5])
    found = case.lose({"distill": 1.0}, VOCABULARY - 1)
    whole = case.lose({"distill": 1.0}, None)
    kept = [
        row for row in range(ROWS) if set(range(5)) <= set(top_of(case.head, case.states, 39).ids[row % 30].tolist())
    ]
    assert kept
    torch.testing.assert_close(found.losses[kept], whole.losses[kept], rtol=1e-4, atol=1e-5)


def test_a_draft_that_has_none_of_the_stored_tokens_gets_finite_gradients() -> None:
    case = Case(torch.arange(VOCABULARY - 1))
    top = TopTokens(
        torch.full((STATES, 1), VOCABULARY - 1, dtype=torch.int32), torch.tensor([[0.0, -65504.0]]).repeat(STATES, 1)
    )
    teacher = make_teacher(case.head, top, TeacherRows.of_slots(torch.arange(ROWS) % STATES), case.known)
    for name in TERMS:
        options = LossOptions(Objective({name: 1.0}), teacher)
        found = fused_loss(case.hidden, case.lm_head, case.labels, case.weights, options)
        assert all(bool(gradient.isfinite().all()) for gradient in (found.losses, *case.gradients(found.total)))


def test_the_top_tokens_and_the_rest_are_those_of_the_targets_distribution() -> None:
    head, states = random_head(), 3 * torch.randn(100, WIDTH, generator=torch.Generator().manual_seed(1))
    found, expected = find_top_tokens(head, states, 8), top_of(head, states, 8)
    assert torch.equal(found.ids, expected.ids)
    assert found.log_probs.dtype == torch.float16
    torch.testing.assert_close(found.log_probs.float(), expected.log_probs, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(found.log_probs.float().exp().sum(-1), torch.ones(100), rtol=0, atol=2e-3)
    with pytest.raises(ValueError, match="40 of 40 tokens"):
        find_top_tokens(head, states, VOCABULARY)


@pytest.mark.parametrize("reach", [None, 1, 3, 8, 100])
def test_seen_spans_are_the_positions_before_any_anchor_within_reach(reach: int | None) -> None:
    generator = torch.Generator().manual_seed(2)
    for share in (0.2, 0.5, 0.9):
        for _ in range(50):
            mask = (torch.rand(12, generator=generator) < share).repeat_interleave(2)[:23]
            seen = torch.zeros(23, dtype=torch.bool)
            for place in anchor_places(mask).tolist():
                seen[0 if reach is None else max(0, place - reach) : place] = True
            spans = seen_spans(spans_of(mask), reach)
            assert torch.equal(mask_of(spans, 23), seen)
            assert all(a < b for a, b in spans)
            assert all(b < c for (_, b), (c, _) in pairwise(spans))


def make_draft(name: str) -> tuple[Draft, TargetHead]:
    values = {**LAYER, **DRAFTS[name]}
    method = METHODS[values["method"]]
    section = method.section.model_validate(values)
    shared = {
        "hidden_size": WIDTH, "vocab_size": VOCABULARY, "num_target_layers": 6, "layer_ids": [1, 3],
        "mask_token_id": VOCABULARY - 1, "rms_norm_eps": 1e-6, "rope_theta": 1e4, "max_position_embeddings": 64,
        "yarn": None, "target_fingerprint": "", "store": "",
    }  # fmt: skip
    draft, head = method.build(method.make_config(section, shared), section), random_head()
    init_weights(draft, seed=3)
    if "draft_vocab_size" in values:
        draft.initialize(3, head, lambda: torch.arange(VOCABULARY))
    return draft, head


def make_batch() -> Batch:
    """Two documents with prompts before, between and after replies."""
    generator = torch.Generator().manual_seed(4)
    lengths = [40, 33]
    mask = torch.cat([mask_of([(12, 18), (30, 37)], 40), mask_of([(9, 10), (20, 30)], 33)])
    total = sum(lengths)
    return Batch(
        torch.randint(0, VOCABULARY - 1, (total,), generator=generator), mask,
        torch.randn(total, 2 * WIDTH, generator=generator), torch.randn(total, WIDTH, generator=generator),
        lengths, ["a", "b"], [1, 2],
    )  # fmt: skip


def step(draft: Draft, head: TargetHead, batch: Batch) -> list[torch.Tensor]:
    """The loss of a step and all gradients."""
    draft.zero_grad()
    result = draft(batch, draft.plan(batch), head)
    result.loss_sum.backward()
    return [result.loss_sum.detach(), result.counts(), *(p.grad for p in draft.parameters() if p.grad is not None)]


def without_unseen(batch: Batch, reach: int | None) -> Batch:
    """The batch as a store gives it that has no states which no block sees."""
    masks = batch.loss_mask.split(batch.lengths)
    seen = torch.cat([mask_of(seen_spans(spans_of(mask), reach), len(mask)) for mask in masks])
    predicting = torch.cat([mask_of(predicting_spans(spans_of(mask)), len(mask)) for mask in masks])
    assert 0 < int(seen.sum()) < len(seen)
    return replace(
        batch,
        aux_hidden_states=batch.aux_hidden_states * seen[:, None],
        hidden_states=batch.hidden_states * predicting[:, None],
    )


@pytest.mark.parametrize("name", DRAFTS)
def test_states_that_no_block_sees_change_no_bit_of_a_step_or_a_drafted_token(name: str) -> None:
    draft, head = make_draft(name)
    batch, reach = make_batch(), draft.config.reach
    assert (reach is None) == ("sliding" not in name)
    trimmed = without_unseen(batch, reach)
    found, expected = step(draft, head, trimmed), step(draft, head, batch)
    assert len(expected) > 5
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    drafted = [draft.draft(sample_of(part), head).tokens for part in (trimmed, batch)]
    assert torch.equal(*drafted)


@pytest.mark.parametrize(("name", "reach"), [("dflash", 8), ("dflash, sliding", 4), ("eagle3", 8)])
def test_a_draft_that_sees_farther_than_a_store_reaches_loses_something(name: str, reach: int) -> None:
    draft, head = make_draft(name)
    assert draft.config.reach is None or draft.config.reach > reach
    found, expected = (step(draft, head, batch)[0] for batch in (without_unseen(make_batch(), reach), make_batch()))
    assert not torch.equal(found, expected)


def sample_of(batch: Batch) -> StoredSample:
    part = slice(batch.lengths[0])
    return StoredSample(
        batch.token_ids[part].int(), batch.loss_mask[part], batch.hidden_states[part], batch.aux_hidden_states[part], {}
    )


@pytest.mark.parametrize("name", DRAFTS)
def test_every_method_learns_from_the_top_tokens_what_it_learns_from_the_states(name: str) -> None:
    draft, head = make_draft(name)
    batch = make_batch()
    top = top_of(head, batch.hidden_states, VOCABULARY - 1)
    empty = replace(batch, hidden_states=batch.hidden_states[:, :0], top=top)
    assert draft.section.needs_final_states
    for found, expected in zip(step(draft, head, empty), step(draft, head, batch), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_an_objective_that_needs_more_than_the_stored_tokens_says_so() -> None:
    method = METHODS["dflash"]
    section = method.section.model_validate(
        {**LAYER, **DRAFTS["dflash"], "objective": "top_k_kl", "objective_top_k": 20}
    )
    assert section.lacks_of(20) == ""
    assert "20 tokens" in section.lacks_of(19)
    values = {**LAYER, **DRAFTS["lilicorr"], "penalty_weight": 1.0}
    assert "penalty_weight" in METHODS["lilicorr"].section.model_validate(values).lacks_of(1000)
