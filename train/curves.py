"""The curves of a training run as one picture: loss, accuracy by position, accepted draft tokens."""

from __future__ import annotations

import json
from pathlib import Path


def draw_curves(metrics: Path, output: Path) -> None:
    """Draw metrics.jsonl as a PNG; draw nothing if it has no loss yet."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    entries = [json.loads(line) for line in metrics.read_text().splitlines()]
    lines = [entry for entry in entries if "loss" in entry]
    if not lines:
        return
    steps = [line["step"] for line in lines]
    figure, (loss, accuracy, accepted) = pyplot.subplots(1, 3, figsize=(15, 4), constrained_layout=True)
    loss.plot(steps, [line["loss"] for line in lines])
    loss.set_title("loss")
    colours = pyplot.colormaps["viridis"].resampled(len(lines[0]["accuracy"]) + 1)
    for place, values in enumerate(zip(*(line["accuracy"] for line in lines), strict=True)):
        accuracy.plot(steps, values, label=str(place + 1), color=colours(place))
    accuracy.set_title("accuracy by position")
    accuracy.legend(fontsize="small", ncols=2)
    accepted.plot(steps, [1 + line["blocks_accepted"] for line in lines], label="training blocks")
    held_out = [(entry["step"], entry["held_out_acceptance"]) for entry in entries if "held_out_acceptance" in entry]
    if held_out:
        accepted.plot(*zip(*held_out, strict=True), "o-", label="held out, predicted")
    accepted.set_title("tokens per step")
    accepted.legend(fontsize="small")
    for axis in (loss, accuracy, accepted):
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
    figure.savefig(output, dpi=100)
    pyplot.close(figure)
