"""The model card of an exported draft."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.files import read_json
from contracts.draft import DESCRIPTOR_FILE, Descriptor, DraftConfig
from contracts.run import read_run
from contracts.speeds import Speeds, explain_speeds
from recipe.recipe import Recipe


@dataclass(frozen=True)
class Figures:
    """What is known of a draft: the report of `train eval`, and the folder of `bench acceptance`; None if not given."""

    evaluation: Path | None = None
    served: Path | None = None

    def read_evaluation(self) -> dict[str, Any] | None:
        return read_json(self.evaluation, "a report of `train eval`") if self.evaluation else None

    def read_speeds(self, draft: str) -> list[Speeds] | None:
        """Read the speeds; `draft` is the fingerprint of the export. Raises UserError for another draft's or none."""
        if self.served is None:
            return None
        if read_run(self.served, "bench acceptance")["inputs"]["draft"] != draft:
            raise UserError(
                self.served, found="figures of another draft", expected="this draft's", fix="Give the right folder."
            )
        speeds = read_json(self.served / "acceptance.json", "the output of `bench acceptance`").get("speeds")
        if not speeds:
            raise UserError(
                self.served,
                found="no speeds",
                expected="those with the draft and without",
                fix="Run `bench acceptance --conversations`.",
            )
        return [Speeds.model_validate(at) for at in speeds]


def make_card(
    config: DraftConfig,
    recipe: Recipe,
    descriptor: Descriptor,
    figures: dict[str, Any] | None,
    speeds: list[Speeds] | None = None,
    trackers: Mapping[str, Mapping[str, Any]] | None = None,
) -> str:
    """Return the card's text: description, serving command, acceptance, speed and training data of the draft.

    `figures`: a report of `train eval`, or None. `trackers`: those of the training run's `trackers.json`.
    """
    num_tokens = config.num_draft_tokens
    speculation = {**descriptor.speculative, "model": "<this folder>", "num_speculative_tokens": num_tokens}
    training = recipe.training()
    return f"""---
library_name: vllm
tags: [speculative-decoding, {config.method}]
---
# A {config.method} draft for {recipe.target.path.name}

Hidden size {config.hidden_size}, {num_tokens} draft tokens per step; reads the outputs of the target's layers
{config.layer_ids} (0-based). Embedding and lm_head are the target's.

## Serving

    vllm serve <target> --speculative-config '{json.dumps(speculation)}'

## Acceptance

{_acceptance(figures, num_tokens)}

## Speed

{_speed(speeds)}

## Training

| what | |
|---|---|
| target's fingerprint | `{config.target_fingerprint}` |
| conversations (sha256) | `{config.store}` |
| weights (sha256) | `{descriptor.sha256}` |
| objective | {training.draft.objective}, {training.num_steps} steps |{_tracked(trackers or {})}

The whole recipe is in `{DESCRIPTOR_FILE}`.
"""


def _tracked(trackers: Mapping[str, Mapping[str, Any]]) -> str:
    """Return a row for each tracker that others may reach: a link, or the run's id. Paths of this machine stay here."""
    rows = ""
    for name, facts in trackers.items():
        url = str(facts.get("url", ""))
        link = f"[{facts.get('run_id', url)}]({url})" if url.startswith("http") else facts.get("run_id")
        rows += f"\n| run at {name} | {link} |" if link else ""
    return rows


def _speed(speeds: list[Speeds] | None) -> str:
    if speeds is None:
        return "Not measured: give `train export --served` the folder of `bench acceptance --conversations`."
    return (
        "Tokens/s by number of draft tokens (K) and requests in flight, on held-out conversations. They hold for the "
        "machine and the server flags of this measurement: measure on yours.\n\n" + explain_speeds(speeds)
    )


def _acceptance(figures: dict[str, Any] | None, num_tokens: int) -> str:
    if figures is None:
        return "Not evaluated: give `train export` the report of `train eval`."
    low, high = figures["interval"]
    rows = "\n".join(
        f"| {mode or 'unset'} | {part['acceptance_length']:.3f} | {part['steps']} |"
        for mode, part in figures["by_mode"].items()
    )
    return (
        f"Simulated on {figures['samples']} held-out samples: acceptance length {figures['acceptance_length']:.3f} "
        f"(95% interval {low:.3f} to {high:.3f}) at K = {num_tokens}; by position "
        f"{', '.join(f'{share:.3f}' for share in figures['per_position'])}.\n\n"
        f"| thinking mode | acceptance length | steps |\n|---|---|---|\n{rows}{_confidence(figures)}"
    )


def _confidence(figures: dict[str, Any]) -> str:
    """Return the reliability of the confidences by position; "" if the draft has none."""
    if "confidence" not in figures:
        return ""
    found = figures["confidence"]
    rows = "\n".join(
        f"| {at['position']} | {at['tried']} | {at['accepted']:.3f} | {at['calibrated']:.3f} |"
        for at in found["by_position"]
    )
    return (
        f"\n\nConfidence head, calibrated on the same samples: expected calibration error "
        f"{found['calibrated_error']:.3f} ({found['calibration_error']:.3f} before).\n\n"
        f"| draft token | tried | accepted | mean confidence |\n|---|---|---|---|\n{rows}"
    )
