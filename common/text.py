"""Normalize text, so that texts which differ in case, spacing or punctuation alone compare as equal."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

APOSTROPHES = "'’‘ʼ"
"""Dropped, so that `don't` and `dont` are the same word. Other punctuation separates words."""
UNSPACED = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u2e80-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"
)
"""Characters of scripts without spaces between words (Thai to Khmer, Chinese, Japanese): each counts as a word."""
OPERATOR = re.compile(r"(?<=\d)\s?([-*/%])|([-*/%])(?=\s?\d)")
OPERATORS = {"-": "minus", "*": "times", "/": "over", "%": "percent"}
"""Punctuation that calculates, beside a digit: 3 - 4 is not 3 / 4."""
SYMBOL = "\x01"
"""First character of a token that is a symbol (mathematics, currencies, emoji)."""


class _Table(dict[int, str | None]):
    """A translation table for `str.translate`, filled as characters occur."""

    def __missing__(self, codepoint: int) -> str | None:
        char = chr(codepoint)
        kind = unicodedata.category(char)
        value: str | None = " "
        if char in APOSTROPHES or kind == "Cf":  # Cf: zero-width characters, soft hyphens
            value = None
        elif kind[0] == "S":
            value = f" {SYMBOL}{char} "
        elif kind[0] in "LMN":
            value = f" {char} " if UNSPACED.match(char) else char
        elif char == SYMBOL:
            value = char
        self[codepoint] = value
        return value


_TABLE = _Table()


def normalize_tokens(text: str) -> list[str]:
    """Return the words and symbols of a text in lower case, without punctuation; compatible forms are equal (NFKC).

    NFKC and case folding as in Unicode's toNFKC_Casefold.
    """
    if text.isascii():
        text = text.lower()
    else:
        text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    text = OPERATOR.sub(_mark, text.replace(SYMBOL, " "))
    return text.translate(_TABLE).split()


def drop_symbols(tokens: Sequence[str]) -> list[str]:
    """Return the words among the tokens."""
    return [token for token in tokens if token[0] != SYMBOL]


def _mark(match: re.Match[str]) -> str:
    return f" {SYMBOL}{OPERATORS[match[1] or match[2]]} "
