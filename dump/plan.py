"""What a dump will cost, before it starts: samples, tokens, bytes, files and hours.

Reads: the conversations' lengths and the recipe. Nothing is loaded.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from contracts.errors import UserError
from contracts.recipe import Recipe
from contracts.store import sample_bytes
from contracts.target import Target
from dump.rendered import TemplateMasks
from dump.samples import judge, read_rows
from serve.extraction import longest_sample

FILE_OVERHEAD_BYTES = 1024  # a sample's header and its ledger line


@dataclass
class Plan:
    """Counts of the rows to capture, of those left out by reason, and of those that other shards have."""

    samples: int = 0
    tokens: int = 0
    supervised: int = 0
    bytes: int = 0
    longest: int = 0
    elsewhere: int = 0
    left_out: Counter[str] = field(default_factory=Counter)

    @property
    def rows(self) -> int:
        return self.samples + self.left_out.total()


def make_plan(
    recipe: Recipe,
    target: Target,
    layer_ids: list[int],
    folders: Sequence[Path],
    shard: tuple[int, int] | None = None,
    is_done: Callable[[str], bool] = lambda _: False,
    elsewhere: frozenset[str] = frozenset(),
) -> Plan:
    """Count what is to be captured; of samples that are there already (`is_done`, or `elsewhere`) only their row."""
    plan, max_tokens = Plan(), longest_sample(recipe, target)
    for row in read_rows(folders, TemplateMasks(recipe.target, target), shard):
        if row.sample_id in elsewhere:
            plan.elsewhere += 1
            continue
        verdict = judge(recipe.dump, row, max_tokens)
        if is_done(row.sample_id):
            plan.left_out["there already"] += 1
        elif verdict.row is None:
            plan.left_out[verdict.status] += 1
        else:
            num_tokens = verdict.row.num_tokens
            plan.samples += 1
            plan.tokens += num_tokens
            plan.supervised += sum(end - start for start, end in verdict.row.sample.loss_spans)
            plan.longest = max(plan.longest, num_tokens)
            plan.bytes += FILE_OVERHEAD_BYTES + sample_bytes(
                num_tokens, target.hidden_size, len(layer_ids), recipe.dump.dtype
            )
    return plan


def suppose_plan(recipe: Recipe, target: Target, layer_ids: list[int], samples: int, mean_tokens: int) -> Plan:
    """The plan of conversations that do not exist yet, all `mean_tokens` long."""
    size = FILE_OVERHEAD_BYTES + sample_bytes(mean_tokens, target.hidden_size, len(layer_ids), recipe.dump.dtype)
    return Plan(samples=samples, tokens=samples * mean_tokens, bytes=samples * size, longest=mean_tokens)


def show_plan(
    recipe: Recipe, plan: Plan, target: Target, layer_ids: list[int], rate: float | None, shards: int
) -> None:
    """Print a plan for people. `rate`: tokens/s of one process."""
    left_out = ", ".join(f"{count} {reason}" for reason, count in plan.left_out.items()) or "none"
    print(f"samples      {plan.samples} (left out: {left_out})")
    supervised = f"{plan.supervised} of them supervised; " if plan.supervised else ""
    print(f"tokens       {plan.tokens}, {supervised}the longest sample has {plan.longest}")
    print(f"layers       {layer_ids} and the final state, {target.hidden_size} wide, {recipe.dump.dtype}")
    print(f"bytes        {plan.bytes} ({plan.bytes / 1e9:.2f} GB), {plan.bytes / max(1, plan.tokens):.0f} a token")
    print(f"files        {plan.samples}, in at most 256 folders")
    if rate:
        hours = plan.tokens / rate / 3600
        print(
            f"hours        {hours:.2f} at {rate:.0f} tokens/s"
            + (f", {hours / shards:.2f} on {shards} shards" if shards > 1 else "")
        )
        print(f"node-hours   {hours:.2f}, the engine's {shards} starts not counted")
    else:
        print("hours        give --rate, the tokens/s that an earlier run printed")


def refuse_full_disk(folder: Path, num_bytes: int) -> None:
    """Raise UserError when the disk of `folder` has no room for so much more."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if num_bytes > free:
        raise UserError(
            folder,
            found=f"{free / 1e9:.2f} GB free",
            expected=f"{num_bytes / 1e9:.2f} GB that this dump will write (`dump plan`)",
            fix="Make room, choose another --output, set dump.dtype to fp8_e4m3, or pass --force.",
        )
