"""Claims about the file of a draft's proposals."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from common.errors import UserError
from contracts.proposals import Proposals, read_proposals, read_proposals_head, write_proposals

STEPS = {"a-0": np.array([[5, 1, 7, 8], [7, 0, 9, 9]], dtype=np.int32), "b-0": np.empty((0, 4), dtype=np.int32)}


def test_proposals_are_read_as_they_were_written(tmp_path: Path) -> None:
    path = tmp_path / "proposals.jsonl"
    write_proposals(path, Proposals(2, "runs/draft", {"store": "s"}, STEPS))
    for found in (read_proposals_head(path), read_proposals(path)):
        assert (found.num_draft_tokens, found.draft, found.inputs) == (2, "runs/draft", {"store": "s"})
    assert list(found.steps) == ["a-0", "b-0"]
    for id_, steps in found.steps.items():
        assert steps.shape == STEPS[id_].shape
        assert (steps == STEPS[id_]).all()


@pytest.mark.parametrize(
    ("lines", "where"),
    [
        ("", ":1"),
        ('{"id": "x"}\n', ":1"),
        ('{"num_draft_tokens": 2, "draft": "d", "inputs": {}}\n{"sample": "a-0", "steps": [[1, 0, 5]]}\n', ":2"),
        ('{"num_draft_tokens": 2, "draft": "d", "inputs": {}}\n{"sample": "a-0", "steps": [1, 0, 5, 6]}\n', ":2"),
    ],
    ids=["empty", "another file", "another K", "flat"],
)
def test_another_file_is_refused_with_the_line(tmp_path: Path, lines: str, where: str) -> None:
    (tmp_path / "p.jsonl").write_text(lines)
    with pytest.raises(UserError, match=f"p.jsonl{where}"):
        read_proposals(tmp_path / "p.jsonl")
