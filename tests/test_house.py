"""Claims about the house: stages do not import each other, help is quick, every module says what it is."""

from __future__ import annotations

import ast
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, command, run

MAY_IMPORT = {
    "contracts": {"contracts"},
    "serve": {"serve", "contracts"},
    "synth": {"synth", "contracts", "serve"},
    "dump": {"dump", "contracts", "serve"},
    "train": {"train", "contracts"},
    "bench": {"bench", "contracts", "serve"},
    "distributed": {"distributed", "contracts"},
}
MODULES = [path for room in MAY_IMPORT for path in sorted((ROOT / room).rglob("*.py"))]
NAMES = [str(path.relative_to(ROOT)) for path in MODULES]


def imported_rooms(path: Path) -> set[str]:
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            rooms |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            rooms.add(node.module.split(".")[0])
    return rooms & set(MAY_IMPORT)


@pytest.mark.parametrize("path", MODULES, ids=NAMES)
def test_a_room_imports_only_the_rooms_it_may(path: Path) -> None:
    room = path.relative_to(ROOT).parts[0]
    assert imported_rooms(path) <= MAY_IMPORT[room]


@pytest.mark.parametrize("path", MODULES, ids=NAMES)
def test_every_module_says_what_it_is_and_fits_in_five_hundred_lines(path: Path) -> None:
    text = path.read_text()
    assert ast.get_docstring(ast.parse(text))
    assert text.count("\n") <= 500


def test_modules_are_small_as_a_rule() -> None:
    assert statistics.median(path.read_text().count("\n") for path in MODULES) <= 150


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="needs Debian's shellcheck")
def test_shell_scripts_are_clean() -> None:
    scripts = [ROOT / ".ci/run", ROOT / "distributed/worker.sh", *sorted(ROOT.glob("recipes/*/*.sh"))]
    result = subprocess.run(["shellcheck", *scripts], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("name", ["synth", "dump", "train", "serve", "bench", "recipe", "distributed"])
def test_help_imports_nothing_heavy(name: str) -> None:
    result = subprocess.run(
        [sys.executable, "-X", "importtime", *command(name, "--help")],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=True,
    )
    heavy = {
        "torch",
        "vllm",
        "transformers",
        "pydantic",
        "openai",
        "matplotlib",
        "numpy",
        "safetensors",
        "datasets",
        "submitit",
    }
    loaded = {line.rsplit("|", 1)[-1].strip() for line in result.stderr.splitlines()}
    assert "typer" in loaded
    assert not heavy & loaded
    assert "Usage" in result.stdout


@pytest.mark.parametrize(
    "args",
    [
        ("synth", "generate"), ("synth", "merge"), ("synth", "stats"), ("synth", "inspect"), ("synth", "verify"),
        ("dump", "plan"), ("dump", "run"), ("dump", "verify"), ("dump", "inspect"), ("dump", "stats"),
        ("dump", "convert"), ("train", "offline"), ("train", "eval"), ("train", "export"),
        ("serve", "command"), ("serve", "start"), ("bench", "acceptance"), ("bench", "report"), ("bench", "gate"),
        ("bench", "plan"), ("bench", "sweep"), ("bench", "compare"),
        ("recipe", "check"), ("recipe", "show"),
        ("distributed", "submit"), ("distributed", "status"), ("distributed", "retry"),
    ],
    ids=" ".join,
)  # fmt: skip
def test_every_command_explains_itself_with_an_example(args: tuple[str, ...]) -> None:
    help_text = run(*args, "--help").stdout
    assert "Example:" in help_text
    assert "Options" in help_text


def test_no_test_folder_is_a_package() -> None:
    assert not list((ROOT / "tests").rglob("__init__.py"))
