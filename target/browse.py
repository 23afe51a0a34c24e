"""Write a page to look through tokens: conversations of a synthesis, samples of a store.

Writes: one HTML file that loads nothing. All data are in it, compressed in blocks of rows: the page unpacks the index
        when it opens, and a block when one of its rows is shown or searched.

Texts are kept once: a row is a list of numbers of *pieces* (see `target.view.Piece`).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import numpy as np

from common.errors import UserError
from common.html import Script, pack, write_page
from target.view import Decoder, supervised_of

TEMPLATE = Path(__file__).with_name("browse.html.j2")
SCRIPTS = [Path(__file__).with_name(name) for name in ("browse_row.js", "browse.js")]
MAX_BLOCK_TOKENS = 65536
MAX_BLOCK_ROWS = 512
EXCERPT = 32
"""Pieces of a row's first reply that the list shows."""

Item = TypeVar("Item")


def spread(items: Sequence[Item], limit: int | None) -> list[Item]:
    """Return `limit` of the items, spread evenly; all of them if there are no more, or if it is None."""
    if limit is None or len(items) <= limit:
        return list(items)
    return [items[number * len(items) // limit] for number in range(limit)]


@dataclass(frozen=True)
class Part:
    """A sequence of tokens; `spans` are its replies, half-open.

    `steps`: how a draft walked them, (S, 2 + K), see contracts/proposals.py; None without a draft.
    """

    name: str
    token_ids: Sequence[int]
    spans: Sequence[tuple[int, int]]
    steps: np.ndarray | None = None


@dataclass(frozen=True)
class Row:
    """A row of the page, which can filter by `facets`, values by name, and shows `facts` with the tokens.

    `label`: what the list calls the row.
    """

    id: str
    label: str
    facets: Mapping[str, str]
    facts: Mapping[str, str] = field(default_factory=dict)
    parts: Sequence[Part] = ()


class Browser:
    """Collects rows and writes their page. Memory: that of the page."""

    def __init__(self, title: str, noun: str, target: Path | None, draft: str = "") -> None:
        """`noun`: what a row is, in the plural. `target`: its folder; None if no row has tokens. `draft`: its name.

        Raises UserError: see `Decoder`.
        """
        self._title, self._noun, self._draft = title, noun, draft
        self._decoder = Decoder(target) if target else None
        self._pieces: dict[tuple[int, ...], int] = {}
        self._texts: list[str] = []
        self._columns: dict[str, list[object]] = {}
        self._facets: list[Mapping[str, str]] = []
        self._blocks: list[str] = []
        self._sizes: list[int] = []
        self._block: list[object] = []
        self._block_tokens = 0

    def add(self, row: Row) -> None:
        """Add a row."""
        parts = [self._encode(part) for part in row.parts]
        steps = [part.steps for part in row.parts if part.steps is not None]
        num_tokens = sum(len(part.token_ids) for part in row.parts)
        columns = {
            "id": row.id,
            "label": row.label,
            "tokens": num_tokens,
            "supervised": sum(end - start for part in row.parts for start, end in part.spans),
            "steps": sum(len(one) for one in steps),
            "accepted": sum(int(one[:, 1].sum()) for one in steps),
            "excerpt": next((pieces[slice(*spans[:2])][:EXCERPT] for _, pieces, spans, _ in parts if spans), []),
        }
        for name, value in columns.items():
            self._columns.setdefault(name, []).append(value)
        self._facets.append(row.facets)
        self._block.append([dict(row.facts), parts])
        self._block_tokens += num_tokens
        if self._block_tokens >= MAX_BLOCK_TOKENS or len(self._block) >= MAX_BLOCK_ROWS:
            self._close_block()

    def write(self, path: Path) -> None:
        """Write the page. Raises UserError if there is no row, or if it cannot be written."""
        if not self._facets:
            raise UserError(self._title, found="no rows", expected=self._noun, fix="Give a folder that has some.")
        self._close_block()
        special = self._decoder.special_ids if self._decoder else set()
        index = {
            "noun": self._noun,
            "draft": self._draft,
            "texts": self._texts,
            "ids": [ids[0] if len(ids) == 1 else ids for ids in self._pieces],
            "special": [number for ids, number in self._pieces.items() if len(ids) == 1 and ids[0] in special],
            "rows": self._columns,
            "facets": [self._facet(name) for name in dict.fromkeys(name for row in self._facets for name in row)],
            "blocks": self._sizes,
        }
        script = Script("".join(path.read_text(encoding="utf-8") for path in SCRIPTS))
        write_page(path, TEMPLATE, title=self._title, blocks=[pack(index), *self._blocks], script=script)

    def _facet(self, name: str) -> dict[str, object]:
        """Return a facet's values in order, and the place of each row's value among them, -1 without one."""
        values = sorted({row[name] for row in self._facets if name in row})
        codes = {value: code for code, value in enumerate(values)}
        return {"name": name, "values": values, "codes": [codes.get(row.get(name, ""), -1) for row in self._facets]}

    def _close_block(self) -> None:
        if self._block:
            self._blocks.append(pack(self._block))
            self._sizes.append(len(self._block))
            self._block, self._block_tokens = [], 0

    def _encode(self, part: Part) -> tuple[str, list[int], list[int], list[list[int]] | None]:
        """Return a part's name, pieces, spans (one after another, as places of pieces) and steps (ditto, of tokens)."""
        assert self._decoder is not None
        pieces, starts = [], []
        for piece in self._decoder.split(part.token_ids, supervised_of(len(part.token_ids), part.spans)):
            starts.append(piece.start)
            pieces.append(self._number(tuple(piece.token_ids), piece.text))
        spans = [bisect_left(starts, edge) for span in part.spans for edge in span]
        return part.name, pieces, spans, self._encode_steps(part.steps)

    def _encode_steps(self, steps: np.ndarray | None) -> list[list[int]] | None:
        if steps is None:
            return None
        assert self._decoder is not None
        drafted, places = np.unique(steps[:, 2:], return_inverse=True)
        numbers = np.array([self._number((token_id,), self._decoder.text(token_id)) for token_id in drafted.tolist()])
        rest = numbers[places].reshape(len(steps), -1) if len(steps) else steps[:, 2:]
        encoded: list[list[int]] = np.concatenate([steps[:, :2], rest], axis=1).tolist()
        return encoded

    def _number(self, token_ids: tuple[int, ...], text: str) -> int:
        number = self._pieces.setdefault(token_ids, len(self._texts))
        if number == len(self._texts):
            self._texts.append(text)
        return number
