"""What all command lines share: the typer app, the --shard option, and options that several commands have."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from common.errors import UserError

ShardOption = Annotated[
    str | None, typer.Option("--shard", metavar="I/N", help="Do only part I of N parts of the work; I counts from 0.")
]

LimitOption = Annotated[
    int, typer.Option("--limit", min=0, help="At most N rows, spread evenly over all; 0: no limit.", metavar="N")
]
TargetOption = Annotated[
    Path | None,
    typer.Option("--target", help="The target's folder, for its tokenizer.", show_default="where the run had it"),
]


def parse_shard(text: str | None) -> tuple[int, int] | None:
    """Parse `"3/64"` as (3, 64). Raises UserError for anything else than I/N with 0 <= I < N."""
    if text is None:
        return None
    number, _, count = text.partition("/")
    if number.isdecimal() and count.isdecimal() and int(number) < int(count):
        return int(number), int(count)
    raise UserError("--shard", found=text, expected="I/N with I from 0 to N-1, as in 3/64", fix="Correct it.")


def make_app(help_text: str) -> typer.Typer:
    """Make a typer app that shows help without arguments and leaves errors to `run_app`."""
    return typer.Typer(
        help=help_text,
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
    )


def expand_options(command: Callable[..., None]) -> Callable[..., None]:
    """Let a typer command take dataclasses: typer sees each of their fields as an option of its own.

    Commands that share options name the dataclass instead of listing the options again.
    """
    hints = get_type_hints(command, include_extras=True)
    parameters: list[inspect.Parameter] = []
    groups: dict[str, Any] = {}
    for parameter in inspect.signature(command).parameters.values():
        hint = hints[parameter.name]
        if is_dataclass(hint):
            groups[parameter.name] = hint
            parameters += _field_parameters(hint)
        else:
            parameters.append(parameter.replace(annotation=hint, kind=inspect.Parameter.KEYWORD_ONLY))

    def run(**values: Any) -> None:
        objects = {name: group(**{f.name: values.pop(f.name) for f in fields(group)}) for name, group in groups.items()}
        command(**objects, **values)

    run.__name__, run.__doc__ = command.__name__, command.__doc__
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return run


def _field_parameters(group: Any) -> list[inspect.Parameter]:
    hints = get_type_hints(group, include_extras=True)
    return [
        inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty if field.default is MISSING else field.default,
            annotation=hints[field.name],
        )
        for field in fields(group)
    ]
