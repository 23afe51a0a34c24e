"""One HTML file that needs no other: headings, paragraphs, tables and pictures, all text escaped.

Reads:  PNG files, which it takes in as base64.
Writes: the file that it is told.
"""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from pathlib import Path

from contracts.files import write_atomic

STYLE = """
:root { color-scheme: light dark; --text: #1b262c; --quiet: #5f6f78; --line: #dbe3e7; --page: #fff; --head: #f4f7f8; }
@media (prefers-color-scheme: dark) {
 :root { --text: #dde5e9; --quiet: #93a4ad; --line: #2f3b42; --page: #12181b; --head: #1a2226; } }
body { font: 15px/1.55 system-ui, sans-serif; color: var(--text); background: var(--page);
 max-width: 72rem; margin: 2.5rem auto; padding: 0 1.2rem; }
h1 { font-size: 1.5rem; margin-bottom: .3rem; } h2 { font-size: 1.1rem; margin: 2.4rem 0 .6rem; }
p { margin: .4rem 0; color: var(--quiet); }
.table { overflow-x: auto; }
table { font-size: .87em; border-collapse: collapse; margin: .6rem 0; font-variant-numeric: tabular-nums; }
th, td { padding: .26rem .55rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { background: var(--head); font-weight: 600; } td.text, th.text { text-align: left; }
img { max-width: 100%; border-radius: 6px; background: #fff; padding: .4rem; box-sizing: border-box; }
"""


LONG = 30


class Page:
    """A page that is added to from top to bottom."""

    def __init__(self, title: str) -> None:
        title = html.escape(title)
        self._parts = [
            "<!doctype html><html lang=en><head><meta charset=utf-8>"
            '<meta name=viewport content="width=device-width, initial-scale=1">',
            f"<title>{title}</title><style>{STYLE}</style></head><body><h1>{title}</h1>",
        ]

    def heading(self, text: str) -> None:
        self._parts.append(f"<h2>{html.escape(text)}</h2>")

    def text(self, text: str) -> None:
        self._parts.append(f"<p>{html.escape(text)}</p>")

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[object]], num_text: int = 1) -> None:
        """A table whose first `num_text` columns are words; numbers stand to the right. A long one unfolds."""

        def row(tag: str, cells: Sequence[object]) -> str:
            kinds = [" class=text" if place < num_text else "" for place in range(len(cells))]
            words = [f"<{tag}{kind}>{html.escape(str(cell))}</{tag}>" for kind, cell in zip(kinds, cells, strict=True)]
            return f"<tr>{''.join(words)}</tr>"

        body = "\n".join(row("td", cells) for cells in rows)
        table = f"<div class=table><table>{row('th', columns)}\n{body}</table></div>"
        if len(rows) > LONG:
            table = f"<details><summary>{len(rows)} rows</summary>{table}</details>"
        self._parts.append(table)

    def picture(self, path: Path, title: str) -> None:
        data = base64.b64encode(path.read_bytes()).decode()
        self._parts.append(f'<img src="data:image/png;base64,{data}" alt="{html.escape(title)}">')

    def write(self, path: Path) -> None:
        write_atomic(path, "\n".join([*self._parts, "</body></html>", ""]))
