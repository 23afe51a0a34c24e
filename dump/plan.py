"""Compute the size of a dump before it starts: samples, tokens, bytes, files and hours.

Reads: the recipe and the lengths of the conversations. No engine is loaded.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from common.errors import UserError
from dump.kept import Kept
from dump.samples import Filter, Row
from recipe.recipe import Recipe
from recipe.sizes import form_of, stored_bytes
from target.layers import captured_layers
from target.target import Target


@dataclass
class Plan:
    """Numbers and sizes of the samples to capture, and numbers of rows left out (by reason) or in other shards."""

    samples: int = 0
    tokens: int = 0
    supervised: int = 0
    bytes: int = 0
    longest: int = 0
    elsewhere: int = 0
    left_out: Counter[str] = field(default_factory=Counter)

    @property
    def rows(self) -> int:
        """Rows in the finished ledger."""
        return self.samples + self.left_out.total()


def make_plan(
    recipe: Recipe,
    target: Target,
    rows: Iterable[Row],
    is_done: Callable[[str], bool] = lambda _: False,
    elsewhere: Container[str] = frozenset(),
) -> Plan:
    """Plan the capture of `rows`; rows that are done (`is_done` or in `elsewhere`) are only counted."""
    plan, row_filter = Plan(), Filter.of(recipe, target)
    kept, form = Kept.of(recipe, target), form_of(recipe, target)
    for row in rows:
        if is_done(row.sample_id):
            plan.left_out["there already"] += 1
            continue
        if row.sample_id in elsewhere:
            plan.elsewhere += 1
            continue
        verdict = row_filter.judge(row)
        if verdict.row is None:
            plan.left_out[verdict.status] += 1
            continue
        num_tokens = verdict.row.num_tokens
        plan.samples += 1
        plan.tokens += num_tokens
        plan.supervised += sum(end - start for start, end in verdict.row.sample.loss_spans)
        plan.longest = max(plan.longest, num_tokens)
        plan.bytes += form.header_bytes + kept.num_bytes(form, num_tokens, verdict.row.sample.loss_spans)
    return plan


def suppose_plan(recipe: Recipe, target: Target, samples: int, mean_tokens: int) -> Plan:
    """Plan for conversations that do not exist yet, all `mean_tokens` long."""
    size = stored_bytes(recipe, target, mean_tokens)
    return Plan(samples=samples, tokens=samples * mean_tokens, bytes=samples * size, longest=mean_tokens)


def show_plan(recipe: Recipe, plan: Plan, target: Target, rate: float | None, shards: int) -> None:
    """Print a plan. `rate`: tokens/s of one process."""
    left_out = ", ".join(f"{count} {reason}" for reason, count in plan.left_out.items()) or "none"
    print(f"samples      {plan.samples} (left out: {left_out})")
    supervised = f"{plan.supervised} of them supervised; " if plan.supervised else ""
    print(f"tokens       {plan.tokens}, {supervised}the longest sample has {plan.longest}")
    layer_ids = captured_layers(recipe.target, target)
    finals = {
        "keep": "the final state",
        "top-k": f"the {recipe.dump.top_k} most likely tokens",
        "drop": "no final state",
    }
    unseen = "" if recipe.dump.unseen_states == "keep" else ", without states that no block sees"
    final = finals[recipe.dump.final_states]
    print(f"layers       {layer_ids} and {final}, {target.hidden_size} wide, {recipe.dump.dtype}{unseen}")
    print(f"bytes        {plan.bytes} ({plan.bytes / 1e9:.2f} GB), {plan.bytes / max(1, plan.tokens):.0f} per token")
    print(f"files        {plan.samples}, in at most 256 folders")
    if rate:
        hours = plan.tokens / rate / 3600
        print(
            f"hours        {hours:.2f} at {rate:.0f} tokens/s"
            + (f", {hours / shards:.2f} on {shards} shards" if shards > 1 else "")
        )
        print(f"node-hours   {hours:.2f}, without the start-up of {shards} processes")
    else:
        print("hours        give --rate, the tokens/s that an earlier run printed")


def refuse_full_disk(folder: Path, num_bytes: int) -> None:
    """Raise UserError if the disk of `folder` has less than `num_bytes` free."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if num_bytes > free:
        raise UserError(
            folder,
            found=f"{free / 1e9:.2f} GB free",
            expected=f"{num_bytes / 1e9:.2f} GB that this dump and its unfinished shards will write (`dump plan`)",
            fix="Make room, choose another --output, set dump.dtype to fp8_e4m3 or int4, or pass --force.",
        )
