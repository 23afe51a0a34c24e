"""Detect the language of a prompt, for `prepare.max_per_language`; needs no network."""

from __future__ import annotations

from functools import cache
from typing import Any

from common.errors import UserError

UNCLEAR = "und"
"""ISO 639's code for a language that is not determined: short or mixed texts, code."""
LEAST_PROBABILITY = 0.3
MAX_CHARS = 1000


@cache
def _load() -> Any:
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ModuleNotFoundError:
        raise UserError(
            "prepare.max_per_language",
            found="no py3langid",
            expected="the library that detects languages",
            fix="Install it: pip install -e '.[languages]' -c constraints.txt.",
        ) from None
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


def load_detector() -> None:
    """Load the model. Raises UserError if the library is missing."""
    _load()


def detect_language(text: str) -> str:
    """Return the ISO 639-1 code of a text's language (three letters where there is no shorter one), or `und`."""
    language, probability = _load().classify(text[:MAX_CHARS])
    return str(language) if probability >= LEAST_PROBABILITY else UNCLEAR
