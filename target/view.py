"""Decode tokens one by one, and print them with the supervised ones coloured."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import typer

from common.errors import UserError

MAX_PENDING = 8
"""Tokens that are decoded together at most; a whole character has up to 4 bytes."""


class Piece(NamedTuple):
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
                fix="Put the target back, or name its folder.",
            )
        self._tokenizer = Tokenizer.from_file(str(path))
        self._texts: dict[int, str] = {}
        added = self._tokenizer.get_added_tokens_decoder().items()
        self.special_ids = {token_id for token_id, token in added if token.special}
        # SentencePiece's decoders strip the space before a text's first token, so decode behind another token.
        self._before: list[int] = self._tokenizer.encode("a", add_special_tokens=False).ids
        self._text_before = str(self._tokenizer.decode(self._before, skip_special_tokens=False))

    def text(self, token_id: int) -> str:
        """Return a token's text; "\ufffd" stands for bytes that are no whole character."""
        if token_id not in self._texts:
            self._texts[token_id] = self._decode([token_id])
        return self._texts[token_id]

    def split(self, token_ids: Sequence[int], supervised: Sequence[bool]) -> Iterator[Piece]:
        """Yield the tokens as pieces; the tokens of a piece are all supervised or all not."""
        pending: list[int] = []
        for position, token_id in enumerate(token_ids):
            pending.append(token_id)
            text = self.text(token_id) if len(pending) == 1 else self._decode(pending)
            last = position + 1 == len(supervised) or supervised[position + 1] != supervised[position]
            if not text.endswith("\ufffd") or last or len(pending) >= MAX_PENDING:
                yield Piece(text, supervised[position], pending, position + 1 - len(pending))
                pending = []

    def _decode(self, token_ids: list[int]) -> str:
        text = str(self._tokenizer.decode(self._before + token_ids, skip_special_tokens=False))
        if text.startswith(self._text_before):
            return text[len(self._text_before) :]
        return str(self._tokenizer.decode(token_ids, skip_special_tokens=False))


def supervised_of(num_tokens: int, spans: Iterable[tuple[int, int]]) -> list[bool]:
    """Return which of a sample's tokens are in one of the half-open spans."""
    supervised = [False] * num_tokens
    for start, end in spans:
        supervised[start:end] = [True] * (end - start)
    return supervised


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
