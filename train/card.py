"""The model card of an exported draft: README.md, made from its certificate and from nothing else.

The YAML block at its top is the hub's metadata with a model-index, as huggingface_hub writes it
(https://github.com/huggingface/hub-docs/blob/main/modelcard.md). The text is a jinja2 template.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from common.markdown import to_cell
from contracts.accuracy import Score, explain_scores
from contracts.certificate import AcceptanceRow, Accuracy, Certificate
from contracts.draft import CARD_FILE, DESCRIPTOR_FILE
from contracts.speeds import explain_speeds

TEMPLATE = Path(__file__).with_name("card.md.j2")
TASK = "text-generation"
TASK_NAME = "Speculative decoding"
METRIC = "acceptance_length"
HUB_NAME = re.compile(r"[\w.-]+/[\w-]+")
"""Without a dot in the last part, which a path of a file has."""


def make_card(certificate: Certificate) -> str:
    """Return the card's text; it does not depend on the certificate's digests and on the card's own checksum."""
    environment = Environment(  # noqa: S701 (Markdown, not HTML)
        loader=FileSystemLoader(TEMPLATE.parent),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"figure": _figure, "interval": _interval, "counts": _counts, "mode": _mode, "cell": to_cell}
    text = environment.get_template(TEMPLATE.name).render(
        c=certificate,
        a="An" if certificate.draft.method[0] in "aeiou" else "A",
        descriptor=DESCRIPTOR_FILE,
        files={name: checksum for name, checksum in certificate.files.items() if name != CARD_FILE},
        rows=[row for part in certificate.served for row in part.rows],
        speeds=[(", ".join(part.sets), explain_speeds(part.speeds)) for part in certificate.served if part.speeds],
        accuracy=[(part, explain_scores(part)) for part in certificate.accuracy],
        recommended=_recommended(certificate),
    )
    return f"---\n{make_metadata(certificate).to_yaml()}\n---\n{text}"


def make_metadata(certificate: Certificate) -> ModelCardData:
    """Return the hub's metadata, with a result in the model-index for each row of the certificate."""
    results = list(_make_results(certificate))
    sources = certificate.data.prompts.sources if certificate.data.prompts else []
    return ModelCardData(
        library_name="vllm",
        tags=["speculative-decoding", "draft-model", certificate.draft.method, "draftline"],
        base_model=certificate.target.repository,
        datasets=[source.origin for source in sources if HUB_NAME.fullmatch(source.origin)] or None,
        model_name=certificate.name if results else None,
        eval_results=results or None,
    )


def _make_results(certificate: Certificate) -> Iterator[EvalResult]:
    for source, parts in (("simulated", certificate.predicted), ("served by vLLM", certificate.served)):
        for part in parts:
            yield from (_make_result(row, source) for row in part.rows)
    for of_tasks in certificate.accuracy:
        yield from (_make_score(row, of_tasks) for row in of_tasks.rows)


def _make_result(row: AcceptanceRow, source: str) -> EvalResult:
    """Return a row as a result. Those of one set and mode share an entry: the hub tells them apart by these two."""
    temperature = "" if row.temperature is None else f", temperature {row.temperature:g}"
    return EvalResult(
        task_type=TASK,
        task_name=TASK_NAME,
        dataset_type=row.set,
        dataset_name=row.set,
        dataset_config=row.thinking_mode or None,
        metric_type=METRIC,
        metric_name=f"acceptance length, {source}, K = {row.num_draft_tokens}{temperature}",
        metric_value=row.acceptance_length,
        metric_args={
            "source": source,
            "num_draft_tokens": row.num_draft_tokens,
            "temperature": row.temperature,
            "confidence_interval": list(row.interval) if row.interval else None,
            "steps": row.steps,
        },
    )


def _make_score(row: Score, accuracy: Accuracy) -> EvalResult:
    """Return a task's score as a result: the target's with the draft, and in its arguments that without it."""
    sampled = row.answers == "sampled"
    return EvalResult(
        task_type=TASK,
        task_name=TASK_NAME,
        dataset_type=row.task,
        dataset_name=row.task,
        dataset_config=accuracy.thinking_mode or None,
        metric_type=row.metric.partition(",")[0],  # without lm-eval's filter
        metric_name=f"{row.metric} of the target with this draft, {row.answers} answers, {row.load}",
        metric_value=round(row.draft, 4),
        metric_args={
            "source": f"bench accuracy, lm-eval {accuracy.lm_eval}",
            "without_draft": round(row.base, 4),
            "difference": round(row.difference, 4),
            "by_chance": round(row.by_chance, 4),
            "is_beyond_chance": row.is_beyond_chance,
            "confidence": accuracy.confidence,
            "questions": row.questions,
            "repeats": row.repeats,
            "temperature": accuracy.sampling.get("temperature") if sampled else 0.0,
        },
    )


def _recommended(certificate: Certificate) -> list[tuple[int, int, str]]:
    """Return `(concurrency, K, set)` of the recommended numbers of draft tokens."""
    return [(at.concurrency, at.recommended, ", ".join(part.sets)) for part in certificate.served for at in part.speeds]


def _figure(value: float) -> str:
    return f"{value:.3f}"


def _interval(edges: Sequence[float] | None) -> str:
    return f" [{edges[0]:.3f}, {edges[1]:.3f}]" if edges else ""


def _counts(values: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{to_cell(name)} {to_cell(value)}" for name, value in values.items() if value not in (0, None, [])
    )


def _mode(row: AcceptanceRow) -> str:
    temperature = "unknown" if row.temperature is None else f"{row.temperature:g}"
    return f"{to_cell(row.thinking_mode or 'unset')} | {temperature}"
