"""Read the reports that a draft's certificate cites: of `train eval`, and of three commands of `bench`.

Reads: a report file of `train eval`; folders of `bench acceptance`, `bench lossless` and `bench accuracy` (run.json and
       their report). Each is given as PATH or NAME=PATH; the name is that of the set on the card.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.files import hash_file, read_json
from contracts.accuracy import Scores
from contracts.certificate import Accuracy, Equality, Lossless, Overlap, Part, Predicted, Served, make_row
from contracts.run import read_run
from contracts.speeds import Speeds

NAME = re.compile(r"[\w.-]+")
ACCEPTANCE, LOSSLESS, ACCURACY = "bench acceptance", "bench lossless", "bench accuracy"
REPORTS = {ACCEPTANCE: "acceptance.json", LOSSLESS: "lossless.json", ACCURACY: "accuracy.json"}
NOT_CITED = {
    "bench sweep": "A sweep measures one number of draft tokens, without intervals: the card's speeds are those of "
    "`bench acceptance --conversations`.",
}
"""What to give instead of a folder that one might take for a source of figures."""
CITED = "`bench acceptance`, `bench lossless` or `bench accuracy`"


@dataclass(frozen=True)
class Source:
    """A report's path, and the set's name if the user gave one."""

    path: Path
    name: str | None = None

    @classmethod
    def parse(cls, option: str, text: str) -> Source:
        """Parse PATH or NAME=PATH. Raises UserError for a name of other characters."""
        name, separator, path = text.partition("=")
        if not separator or Path(text).exists():
            return cls(Path(text))
        if not NAME.fullmatch(name):
            raise UserError(
                f"{option} {text}", found=f"the name {name!r}", expected="letters, digits, . - and _", fix="Correct it."
            )
        return cls(Path(path), name)


def read_predicted(source: Source, weights: Sequence[str]) -> Predicted:
    """Return the figures of a `train eval`. Raises UserError if it is of other weights than these checksums."""
    report = read_json(source.path, "a report of `train eval`")
    found = (report.get("inputs") or {}).get("draft")
    if found not in weights:
        raise UserError(
            source.path,
            found=f"an evaluation of another checkpoint ({str(found)[:12]})",
            expected=f"one of the draft that is exported ({weights[0][:12]})",
            fix="Run `train eval` on this run.",
        )
    if "rows" not in report:
        raise _too_old(source.path, "train eval")
    name, k = source.name or report["set"], report["num_draft_tokens"]
    return Predicted(
        set=name,
        report=hash_file(source.path),
        store=report["inputs"]["store"],
        acceptance_length=report["acceptance_length"],
        interval=report["interval"],
        confidence=report.get("confidence"),
        trained_on=report.get("trained_on"),
        rows=[make_row(name, k, row) for row in report["rows"]],
    )


def read_measured(sources: Sequence[Source], draft: str, target: str) -> dict[str, list[Part]]:
    """Return the certificate's sections served, lossless and accuracy from folders of `bench`, told apart by run.json.

    Raises UserError for a folder of another command, and as `_open`. `draft`, `target`: their fingerprints.
    """
    readers = {
        "served": (ACCEPTANCE, read_served),
        "lossless": (LOSSLESS, read_lossless),
        "accuracy": (ACCURACY, read_accuracy),
    }
    stages = [(source, _stage_of(source.path)) for source in sources]
    return {
        section: [read(source, draft, target) for source, found in stages if found == stage]
        for section, (stage, read) in readers.items()
    }


def _stage_of(folder: Path) -> str:
    """Return which command wrote a folder. Raises UserError unless it is one that a certificate cites."""
    stage = str(read_json(folder / "run.json", f"the output of {CITED}").get("stage"))
    if stage not in REPORTS:
        raise UserError(
            folder,
            found=f"the output of `{stage}`",
            expected=f"that of {CITED}",
            fix=NOT_CITED.get(stage, "Give the right folder."),
        )
    return stage


def read_served(source: Source, draft: str, target: str) -> Served:
    """Return the figures of a `bench acceptance`. Raises: see `_open`."""
    run, report, checksum = _open(source.path, ACCEPTANCE, draft, target)
    if "by_set" not in report:
        raise _too_old(source.path, ACCEPTANCE)
    name = source.name
    rows = [make_row(name or row["dataset"], row["num_draft_tokens"], row) for row in report["by_set"]]
    if name is not None and len({row["dataset"] for row in report["by_set"]}) > 1:
        raise UserError(source.path, found="several sets", expected="one, to give it a name", fix="Leave the name out.")
    overruns = report.get("overruns") or []
    return Served(
        sets=list(dict.fromkeys(row.set for row in rows)),
        report=checksum,
        settings=run["settings"],
        environment=run.get("environment", {}),
        rows=rows,
        equality=_read_equality(report),
        overruns=sum(map(len, overruns.values())) if isinstance(overruns, Mapping) else len(overruns),
        speeds=[Speeds.model_validate(at) for at in report.get("speeds") or []],
        overlap=_read_overlap(report["overlap"]) if report.get("overlap") else None,
    )


def read_lossless(source: Source, draft: str, target: str) -> Lossless:
    """Return the result of a `bench lossless`, which only finishes if no reply is wrong. Raises: see `_open`."""
    run, report, checksum = _open(source.path, LOSSLESS, draft, target)
    return Lossless(
        report=checksum,
        settings=run["settings"],
        environment=run.get("environment", {}),
        concurrency=sorted({row["concurrency"] for row in report["passes"]}),
        **{key: report[key] for key in ("replies", "identical", "ties", "tolerance", "num_chats")},
    )


def read_accuracy(source: Source, draft: str, target: str) -> Accuracy:
    """Return the scores of a `bench accuracy`, whatever its verdict. Raises: see `_open`."""
    run, report, checksum = _open(source.path, ACCURACY, draft, target)
    return Accuracy(
        report=checksum,
        settings=run["settings"],
        environment=run.get("environment", {}),
        **{key: report[key] for key in Scores.model_fields},
    )


def _open(folder: Path, stage: str, draft: str, target: str) -> tuple[dict[str, Any], dict[str, Any], str]:
    """Return a folder's run state, its report and the report's checksum.

    Raises UserError if the run is unfinished, or of another draft or target than these fingerprints.
    """
    run = read_run(folder, stage)
    for key, expected in (("draft", draft), ("target", target)):
        if (found := run["inputs"].get(key)) != expected:
            raise UserError(
                folder,
                found=f"figures of another {key} ({str(found)[:12]})",
                expected=f"this {key}'s ({expected[:12]})",
                fix=f"Give the right folder, or run `{stage}` with this {key}.",
            )
    path = folder / REPORTS[stage]
    return run, dict(read_json(path, f"the output of `{stage}`")), hash_file(path)


def _read_overlap(found: Mapping[str, Any]) -> Overlap:
    """Return the figures of an overlap, without the paths of this machine and the texts of rows."""
    return Overlap(
        training=[str(file["sha256"]) for file in found["training"]],
        sets=found["sets"],
        acceptance=found["acceptance"],
    )


def _read_equality(report: Mapping[str, Any]) -> list[Equality]:
    """Return the comparisons of greedy replies; of prompt sets one for each number of draft tokens."""
    if "greedy" not in report:
        return [_make_equality("all K", report["greedy_identical"], report["greedy_total"], report["differing"])]
    return [
        _make_equality(f"K = {k}", greedy["identical"], greedy["total"], greedy["differing"])
        for k, greedy in report["greedy"].items()
        if greedy["compared"] and greedy["total"]
    ]


def _make_equality(what: str, identical: int, total: int, differing: Sequence[Mapping[str, Any]]) -> Equality:
    gaps = [abs(found["logit_gap"]) for found in differing if found["logit_gap"] is not None]
    return Equality(
        what=what,
        identical=identical,
        total=total,
        max_logit_gap=max(gaps, default=None),
        unknown=len(differing) - len(gaps),
    )


def _too_old(path: Path, stage: str) -> UserError:
    return UserError(
        path,
        found="a report of an earlier version, without figures by mode and temperature",
        expected="one of this version",
        fix=f"Run the same `{stage}` again: it keeps what it measured and computes the figures.",
    )
