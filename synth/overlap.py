"""Check finished conversations for overlap with evaluation sets: their prompts, and the target's replies.

Reads:  conversations (`synth generate`) or prompts, evaluation sets (contracts/evaluation_sets.py).
Writes: OUTPUT, JSON lines: `id`, `category`, and `matches` of each conversation that overlaps (contracts/overlap.py).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.files import replace_file
from contracts.evaluation_sets import SOURCES, find_rows, open_evaluation_set
from contracts.overlap import NEAR, OverlapIndex, find_overlaps
from contracts.prompt_files import open_prompts
from contracts.prompts import read_category, read_id
from synth.prepare import read_all
from synth.prepare_scan import write_line


def check_overlap(run: Path, against: Sequence[str] | None, output: Path, ngram: int) -> dict[str, Any]:
    """List the conversations that overlap in `output`; return the counts. `against` None: all known sets.

    Raises UserError for a path without rows, or a set that cannot be read.
    """
    path = find_rows(run)
    if not path.exists():
        raise UserError(run, found="nothing there", expected="conversations or prompts", fix="Correct the path.")
    questions, sets = read_all([open_evaluation_set(text, "--against") for text in against or SOURCES])
    prompts = open_prompts(path)
    counts: Counter[str] = Counter()
    with replace_file(output) as file:
        for value, matches in find_overlaps(prompts.rows(), OverlapIndex(questions, ngram, NEAR)):
            line = {"id": read_id(value), "category": read_category(value)}
            file.write(write_line({**line, "matches": [match.to_json() for match in matches]}))
            counts["rows"] += 1
            counts["by their prompt"] += any(not match.in_reply for match in matches)
            counts["by a reply alone"] += all(match.in_reply for match in matches)
            counts.update({match.dataset for match in matches})
    print(f"overlap: {counts['rows']} of {prompts.num_rows} rows with {len(questions)} questions -> {output}")
    if counts["rows"]:
        print(f"  {counts['by their prompt']} by their prompt, {counts['by a reply alone']} by a reply alone")
        print("  " + ", ".join(f"{found['name']}: {counts[found['name']]}" for found in sets))
    return dict(counts)
