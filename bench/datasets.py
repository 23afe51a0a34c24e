"""The prompt sets that acceptance is measured on, as rows that `synth generate` reads.

Reads:  a known set by its name, through `datasets` (the hub or its cache); or a local file of rows with `turns`,
        `messages` or `prompt`, or of a known set in its own columns.
Writes: FOLDER/<name>.jsonl: `id`, `category`, and `turns` (or what the local rows have).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from contracts.errors import UserError
from contracts.files import write_atomic

CATEGORY_KEYS = ("category", "subject")
GENERAL_KEYS = ("turns", "messages", "conversations", "prompt")


@dataclass(frozen=True)
class Source:
    """A set on the hub: repository, configuration, split, and the column that holds the prompt or the turns."""

    repository: str
    config: str | None
    split: str
    column: str


SOURCES = {
    "mt_bench": Source("HuggingFaceH4/mt_bench_prompts", None, "train", "prompt"),
    "gsm8k": Source("openai/gsm8k", "main", "test", "question"),
    "humaneval": Source("openai/openai_humaneval", None, "test", "prompt"),
    "math500": Source("HuggingFaceH4/MATH-500", None, "test", "problem"),
    "aime": Source("HuggingFaceH4/aime_2024", None, "train", "problem"),
    "speed_bench": Source("nvidia/SPEED-Bench", "qualitative", "test", "turns"),
}
PLACEHOLDER = "FULL BENCHMARK DATA SHOULD BE FETCHED"
"""How SPEED-Bench begins a turn whose text its own script has to fetch."""


def parse_name(text: str) -> tuple[str, Path | None]:
    """`gsm8k`, `gsm8k=FILE` or `FILE` as a name and a local file, if any.

    Raises UserError for a name that is neither known nor a file's, or that could not name a file.
    """
    name, separator, path = text.partition("=")
    if not separator and name in SOURCES and not Path(name).is_file():
        return name, None
    file = Path(path if separator else name)
    name = name if separator else file.stem
    if not file.is_file():
        raise UserError(
            f"--prompts {text}",
            found="neither a file nor a known set",
            expected=f"one of {', '.join(SOURCES)}, NAME=FILE, or a JSONL file",
            fix="Correct it.",
        )
    if not re.fullmatch(r"[\w.-]+", name):
        raise UserError(
            f"--prompts {text}", found=f"the name {name!r}", expected="letters, digits, - and _", fix="Give NAME=FILE."
        )
    return name, file


def write_prompts(text: str, folder: Path, limit: int | None) -> Path:
    """Write the first `limit` rows of a set into `folder`; the file. Raises UserError when it cannot be had."""
    name, file = parse_name(text)
    source = SOURCES.get(name)
    rows = _read_lines(file) if file else _read_hub(name, SOURCES[name])
    lines: list[str] = []
    for number, row in enumerate(rows):
        if limit is not None and len(lines) == limit:
            break
        if (made := make_row(row, name, number, source)) is not None:
            lines.append(json.dumps(made, ensure_ascii=False))
    if not lines:
        raise UserError(f"--prompts {text}", found="no row with a prompt", expected="some", fix="Look at the set.")
    path = folder / f"{name}.jsonl"
    write_atomic(path, "\n".join(lines) + "\n")
    return path


def make_row(row: dict[str, Any], name: str, number: int, source: Source | None) -> dict[str, Any] | None:
    """A row as `synth generate` reads it; None for one that holds a placeholder instead of its text."""
    own = row.get(source.column) if source and not ({"turns", "messages"} & set(row)) else row.get("turns")
    turns = [own] if isinstance(own, str) else own
    if isinstance(turns, list) and any(PLACEHOLDER in str(turn) for turn in turns):
        return None
    made: dict[str, Any] = {"turns": turns} if turns else {key: row[key] for key in GENERAL_KEYS if key in row}
    made |= {key: row[key] for key in ("tools", "system") if key in row}
    category = next((str(row[key]) for key in CATEGORY_KEYS if row.get(key)), name)
    return {"id": str(row.get("id") or row.get("question_id") or f"{name}/{number}"), "category": category, **made}


def _read_lines(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if line.isspace():
                continue
            try:
                row = json.loads(line)
            except ValueError:
                row = None
            if not isinstance(row, dict):
                raise UserError(f"{path}:{number}", found="no JSON object", expected="a row", fix="Mend the line.")
            yield row


def _read_hub(name: str, source: Source) -> Iterable[dict[str, Any]]:
    import datasets

    try:
        rows: Iterable[dict[str, Any]] = datasets.load_dataset(source.repository, source.config, split=source.split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise UserError(
            f"--prompts {name}",
            found=f"{source.repository}, which cannot be had ({str(error).splitlines()[0][:200]})",
            expected="the set, on the hub or in its cache",
            fix=f"Give a local copy: --prompts {name}=FILE.jsonl.",
        ) from None
    return rows
