"""Print and plot statuses, planned against obtained quotas, thinking modes, finish reasons and lengths of a run.

Reads: RUN/ledger.jsonl and conversations.jsonl, finished or not. Writes: a plot.
"""

from __future__ import annotations

from array import array
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import orjson
import yaml

from common.errors import UserError
from common.files import explain_unwritable, read_json
from contracts.conversation import CONVERSATIONS_FILE
from contracts.ledger import STATUSES, read_entries
from recipe.synth import SynthSection
from synth.demand import count_obtained, divide, limits_of
from synth.output import FLAGS, LEDGER_FILE

QUANTILES = (0.05, 0.5, 0.95, 1.0)


@dataclass
class Lengths:
    """Of one thinking mode: tokens of each reply and sample, turns and finish reasons."""

    replies: array[int] = field(default_factory=lambda: array("q"))
    samples: array[int] = field(default_factory=lambda: array("q"))
    turns: Counter[int] = field(default_factory=Counter)
    finish: Counter[str] = field(default_factory=Counter)


def show_stats(folder: Path, plot: Path) -> None:
    """Print and plot the figures of a run. Raises UserError for a folder without a ledger."""
    if not (folder / LEDGER_FILE).exists():
        raise UserError(
            folder, found=f"no {LEDGER_FILE}", expected="the output of `synth generate`", fix="Correct the folder."
        )
    counts: Counter[str] = Counter()
    marks: Counter[str] = Counter()
    done: Counter[tuple[str, str]] = Counter()
    done_tokens = 0
    failed: set[tuple[int, int]] = set()
    for entry in read_entries(folder / LEDGER_FILE):
        place = (entry["index"], entry["sample"])
        if place in failed:  # retried: the last line counts
            failed.remove(place)
            counts["failed"] -= 1
        if entry["status"] == "failed":
            failed.add(place)
        counts[entry["status"]] += 1
        if entry["status"] == "done":
            done[entry.get("mode", ""), entry.get("category", "")] += 1
            done_tokens += entry.get("tokens", 0)
        marks.update(flag for flag in FLAGS if entry.get(flag))
    print(f"{folder}: {counts.total()} rows: " + ", ".join(f"{counts[status]} {status}" for status in STATUSES))
    print("marked: " + ", ".join(f"{marks[flag]} {flag}" for flag in FLAGS))
    for line in list_planned(folder, done, done_tokens):
        print(line)
    by_mode = read_lengths(folder)
    header = f"{'mode':<14}{'conv':>8}{'turns':>8}{'stop':>8}{'length':>8}{'reply tokens 5%':>17}{'50%':>8}{'95%':>8}"
    print(f"{header}{'max':>8}{'total':>12}")
    for mode, lengths in by_mode.items():
        quantiles = np.quantile(lengths.replies, QUANTILES) if lengths.replies else [0] * len(QUANTILES)
        print(
            f"{mode:<14}{lengths.finish.total():>8}{sum(n * k for n, k in lengths.turns.items()):>8}"
            f"{lengths.finish['stop']:>8}{lengths.finish['length']:>8}{quantiles[0]:>17.0f}"
            + "".join(f"{value:>8.0f}" for value in quantiles[1:])
            + f"{sum(lengths.replies):>12}"
        )
    if by_mode:
        with explain_unwritable(plot):
            plot.parent.mkdir(parents=True, exist_ok=True)
            _draw(by_mode, plot)
        print(f"plot: {plot}")


def list_planned(folder: Path, done: Mapping[tuple[str, str], int], done_tokens: int) -> list[str]:
    """Return a line for each planned share of a thinking mode, each quota and the budget, with what was obtained.

    `done`: finished conversations by mode and category. A shard's quotas and budget are its part of the recipe's.
    """
    recipe, state = folder / "resolved.yaml", folder / "run.json"
    if not (recipe.exists() and state.exists()):
        return []
    section = SynthSection.model_validate(yaml.safe_load(recipe.read_text(encoding="utf-8"))["synth"])
    text = read_json(state, "a run's state")["settings"].get("shard")
    shard = (int(text.split("/")[0]), int(text.split("/")[1])) if text else None
    rows = []
    modes, total = Counter(section.modes_in_turn), sum(done.values())
    for mode, weight in modes.items():
        found = sum(number for (of, _), number in done.items() if of == mode)
        share = f"{found / total:.1%}" if total else "-"
        rows.append((f"thinking mode {mode}, share", f"{weight / modes.total():.1%}", share, ""))
    quotas: dict[str, dict[str, int]] = dict(section.quotas.items())
    obtained = count_obtained(quotas, done)
    for (kind, value), limit in limits_of(quotas, shard).items():
        found = obtained[kind, value]
        short = f"{limit - found} short" if found < limit else ""
        rows.append((f"{kind.replace('_', ' ')} {value or 'unset'}, quota", str(limit), str(found), short))
    if section.until_tokens is not None:
        rows.append(("tokens, until", str(divide(section.until_tokens, shard)), str(done_tokens), ""))
    if not rows:
        return []
    header = ("finished conversations", "planned", "obtained", "")
    width = max(len(row[0]) for row in (header, *rows)) + 2
    return [f"{a:<{width}}{b:>12}{c:>12}  {d}".rstrip() for a, b, c, d in (header, *rows)]


def read_lengths(folder: Path) -> dict[str, Lengths]:
    """Return the lengths of all records by thinking mode ("(none)" if none was sent)."""
    by_mode: dict[str, Lengths] = defaultdict(Lengths)
    with (folder / CONVERSATIONS_FILE).open("rb") as file:
        for line in file:
            if not line.endswith(b"\n"):
                break  # another process is writing it
            record = orjson.loads(line)
            lengths = by_mode[record["thinking_mode"] or "(none)"]
            spans = [span for sample in record["samples"] for span in sample["loss_spans"]]
            lengths.replies.extend(end - start for start, end in spans)
            lengths.samples.extend(len(sample["token_ids"]) for sample in record["samples"])
            lengths.turns[len(spans)] += 1
            lengths.finish[record["finish_reason"]] += 1
    return dict(sorted(by_mode.items()))


def _draw(by_mode: dict[str, Lengths], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(13, 4), layout="constrained")
    for axis, name in ((axes[0], "replies"), (axes[1], "samples")):
        values = [np.asarray(getattr(lengths, name)) for lengths in by_mode.values()]
        top = max((int(value.max()) for value in values if len(value)), default=1)
        axis.hist(values, bins=np.linspace(0, top + 1, 41), label=list(by_mode), histtype="step", linewidth=1.5)
        axis.set(xlabel="tokens", ylabel=name, title=f"length of {name}")
        axis.legend()
    for number, reason in enumerate(("stop", "length")):
        heights = [lengths.finish[reason] for lengths in by_mode.values()]
        bars = axes[2].bar(np.arange(len(by_mode)) + 0.4 * number, heights, width=0.4, label=reason)
        axes[2].bar_label(bars)
    axes[2].set(title="finish reason", ylabel="conversations")
    axes[2].set_xticks(np.arange(len(by_mode)) + 0.2, list(by_mode))
    axes[2].legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
