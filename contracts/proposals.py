"""What a draft proposed at each step over recorded replies, which `train eval` writes and `dump browse` shows.

Format, JSON lines: first `{"num_draft_tokens": K, "draft": ..., "inputs": {...}}`, with the inputs of the evaluation
(checksums of draft and store); then `{"sample": ID, "steps": [[place, accepted, t1, ..., tK], ...]}` for each sample.
A step drafts K tokens after the token at `place`; the first `accepted` of them are the reply's next tokens.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import UserError
from common.files import parse_line, read_lines, write_atomic

WHAT = "proposals, as `train eval --proposals` writes them"


@dataclass(frozen=True)
class Proposals:
    """The steps of each sample, by its id: `(S, 2 + K)` int32, the columns place, accepted and K draft tokens.

    `draft`: the folder that was evaluated. `inputs`: see `train.evaluate.evaluate`.
    """

    num_draft_tokens: int
    draft: str
    inputs: Mapping[str, Any]
    steps: Mapping[str, np.ndarray]


def write_proposals(path: Path, proposals: Proposals) -> None:
    """Write proposals to `path`, atomically. Raises UserError if it cannot be written."""
    head = {"num_draft_tokens": proposals.num_draft_tokens, "draft": proposals.draft, "inputs": proposals.inputs}
    lines = ({"sample": id_, "steps": steps.tolist()} for id_, steps in proposals.steps.items())
    write_atomic(path, "".join(json.dumps(line, separators=(",", ":")) + "\n" for line in chain([head], lines)))


def read_proposals_head(path: Path) -> Proposals:
    """Return the proposals of `path` without their steps. Raises UserError if it holds none."""
    return _parse_head(path, next(read_lines(path, WHAT), (1, b"{}")))


def read_proposals(path: Path) -> Proposals:
    """Return the proposals of `path`. Raises UserError if a line is none."""
    lines = read_lines(path, WHAT)
    head = _parse_head(path, next(lines, (1, b"{}")))
    steps = dict(_read_steps(path, lines, 2 + head.num_draft_tokens))
    return Proposals(head.num_draft_tokens, head.draft, head.inputs, steps)


def _parse_head(path: Path, line: tuple[int, bytes]) -> Proposals:
    value = parse_line(line[1], f"{path}:{line[0]}", WHAT)
    try:
        return Proposals(int(value["num_draft_tokens"]), str(value["draft"]), dict(value["inputs"]), {})
    except (TypeError, ValueError, KeyError):
        raise _not_proposals(f"{path}:{line[0]}") from None


def _read_steps(path: Path, lines: Iterator[tuple[int, bytes]], width: int) -> Iterator[tuple[str, np.ndarray]]:
    for number, line in lines:
        where = f"{path}:{number}"
        value = parse_line(line, where, WHAT)
        try:
            steps = np.array(value["steps"], dtype=np.int32).reshape(-1, width)
            if len(steps) != len(value["steps"]):
                raise _not_proposals(where)
            yield str(value["sample"]), steps
        except (TypeError, ValueError, KeyError, OverflowError):
            raise _not_proposals(where) from None


def _not_proposals(where: str) -> UserError:
    return UserError(where, found="another line", expected=WHAT, fix="Write the file again.")
