"""Compare two servers' answers question by question: accuracies, their difference, and how large it can be by chance.

Writes: accuracy.json, accuracy.md.

If the draft changes nothing, the two sides of a question are exchangeable, so the sign of its difference is random.
Drawing all signs again gives the distribution of the mean difference by chance (a paired permutation test). Answers to
one question count as one observation, their mean. The error probability is divided by the number of comparisons
(Bonferroni), so it holds for the whole report.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import IncompleteError, UserError
from common.files import write_atomic, write_json
from contracts.accuracy import Scores, make_reply_table, make_score_table

MAX_EXACT = 14
"""Up to so many questions that differ, all signs are enumerated."""
NUM_DRAWS = 100_000
CHUNK = 2_000


@dataclass(frozen=True)
class Answers:
    """All passes over a task or group, greedy or sampled, without the draft and with it."""

    load: str
    kind: str
    base: Sequence[Mapping[str, Any]]
    draft: Sequence[Mapping[str, Any]]


def summarize(answers: Sequence[Answers], confidence: float) -> dict[str, Any]:
    """Return `rows`, one per load, task, kind of answer and metric, and `replies`, one without the metrics.

    Raises UserError if the sides were asked other questions.
    """
    rows, replies = [], []
    for part in answers:
        for task in part.base[0]["tasks"]:
            base, draft = ([found["tasks"][task] for found in side] for side in (part.base, part.draft))
            key = {"load": part.load, "task": task, "answers": part.kind}
            _check_same_questions(key, [*base, *draft])
            replies.append({**key, **_count_replies(base, draft), "acceptance_length": _read_length(part.draft)})
            rows += [{**key, **_compare(metric, base, draft)} for metric in _list_metrics(base[0])]
    error = (1 - confidence) / max(1, len(rows))
    for row in rows:
        differences = np.array(row.pop("differences"))
        row["by_chance"] = largest_by_chance(differences, error)
        row["is_beyond_chance"] = abs(row["difference"]) > row["by_chance"] + 1e-9
    return {"confidence": confidence, "min_questions": count_needed(error), "rows": rows, "replies": replies}


def _check_same_questions(key: Mapping[str, str], passes: Sequence[Sequence[Mapping[str, Any]]]) -> None:
    asked = {tuple((question["id"], question["prompt"]) for question in questions) for questions in passes}
    if len(asked) > 1:
        raise UserError(
            f"{key['load']}, task {key['task']}",
            found="other questions with the draft than without",
            expected="the same prompts",
            fix="Its data set has changed: delete the task's files in answers/ and run again.",
        )


def _count_replies(base: Sequence[Any], draft: Sequence[Any]) -> dict[str, Any]:
    """Count replies, those that are the same text on both sides, and those that were cut."""
    pairs = [
        pair
        for before, after in zip(base, draft, strict=True)
        for one, other in zip(before, after, strict=True)
        for pair in zip(one["replies"], other["replies"], strict=True)
    ]
    return {
        "replies": len(pairs),
        "identical": sum(one == other for one, other in pairs),
        "cut": [sum(q["cut"] for questions in side for q in questions) for side in (base, draft)],
    }


def _read_length(passes: Sequence[Mapping[str, Any]]) -> float:
    """Return the acceptance length over all passes of a task or group. Raises IncompleteError without a draft."""
    drafts, accepted = (
        sum(found["counters"][key] for found in passes) for key in ("num_drafts", "num_accepted_tokens")
    )
    if not drafts:
        raise IncompleteError("vLLM's metrics: found no drafted token, expected some. Serve with the draft.")
    return round(1 + accepted / drafts, 4)


def _list_metrics(questions: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yield the metrics that every question has a number for."""
    for metric in questions[0]["metrics"]:
        if all(question["metrics"].get(metric) is not None for question in questions):
            yield metric


def _compare(metric: str, base: Sequence[Any], draft: Sequence[Any]) -> dict[str, Any]:
    """Return means, difference and its standard error; `differences` has one entry per question."""
    before, after = (
        np.array([[question["metrics"][metric] for question in questions] for questions in side]).mean(axis=0)
        for side in (base, draft)
    )
    differences = after - before
    spread = float(differences.std(ddof=1)) if len(differences) > 1 else 0.0
    return {
        "metric": metric,
        "questions": len(differences),
        "repeats": len(base),
        "base": float(before.mean()),
        "draft": float(after.mean()),
        "difference": float(differences.mean()),
        "standard_error": spread / math.sqrt(len(differences)),
        "differences": differences.tolist(),
    }


def largest_by_chance(differences: np.ndarray, error: float) -> float:
    """Return the size of the mean difference that random signs exceed with a probability of at most `error`.

    Shapes: differences (questions,).
    """
    moved = differences[differences != 0]
    if not len(moved):
        return 0.0
    if len(moved) <= MAX_EXACT:
        signs = 1 - 2 * ((np.arange(1 << len(moved))[:, None] >> np.arange(len(moved))) & 1)
        sums = signs @ moved
    else:
        draw = np.random.default_rng(0)
        parts = [
            (1 - 2 * draw.integers(0, 2, (CHUNK, len(moved)), dtype=np.int8)) @ moved for _ in range(NUM_DRAWS // CHUNK)
        ]
        sums = np.concatenate(parts)
    # Rounded, so that sums of the same differences in another order are the same.
    sizes = np.abs(sums).round(9) / len(differences)
    return float(np.quantile(sizes, 1 - error, method="inverted_cdf"))


def count_needed(error: float) -> int:
    """Return the number of questions from which on a difference in all of them is beyond chance."""
    return math.ceil(1 - math.log2(error))  # all signs are equal with a probability of 2 / 2^n


def judge(report: Mapping[str, Any]) -> None:
    """Raise IncompleteError for a difference beyond chance, or if nothing or too little was asked to find any."""
    if not report["rows"]:
        raise IncompleteError(
            "bench accuracy: found no metric with a number for each question, expected one. Choose a task with another "
            "metric: those of a whole corpus (BLEU) are not compared."
        )
    wrong = [row for row in report["rows"] if row["is_beyond_chance"]]
    if wrong:
        row = max(wrong, key=lambda row: abs(row["difference"]))
        others = f", the largest of {len(wrong)}" if len(wrong) > 1 else ""
        raise IncompleteError(
            f"{row['load']}, task {row['task']}, {row['metric']}, {row['answers']} answers: found {row['draft']:.4f} "
            f"with the draft, {row['base']:.4f} without, a difference of {row['difference']:+.4f} over "
            f"{row['questions']} questions{others}, expected at most {row['by_chance']:.4f} (by chance, "
            f"{report['confidence']:.0%} for all {len(report['rows'])} comparisons). The draft changes the target's "
            "answers: `bench lossless` locates the first token that differs."
        )
    for row in report["rows"]:
        if row["questions"] < report["min_questions"]:
            raise IncompleteError(
                f"{row['load']}, task {row['task']}: found {row['questions']} questions, expected at least "
                f"{report['min_questions']}: with fewer, no difference is beyond chance. Raise --limit, or choose a "
                "longer task."
            )


def write_report(report: Mapping[str, Any], output: Path) -> None:
    """Write accuracy.json and accuracy.md, and print the tables."""
    write_json(output / "accuracy.json", report)
    scores = Scores.model_validate(report)
    tables = f"{make_score_table(scores.rows)}\n\n{make_reply_table(scores.replies)}"
    write_atomic(output / "accuracy.md", tables + "\n")
    print(f"{tables}\n")
