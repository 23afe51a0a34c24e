"""Show tokens in a terminal or as an HTML page, with the supervised ones coloured."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import typer

from common.errors import UserError
from common.html import write_page

TEMPLATE = Path(__file__).with_name("view.html.j2")


@dataclass(frozen=True)
class Piece:
    """One token, or several that decode to characters only together. `start` is the position of the first one."""

    text: str
    supervised: bool
    token_ids: list[int]
    start: int

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)


class Decoder:
    """Decodes with a target's tokenizer.json, without the seconds that importing transformers takes."""

    def __init__(self, target: Path) -> None:
        """Load the tokenizer. Raises UserError if the target's folder has no tokenizer.json."""
        from tokenizers import Tokenizer

        path = target / "tokenizer.json"
        if not path.exists():
            raise UserError(
                target,
                found="no tokenizer.json",
                expected="the target's folder",
                fix="Put the target back.",
            )
        self._tokenizer = Tokenizer.from_file(str(path))

    def split(self, token_ids: Sequence[int], supervised: Sequence[bool]) -> Iterator[Piece]:
        """Yield the tokens as pieces; the tokens of a piece are all supervised or all not."""
        pending: list[int] = []
        for position, token_id in enumerate(token_ids):
            pending.append(token_id)
            text = str(self._tokenizer.decode(pending, skip_special_tokens=False))
            last = position + 1 == len(supervised) or supervised[position + 1] != supervised[position]
            if not text.endswith("\ufffd") or last or len(pending) >= 8:
                yield Piece(text, supervised[position], pending, position + 1 - len(pending))
                pending = []


def print_tokens(title: str, pieces: Sequence[Piece]) -> None:
    """Print pieces; the supervised ones are green in a terminal and between « and » elsewhere."""
    colour = sys.stdout.isatty()
    count = sum(piece.num_tokens for piece in pieces if piece.supervised)
    total = sum(piece.num_tokens for piece in pieces)
    print(f"\n{title}: {total} tokens, {count} supervised ({'green' if colour else 'between « and »'})\n")
    for supervised, group in itertools.groupby(pieces, key=lambda piece: piece.supervised):
        text = "".join(piece.text for piece in group)
        if colour:
            print(typer.style(text, fg="green" if supervised else "bright_black"), end="")
        else:
            print(f"«{text}»" if supervised else text, end="")
    print()


def write_html(path: Path, title: str, facts: Mapping[str, str], parts: Mapping[str, Sequence[Piece]]) -> None:
    """Write an HTML page of facts and each part's tokens; hovering over a token shows position and ids."""
    write_page(path, TEMPLATE, title=title, facts=facts, parts=parts)
