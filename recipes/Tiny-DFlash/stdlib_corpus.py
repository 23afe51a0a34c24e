"""Conversations about Python's standard library, made from its docstrings.

Reads: the sources of the running interpreter's standard library (parsed with `ast`, never imported).
"""

from __future__ import annotations

import ast
import random
import re
import sysconfig
from dataclasses import dataclass
from pathlib import Path

SYSTEM_PROMPT = "You explain the Python standard library."
MODES = ("enabled", "disabled", "adaptive")
# Well-known packages and modules, few enough for a tiny target to learn.
MODULES = (
    "argparse",
    "ast",
    "asyncio",
    "base64",
    "bisect",
    "calendar",
    "codecs",
    "collections",
    "configparser",
    "contextlib",
    "csv",
    "ctypes",
    "dataclasses",
    "datetime",
    "difflib",
    "email",
    "enum",
    "fractions",
    "functools",
    "graphlib",
    "gzip",
    "heapq",
    "html",
    "http",
    "inspect",
    "ipaddress",
    "json",
    "logging",
    "mailbox",
    "multiprocessing",
    "operator",
    "os",
    "pathlib",
    "pickle",
    "platform",
    "queue",
    "random",
    "shutil",
    "smtplib",
    "socket",
    "ssl",
    "statistics",
    "string",
    "subprocess",
    "tarfile",
    "tempfile",
    "textwrap",
    "threading",
    "timeit",
    "traceback",
    "typing",
    "unittest",
    "urllib",
    "uuid",
    "weakref",
    "xml",
    "xmlrpc",
    "zipfile",
)
MAX_SUMMARY_CHARS = 110
MAX_PARAMETERS = 5


@dataclass(frozen=True)
class Subject:
    """A documented module, class, function or method: dotted name, kind, module, parameters and summary line."""

    name: str
    kind: str
    module: str
    parameters: tuple[str, ...]
    summary: str


def read_subjects(stdlib: Path | None = None) -> list[Subject]:
    """Return the public, documented subjects of MODULES, sorted by name, each name once."""
    root = stdlib or Path(sysconfig.get_paths()["stdlib"])
    found: dict[str, Subject] = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if parts[-1] == "__init__":
            parts = parts[:-1]
        if not parts or parts[0] not in MODULES or any(part.startswith("_") or part == "tests" for part in parts):
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        module = ".".join(parts)
        for subject in _subjects_of(tree, module):
            found.setdefault(subject.name, subject)
    return [found[name] for name in sorted(found)]


def _subjects_of(tree: ast.Module, module: str) -> list[Subject]:
    subjects = [_subject(tree, module, "module", module)]
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            subjects.append(_subject(node, f"{module}.{node.name}", "function", module))
        elif isinstance(node, ast.ClassDef):
            subjects.append(_subject(node, f"{module}.{node.name}", "class", module))
            for member in node.body:
                if isinstance(member, ast.FunctionDef | ast.AsyncFunctionDef):
                    name = f"{module}.{node.name}.{member.name}"
                    subjects.append(_subject(member, name, "method", module))
    return [subject for subject in subjects if subject is not None]


def _subject(node: ast.AST, name: str, kind: str, module: str) -> Subject | None:
    if any(part.startswith("_") for part in name.split(".")):
        return None
    docstring = ast.get_docstring(node)  # type: ignore[arg-type]
    if not docstring:
        return None
    summary = " ".join(docstring.split("\n\n")[0].split())
    summary = re.split(r"(?<=[.!?]) ", summary)[0]
    if not summary.isascii() or not 12 <= len(summary) <= MAX_SUMMARY_CHARS:
        return None
    parameters: tuple[str, ...] = ()
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        parameters = tuple(arg.arg for arg in node.args.args + node.args.kwonlyargs if arg.arg != "self")
    return Subject(name, kind, module, parameters[:MAX_PARAMETERS], summary.rstrip(".") + ".")


QUESTIONS = {
    "what": ("What does `{name}` do?", "Explain `{name}`.", "Tell me about `{name}`."),
    "call": ("How do I use `{name}`?", "Show me how to call `{name}`.", "Which parameters does `{name}` take?"),
}
FOLLOW_UPS = {"call": "And how do I use it?", "what": "And what does it do?"}
GOALS = {"what": "what it does", "call": "how to use it"}


def write_question(subject: Subject, topic: str, rng: random.Random) -> str:
    """Return a user's question on `topic` ("what" or "call")."""
    return rng.choice(QUESTIONS[topic]).format(name=subject.name)


def write_reply(subject: Subject, topic: str, mode: str) -> tuple[str | None, str]:
    """Return the `(thought, answer)` to train the target on; the thought is None if the mode has none.

    In adaptive mode the target thinks about methods and classes, and answers the rest directly.
    """
    short = subject.name.rsplit(".", 1)[-1]
    thinks = mode == "enabled" or (mode == "adaptive" and subject.kind in ("method", "class"))
    thought = None
    if thinks:
        thought = (
            f"The user asks about `{subject.name}` and wants to know {GOALS[topic]}. "
            f"This is a {subject.kind} of the module `{subject.module}`. "
            f"I will name the {subject.kind} first and then say {GOALS[topic]}."
        )
    opening = f"`{short}` is a {subject.kind} of the module `{subject.module}`."
    if subject.kind == "module":
        opening = f"`{subject.module}` is a module of the standard library."
    if topic == "what":
        return thought, f"{opening}\n\nIts documentation says: {subject.summary}"
    return thought, f"{opening}\n\n{_usage(subject, short)}"


def _usage(subject: Subject, short: str) -> str:
    if subject.kind == "module":
        return f"Import it before use:\n\n    import {subject.module}\n"
    path = subject.name.split(".")
    owner = path[-2] if subject.kind == "method" else ""
    lines = [f"Import it before use:\n\n    from {subject.module} import {owner or short}\n"]
    call = f"{owner.lower()}.{short}" if owner else short
    lines.append(f"Then call it:\n\n    {call}({', '.join(subject.parameters)})\n")
    if subject.parameters:
        lines.append("Its parameters are:\n" + "".join(f"\n- `{name}`" for name in subject.parameters))
    else:
        lines.append("It takes no parameters.")
    return "\n".join(lines)
