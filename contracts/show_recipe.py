"""A recipe as it will be used: valid YAML, each value with where it came from: a file's name, --set or default."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from contracts.recipe import load_recipe, read_files, read_values


def show_recipe(path: Path, overrides: Sequence[str]) -> str:
    """Every key of every section and where it came from. Errors as load_recipe's."""
    resolved = load_recipe(path, overrides).model_dump(mode="json")
    _, given = read_values(path, overrides)
    files = read_files(path)
    lines = []
    for section, values in resolved.items():
        lines.append(f"{section}:")
        for key, value in values.items():
            name = f"{section}.{key}"
            if any(other == name or other.startswith(f"{name}.") for other in given):
                source = "--set"
            else:
                source = next((file.name for file, own in files if key in (own.get(section) or {})), "default")
            lines.append(f"  {key}: {_inline(value)}  # {source}")
    return "\n".join(lines) + "\n"


def _inline(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True, width=1_000_000, allow_unicode=True).split("\n...")[0].strip()
