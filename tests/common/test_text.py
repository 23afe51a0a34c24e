"""Claims about normalized text and sketches: case, spacing and punctuation do not matter; similarity is estimated."""

from __future__ import annotations

import random

import numpy as np
import pytest

from common.minhash import NUM_BANDS, SHINGLE, band_keys, similarity, sketch
from common.text import drop_symbols, normalize_tokens


def words(text: str) -> list[str]:
    return drop_symbols(normalize_tokens(text))


@pytest.mark.parametrize(
    "text",
    [
        "don't STOP me now, it's well known",
        "Don’t  stop—me now; it’s well-known!",
        "“dont stop me now: its\twell\nknown”",
        "ＤＯＮ＇Ｔ stop me\u200b now … it's w\u00adell known",
        "**don't** stop `me` now_it's (well) known $",
    ],
)
def test_case_spacing_punctuation_and_unicode_forms_do_not_matter(text: str) -> None:
    assert words(text) == ["dont", "stop", "me", "now", "its", "well", "known"]


def test_scripts_without_spaces_give_a_word_a_character_and_marks_stay_with_their_letters() -> None:
    assert words("日本語です。ABC") == ["日", "本", "語", "で", "す", "abc"]
    assert words("हिन्दी भाषा") == ["हिन्दी", "भाषा"]
    assert words("STRASSE Straße ﬁne") == ["strasse", "strasse", "fine"]


def test_symbols_and_operators_beside_a_digit_tell_texts_apart_but_are_no_words() -> None:
    sums = ["What is 3 + 4?", "what is 3 - 4", "What is 3-4", "What is 3 / 4", "What is 3*4", "What is 3 4"]
    found = ["".join(normalize_tokens(text)) for text in sums]
    assert found[1] == found[2]
    assert len(set(found)) == 5
    assert all(words(text) == ["what", "is", "3", "4"] for text in sums)
    assert normalize_tokens("a - b\x01") == ["a", "b"]


def exact_similarity(text: str, other: str) -> float:
    parts = [{t.encode()[i : i + SHINGLE] for i in range(len(t.encode()) - SHINGLE + 1)} for t in (text, other)]
    return len(parts[0] & parts[1]) / len(parts[0] | parts[1])


def test_the_estimate_is_near_the_similarity_and_similar_texts_share_a_band() -> None:
    rng = random.Random(0)
    texts, others = [], []
    for _ in range(200):
        text = "".join(rng.choices("abcdefghijklmnop ", k=rng.randint(60, 900)))
        cut = rng.randint(0, len(text) // 3)
        texts.append(text)
        others.append(text[: -cut or None] + "".join(rng.choices("xyz", k=cut // 2)))
    some, more = sketch(texts), sketch(others)
    exact = np.array([exact_similarity(a, b) for a, b in zip(texts, others, strict=True)])
    errors = similarity(some, more) - exact
    assert abs(errors.mean()) < 0.01
    assert errors.std() < 0.05
    shared = sum(band_keys(some, band) == band_keys(more, band) for band in range(NUM_BANDS)) > 0
    assert shared[exact >= 0.8].mean() > 0.98
    assert similarity(sketch(["a", "", "日本"]), sketch(["a", "", "日本"])).tolist() == [1.0, 1.0, 1.0]


def test_sketches_do_not_depend_on_the_texts_beside_them(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [f"text number {n} " * (n + 1) for n in range(20)]
    together = sketch(texts)
    assert (together == np.concatenate([sketch([text]) for text in texts])).all()
    monkeypatch.setattr("common.minhash.PART_BYTES", 50)
    assert (together == sketch(texts)).all()
