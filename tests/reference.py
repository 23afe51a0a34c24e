"""Write the generated pages of docs/, which list every recipe key and every command: `python tests/reference.py`."""

from __future__ import annotations

import functools
import importlib
import re
import sys
import types
import typing
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

import typer  # noqa: E402
import yaml  # noqa: E402
from pydantic.fields import FieldInfo  # noqa: E402
from typer.cli import get_docs_for_click  # noqa: E402

from common.section import Section  # noqa: E402
from drafts import METHODS  # noqa: E402
from recipe.recipe import Recipe  # noqa: E402

STAGES = ("recipe", "synth", "dump", "train", "serve", "bench", "distributed")
KEYS_PAGE, COMMANDS_PAGE = ROOT / "docs/recipe-keys.md", ROOT / "docs/commands.md"
GENERATED = "<!-- Generated: python tests/reference.py -->\n\n"

READ_BY = {
    "target": "all stages",
    "serve": "every stage that starts a server or an engine: `synth`, `dump`, `bench`, `serve`",
    "synth": "`synth`; `bench` takes the lengths and the sampling from it",
    "dump": "`dump`",
    "train": "`train`; `dump run --window` takes the order of the samples from it",
    "train.draft": "`train`; `dump` and `synth` take the mask token's rule from it",
    "export": "`train`",
    "bench": "`bench`",
}
"""The stages that read a section."""

BOUNDS = {"gt": "> {}", "ge": ">= {}", "lt": "< {}", "le": "<= {}", "min_length": "at least {}"}


def kind_of(annotation: Any) -> str:
    """Describe what values a type takes, in a few words."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is typing.Annotated:
        bounds = [text for part in args[1:] for text in bounds_of(part)]
        return ", ".join([kind_of(args[0]), *bounds])
    if origin is Literal:
        return " or ".join(f"`{inline(value)}`" for value in args)
    if origin in (typing.Union, types.UnionType):
        others = [arg for arg in args if arg is not type(None) and not (arg is int and float in args)]
        return ", or ".join(dict.fromkeys(map(kind_of, others)))
    if origin is tuple:
        return f"{len(args)} of {kind_of(args[0])}"
    if origin is list:
        return f"list of {kind_of(args[0])}"
    if origin is dict:
        keys = "" if args[0] is str else f"{kind_of(args[0])} to "
        return f"map: {keys}{kind_of(args[1])}"
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return "section"
    names = {str: "text", int: "whole number", float: "number", bool: "true or false", Path: "path", Any: "any"}
    return names[annotation]


def bounds_of(part: Any) -> list[str]:
    """Return the bounds that a piece of a field's metadata sets, as `> 0`."""
    found = [text.format(getattr(part, name)) for name, text in BOUNDS.items() if getattr(part, name, None) is not None]
    return found + [text for inner in getattr(part, "metadata", []) for text in bounds_of(inner)]


def inline(value: Any) -> str:
    """Return a value as YAML in one line."""
    if isinstance(value, float):
        return f"{value:g}"
    text: str = yaml.safe_dump(value, default_flow_style=True, width=10_000, allow_unicode=True)
    return text.split("\n...")[0].strip()


def default_of(field: FieldInfo) -> str:
    """Return a field's default as a cell."""
    if field.is_required():
        return "required"
    if isinstance(field.default, Section):
        return "see below"
    value = field.default
    return f"`{inline(list(value) if isinstance(value, tuple) else value)}`"


def sections_in(annotation: Any) -> Iterator[type[Section]]:
    """Yield the sections that a type holds."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        yield annotation
    for arg in get_args(annotation):
        yield from sections_in(arg)


def below(name: str, field: FieldInfo) -> str:
    """Return the dotted name of the sections that a field holds, with a word for what the user names."""
    kind = field.annotation
    if get_origin(kind) is dict:
        return f"{name}.NAME"
    return f"{name}[]" if get_origin(kind) is list else name


def row(name: str, field: FieldInfo, default: str | None = None) -> str:
    """Return a field's line of a table."""
    extra = field.json_schema_extra
    resume = "yes" if isinstance(extra, dict) and extra.get("operational") else ""
    kind = ", ".join([kind_of(field.annotation), *(text for part in field.metadata for text in bounds_of(part))])
    cells = [f"`{name}`", default or default_of(field), kind, field.description or "", resume]
    return "| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |"


def table(prefix: str, fields: Mapping[str, FieldInfo], defaults: Mapping[str, str] | None = None) -> list[str]:
    """Return a table of a section's fields. `defaults`: cells that replace a default."""
    head = ["| key | default | values | meaning | resume |", "|---|---|---|---|---|"]
    return head + [row(f"{prefix}.{name}", field, (defaults or {}).get(name)) for name, field in fields.items()]


def describe_section(name: str, section: type[Section], level: int) -> list[str]:
    """Return heading and table of a section, and those of the sections in it."""
    lines = ["", f"{'#' * level} `{name}`", ""]
    if name in READ_BY:
        lines += [f"Read by {READ_BY[name]}.", ""]
    lines += table(name, section.model_fields)
    for key, field in section.model_fields.items():
        if (name, key) == ("train", "draft"):
            lines += describe_drafts()
            continue
        for inner in sections_in(field.annotation):
            lines += describe_section(below(f"{name}.{key}", field), inner, min(level + 1, 4))
    return lines


def describe_drafts() -> list[str]:
    """Return the tables of `train.draft`: the keys of all methods, then each method's own."""
    fields = {method.name: method.section.model_fields for method in METHODS.values()}
    names = [key for key in next(iter(fields.values())) if all(key in own for own in fields.values())]
    method = FieldInfo(annotation=Literal[tuple(METHODS)], description="the draft method")  # type: ignore[arg-type, valid-type]
    shared = {"method": method}
    for key in names:
        shared.setdefault(
            key, max((own[key] for own in fields.values()), key=lambda field: len(field.description or ""))
        )
    defaults = {"method": "required", **{key: shared_default(key, fields) for key in names if key != "method"}}
    lines = ["", "### `train.draft` of all methods", "", f"Read by {READ_BY['train.draft']}.", ""]
    lines += table("train.draft", shared, defaults)
    for name, own in fields.items():
        lines += ["", f"### `train.draft` of `{name}`", ""]
        lines += table("train.draft", {key: field for key, field in own.items() if key not in shared})
    return lines


def shared_default(key: str, fields: Mapping[str, Mapping[str, FieldInfo]]) -> str:
    """Return the default that most methods have, and those of the others by name."""
    cells = {name: default_of(own[key]) for name, own in fields.items()}
    ((usual, _),) = Counter(cells.values()).most_common(1)
    return "; ".join([usual, *(f"{name}: {cell}" for name, cell in cells.items() if cell != usual)])


def keys_page() -> str:
    """Return docs/recipe-keys.md."""
    lines = [
        "# Recipe keys",
        "",
        "Every key of a recipe, by section. [Recipes](recipe.md) explains how a recipe is written and overridden.",
        "`recipe show -r recipe.yaml` prints a recipe's own values, and where each comes from.",
        "",
        "* **resume**: a run that was begun may go on with another value: the key does not change what is written.",
        "* `null`: not set. The meaning says what happens then.",
        "* A name ends in its unit: `_s` seconds, `_gib` 2^30 bytes, `_gb` 10^9 bytes. Lengths without one are tokens.",
    ]
    for name, field in Recipe.model_fields.items():
        for section in sections_in(field.annotation):
            lines += describe_section(name, section, 2)
    return GENERATED + "\n".join(lines) + "\n"


@functools.cache
def load_app(stage: str) -> Any:
    """Return a stage's click group."""
    return typer.main.get_command(importlib.import_module(f"{stage}.cli").app)


def commands_page() -> str:
    """Return docs/commands.md, from typer's own generator."""
    lines = ["# Commands", "", "What `--help` of every command says. Every stage resumes.", ""]
    lines += ["| command | does |", "|---|---|"]
    details = []
    for stage in STAGES:
        group = load_app(stage)
        for name, command in group.commands.items():
            does = " ".join((command.help or "").split("\n\n")[0].split())
            lines.append(f"| [`{stage} {name}`](#{stage}-{name}) | {does} |")
        text = get_docs_for_click(obj=group, ctx=typer.Context(group), indent=1, name=stage)
        text = re.sub(r"\*\*Commands\*\*:\n\n(\* .*\n)+\n*", "", text)
        text = re.sub(r"\*\*Usage\*\*:\n\n```console\n.* COMMAND \[ARGS\]\.\.\.\n```\n\n", "", text)
        text = re.sub(r"^\* `--help`: .*\n", "", text, flags=re.MULTILINE)
        text = re.sub(r"\*\*Options\*\*:\n\n(?!\*)", "", text)
        text = re.sub(rf"^Example: ({stage} .+)$", r"```console\n$ \1\n```", text, flags=re.MULTILINE)
        details += ["", re.sub(r"\n{3,}", "\n\n", text).strip()]
    return GENERATED + "\n".join([*lines, *details]) + "\n"


PAGES = {KEYS_PAGE: keys_page, COMMANDS_PAGE: commands_page}


def main() -> None:
    for path, make in PAGES.items():
        path.write_text(make(), encoding="utf-8")


if __name__ == "__main__":
    main()
