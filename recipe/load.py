"""Load a recipe from its file, its `base`, `--set` overrides and flags, and validate it against the sections.

Precedence: flag > `--set a.b=c` > recipe > its `base` > default. Unknown keys are errors that name the nearest key.
`base` names another recipe, relative to the folder of the file that names it; all other relative paths are relative to
the working directory.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from common.errors import UserError
from common.redact import REDACTED
from drafts import METHODS
from recipe.foreign import refuse_foreign_facts
from recipe.recipe import Recipe
from recipe.renamed import dotted_keys, refuse_renamed


def load_recipe(path: Path, overrides: Sequence[str] = (), flags: Mapping[str, Any] | None = None) -> Recipe:
    """Read a recipe, apply `--set` overrides ("a.b=c", YAML) and flags ({"a.b": value}), validate it.

    Flags with the value None are ignored. Raises UserError for a missing file, broken YAML, an unknown key or a wrong
    value.
    """
    values, _ = read_values(path, overrides, flags)
    return validate_recipe(path, values)


def validate_recipe(path: Path, values: Mapping[str, Any]) -> Recipe:
    """Return the recipe of these values. Raises UserError for an unknown key or a wrong value, naming `path`."""
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise _explain(path, error, values) from None


def read_values(
    path: Path, overrides: Sequence[str] = (), flags: Mapping[str, Any] | None = None
) -> tuple[dict[str, Any], set[str]]:
    """Return the recipe's merged values, not validated, and the dotted keys that `--set` or a flag gave."""
    values: dict[str, Any] = {}
    files = read_files(path)
    for file, above in reversed(files):
        refuse_renamed(str(file), dotted_keys(above), _method_of(above))
        values = _lay_over(values, above)
    given = set()
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator:
            raise UserError(f"--set {override}", found="no '='", expected="section.key=value", fix="Add a value.")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:
            raise UserError(
                f"--set {override}", found=f"broken YAML {text!r}", expected="a YAML value", fix="Fix or quote it."
            ) from None
        refuse_renamed(f"--set {override}", _given(key.strip(), value), _method_of(values))
        _put(values, key.strip(), value, f"--set {override}")
        given.add(key.strip())
    for key, value in (flags or {}).items():
        if value is not None:
            _put(values, key, value, key)
            given.add(key)
    refuse_foreign_facts(files, given)
    _refuse_redacted(path, values)
    return values, given


def _given(key: str, value: Any) -> set[str]:
    """Return the dotted keys that one `--set` gives: its key, or those of the section that it replaces."""
    return dotted_keys({key: value}) or {key}


def _method_of(values: Mapping[str, Any]) -> str | None:
    """Return the draft method that a recipe names (`train.draft.method`, in older recipes `train.method`)."""
    train = values.get("train")
    train = train if isinstance(train, Mapping) else {}
    draft = train.get("draft")
    method = draft.get("method") if isinstance(draft, Mapping) else train.get("method")
    return str(method) if method in METHODS else None


def read_files(path: Path) -> list[tuple[Path, dict[str, Any]]]:
    """Return path and values of the recipe and its bases. Raises UserError for an unreadable file."""
    files: list[tuple[Path, dict[str, Any]]] = []
    while True:
        try:
            values = yaml.safe_load(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise UserError(
                path, found=error.strerror or "no file", expected="a recipe", fix="Correct the path."
            ) from None
        except yaml.YAMLError as error:
            raise UserError(
                path, found=f"broken YAML ({error})", expected="a recipe", fix="Fix the indentation or quotes."
            ) from None
        if not isinstance(values, dict):
            raise UserError(path, found=type(values).__name__, expected="sections", fix="See recipes/Tiny-DFlash.")
        base = values.pop("base", None)
        files.append((path, values))
        if base is None:
            return files
        path = path.parent / str(base)
        if any(path.samefile(known) for known, _ in files if path.exists()):
            raise UserError(f"{files[-1][0]} (base)", found=str(base), expected="another recipe", fix="Correct it.")


def _lay_over(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Merge `above` over `below`, section by section; null or a value that is not a section replaces."""
    merged = dict(below)
    for key, value in above.items():
        lower = merged.get(key)
        if isinstance(value, dict) and isinstance(lower, dict):
            lower = _keep_shared(lower, value["method"]) if key == "draft" and "method" in value else lower
            merged[key] = _lay_over(lower, value)
        else:
            merged[key] = value
    return merged


def _keep_shared(draft: dict[str, Any], method: Any) -> dict[str, Any]:
    """Return the keys of a `train.draft` that `method` has too: a change of the method drops the others."""
    if draft.get("method") == method or method not in METHODS:
        return draft
    return {key: value for key, value in draft.items() if key in METHODS[method].section.model_fields}


def _put(values: dict[str, Any], dotted: str, value: Any, where: str) -> None:
    """Set one dotted key. Raises UserError if one of its parents is not a section."""
    *parents, last = dotted.split(".")
    place: Any = values
    for part in parents:
        place = place.setdefault(part, {}) if isinstance(place, dict) else None
    if not isinstance(place, dict):
        raise UserError(where, found=f"no section at {dotted!r}", expected="section.key=value", fix="Correct the key.")
    if dotted == "train.draft.method":
        values["train"]["draft"] = place = _keep_shared(place, value)
    place[last] = value


def _refuse_redacted(path: Path, values: Mapping[str, Any], place: str = "") -> None:
    """Raise UserError for a value that was redacted when a recipe was written to disk (common/redact.py).

    Environment variables may be: the shell can have them (serve/engine.py).
    """
    for key, value in values.items():
        where = f"{place}{key}"
        if isinstance(value, Mapping) and key != "env":
            _refuse_redacted(path, value, f"{where}.")
        elif value == REDACTED:
            raise UserError(
                f"{path} ({where})",
                found=REDACTED,
                expected="a value: a resolved recipe holds no secrets",
                fix=f"Remove the key, or give --set {where}=VALUE.",
            )


def _explain(path: Path, error: ValidationError, values: Mapping[str, Any]) -> UserError:
    """Return the first validation error as a UserError; for an unknown key it names the nearest known one."""
    first = error.errors()[0]
    keys = [str(part) for part in first["loc"]]
    where = f"{path} ({'.'.join(keys) or 'recipe'})"
    more = f" ({error.error_count() - 1} more after this.)" if error.error_count() > 1 else ""
    if first["type"] == "extra_forbidden":
        known = _keys_at(keys[:-1], values)
        near = difflib.get_close_matches(keys[-1], known, n=1, cutoff=0.0)
        return UserError(
            where,
            found=f"unknown key {keys[-1]!r}",
            expected=f"one of {', '.join(known)}",
            fix=f"Did you mean {near[0]!r}? Rename or remove it.{more}" if near else f"Remove it.{more}",
        )
    found = "nothing" if first["type"] == "missing" else repr(first["input"])
    message = "a value" if first["type"] == "missing" else first["msg"]
    return UserError(where, found=found, expected=message, fix=f"Correct the recipe or pass --set.{more}")


def _keys_at(keys: Sequence[str], values: Mapping[str, Any]) -> list[str]:
    """Return the keys that the section at a dotted path may have."""
    if list(keys) == ["train", "draft"]:
        return list(METHODS[values["train"]["draft"]["method"]].section.model_fields)
    model: type[BaseModel] = Recipe
    for key in keys:
        if key not in model.model_fields:  # an index of a list, or a name in a dictionary of sections
            continue
        annotation = model.model_fields[key].annotation
        options = [annotation, *get_args(annotation)]
        model = next(o for o in options if isinstance(o, type) and issubclass(o, BaseModel))
    return list(model.model_fields)
