"""The evaluation sets: known ones by name, from the hub, and local files of prompt rows.

Reads: a known set by name, through `datasets` (the hub or its cache); or a local file of prompt rows
       (contracts/prompts.py), of conversations, or of a known set in its own columns.

`bench acceptance` measures on these sets; `synth prepare` removes training prompts that overlap with them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.files import read_json
from contracts.conversation import CONVERSATIONS_FILE
from contracts.prepared import PROMPTS_FILE
from contracts.prompt_files import PromptSet, open_hub, open_prompts
from contracts.prompts import PROMPT_KEYS, parse_list, read_category, read_id
from contracts.run import is_complete


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


@dataclass(frozen=True)
class EvaluationSet:
    """A set's name, where it is from (a file, or a repository), and its rows as read."""

    name: str
    origin: str
    prompts: PromptSet
    source: Source | None

    @property
    def checksum(self) -> str:
        return self.prompts.checksum

    def rows(self) -> Iterator[dict[str, Any] | None]:
        """Yield each row in the form that `synth generate` reads; None if it has a placeholder instead of its text.

        Raises UserError for a row that is not an object.
        """
        for number, row in enumerate(self.prompts.rows()):
            if not isinstance(row.value, dict):
                raise UserError(row.where, found=row.error or "no JSON object", expected="a row", fix="Fix the line.")
            yield make_row(row.value, self.name, number, self.source)


def open_evaluation_set(text: str, option: str = "--prompts") -> EvaluationSet:
    """Open the set that `gsm8k`, `gsm8k=FILE` or `FILE` names, as given to `option`. Raises UserError."""
    name, file = parse_name(text, option)
    source = SOURCES.get(name)
    if file is not None:
        return EvaluationSet(name, str(file), open_prompts(file), source)
    assert source is not None
    try:
        prompts = open_hub(source.repository, source.split, source.config)
    except LookupError as error:
        raise UserError(
            f"{option} {name}",
            found=f"{source.repository}, which cannot be loaded ({error.args[0]})",
            expected="the set, on the hub or in its cache",
            fix=f"Give a local copy: {option} {name}=FILE.jsonl.",
        ) from None
    return EvaluationSet(name, source.repository, prompts, source)


def parse_name(text: str, option: str = "--prompts") -> tuple[str, Path | None]:
    """Split `gsm8k`, `gsm8k=FILE` or `FILE` into a name and a local file, if any.

    A folder that `synth generate` wrote stands for its conversations. Raises UserError for a name that is neither a
    known set nor a file, or that is not a valid file name.
    """
    name, separator, path = text.partition("=")
    if not separator and name in SOURCES and not Path(name).is_file():
        return name, None
    folder = Path(path if separator else name)
    name = name if separator else folder.stem
    file = find_rows(folder)
    if not file.is_file():
        raise UserError(
            f"{option} {text}",
            found="neither a file nor a known set",
            expected=f"one of {', '.join(SOURCES)}, NAME=FILE, or a JSONL file",
            fix="Correct it.",
        )
    if not re.fullmatch(r"[\w.-]+", name):
        raise UserError(
            f"{option} {text}", found=f"the name {name!r}", expected="letters, digits, - and _", fix="Give NAME=FILE."
        )
    return name, file


def find_rows(path: Path) -> Path:
    """Return the file of rows in a folder of `synth generate` or `synth prepare`; any other path unchanged.

    Raises UserError for an unfinished output or one whose shards were not merged.
    """
    if not (path / "run.json").exists():
        return path
    name = {"synth generate": CONVERSATIONS_FILE, "synth prepare": PROMPTS_FILE}.get(
        read_json(path / "run.json", "a run's state")["stage"]
    )
    if name is None or not is_complete(path):
        raise UserError(
            path,
            found="no finished output of `synth generate` or `synth prepare`",
            expected="prompts or conversations",
            fix="Finish it (`synth merge` joins shards), or give a file.",
        )
    return path / name


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
