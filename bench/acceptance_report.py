"""Compute the figures of `bench acceptance` on prompt sets, and write its tables and plot.

Writes: acceptance.json; acceptance.md, a table for each thinking mode and temperature; golden_al.yaml, the acceptance
        length by thinking mode and number of draft tokens, for simulated serving; acceptance_by_k.png.

The micro average sums counters before dividing; the macro average is the mean of the rows' acceptance lengths. Replies
that fell into a loop are easy to draft and not typical: they have a line of their own and count nowhere else, except in
rows of servers that report no counts per request.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from bench.differences import find_overruns
from bench.overlap import explain_overlap
from bench.requests import Answer, Turn, answers_from_json, kept_steps
from common.files import write_atomic, write_json
from common.loops import find_loop
from contracts.acceptance import Acceptance

HEADER = "| category | dataset | n | mean acceptance length [95%] | draft acceptance rate | per position |"
RULE = "|---|---|---:|---:|---:|---|"
ALL = "(all)"
"""The category of a row over all categories."""


def summarize(
    turns: Sequence[Turn],
    results: Mapping[int, Sequence[dict[str, Any]]],
    end_token_ids: Collection[int],
    loop_tokens: int,
) -> dict[str, Any]:
    """Compute the figures of each K from its groups `results[K]`, as bench/acceptance.py writes them.

    `rows` has an entry per set, category, mode, temperature and K; `by_set`, `by_mode` and `pooled` aggregate them.
    """
    report: dict[str, Any] = {"rows": [], "by_set": [], "by_mode": [], "pooled": {}, "greedy": {}, "overruns": {}}
    for k, groups in results.items():
        answers = {a.id: a for group in groups for a in answers_from_json(group["answers"])}
        loops = {id_ for id_, answer in answers.items() if find_loop(answer.token_ids, loop_tokens)}
        told = {_key(group) for group in groups if group["per_request"]}
        of_requests = [turn for turn in turns if turn.group in told]
        of_counters = [row_of_counters(turns, loops, group, k) for group in groups if not group["per_request"]]
        rows = make_rows(of_requests, answers, loops, k) + of_counters
        report["rows"] += rows
        report["by_set"] += make_set_rows(of_requests, answers, loops, k) + of_counters
        modes = sorted({(row["thinking_mode"], row["temperature"]) for row in rows})
        for mode, temperature in modes:
            members = [row for row in rows if (row["thinking_mode"], row["temperature"]) == (mode, temperature)]
            key = {"thinking_mode": mode, "temperature": temperature, "num_draft_tokens": k}
            of_mode = [t for t in turns if (t.thinking_mode, t.temperature) == (mode, temperature)]
            report["by_mode"].append({**key, **pool_rows(members), "looping": _of_loops(of_mode, answers, loops, k)})
        report["pooled"][str(k)] = {
            **pool_rows(rows),
            "looping": _of_loops(turns, answers, loops, k),
            "counters": _sum_counters([group["counters"] for group in groups]),
        }
        differing = [found for group in groups for found in group["differing"]]
        identical = sum(group["greedy_identical"] for group in groups)
        report["greedy"][str(k)] = {
            "compared": all(group["compared"] for group in groups),
            "identical": identical,
            "total": identical + len(differing),
            "differing": differing,
        }
        report["overruns"][str(k)] = find_overruns(list(answers.values()), end_token_ids)
    return report


def make_rows(
    turns: Sequence[Turn], answers: Mapping[str, Answer], loops: Collection[str], num_draft_tokens: int
) -> list[dict[str, Any]]:
    """Make a row per set, category, mode and temperature. Replies in `loops` are only counted."""
    groups: dict[tuple[str, str, str, float], list[Turn]] = defaultdict(list)
    for turn in turns:
        groups[turn.dataset, turn.category, turn.thinking_mode, turn.temperature].append(turn)
    rows = []
    for (dataset, category, mode, temperature), members in sorted(groups.items()):
        kept = [turn for turn in members if turn.id not in loops]
        parts = _by_conversation(kept, answers, num_draft_tokens)
        rows.append(
            {
                "dataset": dataset,
                "category": category,
                "thinking_mode": mode,
                "temperature": temperature,
                "num_draft_tokens": num_draft_tokens,
                "n": len(parts),
                "requests": len(kept),
                "looping": len(members) - len(kept),
                "cut": sum(answers[turn.id].finish_reason == "length" for turn in kept),
                **_pool(parts, num_draft_tokens).summary(),
                "interval": [round(edge, 4) for edge in Acceptance.interval(parts)] if parts else [1.0, 1.0],
            }
        )
    return rows


def make_set_rows(
    turns: Sequence[Turn], answers: Mapping[str, Answer], loops: Collection[str], num_draft_tokens: int
) -> list[dict[str, Any]]:
    """Make a row per set, mode and temperature, over all categories."""
    return make_rows([replace(turn, category=ALL) for turn in turns], answers, loops, num_draft_tokens)


def row_of_counters(
    turns: Sequence[Turn], loops: Collection[str], group: Mapping[str, Any], num_draft_tokens: int
) -> dict[str, Any]:
    """Make the row of a group whose server reports no counts per request: all categories, loops included."""
    members = [turn for turn in turns if turn.group == _key(group)]
    counters = group["counters"]
    total = Acceptance.from_counters(
        counters["num_drafts"], [counters.get(f"accepted_at_{i}", 0) for i in range(num_draft_tokens)]
    )
    return {
        "dataset": group["dataset"],
        "category": ALL,
        "thinking_mode": group["thinking_mode"],
        "temperature": group["temperature"],
        "num_draft_tokens": num_draft_tokens,
        "n": len({turn.conversation for turn in members}),
        "requests": len(members),
        "looping": sum(turn.id in loops for turn in members),
        "cut": sum(answer["finish_reason"] == "length" for answer in group["answers"]),
        **total.summary(),
        "interval": None,
    }


def pool_rows(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the micro average of rows, from summed counters, and the macro average of rows with steps."""
    total = Acceptance.pool(Acceptance(tuple(row["histogram"])) for row in rows)
    lengths = [row["acceptance_length"] for row in rows if row["steps"]]
    return {
        **{key: sum(row[key] for row in rows) for key in ("n", "requests", "cut")},
        **total.summary(),
        "macro_acceptance_length": round(sum(lengths) / len(lengths), 4) if lengths else 1.0,
    }


def make_tables(report: Mapping[str, Any]) -> str:
    """Format the tables as Markdown: one per mode and temperature at the largest K, then lengths by K."""
    largest = max(entry["num_draft_tokens"] for entry in report["by_mode"])
    lines = []
    for entry in report["by_mode"]:
        key = {name: entry[name] for name in ("thinking_mode", "temperature", "num_draft_tokens")}
        if entry["num_draft_tokens"] != largest:
            continue
        lines += ["", _title(entry), "", HEADER, RULE]
        for row in report["rows"]:
            if all(row[name] == value for name, value in key.items()):
                interval = " [{:.2f}, {:.2f}]".format(*row["interval"]) if row["interval"] else ""
                lines.append(_line(row["category"], row["dataset"], row, interval))
        lines.append(_line("**micro**", "all", entry))
        lines.append(f"| **macro** | all | {entry['n']} | {entry['macro_acceptance_length']:.3f} | | |")
        if entry["looping"]["replies"]:
            looping = entry["looping"]
            lines.append(_line("looping, not included", "all", {"n": looping["replies"], **looping}))
    ks = sorted({entry["num_draft_tokens"] for entry in report["by_mode"]})
    if len(ks) > 1:
        lines += ["", "Mean acceptance length by number of draft tokens", ""]
        lines.append("| thinking | temperature | " + " | ".join(f"K = {k}" for k in ks) + " |")
        lines.append("|---|---:|" + "---:|" * len(ks))
        for (mode, temperature), lengths in _lengths(report).items():
            figures = " | ".join(f"{lengths[k]:.3f}" for k in ks)
            lines.append(f"| {mode or 'unset'} | {temperature:g} | {figures} |")
    lines.append("")
    for k, greedy in report["greedy"].items():
        if greedy["compared"]:
            lines.append(f"Greedy replies identical to those without a draft, K = {k}: {_describe(greedy)}")
        else:
            lines.append("Greedy replies were not compared: the running server always drafts.")
    if "overlap" in report:
        lines += ["", *explain_overlap(report["overlap"]), ""]
    wrong = sum(len(found) for found in report["overruns"].values())
    lines.append(f"Replies that do not end at their stop token: {wrong}")
    return "\n".join(lines).lstrip("\n") + "\n"


def write_report(report: Mapping[str, Any], output: Path) -> None:
    """Write all files of a report and print its tables."""
    tables = make_tables(report)
    write_atomic(output / "acceptance.md", tables)
    print(tables)
    name = f"{Path(report['target']).name}-{Path(report['draft']).name}"
    for temperature in sorted({entry["temperature"] for entry in report["by_mode"]}):
        golden = {
            mode or "default": {k: round(length, 2) for k, length in lengths.items()}
            for (mode, at), lengths in _lengths(report).items()
            if at == temperature
        }
        sets = ", ".join(sorted({row["dataset"] for row in report["rows"]}))
        comment = (
            f"# Acceptance length by thinking mode and number of draft tokens; temperature {temperature:g}; {sets}.\n"
        )
        suffix = "" if temperature == report["by_mode"][0]["temperature"] else f"-t{temperature:g}"
        write_atomic(output / f"golden_al{suffix}.yaml", comment + yaml.safe_dump({name: golden}, sort_keys=False))
    _plot(report, output / "acceptance_by_k.png")
    write_json(output / "acceptance.json", report)


def _key(group: Mapping[str, Any]) -> tuple[str, str, float]:
    return group["dataset"], group["thinking_mode"], group["temperature"]


def _by_conversation(turns: Sequence[Turn], answers: Mapping[str, Answer], num_draft_tokens: int) -> list[Acceptance]:
    """Return the acceptance of each conversation, the unit that the bootstrap resamples."""
    steps: dict[str, list[int]] = defaultdict(list)
    for turn in turns:
        steps[turn.conversation] += kept_steps(answers[turn.id])
    return [Acceptance.from_steps(found, num_draft_tokens) for found in steps.values()]


def _of_loops(
    turns: Sequence[Turn], answers: Mapping[str, Answer], loops: Collection[str], num_draft_tokens: int
) -> dict[str, Any]:
    looping = [turn for turn in turns if turn.id in loops]
    parts = _by_conversation(looping, answers, num_draft_tokens)
    return {"replies": len(looping), **_pool(parts, num_draft_tokens).summary()}


def _pool(parts: Sequence[Acceptance], num_draft_tokens: int) -> Acceptance:
    return Acceptance.pool([*parts, Acceptance((0,) * (num_draft_tokens + 1))])


def _sum_counters(parts: Sequence[Mapping[str, float]]) -> dict[str, float]:
    total: dict[str, float] = defaultdict(float)
    for part in parts:
        for key, value in part.items():
            total[key] += value
    return dict(total)


def _lengths(report: Mapping[str, Any]) -> dict[tuple[str, float], dict[int, float]]:
    found: dict[tuple[str, float], dict[int, float]] = defaultdict(dict)
    for entry in report["by_mode"]:
        found[entry["thinking_mode"], entry["temperature"]][entry["num_draft_tokens"]] = entry["acceptance_length"]
    return found


def _title(entry: Mapping[str, Any]) -> str:
    mode = f"thinking {entry['thinking_mode']}" if entry["thinking_mode"] else "thinking unset"
    return f"{mode}, temperature {entry['temperature']:g}, K = {entry['num_draft_tokens']} (vLLM)"


def _line(category: str, dataset: str, row: Mapping[str, Any], interval: str = "") -> str:
    shares = " ".join(f"{share:.3f}" for share in row["per_position"])
    return (
        f"| {category} | {dataset} | {row['n']} | {row['acceptance_length']:.3f}{interval} "
        f"| {row['acceptance_rate']:.1%} | {shares} |"
    )


def _describe(greedy: Mapping[str, Any]) -> str:
    text = f"{greedy['identical']} of {greedy['total']}"
    if greedy["differing"]:
        gaps = [abs(d["logit_gap"]) for d in greedy["differing"] if d["logit_gap"] is not None]
        first = greedy["differing"][0]
        text += f"; first difference: {first['turn']} at token {first['first_token']}"
        text += f"; logit gaps up to {max(gaps):.4f}" if gaps else ""
    return text


def _plot(report: Mapping[str, Any], path: Path) -> None:
    """Draw acceptance length by K, one line per mode and temperature."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 3.6), dpi=120)
    for (mode, temperature), lengths in _lengths(report).items():
        axes.plot(list(lengths), list(lengths.values()), marker="o", label=f"{mode or 'default'}, T = {temperature:g}")
    axes.set_xlabel("draft tokens")
    axes.set_ylabel("acceptance length (tokens per step)")
    axes.set_ylim(bottom=1)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)
