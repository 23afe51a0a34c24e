"""Open a prompt set and read its rows in batches, so that memory does not grow with the input.

Reads: JSONL, JSON (an array of rows), Parquet, a directory of such files, a folder saved by `datasets`, or a dataset
       of the Hugging Face hub (`name` or `name:split`, split "train" by default) where there is a network.

Row i is row i of the whole input; files are ordered by name. Empty lines of JSONL are not rows.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.files import hash_file, hash_json

SUFFIXES = (".jsonl", ".json", ".parquet")
BATCH_ROWS = 256
EXPECTED = "JSONL, JSON or Parquet, a directory of them, or a saved `datasets` folder"

Wanted = Callable[[int], bool]
"""A function of a row's index: whether to parse the row. Others are skipped."""


@dataclass(frozen=True)
class Row:
    """One row: its index in the whole input, its file and line, and its value or why it could not be parsed."""

    index: int
    where: str
    value: Any = None
    error: str = ""


@dataclass(frozen=True)
class PromptFile:
    """One file (or dataset) of the input. `read(first, wanted)` yields its wanted rows, numbered from `first`."""

    num_rows: int
    checksum: str
    read: Callable[[int, Wanted], Iterator[Row]]


@dataclass(frozen=True)
class PromptSet:
    """The whole input."""

    files: list[PromptFile]

    @property
    def num_rows(self) -> int:
        return sum(file.num_rows for file in self.files)

    @property
    def checksum(self) -> str:
        """Checksum of the content alone; renaming or moving files does not change it."""
        return hash_json([file.checksum for file in self.files])

    def rows(self, wanted: Wanted = lambda _: True) -> Iterator[Row]:
        """Yield the wanted rows in order."""
        first = 0
        for file in self.files:
            yield from file.read(first, wanted)
            first += file.num_rows


def open_prompts(name: str | Path) -> PromptSet:
    """Count a prompt set's rows and hash it. Raises UserError if it is missing, empty, broken or unknown."""
    path = Path(name)
    if (path / "state.json").exists() or (path / "dataset_dict.json").exists():
        files = [_open_saved(path)]
    elif path.is_dir():
        found = sorted(p for p in path.rglob("*") if p.suffix in SUFFIXES and not p.name.startswith("."))
        files = [_open_file(file) for file in found]
        if not files:
            raise UserError(
                path, found="none of *.jsonl, *.json, *.parquet", expected=EXPECTED, fix="Correct the path."
            )
    elif path.is_file():
        files = [_open_file(path)]
    elif re.fullmatch(r"[\w.-]+/[\w.-]+(:\w+)?", str(name)) and not path.parent.exists():
        return _refuse_empty(_open_hub(str(name)), path)
    else:
        raise UserError(path, found="no such file", expected=EXPECTED, fix="Correct the path.")
    return _refuse_empty(PromptSet(files), path)


def _refuse_empty(prompts: PromptSet, path: Path) -> PromptSet:
    if prompts.num_rows == 0:
        raise UserError(path, found="no rows", expected="at least one", fix="Give a prompt set that is not empty.")
    return prompts


def _open_file(path: Path) -> PromptFile:
    if path.suffix == ".parquet":
        return _open_parquet(path)
    with path.open("rb") as file:
        start = file.read(4096).lstrip()[:1]
    # Many .json files are JSONL.
    return _open_json(path) if start == b"[" and path.suffix != ".jsonl" else _open_jsonl(path)


def _open_jsonl(path: Path) -> PromptFile:
    digest, num_rows = hashlib.sha256(), 0
    with path.open("rb") as file:
        for line in file:
            digest.update(line)
            num_rows += not line.isspace()

    def read(first: int, wanted: Wanted) -> Iterator[Row]:
        index = first - 1
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.isspace():
                    continue
                index += 1
                if not wanted(index):
                    continue
                try:
                    yield Row(index, f"{path}:{number}", json.loads(line))
                except ValueError as error:
                    yield Row(index, f"{path}:{number}", error=f"broken JSON ({error})")

    return PromptFile(num_rows, digest.hexdigest(), read)


def _open_json(path: Path) -> PromptFile:
    import ijson

    def items() -> Iterator[Any]:
        with path.open("rb") as file:
            try:
                yield from ijson.items(file, "item", use_float=True)
            except ijson.JSONError as error:
                raise UserError(
                    path, found=f"broken JSON ({error})", expected="an array of rows", fix="Fix it, or use JSONL."
                ) from None

    def read(first: int, wanted: Wanted) -> Iterator[Row]:
        for number, value in enumerate(items()):
            if wanted(first + number):
                yield Row(first + number, f"{path}[{number}]", value)

    return PromptFile(sum(1 for _ in items()), hash_file(path), read)


def _open_parquet(path: Path) -> PromptFile:
    import pyarrow
    import pyarrow.parquet

    try:
        num_rows = pyarrow.parquet.ParquetFile(path).metadata.num_rows
    except pyarrow.ArrowException as error:
        raise UserError(
            path, found=f"no Parquet ({error})", expected="Parquet", fix="Fix or remove the file."
        ) from None

    def read(first: int, wanted: Wanted) -> Iterator[Row]:
        number = 0
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=BATCH_ROWS):
                places = range(first + number, first + number + batch.num_rows)
                if any(wanted(place) for place in places):
                    for place, value in zip(places, batch.to_pylist(), strict=True):
                        if wanted(place):
                            yield Row(place, f"{path}[{place - first}]", _drop_nulls(value))
                number += batch.num_rows

    return PromptFile(num_rows, hash_file(path), read)


def _open_saved(path: Path) -> PromptFile:
    import datasets

    dataset = datasets.load_from_disk(str(path))
    if isinstance(dataset, datasets.DatasetDict):
        raise UserError(
            path,
            found=f"splits {', '.join(dataset)}",
            expected="one dataset",
            fix=f"Give one of them, as in {path / next(iter(dataset))}.",
        )
    return _from_dataset(dataset, str(path))


def open_hub(repository: str, split: str, config: str | None = None) -> PromptSet:
    """Open a dataset of the hub or of its cache. Raises LookupError with the reason when it cannot be loaded."""
    import datasets

    try:
        dataset = datasets.load_dataset(repository, config, split=split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise LookupError(str(error).splitlines()[0][:200]) from None
    return PromptSet([_from_dataset(dataset, f"{repository}:{split}")])


def _open_hub(name: str) -> PromptSet:
    repository, _, split = name.partition(":")
    try:
        return open_hub(repository, split or "train")
    except LookupError as error:
        raise UserError(
            name,
            found=f"neither a file nor a dataset of the hub that can be loaded ({error.args[0]})",
            expected=EXPECTED,
            fix="Correct the name, or add the split, as in name:test.",
        ) from None


def _from_dataset(dataset: Any, name: str) -> PromptFile:
    """Return a memory-mapped dataset as a prompt file, read in slices."""

    def read(first: int, wanted: Wanted) -> Iterator[Row]:
        for start in range(0, len(dataset), BATCH_ROWS):
            numbers = range(start, min(start + BATCH_ROWS, len(dataset)))
            if not any(wanted(first + number) for number in numbers):
                continue
            columns = dataset[numbers.start : numbers.stop]
            for number in numbers:
                if wanted(first + number):
                    value = {key: column[number - start] for key, column in columns.items()}
                    yield Row(first + number, f"{name}[{number}]", _drop_nulls(value))

    files = sorted({str(entry["filename"]) for entry in dataset.cache_files})
    content = [hash_file(Path(file)) for file in files]
    return PromptFile(len(dataset), hash_json([content, len(dataset), dataset.column_names]), read)


def _drop_nulls(value: Any) -> Any:
    """Remove null keys: Arrow gives all objects of a column the same keys, null if an object had none."""
    if isinstance(value, dict):
        return {key: _drop_nulls(item) for key, item in value.items() if item is not None}
    return [_drop_nulls(item) for item in value] if isinstance(value, list) else value
