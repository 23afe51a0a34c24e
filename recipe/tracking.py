"""The recipe's `tracking` section: the experiment trackers of training and of bench."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import field_validator

from common.redact import redact_urls
from common.section import Section, operational
from common.trackers import TRACKERS
from common.trackers.identity import begin_identity
from common.trackers.tracker import TrackedRun
from contracts.run import Run

if TYPE_CHECKING:
    from recipe.recipe import Recipe

NAMES = ", ".join(TRACKERS)


class TrackingSection(Section):
    train: list[str] = operational(default=["tensorboard"], description=f"trackers of `train offline`, of {NAMES}")
    bench: list[str] = operational(
        default=[], description="trackers of `bench acceptance` and `bench sweep`, of the same"
    )
    project: str = operational(
        default="draftline", min_length=1, description="project (MLflow: experiment) of the runs"
    )
    name: str | None = operational(
        default=None, description="name of a run; default: the last two parts of its folder's path"
    )

    @field_validator("train", "bench")
    @classmethod
    def _trackers_are_known(cls, names: list[str]) -> list[str]:
        for name in names:
            if name not in TRACKERS:
                raise ValueError(f"{name!r} is none of {NAMES}")
        if len(set(names)) < len(names):
            raise ValueError("a tracker is listed twice")
        return names


def tracked_run(recipe: Recipe, run: Run, first_step: int) -> TrackedRun:
    """Return a run of a stage as its trackers know it, and begin the folder's `trackers.json`.

    The config that is logged is the whole recipe without secrets, and what identifies the run's inputs.
    """
    identity = begin_identity(run.folder, recipe.tracking.project, recipe.tracking.name, run.fingerprint)
    facts = {"stage": run.state["stage"], "fingerprint": run.fingerprint, "inputs": run.state["inputs"]}
    return TrackedRun(
        id=identity["id"],
        folder=run.folder,
        stage=str(run.state["stage"]),
        project=identity["project"],
        name=identity["name"],
        config=redact_urls({**recipe.redacted(), "run": facts}),
        first_step=first_step,
    )
