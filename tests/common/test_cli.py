"""Claims about command lines: options that commands share are listed once and behave as if listed in each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import typer
from typer.testing import CliRunner

from common.cli import expand_options, make_app

app = make_app("Test.")


@dataclass(frozen=True)
class Shared:
    """Options of both commands."""

    name: Annotated[str, typer.Option(help="Who.")]
    times: Annotated[list[int] | None, typer.Option("--times", "-t")] = None
    words: Annotated[list[str] | None, typer.Argument(help="What.")] = None


@app.command()
@expand_options
def one(shared: Shared, *, flag: bool = True) -> None:
    """Do one."""
    print(shared, flag)


@app.command()
@expand_options
def two(path: str, shared: Shared) -> None:
    """Do two."""
    print(path, shared)


def test_commands_take_the_fields_of_a_dataclass_as_options() -> None:
    result = CliRunner().invoke(app, ["one", "--name", "x", "-t", "1", "-t", "2", "--no-flag", "--", "a", "-b"])
    assert result.output == "Shared(name='x', times=[1, 2], words=['a', '-b']) False\n"
    result = CliRunner().invoke(app, ["two", "p", "--name", "x"])
    assert result.output == "p Shared(name='x', times=None, words=None)\n"


def test_an_option_without_a_default_is_required_and_help_lists_all() -> None:
    result = CliRunner().invoke(app, ["one"])
    assert result.exit_code == 2
    assert "--name" in result.output
    text = CliRunner().invoke(app, ["one", "--help"]).output
    assert all(word in text for word in ("Do one.", "--name", "Who.", "--times", "--no-flag", "[words]..."))
