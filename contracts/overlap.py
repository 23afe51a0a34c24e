"""Find training rows that overlap with evaluation questions.

Texts are compared by their normalized words (common/text.py), so case, spacing and punctuation do not matter. A row
overlaps with a question if

* ngram: they share a run of `ngram` words, 13 by default, as in GPT-3 (arXiv 2005.14165, appendix C) and in lm-eval
  (docs/decontamination.md). A question of fewer words, but at least 8 (GPT-3's smallest n-gram), must occur as a whole.
  Runs that more than 10 questions share are boilerplate and do not count;
* equal: a message is the question, even if the question is shorter, and even if words are joined or split;
* near: the row's user turns are similar to the question's (common/minhash.py).

Replies are compared by n-grams alone: a reply that quotes a question leaks it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any, Literal

import numpy as np

from common.minhash import NUM_BANDS, band_keys, similarity, sketch
from common.text import drop_symbols, normalize_tokens
from contracts.evaluation_sets import EvaluationSet
from contracts.prompt_files import Row
from contracts.prompts import read_prompt_row, read_text

NGRAM = 13
MIN_WORDS = 8
MAX_SHARED = 10
NEAR = 0.8
BATCH_ROWS = 256
_FACTORS = np.random.default_rng(1).integers(2**63, size=256, dtype=np.uint64) * np.uint64(2) + np.uint64(1)


@dataclass(frozen=True)
class Question:
    """A row of an evaluation set: `index` counts its rows from 0; `turns` are the words of its user turns."""

    dataset: str
    index: int
    id: str
    turns: list[list[str]]
    texts: list[str]
    """To compare with what a row's user says: the turns as one text, and the first one alone if there are several."""


@dataclass(frozen=True)
class Document:
    """A training row, normalized. `prompts`, `replies`: the words of its messages.

    As text, with symbols: `said`, its user and tool messages; `context`, its others; `whole`, all with their roles.
    """

    prompts: list[list[str]]
    replies: list[list[str]]
    said: str
    whole: str
    context: str


@dataclass(frozen=True)
class Match:
    """Why a training row overlaps with a question. `text`: the words they share; `similarity` of near ones."""

    kind: Literal["equal", "ngram", "near"]
    dataset: str
    index: int
    id: str
    text: str
    similarity: float | None = None
    in_reply: bool = False

    def to_json(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(self).items() if value is not None}


def read_document(messages: Sequence[Mapping[str, Any]], *, with_replies: bool = False) -> Document:
    """Normalize the messages of a row, and its replies if asked for."""
    prompts, replies = [], []
    said: list[str] = []
    context: list[str] = []
    whole: list[str] = []
    for message in messages:
        role, text = message["role"], read_text(message)
        if role == "assistant":
            if with_replies:
                texts = [*(str(message.get(key) or "") for key in ("reasoning_content", "reasoning")), text]
                replies += [_read_words(text) for text in texts]
            continue
        tokens = normalize_tokens(text)
        squeezed = "".join(tokens) or text  # of punctuation alone
        prompts.append(drop_symbols(tokens))
        (said if role in ("user", "tool") else context).append(squeezed)
        whole.append(f"{role}:{squeezed}")
    return Document(prompts, replies, "".join(said), "\n".join(whole), "\n".join(context))


def _read_words(text: str) -> list[str]:
    return drop_symbols(normalize_tokens(text))


def read_questions(found: EvaluationSet) -> Iterator[Question | None]:
    """Yield the questions of a set, None for a row that has none. Raises UserError for a row that is not an object."""
    for index, row in enumerate(found.rows()):
        yield None if row is None else read_question(row, found.name, index)


def read_question(row: Mapping[str, Any], dataset: str, index: int) -> Question | None:
    """Return the question of a prompt row, None if it has none that can be used."""
    try:
        source = read_prompt_row(row)
    except ValueError:
        return None
    tokens = [normalize_tokens(read_text(message)) for message in source.messages if message["role"] == "user"]
    turns = [words for words in map(drop_symbols, tokens) if words]
    # Training rows often hold the first turn of a question with several.
    texts = list(dict.fromkeys(["".join(map("".join, tokens)), "".join(tokens[0])])) if turns else []
    return Question(dataset, index, source.id, turns, texts) if turns else None


def find_overlaps(rows: Iterable[Row], index: OverlapIndex) -> Iterator[tuple[dict[str, Any], list[Match]]]:
    """Yield the rows of a training set that overlap with questions, prompts and replies, and their matches.

    Rows that cannot be read are skipped, as in training.
    """
    rows = iter(rows)
    while batch := list(islice(rows, BATCH_ROWS)):
        values, documents = [], []
        for row in batch:
            try:
                messages = read_prompt_row(row.value).messages
            except ValueError:
                continue
            values.append(row.value)
            documents.append(read_document(messages, with_replies=True))
        found = index.find(documents, sketch([document.said for document in documents]))
        yield from ((value, matches) for value, matches in zip(values, found, strict=True) if matches)


class OverlapIndex:
    """Evaluation questions, to look training rows up in. Memory: about 50 bytes for each of their words."""

    def __init__(self, questions: Iterable[Question], ngram: int = NGRAM, near: float | None = NEAR) -> None:
        """Index the questions. `near`: the least similarity of near ones; None: they do not count."""
        self._questions = list(questions)
        self._grams = _list_grams(self._questions, ngram)
        self._equal: dict[str, list[int]] = {}
        for number, question in enumerate(self._questions):
            turns = [question.turns[0], *(words for words in question.turns[1:] if len(words) >= MIN_WORDS)]
            for squeezed in {"".join(words) for words in turns}:
                self._equal.setdefault(squeezed, []).append(number)
        self._near = near
        texts = [(number, text) for number, question in enumerate(self._questions) for text in question.texts]
        self._owners = np.array([number for number, _ in texts], np.int64)
        self._sketches = sketch([text for _, text in texts])
        self._bands = [_SortedKeys(band_keys(self._sketches, band)) for band in range(NUM_BANDS)]

    def find(self, documents: Sequence[Document], sketches: np.ndarray) -> list[list[Match]]:
        """Return the matches of each document, one for each question, in the order of the questions.

        `sketches`: of what the documents' users say, (N, NUM_HASHES).
        """
        found: list[dict[int, Match]] = [{} for _ in documents]
        if not self._questions:
            return [[] for _ in documents]
        for place, document in enumerate(documents):
            for words in document.prompts:
                for number in self._equal.get("".join(words), ()):
                    found[place].setdefault(number, self._match("equal", number, words))
        texts = [
            _Text(place, words, is_reply)
            for place, document in enumerate(documents)
            for is_reply, members in ((False, document.prompts), (True, document.replies))
            for words in members
        ]
        for text, number, words in self._find_grams(texts):
            found[text.place].setdefault(number, self._match("ngram", number, words, in_reply=text.is_reply))
        if self._near is not None:
            for place, number, alike in self._find_near(sketches):
                found[place].setdefault(number, self._match("near", number, self._questions[number].turns[0], alike))
        return [[matches[number] for number in sorted(matches)] for matches in found]

    def _match(
        self,
        kind: Literal["equal", "ngram", "near"],
        number: int,
        words: Sequence[str],
        alike: float | None = None,
        *,
        in_reply: bool = False,
    ) -> Match:
        question = self._questions[number]
        text = " ".join(words)[:300]
        return Match(kind, question.dataset, question.index, question.id, text, alike, in_reply)

    def _find_grams(self, texts: Sequence[_Text]) -> Iterator[tuple[_Text, int, list[str]]]:
        """Yield text, question and shared words of every n-gram that occurs in a question."""
        words = [word for text in texts for word in text.words]
        owners = np.repeat(np.arange(len(texts)), [len(text.words) for text in texts])
        hashes = _hash_words(words)
        for size, grams in self._grams.items():
            rolled = _roll(hashes, size)
            inside = owners[: len(rolled)] == owners[size - 1 :]  # the n-gram does not span two texts
            for place, entry in grams.find(rolled):
                if not inside[place]:
                    continue
                number, turn, start = grams.places[entry]
                shared = self._questions[number].turns[turn][start : start + size]
                if words[place : place + size] == shared:
                    yield texts[owners[place]], int(number), shared

    def _find_near(self, sketches: np.ndarray) -> Iterator[tuple[int, int, float]]:
        """Yield document, question and similarity of those that are similar enough."""
        pairs = {pair for band, keys in enumerate(self._bands) for pair in keys.find(band_keys(sketches, band))}
        for place, entry in sorted(pairs):
            alike = float(similarity(sketches[place : place + 1], self._sketches[entry])[0])
            if alike >= (self._near or 0.0):
                yield place, int(self._owners[entry]), round(alike, 3)


@dataclass(frozen=True)
class _Text:
    """One text of the document at `place`."""

    place: int
    words: list[str]
    is_reply: bool


class _SortedKeys:
    """Keys in order, to find the entries with a key."""

    def __init__(self, keys: np.ndarray) -> None:
        self._order = np.argsort(keys, kind="stable")
        self._keys = keys[self._order]

    def find(self, wanted: np.ndarray) -> Iterator[tuple[int, int]]:
        """Yield the place in `wanted` and the entry of every pair with equal keys."""
        first = np.searchsorted(self._keys, wanted)
        is_there = first < len(self._keys)
        is_there[is_there] = self._keys[first[is_there]] == wanted[is_there]
        for place in np.flatnonzero(is_there):
            entry = int(first[place])
            while entry < len(self._keys) and self._keys[entry] == wanted[place]:
                yield int(place), int(self._order[entry])
                entry += 1


class _Grams(_SortedKeys):
    """The n-grams of one size. `places`, (N, 3): question, turn and first word of each."""

    def __init__(self, keys: np.ndarray, places: np.ndarray, texts: np.ndarray) -> None:
        """Keep the n-grams that are no boilerplate. `texts`: a number for each question, the same for equal ones."""
        owners = np.unique(np.stack([keys, texts[places[:, 0]]]), axis=1)[0]
        values, counts = np.unique(owners, return_counts=True)
        kept = ~np.isin(keys, values[counts > MAX_SHARED])
        super().__init__(keys[kept])
        self.places = places[kept]


def _list_grams(questions: Sequence[Question], ngram: int) -> dict[int, _Grams]:
    """Return the n-grams of all turns by size: of `ngram` words, or a shorter turn as a whole."""
    keys: dict[int, list[np.ndarray]] = {}
    places: dict[int, list[np.ndarray]] = {}
    seen: dict[str, int] = {}
    texts = np.zeros(len(questions), np.uint64)
    for number, question in enumerate(questions):
        texts[number] = seen.setdefault(" ".join(" ".join(words) for words in question.turns), number)
        for turn, words in enumerate(question.turns):
            if len(words) < min(MIN_WORDS, ngram):
                continue
            size = min(ngram, len(words))
            rolled = _roll(_hash_words(words), size)
            starts = np.arange(len(rolled))
            keys.setdefault(size, []).append(rolled)
            owner = [np.full_like(starts, number), np.full_like(starts, turn), starts]
            places.setdefault(size, []).append(np.stack(owner, axis=1))
    return {size: _Grams(np.concatenate(keys[size]), np.concatenate(places[size]), texts) for size in sorted(keys)}


def _hash_words(words: Sequence[str]) -> np.ndarray:
    """Return a hash of each word, uint64. It differs between processes; matches are compared word by word."""
    return np.fromiter(map(hash, words), np.int64, len(words)).view(np.uint64)


def _roll(hashes: np.ndarray, size: int) -> np.ndarray:
    """Return the hash of each run of `size` words: (W,) -> (W - size + 1,)."""
    count = max(0, len(hashes) - size + 1)
    total = np.zeros(count, np.uint64)
    for k in range(size):
        total += hashes[k : k + count] * _FACTORS[k]
    return total
