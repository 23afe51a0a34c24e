"""Export a trained draft to the folder that vLLM loads, in a layout of its method.

Reads:  a training run's chosen checkpoint.
Writes: OUTPUT/config.json and model.safetensors (without embedding and lm_head: the server shares the target's),
        draftline.json (the descriptor), certificate.json and README.md (the model card). The folder has a temporary
        name until it is complete.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from common.errors import UserError
from common.files import explain_unwritable, hash_file, read_json, write_atomic, write_json
from common.versions import read_environment
from contracts.certificate import CERTIFICATE_FILE, read_certificate
from contracts.draft import CARD_FILE, DESCRIPTOR_FILE, Descriptor, DraftConfig, DraftRun
from contracts.run import read_run
from contracts.store import DTYPES
from drafts import METHODS
from drafts.method import DraftMethod, ExportFacts
from drafts.published import read_config, read_descriptor
from recipe.recipe import Recipe
from target.target import Target
from train.card import make_card
from train.certificate import Exported, Figures, build_certificate
from train.draft import served_config


def export(
    recipe: Recipe, run_folder: Path, output: Path, figures: Figures | None = None, layout: str | None = None
) -> None:
    """Write the draft of a run to `output`; keep an export that has the same descriptor.

    `figures`: for the certificate and the card. They may come later than the export, since most are measured with it.
    `layout`: one of the method's; default: its first.

    Raises UserError if `output` holds something else, if YaRN's window is not the context length, for an unknown
    layout, or for figures of another draft.
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
    evaluation = figures.evaluations[0].path if figures.evaluations else None
    calibration = _calibration(evaluation, weights)
    descriptor = method.describe_trained(config).model_copy(
        update={
            "weights": f"{weights.parent.name}/{weights.name}",
            "sha256": hash_file(weights),
            "dtype": recipe.export.dtype,
            "layout": layout,
            "evaluation": hash_file(evaluation) if evaluation else None,
            "calibration": calibration,
            "recipe": recipe.redacted(),
        }
    )
    exported = Exported(output, run, config, descriptor)
    if output.exists():
        _renew_card(recipe, exported, figures)
        return
    temporary = output.with_name(f".{output.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    with explain_unwritable(output):
        temporary.mkdir(parents=True)
    _write_weights(method, config, layout, _Source(weights, calibration), recipe, temporary)
    write_json(temporary / DESCRIPTOR_FILE, descriptor.model_dump(mode="json"))
    _write_card(recipe, replace(exported, folder=temporary), figures, read_environment())
    temporary.rename(output)
    print(f"export: {weights.parent.name} -> {output}")


def _renew_card(recipe: Recipe, exported: Exported, figures: Figures) -> None:
    """Write certificate and card of an existing export anew if figures are given, or if it has none."""
    output = exported.folder
    _refuse_changes(output, exported.descriptor)
    exists = (output / CERTIFICATE_FILE).exists()
    if exists and not figures.any:
        print(f"export: {output} is finished, skipped")
        return
    environment = read_certificate(output)[0].environment if exists else read_environment()
    exported = replace(exported, descriptor=read_descriptor(output))  # with the recipe of the export
    if _write_card(recipe, exported, figures, environment):
        print(f"export: certificate and card -> {output / CARD_FILE}")
    else:
        print(f"export: {output} is finished, skipped")


def _write_card(recipe: Recipe, exported: Exported, figures: Figures, environment: Mapping[str, str]) -> bool:
    """Write certificate.json and README.md; return whether they differ from those that were there.

    Figures that were there are kept unless others of their kind are given.
    """
    certificate, folder = build_certificate(recipe, exported, figures, environment), exported.folder
    if (folder / CERTIFICATE_FILE).exists():
        certificate = certificate.with_rest_of(read_certificate(folder)[0])
    card = make_card(certificate)
    sealed = certificate.sealed(card)
    if (folder / CERTIFICATE_FILE).exists() and (folder / CARD_FILE).exists():
        before = read_json(folder / CERTIFICATE_FILE, "a certificate"), (folder / CARD_FILE).read_bytes()
        if before == (sealed.model_dump(mode="json"), card.encode()):
            return False
    sealed.write(folder)
    write_atomic(folder / CARD_FILE, card)
    return True


@dataclass(frozen=True)
class _Source:
    """A checkpoint's weights, and the scale and shift of its confidences; None if it has none or they are unknown."""

    weights: Path
    calibration: tuple[float, float] | None


def _calibration(evaluation: Path | None, weights: Path) -> tuple[float, float] | None:
    """Return the calibration that an evaluation found. Raises UserError if it is of other weights."""
    evaluated = read_json(evaluation, "a report of `train eval`") if evaluation else {}
    found = evaluated.get("confidence")
    if found is None:
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
