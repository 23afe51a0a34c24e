"""Accuracy of the target with and without a draft: what others read of accuracy.json, as tables and as a sentence.

`bench accuracy` computes it (bench/accuracy_report.py); `train export --served` puts it on the model card.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from pydantic import BaseModel, ConfigDict

from common.markdown import to_cell


class Score(BaseModel):
    """One metric of a task's greedy or sampled answers on one server (`load`): means over questions and `repeats`.

    `difference` is with minus without the draft, `standard_error` that of its mean over the questions. `by_chance` is
    the largest difference that chance explains.
    """

    model_config = ConfigDict(frozen=True)

    load: str
    task: str
    answers: str
    metric: str
    questions: int
    repeats: int
    base: float
    draft: float
    difference: float
    standard_error: float
    by_chance: float
    is_beyond_chance: bool


class Replies(BaseModel):
    """Replies of a task on one server: those of the same text on both sides, and those cut without and with the draft.

    `acceptance_length` is that of vLLM's counters over all passes.
    """

    model_config = ConfigDict(frozen=True)

    load: str
    task: str
    answers: str
    replies: int
    identical: int
    cut: tuple[int, int]
    acceptance_length: float


class Scores(BaseModel):
    """The comparisons of accuracy.json. `confidence` holds for all of them together.

    `min_questions`: with fewer, no difference is beyond chance. `sampling`: what the sampled requests ask for.
    """

    model_config = ConfigDict(frozen=True)

    lm_eval: str
    thinking_mode: str
    sampling: dict[str, Any]
    confidence: float
    min_questions: int
    rows: list[Score]
    replies: list[Replies]


def make_score_table(rows: Iterable[Score]) -> str:
    """Format the comparisons as Markdown; those beyond chance are marked."""
    lines = [
        "| server | task | metric | answers | questions | without draft | with draft | difference | by chance |",
        "|---|---|---|---|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        answers = row.answers + (f" x {row.repeats}" if row.answers == "sampled" else "")
        verdict = " **too large**" if row.is_beyond_chance else ""
        lines.append(
            f"| {to_cell(row.load)} | {to_cell(row.task)} | {to_cell(row.metric)} | {answers} | {row.questions} "
            f"| {row.base:.4f} | {row.draft:.4f} | {row.difference:+.4f} ± {row.standard_error:.4f} "
            f"| {row.by_chance:.4f}{verdict} |"
        )
    return "\n".join(lines)


def make_reply_table(replies: Iterable[Replies]) -> str:
    """Format counts of replies as Markdown. Sampled replies differ, since they are drawn anew."""
    lines = [
        "| server | task | answers | identical | cut without draft | cut with draft | acceptance length |",
        "|---|---|---|---:|---:|---:|---:|",
    ]
    for row in replies:
        same = f"{row.identical} of {row.replies}" if row.answers == "greedy" else ""
        lines.append(
            f"| {to_cell(row.load)} | {to_cell(row.task)} | {row.answers} | {same} | {row.cut[0]} | {row.cut[1]} "
            f"| {row.acceptance_length:.3f} |"
        )
    return "\n".join(lines)


def explain_scores(scores: Scores) -> str:
    """Return the verdict and the tables as Markdown."""
    return "\n\n".join([_judge(scores), make_score_table(scores.rows), make_reply_table(scores.replies)])


def _judge(scores: Scores) -> str:
    """Return whether a difference is beyond chance, and which tasks are too short to tell."""
    if not scores.rows:
        return "**Not conclusive**: no metric has a number for each question."
    wrong, number = sum(row.is_beyond_chance for row in scores.rows), len(scores.rows)
    explained = f"larger than chance explains ({100 * scores.confidence:g}% for the whole table)"
    text = f"None of {number} differences is {explained}."
    if wrong:
        verb = "is" if wrong == 1 else "are"
        text = f"**The draft changes the target's answers:** {wrong} of {number} differences {verb} {explained}."
    if short := list(dict.fromkeys(row.task for row in scores.rows if row.questions < scores.min_questions)):
        names = ", ".join(map(to_cell, short))
        text += (
            f" **Not conclusive** for {names}: with fewer than {scores.min_questions} questions no difference can be."
        )
    return text
