"""The files in which each tensor-parallel rank writes the states that it captured for a preflight."""

from __future__ import annotations

import re
from pathlib import Path

PREFLIGHT = "draftline-preflight"
"""Part of the request ids of a preflight; ranks write their states for these requests only."""

NAME = re.compile(r"\.rank(\d+)of(\d+)")


def rank_file(staged: Path, rank: int, ranks: int) -> Path:
    """Return the file of a rank beside a staged file."""
    return staged.with_name(f"{staged.name}.rank{rank}of{ranks}")


def find_rank_files(staged: Path) -> tuple[int, list[Path]]:
    """Return the number of ranks (0: none wrote yet) and the files that are there, in order of the ranks."""
    found = {}
    for path in staged.parent.glob(f"{staged.name}.rank*"):
        if match := NAME.fullmatch(path.name.removeprefix(staged.name)):
            found[int(match[1])] = (int(match[2]), path)
    ranks = max((count for count, _ in found.values()), default=0)
    return ranks, [found[rank][1] for rank in sorted(found)]
