"""Claims about the code base: who imports whom, sizes of modules and functions, quick help texts with examples."""

from __future__ import annotations

import ast
import importlib
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from conftest import ROOT, command, run

# From the ground up. Of `drafts`, the recipe imports the light `config` modules only.
SHARED = ["common", "contracts", "target", "drafts", "recipe", "serve"]
MAY_IMPORT = {
    "common": {"common"},
    "contracts": {"contracts", "common"},
    "target": {"target", "contracts", "common"},
    "drafts": {"drafts", "target", "contracts", "common"},
    "recipe": {"recipe", "drafts", "target", "contracts", "common"},
    "serve": {*SHARED},
    **{stage: {stage, *SHARED} for stage in ("synth", "dump", "train", "bench")},
    "distributed": {"distributed", "recipe", "contracts", "common"},
}
MODULES = [path for package in MAY_IMPORT for path in sorted((ROOT / package).rglob("*.py"))]
NAMES = [str(path.relative_to(ROOT)) for path in MODULES]
STAGES = ["synth", "dump", "train", "serve", "bench", "recipe", "distributed"]
SCRIPTS = [path for folder in ("benchmarks", "recipes") for path in sorted((ROOT / folder).rglob("*.py"))]

MAX_LINES, MAX_PARAMETERS = 60, 6
LONG = {"train/offline.py:_train": 90}  # the training loop reads best in one piece


def imported_packages(path: Path) -> set[str]:
    packages = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            packages |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            packages.add(node.module.split(".")[0])
    return packages & set(MAY_IMPORT)


@pytest.mark.parametrize("path", MODULES, ids=NAMES)
def test_a_package_imports_only_the_packages_it_may(path: Path) -> None:
    package = path.relative_to(ROOT).parts[0]
    assert imported_packages(path) <= MAY_IMPORT[package]


@pytest.mark.parametrize("path", MODULES, ids=NAMES)
def test_every_module_says_what_it_is_and_fits_in_five_hundred_lines(path: Path) -> None:
    text = path.read_text()
    assert ast.get_docstring(ast.parse(text))
    assert text.count("\n") <= 500


def test_modules_are_small_as_a_rule() -> None:
    assert statistics.median(path.read_text().count("\n") for path in MODULES) <= 150


def is_command(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Whether typer calls it: then each parameter is an option, and the signature is the documentation."""
    calls = [decorator.func for decorator in function.decorator_list if isinstance(decorator, ast.Call)]
    return any(isinstance(called, ast.Attribute) and called.attr == "command" for called in calls)


def list_excesses(path: Path, root: Path = ROOT) -> list[str]:
    """List functions that are too long or have too many parameters, as messages."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        name = f"{path.relative_to(root)}:{node.name}"
        assert node.end_lineno is not None
        lines = node.end_lineno - node.lineno + 1
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        parameters = sum(argument.arg not in ("self", "cls", "ctx") for argument in arguments)
        if lines > LONG.get(name, MAX_LINES):
            found.append(f"{name} has {lines} lines")
        if parameters > MAX_PARAMETERS and not is_command(node):
            found.append(f"{name} has {parameters} parameters")
    return found


def test_functions_fit_on_a_screen_and_take_at_most_six_parameters() -> None:
    excesses = [message for path in [*MODULES, *SCRIPTS] for message in list_excesses(path)]
    assert not excesses, "\n".join(excesses)


def test_a_long_function_and_one_with_seven_parameters_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    body = "\n".join(f"    x = {n}" for n in range(60))
    (tmp_path / "a.py").write_text(f"""
def long():
{body}


def wide(a, b, c, d, *, e, f, g): ...


@app.command(epilog="")
def command(a, b, c, d, e, f, g): ...


class Narrow:
    def method(self, a, b, c, d, e, f): ...
""")
    assert list_excesses(tmp_path / "a.py", tmp_path) == ["a.py:long has 61 lines", "a.py:wide has 7 parameters"]


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="needs Debian's shellcheck")
def test_shell_scripts_are_clean() -> None:
    scripts = [ROOT / ".ci/run", ROOT / "distributed/worker.sh", *sorted(ROOT.glob("recipes/**/*.sh"))]
    result = subprocess.run(
        ["shellcheck", "--external-sources", *scripts], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("name", STAGES)
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
        "jinja2",
        "aiohttp",
        "httpx2",
    }
    loaded = {line.rsplit("|", 1)[-1].strip() for line in result.stderr.splitlines()}
    assert "typer" in loaded
    assert not heavy & loaded
    assert "Usage" in result.stdout


def list_commands() -> list[tuple[str, str]]:
    """List stage and name of every command that help shows."""
    apps = {stage: importlib.import_module(f"{stage}.cli").app for stage in STAGES}
    return [
        (stage, name)
        for stage, app in apps.items()
        for name, command in typer.main.get_group(app).commands.items()
        if not command.hidden
    ]


@pytest.mark.parametrize("args", list_commands(), ids=" ".join)
def test_every_command_explains_itself_with_an_example(args: tuple[str, ...]) -> None:
    help_text = run(*args, "--help").stdout
    assert "Example:" in help_text
    assert "Options" in help_text


def test_no_test_folder_is_a_package() -> None:
    assert not list((ROOT / "tests").rglob("__init__.py"))


def test_synthesis_runs_without_torch() -> None:
    code = "import sys, synth.generate, synth.work; raise SystemExit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
