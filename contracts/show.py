"""Show tokens with the supervised ones coloured: in a terminal, or as parts of one HTML file."""

from __future__ import annotations

import html
import itertools
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import typer

from contracts.errors import UserError

STYLE = """
body { font: 14px/1.6 ui-monospace, monospace; max-width: 60rem; margin: 2rem auto; white-space: pre-wrap; }
h1, h2, p { font-family: system-ui; white-space: normal; } h1 { font-size: 1.2rem; } h2 { font-size: 1rem; }
.context { color: #777; } .supervised { background: #c8f0cf; } .supervised.odd { background: #9fe0ad; }
@media (prefers-color-scheme: dark) { body { background: #111; color: #ddd; }
 .supervised { background: #14532d; } .supervised.odd { background: #1d7a42; } }
"""


@dataclass(frozen=True)
class Piece:
    """A token, or a few that only together make characters: its text, whether it is supervised, its ids."""

    text: str
    supervised: bool
    token_ids: list[int]


class Decoder:
    """A target's tokenizer, without transformers: to look at something should not take seconds."""

    def __init__(self, target: Path) -> None:
        """Raises UserError when the target's folder has no tokenizer.json."""
        from tokenizers import Tokenizer

        path = target / "tokenizer.json"
        if not path.exists():
            raise UserError(
                target,
                found="no tokenizer.json",
                expected="the target's folder",
                fix="Bring the target back to its place.",
            )
        self._tokenizer = Tokenizer.from_file(str(path))

    def split(self, token_ids: Sequence[int], supervised: Sequence[bool]) -> Iterator[Piece]:
        """Yield tokens as pieces, each all supervised or all not."""
        pending: list[int] = []
        for place, token_id in enumerate(token_ids):
            pending.append(token_id)
            text = str(self._tokenizer.decode(pending, skip_special_tokens=False))
            last = place + 1 == len(supervised) or supervised[place + 1] != supervised[place]
            if not text.endswith("\ufffd") or last or len(pending) >= 8:
                yield Piece(text, supervised[place], pending)
                pending = []


def print_tokens(title: str, pieces: Sequence[Piece]) -> None:
    """Print pieces: the supervised ones green on a terminal, between « and » elsewhere."""
    colour = sys.stdout.isatty()
    count = sum(len(piece.token_ids) for piece in pieces if piece.supervised)
    total = sum(len(piece.token_ids) for piece in pieces)
    print(f"\n{title}: {total} tokens, {count} supervised ({'green' if colour else 'between « and »'})\n")
    for supervised, group in itertools.groupby(pieces, key=lambda piece: piece.supervised):
        text = "".join(piece.text for piece in group)
        if colour:
            print(typer.style(text, fg="green" if supervised else "bright_black"), end="")
        else:
            print(f"«{text}»" if supervised else text, end="")
    print()


def write_html(path: Path, title: str, facts: Mapping[str, str], parts: Mapping[str, Sequence[Piece]]) -> None:
    """Write one HTML file: facts, then tokens by part; a token's place and ids show when it is pointed at."""
    title = html.escape(title)
    words = [f"<!doctype html><meta charset=utf-8><title>{title}</title><style>{STYLE}</style><h1>{title}</h1>"]
    words += [f"<p>{html.escape(key)}: {html.escape(value)}</p>" for key, value in facts.items()]
    for name, pieces in parts.items():
        words.append(f"<h2>{html.escape(name)}</h2><div>")
        place = 0
        for odd, piece in enumerate(pieces):
            kind = ("supervised odd" if odd % 2 else "supervised") if piece.supervised else "context"
            ids = f"{place}: {' '.join(map(str, piece.token_ids))}"
            words.append(f'<span class="{kind}" title="{ids}">{html.escape(piece.text)}</span>')
            place += len(piece.token_ids)
        words.append("</div>")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(words) + "\n", encoding="utf-8")
