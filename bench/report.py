"""Collect a pipeline's figures in report.json, a table for the terminal, and a plot of acceptance by position.

Reads:  the run folders of all stages.
Writes: OUTPUT (JSON), and acceptance_by_position.png beside it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.files import read_json, write_json
from contracts.run import read_run

PLOT_FILE = "acceptance_by_position.png"


@dataclass(frozen=True)
class Folders:
    """The output folders of a pipeline's stages."""

    target: Path
    synth_train: Path
    synth_held_out: Path
    store_train: Path
    store_held_out: Path
    draft_run: Path
    evaluation: Path
    bench: Path


def write_report(folders: Folders, output: Path) -> dict[str, Any]:
    """Write and print the report. Raises UserError if a stage is missing or unfinished."""
    synth = {name: read_run(path, "synth generate") for name, path in _splits(folders, "synth").items()}
    stores = {name: read_run(path, "dump run") for name, path in _splits(folders, "store").items()}
    draft = read_run(folders.draft_run, "train offline")
    bench = read_run(folders.bench, "bench acceptance")
    evaluation = read_json(folders.evaluation, "the output of `train eval`")
    served = read_json(folders.bench / "acceptance.json", "the output of `bench acceptance`")
    target = folders.target / "summary.json"
    report = {
        "prompts": {name: state["summary"]["input"] for name, state in synth.items()},
        "synth": _add(synth, ("done", "truncated", "filtered", "failed", "tokens")),
        "dump": _add(stores, ("samples", "tokens", "bytes")),
        "train": draft["summary"],
        "eval": {key: value for key, value in evaluation.items() if key != "walks"},
        "served": {key: value for key, value in served.items() if key != "walks"},
        "agreement": _agreement(evaluation, served),
        "seconds": {
            "target": read_json(target, "the target's summary")["seconds"] if target.exists() else None,
            "synth": round(sum(state["seconds"] for state in synth.values()), 1),
            "dump": round(sum(state["seconds"] for state in stores.values()), 1),
            "train": draft["seconds"],
            "serve": bench["seconds"],
        },
    }
    write_json(output, report)
    plot_positions(evaluation["per_position"], served["per_position"], output.with_name(PLOT_FILE))
    print(make_table(report))
    print(f"plot:   {output.with_name(PLOT_FILE)}\nreport: {output}")
    return report


def _splits(folders: Folders, stage: str) -> dict[str, Path]:
    return {"train": getattr(folders, f"{stage}_train"), "held_out": getattr(folders, f"{stage}_held_out")}


def _add(states: dict[str, dict[str, Any]], keys: tuple[str, ...]) -> dict[str, Any]:
    """Return the sum of each key over the splits, and the figures by split."""
    total = {key: sum(state["summary"][key] for state in states.values()) for key in keys}
    splits = {name: {key: state["summary"][key] for key in keys} for name, state in states.items()}
    return {**total, "by_split": splits}


def _agreement(evaluation: dict[str, Any], served: dict[str, Any]) -> dict[str, Any]:
    """Compare predicted and served acceptance over the same replies, in total and step by step."""
    predicted = {walk["sample"]: walk["accepted"] for walk in evaluation["walks"]}
    measured: dict[str, list[list[int]]] = {}
    for walk in served["walks"]:
        measured.setdefault(walk["turn"].rsplit("-", 1)[0], []).append(walk["accepted"])
    same = sum(predicted.get(key) == steps for key, steps in measured.items())
    difference = served["acceptance_length"] / evaluation["acceptance_length"] - 1
    return {"relative_difference": round(difference, 5), "identical_walks": same, "walks": len(measured)}


def make_table(report: dict[str, Any]) -> str:
    """Format acceptance and speed for the terminal."""
    evaluation, served = report["eval"], report["served"]
    lines = [
        "",
        f"{'acceptance (greedy, held out)':<44}{'predicted':>10}{'served':>10}",
        f"{'acceptance length':<44}{evaluation['acceptance_length']:>10.3f}{served['acceptance_length']:>10.3f}",
    ]
    for mode, figures in served["by_mode"].items():
        predicted = evaluation["by_mode"].get(mode, {}).get("acceptance_length", float("nan"))
        lines.append(f"{'  thinking ' + (mode or 'unset'):<44}{predicted:>10.3f}{figures['acceptance_length']:>10.3f}")
    for position, (a, b) in enumerate(zip(evaluation["per_position"], served["per_position"], strict=True), start=1):
        lines.append(f"{f'  position {position} accepted':<44}{a:>10.3f}{b:>10.3f}")
    lines.append("")
    lines.append(f"{'tokens/s':<44}{'baseline':>10}{'draft':>10}{'speed-up':>10}")
    for concurrency, speed in served["tokens_per_s"].items():
        base = served["baseline_tokens_per_s"][concurrency]
        lines.append(f"{f'  at concurrency {concurrency}':<44}{base:>10.1f}{speed:>10.1f}{speed / base:>9.2f}x")
    lines += served.get("warnings", [])
    agreement = report["agreement"]
    lines.append("")
    lines.append(f"greedy outputs identical: {served['greedy_identical']} of {served['greedy_total']}")
    lines.append(f"walks identical step by step: {agreement['identical_walks']} of {agreement['walks']} conversations")
    lines.append("seconds: " + ", ".join(f"{key} {value}" for key, value in report["seconds"].items()))
    return "\n".join(lines)


def plot_positions(predicted: list[float], served: list[float], path: Path) -> None:
    """Plot predicted and served acceptance by position as PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    places = range(1, len(served) + 1)
    figure, axes = pyplot.subplots(figsize=(7, 4.2), dpi=120)
    width = 0.38
    axes.bar([p - width / 2 for p in places], predicted, width, label="predicted (train eval)", color="#9db4c0")
    axes.bar([p + width / 2 for p in places], served, width, label="served (vLLM)", color="#2a6f97")
    for place, value in zip(places, served, strict=True):
        axes.text(place + width / 2, value + 0.015, f"{value:.2f}", ha="center", fontsize=8)
    axes.set_xlabel("draft position")
    axes.set_ylabel("share of steps that accept it")
    axes.set_ylim(0, 1.05)
    axes.set_xticks(list(places))
    lengths = 1 + sum(predicted), 1 + sum(served)
    axes.set_title(f"Acceptance by position; length {lengths[0]:.2f} predicted, {lengths[1]:.2f} served")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)
