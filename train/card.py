"""The model card of an exported draft."""

from __future__ import annotations

import json
from typing import Any

from contracts.draft import DESCRIPTOR_FILE, Descriptor, DraftConfig
from recipe.recipe import Recipe


def make_card(config: DraftConfig, recipe: Recipe, descriptor: Descriptor, figures: dict[str, Any] | None) -> str:
    """Return the card's text: description, serving command, acceptance and training data of the draft.

    `figures`: a report of `train eval`, or None.
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

## Training

| what | |
|---|---|
| target's fingerprint | `{config.target_fingerprint}` |
| conversations (sha256) | `{config.store}` |
| weights (sha256) | `{descriptor.sha256}` |
| objective | {training.draft.objective}, {training.num_steps} steps |

The whole recipe is in `{DESCRIPTOR_FILE}`.
"""


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
        f"| thinking mode | acceptance length | steps |\n|---|---|---|\n{rows}"
    )
