"""The recipe: one YAML with all settings of a pipeline, checked before anything starts.

Sections: `target`, `serve`, `prepare`, `synth`, `dump`, `train`, `export`, `bench`, `tracking`, `plan`. What several
stages share is only in `target`.
"""

from __future__ import annotations

from typing import Any

import yaml

from common.errors import UserError
from common.redact import redact
from common.section import Section
from recipe.bench import BenchSection
from recipe.dump import DumpSection
from recipe.planning import PlanSection
from recipe.prepare import PrepareSection
from recipe.serve import ServeSection
from recipe.synth import SynthSection
from recipe.tracking import TrackingSection
from recipe.train import ExportSection, TrainSection
from target.section import TargetSection


class Recipe(Section):
    target: TargetSection
    serve: ServeSection = ServeSection()
    prepare: PrepareSection | None = None
    synth: SynthSection = SynthSection()
    dump: DumpSection = DumpSection()
    train: TrainSection | None = None
    export: ExportSection = ExportSection()
    bench: BenchSection = BenchSection()
    tracking: TrackingSection = TrackingSection()
    plan: PlanSection = PlanSection()

    def training(self) -> TrainSection:
        """Return the `train` section. Raises UserError for a recipe without one."""
        if self.train is None:
            raise UserError(
                "train",
                found="no such section in the recipe",
                expected="the draft, its optimizer and number of steps",
                fix="Add a `train` section; recipes/Tiny-DFlash/recipe.yaml has one.",
            )
        return self.train

    def preparing(self) -> PrepareSection:
        """Return the `prepare` section. Raises UserError for a recipe without one."""
        if self.prepare is None:
            raise UserError(
                "prepare",
                found="no such section in the recipe",
                expected="the sources of the prompts",
                fix="Add a `prepare` section (docs/prompts.md).",
            )
        return self.prepare

    def redacted(self) -> dict[str, Any]:
        """Return every field, defaults included, without secrets; this may be written to disk."""
        values: dict[str, Any] = redact(self.model_dump(mode="json"))
        return values

    def to_yaml(self) -> str:
        """Return the resolved recipe as YAML, without secrets."""
        return yaml.safe_dump(self.redacted(), sort_keys=False, allow_unicode=True)
