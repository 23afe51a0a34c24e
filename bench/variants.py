"""Serve every draft of a comparison (`train compare`) on the same conversations: the best one for each concurrency.

Reads:  COMPARE/compare.json and COMPARE/NAME/export; held-out conversations (`synth generate`).
Writes: COMPARE/NAME/served (`bench acceptance`, with a baseline of its own, measured beside the draft),
        COMPARE/served.json, COMPARE/served.html.

Each draft is served with the number of draft tokens that is best for it. Its speed-up is over its own baseline, so that
a machine that becomes slower between two drafts changes nothing. Gains over the first variant are paired: the same
conversations are drawn for both in each bootstrap resample.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from bench.replay import measure
from bench.speeds import QUANTILES, Array, Load, predict
from common.errors import UserError
from common.files import read_json, write_json
from common.html import Table, write_page
from contracts.acceptance import RESAMPLES
from contracts.speeds import Speed, Speeds
from recipe.recipe import Recipe

TEMPLATE = Path(__file__).with_name("variants.html.j2")


@dataclass(frozen=True)
class Variant:
    """A draft of the comparison: its predicted figures, and the folder of `bench acceptance`."""

    name: str
    predicted: Mapping[str, Any]
    folder: Path

    @cached_property
    def report(self) -> dict[str, Any]:
        return dict(read_json(self.folder / "acceptance.json", "the output of `bench acceptance`"))

    @cached_property
    def runs(self) -> dict[int, dict[str, Any]]:
        """The servers' answers by number of draft tokens, 0 for none."""
        found = {0: read_json(self.folder / "baseline.json", "a server's answers")}
        for number in map(int, self.report["by_draft_tokens"]):
            found[number] = read_json(self.folder / f"draft-k{number}.json", "a server's answers")
        return {number: dict(run) for number, run in found.items()}

    @property
    def speeds(self) -> list[Speeds]:
        return [Speeds.model_validate(at) for at in self.report["speeds"]]

    def served(self, at: Speeds) -> Speed:
        """Return the speed with the number of draft tokens to serve: the recommended one, or the best of any draft."""
        return at.best if at.recommended else max(at.speeds[1:], key=lambda speed: speed.tokens_per_s)

    def speed_ups(self, at: Speeds, weights: Array) -> Array:
        """Return the speed-up of `served` in each draw of conversations. Shapes: weights (B, C) -> (B,)."""
        loads = {k: Load.from_point(run["points"][str(at.concurrency)], k) for k, run in self.runs.items()}
        found = predict(loads, weights)
        column = found.numbers.index(self.served(at).draft_tokens)
        ratios: Array = found.tokens_per_s[:, column] / found.tokens_per_s[:, 0]
        return ratios


def serve_variants(
    recipe: Recipe,
    folder: Path,
    conversations: Path,
    names: Sequence[str] | None = None,
    draft_tokens: Sequence[int] | None = None,
) -> dict[str, Any]:
    """Measure the drafts of a comparison one after another, and report; return the content of served.json.

    `names`: only these variants. `draft_tokens`: numbers to measure, as for `bench acceptance`. Raises UserError for a
    name that the comparison does not have.
    """
    rows = {row["name"]: row for row in read_json(folder / "compare.json", "the output of `train compare`")["variants"]}
    for name in names or []:
        if name not in rows:
            raise UserError(
                "--variant", found=name, expected=f"one of {', '.join(rows)}", fix=f"See {folder / 'report.html'}."
            )
    chosen = [Variant(name, row, folder / name / "served") for name, row in rows.items() if not names or name in names]
    for number, variant in enumerate(chosen, start=1):
        print(f"bench: {variant.name}, {number} of {len(chosen)}")
        measure(recipe, conversations, folder / variant.name / "export", variant.folder, draft_tokens)
    result = summarize(chosen)
    write_json(folder / "served.json", result)
    write_page(folder / "served.html", TEMPLATE, title="Drafts served", **make_tables(result))
    print_result(result)
    print(f"bench: -> {folder / 'served.html'}")
    return result


def summarize(variants: Sequence[Variant]) -> dict[str, Any]:
    """Return the figures of all variants, at each concurrency that all of them were measured at."""
    first = variants[0]
    points = []
    for at in first.speeds:
        rows = [_row(variant, first, at.concurrency) for variant in variants]
        best = max(rows, key=lambda row: row["speed_up"])
        points.append({"concurrency": at.concurrency, "best": best["name"] if best["pays"] else None, "variants": rows})
    accepted = [
        {
            "name": variant.name,
            "num_draft_tokens": variant.report["num_draft_tokens"],
            "predicted": variant.predicted["acceptance_length"],
            "served": variant.report["acceptance_length"],
            "greedy_identical": variant.report["greedy_identical"],
            "greedy_total": variant.report["greedy_total"],
        }
        for variant in variants
    ]
    return {"over": first.name, "points": points, "acceptance": accepted}


def _row(variant: Variant, first: Variant, concurrency: int) -> dict[str, Any]:
    """Return a variant's figures at a concurrency; gains are over `first`."""
    own, other = (next(at for at in one.speeds if at.concurrency == concurrency) for one in (variant, first))
    size = own.conversations
    draws = np.random.default_rng(0).multinomial(size, np.full(size, 1 / size), RESAMPLES)
    weights = np.concatenate([np.ones((1, size)), draws])  # the conversations as they are, then the draws
    gains = variant.speed_ups(own, weights) / first.speed_ups(other, weights) - 1
    served = variant.served(own)
    return {
        "name": variant.name,
        "draft_tokens": served.draft_tokens,
        "pays": bool(own.recommended),
        "tokens_per_s": served.tokens_per_s,
        "baseline_tokens_per_s": own.base.tokens_per_s,
        "speed_up": served.speed_up,
        "interval": served.interval,
        "acceptance_length": served.acceptance_length,
        "step_ms": served.step_ms,
        "draft_and_check_ms": round(served.step_ms - own.base.step_ms, 3),
        "gain": round(float(gains[0]), 4),
        "gain_interval": [round(float(edge), 4) for edge in np.quantile(gains[1:], QUANTILES)],
    }


def make_tables(result: Mapping[str, Any]) -> dict[str, Any]:
    """Return the page's values."""
    columns = (
        "variant", "K", "tokens/s", "no draft", "speed-up", "95% interval", f"gain over {result['over']}",
        "95% interval of the gain", "tokens a step", "ms a step", "of them for the draft and its check",
    )  # fmt: skip
    speeds = [
        (point["concurrency"], point["best"], Table(columns, [_speed_row(row) for row in point["variants"]]))
        for point in result["points"]
    ]
    accepted = [
        (
            row["name"], row["num_draft_tokens"], f"{row['predicted']:.3f}", f"{row['served']:.3f}",
            f"{row['greedy_identical']} of {row['greedy_total']}",
        )
        for row in result["acceptance"]
    ]  # fmt: skip
    titles = ("variant", "K", "predicted", "served", "greedy replies as without the draft")
    return {"speeds": speeds, "accepted": Table(titles, accepted)}


def _speed_row(row: Mapping[str, Any]) -> tuple[str, ...]:
    low, high = row["interval"] or (row["speed_up"], row["speed_up"])
    gain_low, gain_high = row["gain_interval"]
    return (
        row["name"], str(row["draft_tokens"]), f"{row['tokens_per_s']:.1f}", f"{row['baseline_tokens_per_s']:.1f}",
        f"{row['speed_up']:.2f}x", f"{low:.2f} to {high:.2f}", f"{row['gain']:+.1%}",
        f"{gain_low:+.1%} to {gain_high:+.1%}", f"{row['acceptance_length']:.3f}", f"{row['step_ms']:.1f}",
        f"{row['draft_and_check_ms']:.1f}",
    )  # fmt: skip


def print_result(result: Mapping[str, Any]) -> None:
    """Print a table for each concurrency."""
    titles = f"{'tokens/s':>10}{'speed-up':>10}{'gain':>8}  {'95% interval of it':<20}{'length':>8}"
    for point in result["points"]:
        best = point["best"] or "no draft"
        print(f"\nconcurrency {point['concurrency']}, best: {best}\n{'variant':<24}{'K':>3}{titles}")
        for row in point["variants"]:
            low, high = row["gain_interval"]
            print(
                f"{row['name']:<24}{row['draft_tokens']:>3}{row['tokens_per_s']:>10.1f}{row['speed_up']:>9.2f}x"
                f"{row['gain']:>+8.1%}  {f'{low:+.1%} to {high:+.1%}':<20}{row['acceptance_length']:>8.3f}"
            )
