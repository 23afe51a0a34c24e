"""Which evaluation rows overlap with the training data, and the acceptance with and without them.

Reads: the rows that are measured, and the conversations (or prompts) that the draft was trained on.

A draft has seen the target's replies to its training prompts: on those it is accepted more often than on new ones.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.requests import Turn, answers_from_json, conversation_of, kept_steps
from common.errors import UserError
from common.loops import find_loop
from contracts.acceptance import Acceptance
from contracts.evaluation_sets import find_rows
from contracts.overlap import NEAR, NGRAM, OverlapIndex, Question, find_overlaps, read_question
from contracts.prompt_files import open_prompts
from contracts.prompts import read_id

Place = tuple[str, int]
"""A prompt set and a row of it."""


@dataclass(frozen=True)
class Overlap:
    """`found`: for each overlapping row, why, and the id of the training row. `num_rows`: rows by set."""

    training: list[dict[str, Any]]
    num_rows: dict[str, int]
    found: dict[Place, dict[str, Any]]

    def report(
        self, acceptance: Mapping[int, Mapping[str, Acceptance]], origins: Mapping[str, Place]
    ) -> dict[str, Any]:
        """Return the figures for acceptance.json.

        `acceptance`: of each conversation, by the number of draft tokens; `origins`: the conversations' rows.
        """
        overlapping = Counter(dataset for dataset, _ in self.found)
        return {
            "training": self.training,
            "ngram": NGRAM,
            "near": NEAR,
            "sets": {name: {"rows": rows, "overlapping": overlapping[name]} for name, rows in self.num_rows.items()},
            "rows": [self.found[place] for place in sorted(self.found)],
            "acceptance": {str(k): self._split(parts, origins) for k, parts in sorted(acceptance.items())},
        }

    def _split(self, parts: Mapping[str, Acceptance], origins: Mapping[str, Place]) -> dict[str, Any]:
        is_found = {id_: origins.get(id_) in self.found for id_ in parts}
        return {
            "all": _figures(list(parts.values())),
            "without_overlap": _figures([part for id_, part in parts.items() if not is_found[id_]]),
            "overlap_only": _figures([part for id_, part in parts.items() if is_found[id_]]),
        }


def read_set(path: Path) -> list[Question]:
    """Return the questions of a file of prompt rows or conversations; the set has the file's name."""
    rows = open_prompts(path).rows()
    questions = [read_question(row.value, path.stem, row.index) for row in rows if isinstance(row.value, dict)]
    return [question for question in questions if question is not None]


def find_overlap(questions: Sequence[Question], training: Sequence[Path]) -> Overlap:
    """Look for the questions in the training data. Raises UserError for a path that holds no rows."""
    index = OverlapIndex(questions)
    described, found = [], dict[Place, dict[str, Any]]()
    for path in training:
        file = find_rows(path)
        if not file.exists():
            raise UserError(
                f"--training-conversations {path}",
                found="no such file or folder",
                expected="what the draft was trained on",
                fix="Correct the path.",
            )
        rows = open_prompts(file)
        described.append({"path": str(path), "rows": rows.num_rows, "sha256": rows.checksum})
        for value, matches in find_overlaps(rows.rows(), index):
            for match in matches:
                more = {"training": str(path), "training_id": read_id(value)}
                found.setdefault((match.dataset, match.index), {**match.to_json(), **more})
    return Overlap(described, dict(Counter(question.dataset for question in questions)), found)


def by_conversation(
    turns: Sequence[Turn], groups: Sequence[Mapping[str, Any]], loop_tokens: int
) -> dict[str, Acceptance]:
    """Return the acceptance of each conversation, without loops, where the server reports counts per request."""
    steps: dict[str, list[int]] = defaultdict(list)
    known = {turn.id for turn in turns}
    num_draft_tokens = 0
    for group in groups:
        num_draft_tokens = sum(key.startswith("accepted_at_") for key in group["counters"])
        for answer in answers_from_json(group["answers"]) if group["per_request"] else []:
            if answer.id in known and not find_loop(answer.token_ids, loop_tokens):
                steps[conversation_of(answer.id)] += kept_steps(answer)
    return {id_: Acceptance.from_steps(found, num_draft_tokens) for id_, found in steps.items()}


def of_walks(report: Mapping[str, Any]) -> dict[str, Acceptance]:
    """Return the acceptance of each held-out conversation from a report's walks."""
    steps: dict[str, list[int]] = defaultdict(list)
    for walk in report["walks"]:
        steps[conversation_of(walk["turn"])] += walk["accepted"]
    return {id_: Acceptance.from_steps(found, report["num_draft_tokens"]) for id_, found in steps.items()}


def explain_overlap(overlap: Mapping[str, Any]) -> list[str]:
    """Return lines for acceptance.md."""
    sets = overlap["sets"]
    total, found = (sum(of[key] for of in sets.values()) for key in ("rows", "overlapping"))
    by_set = ", ".join(f"{name} {of['overlapping']} of {of['rows']}" for name, of in sets.items())
    lines = [f"Rows that overlap with the training data: {found} of {total} ({by_set})"]
    for k, parts in overlap["acceptance"].items():
        told = [f"{name.replace('_', ' ')} {_tell(figures)}" for name, figures in parts.items() if figures]
        lines.append(f"Acceptance length, K = {k}: {'; '.join(told) or 'not known by row'}")
    return lines


def _figures(parts: Sequence[Acceptance]) -> dict[str, Any] | None:
    if not any(part.steps for part in parts):
        return None
    total = Acceptance.pool(parts)
    interval = [round(edge, 4) for edge in Acceptance.interval(parts)]
    return {"n": len(parts), "acceptance_length": round(total.acceptance_length, 4), "interval": interval}


def _tell(figures: Mapping[str, Any]) -> str:
    low, high = figures["interval"]
    return f"{figures['acceptance_length']:.3f} [{low:.2f}, {high:.2f}] (n = {figures['n']})"
