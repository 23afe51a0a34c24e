"""Write the prompt sets of `bench acceptance` as rows that `synth generate` reads.

Reads:  an evaluation set (contracts/evaluation_sets.py).
Writes: FOLDER/<name>.jsonl: `id`, `category`, and `turns` (or what the local rows have).
"""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path

from common.errors import UserError
from common.files import write_atomic
from contracts.evaluation_sets import open_evaluation_set


def write_prompts(text: str, folder: Path, limit: int | None) -> Path:
    """Write the first `limit` rows of a set to a file; return it. Raises UserError if the set is missing."""
    found = open_evaluation_set(text)
    rows = islice((row for row in found.rows() if row is not None), limit)
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    if not lines:
        raise UserError(f"--prompts {text}", found="no row with a prompt", expected="some", fix="Look at the set.")
    path = folder / f"{found.name}.jsonl"
    write_atomic(path, "\n".join(lines) + "\n")
    return path
