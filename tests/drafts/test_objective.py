"""Claims about the losses: chunks change nothing, gradients are exact, weights are those of their definitions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
from pydantic import ValidationError
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from drafts.block_config import BlockSection
from drafts.chunks import chunks
from drafts.layers import RMSNorm, gated
from drafts.loss_terms import TERMS, Objective
from drafts.method import ObjectiveName, TransformerSection
from drafts.objective import Bias, LossOptions, fused_loss, greedy_tokens
from drafts.rope import rotate
from drafts.slot_weights import dpace_weights, e2e_tv_weights, slot_decay
from drafts.teacher import TeacherRows, make_teacher, teacher_argmax
from target.head import TargetHead

ROWS, WIDTH, VOCABULARY = 150, 12, 40
DISTILL = Objective({"distill": 1.0})


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("drafts.chunks.CHUNK_ELEMENTS", 0)
    monkeypatch.setattr("drafts.chunks.MIN_CHUNK_ROWS", 32)


def make_rows() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(ROWS, WIDTH, generator=generator, requires_grad=True)
    lm_head = torch.randn(VOCABULARY, WIDTH, generator=generator, requires_grad=True)
    labels = torch.randint(0, VOCABULARY, (ROWS,), generator=generator)
    return hidden, lm_head, labels, torch.rand(ROWS, generator=generator)


def check(ours: torch.Tensor, reference: torch.Tensor, inputs: tuple[torch.Tensor, ...]) -> None:
    torch.testing.assert_close(ours, reference)
    for a, b in zip(torch.autograd.grad(3 * ours, inputs), torch.autograd.grad(3 * reference, inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_chunked_cross_entropy_has_the_plain_ones_value_and_gradients() -> None:
    hidden, lm_head, labels, weights = make_rows()
    loss, hits, losses, *_ = fused_loss(hidden, lm_head, labels, weights)
    each = functional.cross_entropy(hidden @ lm_head.T, labels, reduction="none")
    check(loss, (each * weights).sum(), (hidden, lm_head))
    torch.testing.assert_close(losses, each.detach())
    assert torch.equal(hits, (hidden @ lm_head.T).argmax(-1) == labels)


def test_distillation_is_cross_entropy_with_the_targets_own_distribution() -> None:
    hidden, lm_head, labels, weights = make_rows()
    target = TargetHead(lm_head.detach(), torch.randn(VOCABULARY, WIDTH), torch.rand(WIDTH), "gemma", 1e-6)
    states, places = torch.randn(30, WIDTH), torch.arange(ROWS) % 30
    teacher = make_teacher(target, states, TeacherRows.of_slots(places))
    loss = fused_loss(hidden, lm_head, labels, weights, LossOptions(DISTILL, teacher)).total
    q = target.logits(states[places]).softmax(-1)
    each = -(q * (hidden @ lm_head.T).log_softmax(-1)).sum(-1)
    check(loss, (each * weights).sum(), (hidden, lm_head))
    assert torch.equal(teacher_argmax(target, states, places), q.argmax(-1))


def test_weights_that_follow_from_losses_see_whole_blocks() -> None:
    hidden, lm_head, labels, _ = make_rows()
    valid = torch.rand(50, 3) > 0.3
    valid = valid.long().cumprod(1).bool() & (torch.arange(50)[:, None] != 7)
    rows = int(valid.sum())
    ends = valid.sum(1).cumsum(0)
    seen = []

    def weigh(part: slice, losses: torch.Tensor) -> torch.Tensor:
        assert part.stop in ends.tolist()
        seen.append(part)
        return losses * 0 + 2.0

    loss = fused_loss(hidden[:rows], lm_head, labels[:rows], weigh, LossOptions(bounds=ends.tolist())).total
    each = functional.cross_entropy(hidden[:rows] @ lm_head.T, labels[:rows], reduction="none")
    check(loss, 2 * each.sum(), (hidden, lm_head))
    assert len(seen) > 1
    assert [part.start for part in seen] == [0, *(part.stop for part in seen[:-1])]


def overlap(d: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return torch.minimum(d, t).sum(-1)


def lk(d: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    share = torch.exp(-2.0 * overlap(d, t).detach())
    return share * (t * (t.log() - d.log())).sum(-1) + (1 - share) * (1 - overlap(d, t))


def of_largest(d: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    kept = t >= t.sort(-1, descending=True).values[:, 6:7]
    return (kept * t * (t.log() - d.log())).sum(-1)


DIRECT: dict[ObjectiveName, Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "tokens": lambda d, t, own: -own.log(),
    "distill": lambda d, t, own: -(t * d.log()).sum(-1),
    "reverse_kl": lambda d, t, own: (d * (d.log() - t.log())).sum(-1),
    "tv": lambda d, t, own: 0.5 * (d - t).abs().sum(-1),
    "nla": lambda d, t, own: -overlap(d, t).log(),
    "lk_hybrid": lambda d, t, own: lk(d, t),
    "top_k_kl": lambda d, t, own: of_largest(d, t),
}


def test_every_term_has_a_direct_computation() -> None:
    assert set(TERMS) == set(DIRECT) == set(get_args(ObjectiveName))


@pytest.mark.parametrize(
    "terms", [*({name: 1.0} for name in DIRECT), {"tokens": 0.1, "tv": 1.8}, {"distill": 1.0, "tv": 0.5}], ids=str
)
def test_values_and_gradients_are_those_of_the_direct_computation(terms: dict[ObjectiveName, float]) -> None:
    torch.manual_seed(0)
    hidden, lm_head, labels, weights = make_rows()
    states, factor = torch.randn(ROWS, 3, requires_grad=True), torch.randn(VOCABULARY, 3, requires_grad=True)
    target = TargetHead(lm_head.detach(), 0.3 * torch.randn(VOCABULARY, WIDTH), torch.rand(WIDTH), "rms", 1e-6)
    known, places = torch.randn(30, WIDTH), torch.arange(ROWS) % 30
    teacher = make_teacher(target, known, TeacherRows.of_slots(places))
    options = LossOptions(Objective(terms, top_k=7, lk_eta=2.0), teacher, wants_accepted=True)
    found = fused_loss(hidden, lm_head, labels, weights, options, Bias(states, factor))
    t = target.logits(known[places]).softmax(-1)
    d = (hidden @ lm_head.T + states @ factor.T).softmax(-1)
    own = d.gather(1, labels[:, None])[:, 0]
    each = sum(weight * DIRECT[name](d, t, own) for name, weight in terms.items())
    assert isinstance(each, torch.Tensor)
    torch.testing.assert_close(found.losses, each.detach())
    torch.testing.assert_close(found.accepted, overlap(d, t).detach())
    check(found.total, (each * weights).sum(), (hidden, lm_head, states, factor))
    fast = fused_loss(hidden, lm_head, labels, weights, options._replace(wants_accepted=False), Bias(states, factor))
    torch.testing.assert_close(fast.total, found.total)


def test_the_surrogate_of_end_to_end_total_variation_has_its_gradient() -> None:
    distances = torch.rand(6, 4, requires_grad=True)
    valid = torch.tensor([4, 4, 3, 2, 1, 4])[:, None] > torch.arange(4)
    weights = e2e_tv_weights(distances.detach(), valid)
    reached = torch.stack([(1 - distances[:, : k + 1]).prod(1) * valid[:, k] for k in range(4)], 1).sum(1)
    exact = (1 - reached / valid.sum(1)).sum()
    (gradient,) = torch.autograd.grad(exact, distances)
    torch.testing.assert_close(weights, gradient)


def test_a_mix_of_terms_is_checked() -> None:
    dims = {"num_attention_heads": 1, "num_key_value_heads": 1, "intermediate_size": 1, "method": "x"}
    section = TransformerSection(**dims, objective={"tokens": 0.1, "tv": 1.8})
    assert section.needs_final_states
    assert not TransformerSection(**dims, objective={"tokens": 2.0}).needs_final_states
    assert BlockSection(**dims, objective="tv", slot_weights="e2e_tv").slot_weights == "e2e_tv"
    with pytest.raises(ValidationError, match="slot_weights e2e_tv needs objective tv"):
        BlockSection(**dims, objective={"tokens": 0.1, "tv": 1.8}, slot_weights="e2e_tv")
    for wrong in ("hinge", {"hinge": 1.0}, {"tv": -1.0}, {}):
        with pytest.raises(ValidationError):
            TransformerSection(**dims, objective=wrong)


def test_chunks_cover_all_rows_once() -> None:
    for bounds in (None, [3, 40, 41, 90, 150]):
        covered = [row for part in chunks(150, VOCABULARY, bounds) for row in range(part.start, part.stop)]
        assert covered == list(range(150))


def test_dpace_weights_are_those_of_their_definition() -> None:
    losses = torch.tensor([[0.1, 2.0, 0.5], [1.0, 0.3, 0.7]])
    valid = torch.tensor([[True, True, True], [True, True, False]])
    found = dpace_weights(losses, valid, 0.5)
    q = (0.5 * torch.exp(-losses) + 0.5).tolist()
    for row, width in ((0, 3), (1, 2)):
        for j in range(width):
            expected = 0.0
            for m in range(j, width):
                product = 1.0
                for i in range(m + 1):
                    product *= q[row][i]
                expected += product
            assert abs(float(found[row, j]) - expected) < 1e-6
    assert float(found[1, 2]) == 0.0


def test_slot_weights_decay_from_one() -> None:
    torch.testing.assert_close(slot_decay(3, 4.0), torch.exp(torch.tensor([0.0, -0.25, -0.5])))


def test_written_out_gradients_are_torchs_own() -> None:
    generator = torch.Generator().manual_seed(1)
    x, y = (torch.randn(5, 3, 8, generator=generator, requires_grad=True) for _ in range(2))
    norm = RMSNorm(8, 1e-6)
    torch.nn.init.normal_(norm.weight, generator=generator)
    mix = torch.randn(5, 3, 8, generator=generator)
    check((norm(x) * mix).sum(), (functional.rms_norm(x, (8,), norm.weight, 1e-6) * mix).sum(), (x, norm.weight))
    check((gated(x, y) * mix).sum(), (functional.silu(x) * y * mix).sum(), (x, y))
    angles = torch.randn(5, 1, 4, generator=generator)
    cos, sin = (1.3 * torch.cat([f(angles)] * 2, -1) for f in (torch.cos, torch.sin))
    plain = x * cos + torch.cat([-x[..., 4:], x[..., :4]], -1) * sin
    check((rotate(x, (cos, sin)) * mix).sum(), (plain * mix).sum(), (x,))


def test_the_most_likely_tokens_are_found_without_the_logits_of_all_rows() -> None:
    hidden, lm_head, _, _ = make_rows()
    states = hidden.detach().unflatten(0, (30, 5))
    with Allocations() as seen:
        found = greedy_tokens(states, lm_head.detach())
    assert torch.equal(found, functional.linear(states, lm_head).argmax(-1))
    assert seen.largest == max(states.nbytes, 32 * VOCABULARY * 4)  # one chunk's logits


class Allocations(TorchDispatchMode):
    """The size of the largest result of an operation, in bytes."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.largest = max(self.largest, result.untyped_storage().nbytes())
        return result


def test_a_chunk_of_slots_computes_each_row_of_the_teacher_once(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    states, rows = torch.randn(40, 8, generator=generator), torch.randn(30, 8, generator=generator)
    head = TargetHead(rows, rows, torch.ones(8), "rms", 1e-6)
    places = (torch.arange(20)[:, None] + torch.arange(7)).flatten()  # 20 chains of 7 steps
    computed, logits = list[int](), TargetHead.logits

    def count(self: TargetHead, hidden: torch.Tensor) -> torch.Tensor:
        computed.append(len(hidden))
        return logits(self, hidden)

    monkeypatch.setattr(TargetHead, "logits", count)
    teacher = make_teacher(head, states, TeacherRows.of_slots(places))
    known = make_teacher(head, states, TeacherRows.of_slots(places), torch.arange(0, 30, 3))
    for part in (slice(0, 70), slice(70, 140)):
        expected = logits(head, states[places[part]]).softmax(-1)
        torch.testing.assert_close(teacher(part), expected)
        some = expected[:, ::3]
        torch.testing.assert_close(known(part), some / some.sum(-1, keepdim=True))
    assert computed == [16] * 4  # of 70 slots each
