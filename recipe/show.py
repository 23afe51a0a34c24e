"""Print a resolved recipe: valid YAML, each value with its source (a file's name, --set or default)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from recipe.load import load_recipe, read_files, read_values

NESTED = ("train.draft",)
"""Sections inside sections, whose keys are listed one by one."""


def show_recipe(path: Path, overrides: Sequence[str]) -> str:
    """Return every key of every section with its source, as YAML. Raises: see `load_recipe`."""
    resolved = load_recipe(path, overrides).redacted()
    _, given = read_values(path, overrides)
    sources = Sources([(file.name, values) for file, values in read_files(path)], given)
    return "\n".join(line for name, values in resolved.items() for line in _show(name, values, sources, "")) + "\n"


def _show(name: str, values: Any, sources: Sources, indent: str) -> Iterator[str]:
    """Yield the lines of one section or key."""
    key = name.rpartition(".")[2]
    if isinstance(values, Mapping) and (not indent or name in NESTED):
        yield f"{indent}{key}:"
        for inner, value in values.items():
            yield from _show(f"{name}.{inner}", value, sources, indent + "  ")
    else:
        yield f"{indent}{key}: {inline_yaml(values)}" + (f"  # {sources.find(name)}" if indent else "")


class Sources:
    """The sources of a recipe's keys: the files and --set."""

    def __init__(self, files: Sequence[tuple[str, Mapping[str, Any]]], given: set[str]) -> None:
        """Keep `files`, names and values of the recipe and then its bases, and the keys `given` by --set."""
        self._files, self._given = files, given

    def find(self, name: str) -> str:
        """Return the source of a dotted key."""
        if any(other == name or other.startswith(f"{name}.") for other in self._given):
            return "--set"
        return next((file for file, values in self._files if _has(values, name.split("."))), "default")


def _has(values: Any, keys: Sequence[str]) -> bool:
    for key in keys:
        if not isinstance(values, Mapping) or key not in values:
            return False
        values = values[key]
    return True


def inline_yaml(value: Any) -> str:
    """Return a value as YAML in one line."""
    return yaml.safe_dump(value, default_flow_style=True, width=1_000_000, allow_unicode=True).split("\n...")[0].strip()
