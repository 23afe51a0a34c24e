"""Write the prompt sets of `bench acceptance` as rows that `synth generate` reads.

Reads:  a known set by name, through `datasets` (the hub or its cache); or a local file of prompt rows
        (contracts/prompts.py), or of a known set in its own columns.
Writes: FOLDER/<name>.jsonl: `id`, `category`, and `turns` (or what the local rows have).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.files import write_atomic
from contracts.prompt_files import open_hub, open_prompts
from contracts.prompts import PROMPT_KEYS, parse_list, read_category, read_id


@dataclass(frozen=True)
class Source:
    """A set on the hub; `column` holds the prompt or the turns."""

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
"""Beginning of a SPEED-Bench turn whose text must be fetched with its own script."""


def parse_name(text: str) -> tuple[str, Path | None]:
    """Split `gsm8k`, `gsm8k=FILE` or `FILE` into a name and a local file, if any.

    Raises UserError for a name that is neither a known set nor a file, or that is not a valid file name.
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
    """Write the first `limit` rows of a set to a file; return it. Raises UserError if the set is missing."""
    name, file = parse_name(text)
    source = SOURCES.get(name)
    rows = _read_file(file) if file else _read_hub(name, SOURCES[name])
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
    """Convert a row for `synth generate`; return None if it has a placeholder instead of its text."""
    prompt = {key: parse_list(row[key]) for key in PROMPT_KEYS if row.get(key)}
    if source and not ({"turns", "messages"} & set(prompt)):
        prompt = {"turns": row.get(source.column)}
    if isinstance(prompt.get("turns"), str):
        prompt["turns"] = [prompt["turns"]]
    if PLACEHOLDER in str(prompt.get("turns")):
        return None
    prompt |= {key: row[key] for key in ("tools", "system") if key in row}
    return {"id": read_id(row) or f"{name}/{number}", "category": read_category(row) or name, **prompt}


def _read_file(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a local file. Raises UserError for one that is not an object."""
    for row in open_prompts(path).rows():
        if not isinstance(row.value, dict):
            raise UserError(row.where, found=row.error or "no JSON object", expected="a row", fix="Fix the line.")
        yield row.value


def _read_hub(name: str, source: Source) -> Iterator[dict[str, Any]]:
    """Yield the rows of a known set. Raises UserError if it cannot be loaded."""
    try:
        rows = open_hub(source.repository, source.split, source.config).rows()
    except LookupError as error:
        raise UserError(
            f"--prompts {name}",
            found=f"{source.repository}, which cannot be loaded ({error.args[0]})",
            expected="the set, on the hub or in its cache",
            fix=f"Give a local copy: --prompts {name}=FILE.jsonl.",
        ) from None
    yield from (row.value for row in rows)
