"""Claims about the losses: chunks change nothing, gradients are exact, weights are those of their definitions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from drafts.layers import RMSNorm, gated
from drafts.objective import (
    TeacherRows,
    chunks,
    dpace_weights,
    fused_cross_entropy,
    greedy_tokens,
    make_teacher,
    slot_weights,
    teacher_argmax,
)
from drafts.rope import rotate
from target.head import TargetHead

ROWS, WIDTH, VOCABULARY = 150, 12, 40


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("drafts.objective.CHUNK_ELEMENTS", 0)
    monkeypatch.setattr("drafts.objective.MIN_CHUNK_ROWS", 32)


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
    loss, hits, losses = fused_cross_entropy(hidden, lm_head, labels, weights)
    each = functional.cross_entropy(hidden @ lm_head.T, labels, reduction="none")
    check(loss, (each * weights).sum(), (hidden, lm_head))
    torch.testing.assert_close(losses, each.detach())
    assert torch.equal(hits, (hidden @ lm_head.T).argmax(-1) == labels)


def test_distillation_is_cross_entropy_with_the_targets_own_distribution() -> None:
    hidden, lm_head, labels, weights = make_rows()
    target = TargetHead(lm_head.detach(), torch.randn(VOCABULARY, WIDTH), torch.rand(WIDTH), "gemma", 1e-6)
    states, places = torch.randn(30, WIDTH), torch.arange(ROWS) % 30
    loss, _, _ = fused_cross_entropy(
        hidden, lm_head, labels, weights, make_teacher(target, states, TeacherRows.of_slots(places))
    )
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

    loss, _, _ = fused_cross_entropy(hidden[:rows], lm_head, labels[:rows], weigh, bounds=ends.tolist())
    each = functional.cross_entropy(hidden[:rows] @ lm_head.T, labels[:rows], reduction="none")
    check(loss, 2 * each.sum(), (hidden, lm_head))
    assert len(seen) > 1
    assert [part.start for part in seen] == [0, *(part.stop for part in seen[:-1])]


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
    torch.testing.assert_close(slot_weights(4, 4.0), torch.exp(torch.tensor([0.0, -0.25, -0.5])))


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
