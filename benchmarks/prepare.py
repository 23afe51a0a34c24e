"""Speed and memory of `synth prepare` on one core, at several numbers of rows.

    python benchmarks/prepare.py --work FOLDER [--rows 100000 1000000]

Rows are made up: user turns of 20 to 230 words drawn from 20,000 words as often as words occur in text (Zipf), with a
reply of the same length that is dropped. Planted among them: exact duplicates (4%, paraphrased by case and spacing),
near-duplicates (4%, one word changed in rows of more than 100), questions of an evaluation set (0.5%, paraphrased by
case and punctuation). `prepare` runs in a process of its own, in one thread, with an evaluation set of 1,500 questions,
a category with a cap, and weights. The time includes hashing the input and writing the output; seconds of one core are
the process's CPU time, which other work on the machine changes little.

Exits with an error if fewer rows are removed than planted or 0.1% of all rows more, below 100,000 rows a minute, or if
a row takes more than 200 bytes of memory.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from recipe.load import load_recipe
from synth.prepare import prepare

NUM_QUESTIONS = 1500
LEAST_ROWS_PER_MINUTE = 100_000
MOST_BYTES_PER_ROW = 200
MOST_WRONG = 0.001
RECIPE = """
target: {{path: nowhere, max_model_len: 4096}}
prepare:
  sources:
    - {{path: {folder}/0.jsonl, weight: 2}}
    - {{path: {folder}/1.jsonl, category: other}}
  num_rows: {num_rows}
  max_per_category: {{a: {cap}}}
  against: [questions={folder}/questions.jsonl]
"""


class Words:
    """Draws texts: words of 2 to 9 letters, the most frequent ones first."""

    def __init__(self, seed: int) -> None:
        self._rng = np.random.default_rng(seed)
        letters = np.array(list("etaoinshrdlucmfwypvbgk"))
        self._words = np.array(["".join(self._rng.choice(letters, n)) for n in self._rng.integers(2, 10, 20_000)])
        shares = 1 / np.arange(1, len(self._words) + 1)
        self._edges = np.cumsum(shares / shares.sum())

    def draw(self, num_words: int) -> list[str]:
        places = np.searchsorted(self._edges, self._rng.random(num_words))
        return list(self._words[np.minimum(places, len(self._words) - 1)])


def make_rows(num_rows: int, words: Words, questions: list[str], rng: random.Random) -> Iterator[tuple[str, str]]:
    """Yield the kind and the text of each row."""
    recent: list[list[str]] = []
    for number in range(num_rows):
        drawn = rng.random()
        if drawn < 0.04 and recent:
            yield "duplicate", "  ".join(rng.choice(recent)).upper()
        elif drawn < 0.08 and (long := [text for text in recent if len(text) > 100]):
            text = list(rng.choice(long))
            text[rng.randrange(len(text))] = f"changed{number}"
            yield "near_duplicate", " ".join(text)
        elif drawn < 0.085:
            yield "overlap", ", ".join(rng.choice(questions).title().split()) + "!"
        else:
            text = words.draw(rng.randint(20, 230))
            recent = [*recent[-200:], text]
            yield "unique", " ".join(text)


def make(folder: Path, num_rows: int) -> dict[str, int]:
    """Write two sources, the evaluation set and the recipe; return the number of rows by kind."""
    folder.mkdir(parents=True)
    words, rng = Words(0), random.Random(0)
    questions = [" ".join(words.draw(rng.randint(15, 120))) for _ in range(NUM_QUESTIONS)]
    lines = (json.dumps({"prompt": question}) for question in questions)
    (folder / "questions.jsonl").write_text("\n".join(lines))
    counts: dict[str, int] = {}
    with (folder / "0.jsonl").open("w") as first, (folder / "1.jsonl").open("w") as second:
        for number, (kind, text) in enumerate(make_rows(num_rows, words, questions, rng)):
            counts[kind] = counts.get(kind, 0) + 1
            category = {"category": "ab"[number % 2]} if number < num_rows // 2 else {}
            messages = [{"role": "user", "content": text}, {"role": "assistant", "content": text[::-1]}]
            file = first if number < num_rows // 2 else second
            file.write(json.dumps({"id": str(number), **category, "messages": messages}) + "\n")
    numbers = {"num_rows": num_rows * 3 // 4, "cap": num_rows // 5}
    (folder / "recipe.yaml").write_text(RECIPE.format(folder=folder, **numbers))
    return counts


def run_prepare(folder: Path) -> None:
    """Prepare, and print seconds of one core, seconds of the clock, peak memory in bytes, and the rows by step."""
    started, of_clock = time.process_time(), time.perf_counter()
    manifest = prepare(load_recipe(folder / "recipe.yaml"), folder / "out")
    seconds = [time.process_time() - started, time.perf_counter() - of_clock]
    steps: dict[str, int] = {}
    for source in manifest["sources"]:
        for step, count in source["counts"].items():
            steps[step] = steps.get(step, 0) + count
    print(json.dumps([*seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, steps]))


def measure(folder: Path, num_rows: int) -> tuple[float, float, int, list[str]]:
    """Return rows a minute (of one core, of the clock), peak bytes, and what is wrong with the result."""
    planted = make(folder, num_rows)
    words = [sys.executable, __file__, "--work", str(folder), "--run"]
    environment = {**os.environ, "RAYON_NUM_THREADS": "1"}
    result = subprocess.run(words, stdout=subprocess.PIPE, check=True, text=True, env=environment)
    of_core, of_clock, peak, steps = json.loads(result.stdout.splitlines()[-1])
    problems = []
    removed = steps["duplicate"] + steps["near_duplicate"] + steps["overlap"]
    expected = sum(count for kind, count in planted.items() if kind != "unique")
    if not expected <= removed <= expected + MOST_WRONG * num_rows:
        problems.append(f"{removed} duplicates and overlaps of {num_rows} rows, planted {expected}")
    if (rate := num_rows / of_core * 60) < LEAST_ROWS_PER_MINUTE:
        problems.append(f"{rate:.0f} rows a minute")
    print(f"{num_rows} rows: planted {planted}, found {steps}", file=sys.stderr)
    return rate, num_rows / of_clock * 60, peak, problems


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="an empty folder")
    parser.add_argument("--rows", type=int, nargs="+", default=[100_000])
    parser.add_argument("--run", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        run_prepare(args.work)
        return
    problems: list[str] = []
    peaks = {}
    print("| rows | rows a minute of one core | rows a minute of the clock | peak memory |\n|---:|---:|---:|---:|")
    for num_rows in args.rows:
        rate, of_clock, peaks[num_rows], found = measure(args.work / str(num_rows), num_rows)
        print(f"| {num_rows:,} | {rate:,.0f} | {of_clock:,.0f} | {peaks[num_rows] / 2**20:.0f} MiB |", flush=True)
        problems += found
    least, most = min(peaks), max(peaks)
    if most > least:
        per_row = (peaks[most] - peaks[least]) / (most - least)
        print(f"\nMemory grows by {per_row:.0f} bytes a row.")
        if per_row > MOST_BYTES_PER_ROW:
            problems.append(f"{per_row:.0f} bytes a row")
    if problems:
        raise SystemExit("; ".join(problems))


if __name__ == "__main__":
    main()
