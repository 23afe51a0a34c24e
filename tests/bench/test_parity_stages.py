"""Claims about the stage of `bench parity` that compares the scores of candidates."""

from __future__ import annotations

import torch

from bench.parity import Finding, compare
from contracts.trace import Trace

INFINITE = float("inf")


def find(scores: list[list[float]], theirs: list[list[float]]) -> list[Finding]:
    shared = {
        "token_ids": torch.tensor([5, 6, 7]), "layers": torch.ones(2, 1, 4), "teacher": torch.tensor([7]),
        "draft_logits": torch.ones(len(scores), 4),
    }  # fmt: skip
    traces = [[Trace("a", 2, {**shared, "candidate_scores": torch.tensor(values)})] for values in (scores, theirs)]
    found = compare(*traces, [1], 1e-3, autoregressive=False)
    return [finding for finding in found if finding.stage.startswith("candidate")]


def test_scores_are_compared_where_both_sides_have_the_candidate_until_their_tokens_differ() -> None:
    ours = [[4.0, 1.0, 2.0, -INFINITE], [1.0, 3.0, 2.0, -INFINITE], [0.0, 1.0, 9.0, -INFINITE]]
    other_last = [[4.0, -INFINITE, 2.0, 1.0], *ours[1:]]  # a tie of the least likely candidates, broken otherwise
    assert [finding.differs for finding in find(ours, other_last)] == [False, False, False]
    found = find(ours, [ours[0], [1.0, 3.0, 2.1, -INFINITE], ours[2]])
    assert [finding.differs for finding in found] == [False, True, False]
    assert found[1].stage == "candidate slot 2"
    found = find(ours, [ours[0], [1.0, 1.9, 2.0, -INFINITE], ours[2]])
    assert [finding.differs for finding in found] == [False, True]
    assert "tokens 1 and 2" in found[1].text
    nothing_shared = [[-INFINITE, -INFINITE, -INFINITE, 1.0], *ours[1:]]
    assert [finding.differs for finding in find(ours, nothing_shared)] == [True]
