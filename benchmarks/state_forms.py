"""Store the same states in several forms, train a draft from each, and compare bytes and predicted acceptance.

    python benchmarks/state_forms.py --recipe recipes/Tiny-DFlash/recipe.yaml --set target.path=RUN/target \
        --store RUN/store/train --held-out RUN/store/held_out --work FOLDER [--objective distill] [--forms bf16 int4]

The store holds whole states, as captured. A form is DTYPE[-drop|-topK][-seen]: the dtype of the captured layers, with
no final states or the K most likely tokens instead, and without the states that no block sees. Samples are written as
`dump run` writes them. All drafts are predicted on the same held-out store; differences are paired by sample. Finished
forms are kept: run again to resume or to add some.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from common.files import write_json  # noqa: E402
from contracts.acceptance import Acceptance  # noqa: E402
from contracts.ledger import Ledger  # noqa: E402
from contracts.store import Store  # noqa: E402
from dump.kept import Kept  # noqa: E402
from recipe.load import load_recipe  # noqa: E402
from recipe.recipe import Recipe  # noqa: E402
from target.target import Target  # noqa: E402

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp8": "fp8_e4m3", "int4": "int4"}
FORMS = ("bf16", "bf16-drop", "bf16-top32", "bf16-top128", "fp8", "fp8-top128", "int4", "int4-top128", "int4-drop-seen")


def read_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", type=Path, required=True)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--store", type=Path, required=True, help="a whole store, dtype as captured")
    parser.add_argument("--held-out", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--objective", default="tokens", help="train.draft.objective")
    parser.add_argument("--forms", nargs="+", default=FORMS, help="the first one is compared with")
    return parser.parse_args()


def settings_of(form: str) -> list[str]:
    """Return the recipe's overrides for a form. Exits for one that is none."""
    dtype, *parts = form.split("-")
    found = [f"dump.dtype={DTYPES.get(dtype, dtype)}"]
    for part in parts:
        if part == "drop":
            found.append("dump.final_states=drop")
        elif part == "seen":
            found.append("dump.unseen_states=drop")
        elif part.startswith("top") and part[3:].isdecimal():
            found += ["dump.final_states=top-k", f"dump.top_k={part[3:]}"]
        else:
            raise SystemExit(f"form {form}: found {part!r}, expected drop, seen or top<K>")
    return found


def write_form(recipe: Recipe, source: Store, folder: Path) -> None:
    """Write a store's samples in the recipe's form; the rest of the store is a copy."""
    kept, store, whole = Kept.of(recipe, Target.here(recipe.target)), Store(folder), source.read_manifest()
    if whole.form.is_reduced or whole.final_state != "pre-norm" or whole.dtype not in ("float32", "bfloat16"):
        raise SystemExit(f"{source.folder}: found states of a reduced form, expected all of them in fp32 or bf16")
    manifest = whole.model_copy(
        update={
            "dtype": recipe.dump.dtype,
            "final_state": kept.final_state,
            "top_k": kept.top_k or None,
            "unseen_states": None if kept.unseen else "dropped",
            "seen_reach": kept.reach,
        }
    )
    folder.mkdir(parents=True)
    store.write_manifest(manifest)
    lines = []
    for sample_id in source.sample_ids():
        sample = source.read_sample(sample_id)
        keeps = kept.final_state == "pre-norm"
        fields = store.write_sample(sample_id, kept.trim(sample), recipe.dump.dtype, final_states=keeps)
        lines.append({"id": sample_id, "status": "done", "tokens": sample.num_tokens, **fields})
    store.ledger_path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    shutil.copy(source.folder / "run.json", folder)  # last: the store is complete


def run_form(args: argparse.Namespace, form: str) -> tuple[float, dict[str, Acceptance]]:
    """Return a form's bytes per token, and the acceptance of each held-out sample with the draft trained from it."""
    sets = [*args.set, *settings_of(form), f"train.draft.objective={args.objective}"]
    words = ["--recipe", str(args.recipe), *(word for value in sets for word in ("--set", value))]
    folder, result = args.work / "stores" / form, args.work / args.objective / form
    if not (folder / "run.json").exists():
        shutil.rmtree(folder, ignore_errors=True)
        write_form(load_recipe(args.recipe, sets), Store(args.store), folder)
    output = result / "eval.json"
    if not output.exists():
        call("train", "offline", *words, "--store", folder, "--output", result / "draft")
        call("train", "eval", *words, "--run", result / "draft", "--store", args.held_out, "--output", output)
    entries = [entry for entry in Ledger(Store(folder).ledger_path).entries.values() if entry["status"] == "done"]
    size = sum(entry["size"] for entry in entries) / sum(entry["tokens"] for entry in entries)
    return size, acceptance_by_sample(json.loads(output.read_text()))


def acceptance_by_sample(report: dict[str, Any]) -> dict[str, Acceptance]:
    """Return the acceptance of each sample of an evaluation, in the order of their ids."""
    found = {}
    for walk in sorted(report["walks"], key=lambda walk: str(walk["sample"])):
        counts = Counter(count for part in walk["accepted"] for count in part)
        found[str(walk["sample"])] = Acceptance(tuple(counts[i] for i in range(report["num_draft_tokens"] + 1)))
    return found


def call(name: str, *words: object) -> None:
    """Run a command; its output goes to this program's error stream."""
    program = str(Path(sys.executable).with_name(name))
    subprocess.run([program, *map(str, words)], cwd=ROOT, check=True, stdout=sys.stderr)


def main() -> None:
    args = read_args()
    args.work = args.work.absolute()
    rows: list[dict[str, Any]] = []
    base: tuple[float, dict[str, Acceptance]] | None = None
    print("| form | bytes a token | relative | acceptance length | difference, paired |\n|---|---:|---:|---|---|")
    for form in args.forms:
        size, by_sample = run_form(args, form)
        base = base or (size, by_sample)
        if by_sample.keys() != base[1].keys():
            raise SystemExit(
                f"{form}: found predictions of other samples than those of {args.forms[0]}: use another --work"
            )
        parts, before = list(by_sample.values()), list(base[1].values())
        length, interval = Acceptance.pool(parts).acceptance_length, Acceptance.interval(parts)
        gain = length - Acceptance.pool(before).acceptance_length
        edges = Acceptance.gain_interval(parts, before)
        row = {
            "form": form,
            "bytes": size,
            "length": length,
            "interval": interval,
            "gain": gain,
            "gain_interval": edges,
        }
        rows.append(row)
        text = f"{gain:+.3f} [{edges[0]:+.3f}, {edges[1]:+.3f}]" if len(rows) > 1 else ""
        figures = f"{size:.0f} | {size / base[0]:.3f} | {length:.3f} [{interval[0]:.3f}, {interval[1]:.3f}]"
        print(f"| {form} | {figures} | {text} |", flush=True)
    write_json(args.work / f"{args.objective}.json", rows)


if __name__ == "__main__":
    main()
