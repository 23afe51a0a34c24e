"""Refuse facts of another target that a recipe inherits from its `base`.

A recipe that names another target than its base must set its own: nothing else would notice M3's mask token or norm
in a recipe of Qwen3. A copy of the same target in another folder keeps the base's facts: the last part of its path is
the same. `--set target.path=...` is taken for such a copy.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from common.errors import UserError

FACTS = (
    "facts", "final_norm", "aux_layers", "mask_token_id", "training_template", "training_template_sha256",
    "thinking_tags",
)  # fmt: skip
"""Keys of `target` that hold for one target only."""


def refuse_foreign_facts(files: Sequence[tuple[Path, Mapping[str, Any]]], given: Collection[str]) -> None:
    """Raise UserError for facts that a base of another target gives to the recipe.

    `files`: paths and values of the recipe and then its bases. `given`: dotted keys of `--set` and flags.
    """
    targets = [(file, target) for file, values in files if isinstance(target := values.get("target"), Mapping)]
    named = [(number, target["path"]) for number, (_, target) in enumerate(targets) if target.get("path")]
    if not named:
        return
    ours = list(itertools.takewhile(lambda item: _name_of(item[1]) == _name_of(named[0][1]), named))
    if len(ours) == len(named):
        return
    number, path = named[len(ours)]
    num_own = ours[-1][0] + 1  # a file that names no target has that of its base
    own = {key for _, target in targets[:num_own] for key, _ in _facts_of(target)} | set(given)
    facts = [fact for _, target in targets[num_own:] for fact in _facts_of(target)]
    inherited = dict.fromkeys(key for key, value in facts if value is not None and not _is_in(key, own))
    if inherited:
        raise UserError(
            f"{files[0][0]} (target.path {named[0][1]})",
            found=f"facts of another target, {path}, taken from {targets[number][0]}: {', '.join(inherited)}",
            expected="facts of its own",
            fix=f"Write a recipe for this target with `recipe init {named[0][1]}`, or set each of these keys (null: "
            "the default).",
        )


def _facts_of(target: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield dotted keys and values of a `target` section that hold for one target."""
    for key in FACTS:
        value = target.get(key)
        if key == "facts" and isinstance(value, Mapping):
            yield from ((f"target.facts.{name}", fact) for name, fact in value.items())
        elif key in target:
            yield f"target.{key}", value


def _is_in(key: str, own: Collection[str]) -> bool:
    """Return whether one of `own` sets a dotted key, itself or with its section."""
    parts = key.split(".")
    return any(".".join(parts[:length]) in own for length in range(1, len(parts) + 1))


def _name_of(path: Any) -> str:
    """Return the last part of a target's path or hub name; of a snapshot in the hub's cache, the model's name."""
    parts = Path(str(path)).parts
    cached = next((part for part in parts if part.startswith("models--")), None)
    return (cached.rpartition("--")[2] if cached else parts[-1] if parts else "").lower()
