"""Export a trained draft to the folder that vLLM loads, in a layout of its method.

Reads:  a training run's chosen checkpoint.
Writes: OUTPUT/config.json and model.safetensors (without embedding and lm_head: the server shares the target's),
        draftline.json (the descriptor) and README.md (the model card). The folder has a temporary name until it is
        complete.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from common.errors import UserError
from common.files import explain_unwritable, hash_file, read_json, write_atomic, write_json
from common.trackers.identity import read_identity
from contracts.draft import DESCRIPTOR_FILE, Descriptor, DraftConfig, DraftRun
from contracts.run import read_run
from contracts.store import DTYPES
from drafts import METHODS
from drafts.method import DraftMethod, ExportFacts
from drafts.published import read_config
from recipe.recipe import Recipe
from serve.command import fingerprint_draft
from target.target import Target
from train.card import Figures, make_card
from train.draft import served_config

CARD_FILE = "README.md"


def export(
    recipe: Recipe, run_folder: Path, output: Path, figures: Figures | None = None, layout: str | None = None
) -> None:
    """Write the draft of a run to `output`; keep an export that has the same descriptor.

    `figures`: for the model card; speeds are also added to an existing export's card, since they are measured with it.
    `layout`: one of the method's; default: its first.

    Raises UserError if `output` holds something else, if YaRN's window is not the context length, for an unknown
    layout, or for speeds of another draft.
    """
    figures = figures or Figures()
    read_run(run_folder, "train offline")
    run = DraftRun(run_folder)
    config = served_config(read_config(run), recipe)
    method = METHODS[config.method]
    layout = layout or method.layouts[0]
    if layout not in method.layouts:
        raise UserError("--format", found=layout, expected=f"one of {', '.join(method.layouts)}", fix="Correct it.")
    weights = run.chosen_weights()
    evaluated, trackers = figures.read_evaluation(), read_identity(run_folder)["trackers"]
    calibration = _calibration(evaluated, weights)
    descriptor = method.describe_trained(config).model_copy(
        update={
            "weights": f"{weights.parent.name}/{weights.name}",
            "sha256": hash_file(weights),
            "dtype": recipe.export.dtype,
            "layout": layout,
            "evaluation": hash_file(figures.evaluation) if figures.evaluation else None,
            "calibration": calibration,
            "recipe": recipe.redacted(),
        }
    )
    if output.exists():
        _refuse_changes(output, descriptor)
        speeds = figures.read_speeds(fingerprint_draft(recipe, output))
        card = make_card(config, recipe, descriptor, evaluated, speeds, trackers)
        if speeds is None or card == (output / CARD_FILE).read_text(encoding="utf-8"):
            print(f"export: {output} is finished, skipped")
        else:
            write_atomic(output / CARD_FILE, card)
            print(f"export: speeds of {figures.served} -> {output / CARD_FILE}")
        return
    temporary = output.with_name(f".{output.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    with explain_unwritable(output):
        temporary.mkdir(parents=True)
    source = _Source(weights, calibration)
    _write_weights(method, config, layout, source, recipe, temporary)
    write_json(temporary / DESCRIPTOR_FILE, descriptor.model_dump(mode="json"))
    speeds = figures.read_speeds(fingerprint_draft(recipe, temporary))
    card = make_card(config, recipe, descriptor, evaluated, speeds, trackers)
    (temporary / CARD_FILE).write_text(card, encoding="utf-8")
    temporary.rename(output)
    print(f"export: {weights.parent.name} -> {output}")


@dataclass(frozen=True)
class _Source:
    """A checkpoint's weights, and the scale and shift of its confidences; None if it has none or they are unknown."""

    weights: Path
    calibration: tuple[float, float] | None


def _calibration(evaluated: dict[str, Any] | None, weights: Path) -> tuple[float, float] | None:
    """Return the calibration that an evaluation found. Raises UserError if it is of other weights."""
    found = (evaluated or {}).get("confidence")
    if evaluated is None or found is None:
        return None
    if (evaluated.get("inputs") or {}).get("draft") != hash_file(weights):
        raise UserError(
            "--eval",
            found="an evaluation of another checkpoint",
            expected=f"one of {weights.parent.name}, whose confidences it calibrates",
            fix="Run `train eval` on this run.",
        )
    return float(found["scale"]), float(found["shift"])


def _write_weights(
    method: DraftMethod, config: DraftConfig, layout: str, source: _Source, recipe: Recipe, folder: Path
) -> None:
    """Write config.json and model.safetensors."""
    loaded = load_file(source.weights)
    if source.calibration is not None:
        loaded = method.calibrate(loaded, *source.calibration)
    dtype, kept = DTYPES[recipe.export.dtype], method.fp32_tensors
    tensors = {
        name: (tensor.to(dtype) if tensor.is_floating_point() and not name.startswith(kept) else tensor).contiguous()
        for name, tensor in loaded.items()
    }
    target = Target.here(recipe.target)
    facts = ExportFacts(
        dtype=recipe.export.dtype,
        target=str(target.path),
        architectures=target.config.get("architectures") or [],
        bos_token_id=target.config.get("bos_token_id"),
        eos_token_id=target.config.get("eos_token_id"),
    )
    exported, tensors = method.export(config, tensors, layout, facts)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    write_json(folder / "config.json", exported)


def _refuse_changes(output: Path, descriptor: Descriptor) -> None:
    """Raise UserError if the existing export's descriptor differs; its recipe is not compared."""
    found: dict[str, Any] = read_json(output / DESCRIPTOR_FILE, "an export of `train export`")
    for key, value in descriptor.model_dump(mode="json", exclude={"recipe"}).items():
        if found.get(key) != value:
            raise UserError(
                output,
                found=f"an export with {key} {str(found.get(key))[:40]}",
                expected=f"{str(value)[:40]}, or an empty place",
                fix="Delete it or choose another --output.",
            )
