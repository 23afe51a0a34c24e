"""Compare draft methods or settings that are trained on one store: same batches and anchors, same held-out samples.

Reads:  a YAML file of variants, `name: [overrides]`; the store to train on; a store of held-out conversations.
Writes: OUTPUT/NAME/{draft,eval.json,export} for each variant, OUTPUT/compare.json, OUTPUT/report.html.

Each stage skips what is finished, so a comparison resumes and takes further variants. Gains over the first variant are
paired: the same samples are drawn for both in each bootstrap resample.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from common.errors import UserError
from common.files import write_json
from common.html import Table, write_page
from contracts.acceptance import Acceptance
from contracts.run import read_run
from recipe.recipe import Recipe
from train.certificate import Figures
from train.evaluate import Evaluation, evaluate
from train.export import export
from train.offline import train_offline
from train.pilots import parts_of
from train.reports import Source

TEMPLATE = Path(__file__).with_name("compare.html.j2")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
SHARED = ("num_steps", "global_batch_size", "seed", "max_samples")
"""Keys of `train` that all variants should have in common."""


@dataclass(frozen=True)
class Variant:
    """A variant's recipe, and what came of it. `walks`: accepted tokens of each sample."""

    name: str
    recipe: Recipe
    report: dict[str, Any]
    training: dict[str, Any]

    @property
    def parts(self) -> list[Acceptance]:
        """The acceptance of each sample, in the store's order."""
        return parts_of(self.report)


def read_variants(path: Path) -> dict[str, list[str]]:
    """Read `name: [overrides]`. Raises UserError for another format or a name that cannot be a folder's."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise UserError(path, found=str(error), expected="a YAML file", fix="Correct it.") from None
    if not isinstance(values, Mapping) or not values:
        raise UserError(
            path, found=type(values).__name__, expected="name: [overrides] for each variant", fix="Correct it."
        )
    variants: dict[str, list[str]] = {}
    for name, overrides in values.items():
        if not NAME.fullmatch(str(name)) or not isinstance(overrides or [], list):
            raise UserError(
                f"{path} ({name})",
                found=f"{name!r}: {overrides!r}",
                expected="a name of letters, digits, '.', '_' and '-', and a list of KEY=VALUE",
                fix="Correct it.",
            )
        variants[str(name)] = [str(override) for override in overrides or []]
    return variants


def compare(
    variants: Mapping[str, list[str]], load: Callable[[list[str]], Recipe], stores: tuple[Path, Path], output: Path
) -> dict[str, Any]:
    """Train, evaluate and export each variant, and report; return the report.

    `load`: the recipe with some overrides, checked. `stores`: to train on, and of held-out conversations.
    """
    recipes = {name: load(overrides) for name, overrides in variants.items()}  # all are checked before one is trained
    done = []
    for number, (name, recipe) in enumerate(recipes.items(), start=1):
        print(f"compare: {name}, {number} of {len(recipes)}")
        folder = output / name
        train_offline(recipe, stores[0], folder / "draft")
        report = evaluate(recipe, Evaluation(stores[1], folder / "eval.json", folder / "draft"))
        export(recipe, folder / "draft", folder / "export", Figures([Source(folder / "eval.json")]))
        done.append(Variant(name, recipe, report, read_run(folder / "draft", "train offline")))
    result = summarize(done)
    write_json(output / "compare.json", result)
    write_page(output / "report.html", TEMPLATE, title="Drafts compared", **make_tables(result))
    print_result(result)
    print(f"compare: -> {output / 'report.html'}. Serve all of them: bench variants {output} ...")
    return result


def summarize(variants: list[Variant]) -> dict[str, Any]:
    """Return the figures of all variants, and where their trainings differ."""
    first = variants[0]
    rows = []
    for variant in variants:
        total = Acceptance.pool(variant.parts)
        rows.append({
            "name": variant.name,
            "method": variant.recipe.training().draft.method,
            "num_draft_tokens": variant.report["num_draft_tokens"],
            "trained_on": variant.report.get("trained_on"),
            "parameters": variant.training["summary"]["parameters"],
            "training_seconds": variant.training["seconds"],
            **total.summary(),
            "interval": variant.report["interval"],
            "gain": round(total.acceptance_length - Acceptance.pool(first.parts).acceptance_length, 4),
            "gain_interval": [round(edge, 4) for edge in Acceptance.gain_interval(variant.parts, first.parts)],
            "by_mode": {mode: part["acceptance_length"] for mode, part in variant.report["by_mode"].items()},
        })  # fmt: skip
    values = {key: [getattr(one.recipe.training(), key) for one in variants] for key in SHARED}
    differing = {key: found for key, found in values.items() if len(set(found)) > 1}
    best = max(rows, key=lambda row: row["acceptance_length"])
    return {"over": first.name, "best": best["name"], "samples": first.report["samples"], "differing": differing,
            "variants": rows}  # fmt: skip


def make_tables(result: dict[str, Any]) -> dict[str, Any]:
    """Return the page's values."""
    rows = result["variants"]
    longest = max(row["num_draft_tokens"] for row in rows)
    modes = list(rows[0]["by_mode"])
    columns = ("variant", "method", "K", "acceptance length", "95% interval", f"gain over {result['over']}",
               "95% interval of the gain", "parameters", "training")  # fmt: skip
    lengths = [
        (
            row["name"], row["method"], row["num_draft_tokens"], f"{row['acceptance_length']:.3f}",
            _interval(row["interval"]), f"{row['gain']:+.3f}", _interval(row["gain_interval"], "+"),
            f"{row['parameters'] / 1e6:.2f}M", f"{row['training_seconds']:.0f} s",
        )
        for row in rows
    ]  # fmt: skip
    positions = [
        (row["name"], *(f"{share:.3f}" for share in row["per_position"]), *[""] * (longest - row["num_draft_tokens"]))
        for row in rows
    ]
    by_mode = [(row["name"], *(f"{row['by_mode'].get(mode, 0):.3f}" for mode in modes)) for row in rows]
    return {
        "result": result,
        "lengths": Table(columns, lengths, num_text=2),
        "positions": Table(("variant", *(str(place) for place in range(1, longest + 1))), positions),
        "modes": Table(("variant", *(mode or "unset" for mode in modes)), by_mode),
    }


def _interval(edges: list[float], sign: str = "") -> str:
    return f"{edges[0]:{sign}.3f} to {edges[1]:{sign}.3f}"


def print_result(result: dict[str, Any]) -> None:
    """Print a line for each variant."""
    print(f"\n{'variant':<24}{'K':>3}{'length':>9}{'gain':>9}  {'95% interval of it':<20}{'parameters':>11}{'s':>7}")
    for row in result["variants"]:
        gain, parameters = _interval(row["gain_interval"], "+"), f"{row['parameters'] / 1e6:.2f}M"
        print(
            f"{row['name']:<24}{row['num_draft_tokens']:>3}{row['acceptance_length']:>9.3f}{row['gain']:>+9.3f}  "
            f"{gain:<20}{parameters:>11}{row['training_seconds']:>7.0f}"
        )
    for key, values in result["differing"].items():
        print(f"note: the variants differ in train.{key}: {values}; their trainings are not equal")
