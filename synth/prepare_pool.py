"""The rows that passed the scans of `synth prepare`: remove duplicates, apply caps and weights.

Reads: the scans' folders (synth/prepare_scan.py). Texts and sketches stay on disk; a row takes about 100 bytes.

A row's place is its number among all rows of all sources, in the order of the recipe. Of equal or similar rows the
first one stays.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO

import numpy as np

from common.files import read_json
from common.minhash import NUM_BANDS, NUM_HASHES, band_keys, mix, similarity
from synth.prepare_scan import ROW, Names

CHUNK_ROWS = 1 << 16
MAX_STEPS = 16
"""Earlier rows of a band that a row is compared with. Near-duplicates share many bands, so few are needed."""
EVERY_OTHER = "*"


class Pool:
    """All rows of the scans; use as a context manager. `step` (R,): why a row was removed, an index of STEPS, or 0."""

    STEPS = ("kept", "duplicate", "near_duplicate", "category", "language", "share")

    def __init__(self, folders: Sequence[Path], seed: int) -> None:
        self.scans = [read_json(folder / "scan.json", "a scan of `synth prepare`") for folder in folders]
        self._folders = folders
        self._stack = ExitStack()
        self._categories, self._languages = Names(), Names()
        sizes = [(folder / "rows.bin").stat().st_size // ROW.itemsize for folder in folders]
        self.source = np.repeat(np.arange(len(folders), dtype=np.int32), sizes)
        self._first = np.concatenate([[0], np.cumsum(sizes)])
        fields = {name: np.empty(sum(sizes), ROW[name]) for name in ROW.names or ()}
        for (folder, scan), first, size in zip(self._parts(), self._first, sizes, strict=False):
            records = self._renumber(np.fromfile(folder / "rows.bin", ROW), scan)
            for name, values in fields.items():
                values[first : first + size] = records[name]
        self.row, self._end, self._key, self._context, self.category, self.language = fields.values()
        self.priority = mix(self._key ^ mix(np.array([seed % 2**64], np.uint64)))
        """A draw for each row that depends on its text and the seed alone."""
        self.step = np.zeros(len(self.row), np.int8)
        self.match = np.full(len(self.row), -1, np.int32)
        self.alike = np.ones(len(self.row), np.float32)
        """The row that a removed duplicate is equal or similar to, and their similarity."""

    def __enter__(self) -> Pool:
        self._lines = [self._open(folder / "rows.jsonl") for folder in self._folders]
        self._sketches = [self._open(folder / "sketches.bin") for folder in self._folders]
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def categories(self) -> list[str]:
        return list(self._categories.numbers)

    @property
    def languages(self) -> list[str]:
        return list(self._languages.numbers)

    def line(self, place: int) -> bytes:
        """Return a row's line of the prompt set."""
        source, end = self.source[place], int(self._end[place])
        start = 0 if place == self._first[source] else int(self._end[place - 1])
        return os.pread(self._lines[source].fileno(), end - start, start)

    def remove_duplicates(self) -> None:
        """Remove rows whose normalized text an earlier row has."""
        order = np.argsort(self._key, kind="stable")
        keys = self._key[order]
        is_first = np.concatenate([[True], keys[1:] != keys[:-1]])[: len(keys)]
        first = order[np.maximum.accumulate(np.where(is_first, np.arange(len(keys)), 0))]
        self.step[order[~is_first]] = self.STEPS.index("duplicate")
        self.match[order[~is_first]] = first[~is_first]

    def remove_near_duplicates(self, threshold: float) -> None:
        """Remove rows that are similar to an earlier row that stays, if their system messages and tools are equal."""
        earlier = [self._earlier_of_band(band) for band in range(NUM_BANDS)]
        places = np.unique(np.concatenate([of_band[0] for of_band in earlier]))
        for place in places.tolist():
            candidates = {self._kept_one(other) for of_band in earlier for other in _walk(of_band, place)}
            ordered = sorted(candidate for candidate in candidates if self._context[candidate] == self._context[place])
            if not ordered:
                continue
            sketches = np.stack([self._sketch(candidate) for candidate in ordered])
            alike = similarity(sketches, self._sketch(place))
            best = int(alike.argmax())
            if alike[best] >= threshold:
                self.step[place] = self.STEPS.index("near_duplicate")
                self.match[place], self.alike[place] = ordered[best], alike[best]

    def cap(self, step: str, caps: Mapping[str, int]) -> None:
        """Remove rows beyond the caps by category or language (`step`), drawn by priority."""
        names, groups = (self.categories, self.category) if step == "category" else (self.languages, self.language)
        if not caps or not len(groups):
            return
        unlimited = len(self.step)
        limits = np.array([caps.get(name, caps.get(EVERY_OTHER, unlimited)) for name in names], np.int64)
        left = np.flatnonzero(self.step == 0)
        groups = groups[left]
        self.step[left[self._rank(left, groups) >= limits[groups]]] = self.STEPS.index(step)

    def share(self, num_rows: int | None, weights: Sequence[float], limits: Sequence[int | None]) -> None:
        """Remove rows beyond each source's limit and its share of `num_rows`, drawn by priority."""
        left = np.flatnonzero(self.step == 0)
        sources = self.source[left]
        available = np.bincount(sources, minlength=len(weights))
        most = [int(n) if limit is None else min(int(n), limit) for n, limit in zip(available, limits, strict=True)]
        quotas = np.array(share_out(num_rows, weights, most), np.int64)
        self.step[left[self._rank(left, sources) >= quotas[sources]]] = self.STEPS.index("share")

    def drawn(self) -> np.ndarray:
        """Return the places of the rows that stay, in the order of the output."""
        left = np.flatnonzero(self.step == 0)
        return np.asarray(left[np.argsort(self.priority[left], kind="stable")])

    def _parts(self) -> Iterator[tuple[Path, dict[str, list[str]]]]:
        return zip(self._folders, self.scans, strict=True)

    def _renumber(self, records: np.ndarray, scan: Mapping[str, list[str]]) -> np.ndarray:
        """Replace a scan's own numbers of categories and languages by those of the pool."""
        tables = (("category", "categories", self._categories), ("language", "languages", self._languages))
        for key, table, names in tables:
            numbers = np.array([names.number(name) for name in scan[table]] or [-1], np.int32)
            records[key] = numbers[np.maximum(records[key], 0)]
        return records

    def _open(self, path: Path) -> BinaryIO:
        return self._stack.enter_context(path.open("rb"))

    def _rank(self, places: np.ndarray, groups: np.ndarray) -> np.ndarray:
        """Return each place's rank by priority within its group, from 0."""
        order = np.lexsort((self.priority[places], groups))
        ordered = groups[order]
        starts = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]])[: len(ordered)])
        ranks = np.empty(len(places), np.int64)
        sizes = np.diff(np.append(starts, len(ordered)))
        ranks[order] = np.arange(len(ordered)) - np.repeat(starts, sizes)
        return ranks

    def _earlier_of_band(self, band: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the places that share a band with an earlier row, ascending, and the last such row of each."""
        keys = np.empty(len(self.row), np.uint64)
        start = 0
        for file in self._sketches:
            file.seek(0)
            while data := file.read(CHUNK_ROWS * NUM_HASHES * 2):
                sketches = np.frombuffer(data, np.uint16).reshape(-1, NUM_HASHES)
                keys[start : start + len(sketches)] = band_keys(sketches, band)
                start += len(sketches)
        keys ^= self._context
        left = np.flatnonzero(self.step == 0).astype(np.int32)
        order = left[np.argsort(keys[left], kind="stable")]
        is_same = keys[order[1:]] == keys[order[:-1]]
        later, earlier = order[1:][is_same], order[:-1][is_same]
        by_place = np.argsort(later)
        return later[by_place], earlier[by_place]

    def _kept_one(self, place: int) -> int:
        """Return the row itself, or the one that it is a near-duplicate of."""
        return int(self.match[place]) if self.step[place] else place

    def _sketch(self, place: int) -> np.ndarray:
        source = self.source[place]
        offset = (place - int(self._first[source])) * NUM_HASHES * 2
        return np.frombuffer(os.pread(self._sketches[source].fileno(), NUM_HASHES * 2, offset), np.uint16)


def _walk(of_band: tuple[np.ndarray, np.ndarray], place: int) -> Iterator[int]:
    """Yield the earlier rows with the same key in a band, the nearest first."""
    later, earlier = of_band
    for _ in range(MAX_STEPS):
        found = int(np.searchsorted(later, place))
        if found == len(later) or later[found] != place:
            return
        place = int(earlier[found])
        yield place


def share_out(total: int | None, weights: Sequence[float], available: Sequence[int]) -> list[int]:
    """Return how many rows each source gives: `total` by weight, or all that are available.

    A source that has too few gives all; the others share the rest by weight. Rounding: the largest remainders first.
    """
    if total is None or total >= sum(available):
        return list(available)
    quotas = [0] * len(weights)
    open_ = list(range(len(weights)))
    left = total
    while True:
        unit = left / sum(weights[i] for i in open_)
        short = [i for i in open_ if available[i] <= unit * weights[i]]
        if not short:
            break
        for i in short:
            quotas[i] = available[i]
            left -= available[i]
        open_ = [i for i in open_ if i not in short]
    exact = {i: unit * weights[i] for i in open_}
    for i in open_:
        quotas[i] = int(exact[i])
    by_remainder = sorted(open_, key=lambda i: (int(exact[i]) - exact[i], i))
    for i in by_remainder[: left - sum(quotas[i] for i in open_)]:
        quotas[i] += 1
    return quotas
