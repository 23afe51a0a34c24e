"""Log the figures of `bench acceptance` and `bench sweep` to the recipe's trackers (`tracking.bench`).

Writes: `trackers.json` in the output folder (common/trackers/identity.py); `results` of a tracker holds the checksums
        of the figures that it has.

A folder is one run of a tracker. Its n-th step holds the figures as they were when they changed for the n-th time: a
folder may be measured again with more points.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from common.files import hash_json
from common.trackers import installed_trackers
from common.trackers.identity import note_tracker, read_identity
from common.trackers.tracking import Tracking
from contracts.run import Run
from recipe.recipe import Recipe
from recipe.tracking import tracked_run


def log_results(recipe: Recipe, run: Run, figures: Mapping[str, float]) -> None:
    """Log figures by name to each tracker that does not have them yet. A tracker that fails is named, and no error."""
    checksum = hash_json(figures)
    for tracker in installed_trackers(recipe.tracking.bench):
        facts = read_identity(run.folder)["trackers"].get(tracker, {})
        results = facts.get("results", [])
        if checksum in results:
            continue
        tracking = Tracking(tracked_run(recipe, run, len(results)), [tracker])
        with tracking:
            tracking.log(figures, len(results) + 1)
        if tracking.complete:
            note_tracker(run.folder, tracker, {"results": [*results, checksum]})


def figures_of_prompts(report: Mapping[str, Any]) -> dict[str, float]:
    """Return the figures of `bench acceptance --prompts`: acceptance by number of draft tokens and set."""
    figures: dict[str, float] = {}
    for k, pooled in report["pooled"].items():
        figures |= _acceptance(f"k{k}/all", pooled)
    for row in report["rows"]:
        name = "/".join(
            (
                f"k{row['num_draft_tokens']}",
                row["dataset"],
                row["category"],
                row["thinking_mode"] or "unset",
                f"t{row['temperature']:g}",
            )
        )
        figures |= _acceptance(name, row)
    return figures


def figures_of_speeds(report: Mapping[str, Any]) -> dict[str, float]:
    """Return the figures of `bench acceptance --conversations`: acceptance, and measured speeds by concurrency."""
    figures: dict[str, float] = {}
    for k, found in report["by_draft_tokens"].items():
        figures |= _acceptance(f"k{k}/all", found)
    for at in report["speeds"]:
        for speed in at["speeds"]:
            if speed["measured"]:
                name = f"concurrency{at['concurrency']}/k{speed['draft_tokens']}"
                figures |= {f"{name}/{key}": float(speed[key]) for key in ("tokens_per_s", "speed_up")}
    return figures


def figures_of_points(points: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return the figures of the measured points of `bench sweep`, by point."""
    done = [point for point in points if point["status"] == "done"]
    return {f"{point['id']}/{name}": value for point in done for name, value in _numbers(point)}


def _acceptance(name: str, found: Mapping[str, Any]) -> dict[str, float]:
    places = {f"{name}/accepted/{at}": float(rate) for at, rate in enumerate(found["per_position"], start=1)}
    return {f"{name}/acceptance_length": float(found["acceptance_length"]), **places}


def _numbers(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Yield the numbers of nested figures; those of an inner mapping have its name before theirs."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{prefix}{key}/")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield f"{prefix}{key}", float(value)
