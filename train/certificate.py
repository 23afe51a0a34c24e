"""Build the certificate of an exported draft from its training run, its folder, and the reports of its figures."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.files import hash_file, read_json
from common.hub import revision_of
from common.trackers.identity import read_identity
from contracts.certificate import (
    CERTIFICATE_FILE,
    Certificate,
    Commands,
    DraftFacts,
    TargetFacts,
    TrainingFacts,
)
from contracts.draft import CARD_FILE, Descriptor, DraftConfig, DraftRun
from contracts.run import read_run
from drafts import METHODS
from recipe.recipe import Recipe
from serve.command import fingerprint_draft
from serve.flags import to_flags
from target.target import Target
from train.provenance import DataFolders, describe_data
from train.reports import Source, read_measured, read_predicted

WEIGHTS_FILE = "model.safetensors"
THIS_FOLDER = "<this folder>"


@dataclass(frozen=True)
class Figures:
    """Where the figures and the data of a draft are: reports of `train eval`, folders of `bench`, the training data."""

    evaluations: Sequence[Source] = ()
    served: Sequence[Source] = ()
    data: DataFolders = field(default_factory=DataFolders)

    @property
    def any(self) -> bool:
        return bool(self.evaluations or self.served or self.data.store)

    def read(self, weights: Sequence[str], draft: str, target: str) -> dict[str, Any]:
        """Return the sections of figures. Raises UserError for reports of another draft."""
        predicted = [read_predicted(source, weights) for source in self.evaluations]
        return {"predicted": predicted, **read_measured(self.served, draft, target)}


@dataclass(frozen=True)
class Exported:
    """A complete export but for its card: the folder, the training run, and what describes the draft."""

    folder: Path
    run: DraftRun
    config: DraftConfig
    descriptor: Descriptor


def build_certificate(
    recipe: Recipe, exported: Exported, figures: Figures, environment: Mapping[str, str]
) -> Certificate:
    """Return the certificate, not yet sealed. `environment`: the software that wrote the weights.

    Raises UserError for figures of another draft or target, and for data that it was not trained on.
    """
    config, descriptor = exported.config, exported.descriptor
    state = read_run(exported.run.folder, "train offline")
    target = Target.here(recipe.target)
    files = {name: checksum for name, checksum in hash_files(exported.folder).items() if name != CARD_FILE}
    found = figures.read(
        (str(descriptor.sha256), files[WEIGHTS_FILE]),
        fingerprint_draft(recipe, exported.folder),
        config.target_fingerprint,
    )
    return Certificate(
        draft=_describe_draft(config, descriptor, state),
        target=_describe_target(target, config.target_fingerprint),
        data=describe_data(state, config.store, figures.data),
        training=_describe_training(exported.run, state, descriptor, recipe),
        recipe=descriptor.recipe or {},
        **found,
        commands=_make_commands(exported, target),
        environment=dict(environment),
        files=files,
    )


def hash_files(folder: Path) -> dict[str, str]:
    """Return the sha256 of a folder's files by their relative names, without the certificate and the hub's dotfiles."""
    names = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return {
        name: hash_file(path)
        for name, path in names.items()
        if name != CERTIFICATE_FILE and not any(part.startswith(".") for part in name.split("/"))
    }


def _describe_draft(config: DraftConfig, descriptor: Descriptor, state: Mapping[str, Any]) -> DraftFacts:
    return DraftFacts(
        method=config.method,
        layout=str(descriptor.layout),
        dtype=str(descriptor.dtype),
        parameters=state["summary"]["parameters"],
        hidden_size=config.hidden_size,
        layer_ids=config.layer_ids,
        num_draft_tokens=config.num_draft_tokens,
        mask_token_id=config.mask_token_id,
        max_position_embeddings=config.max_position_embeddings,
        calibration=descriptor.calibration,
    )


def _describe_target(target: Target, fingerprint: str) -> TargetFacts:
    """Return the target's facts. Raises UserError if the recipe's target is not the one of the training."""
    if target.fingerprint != fingerprint:
        raise UserError(
            target.path,
            found=f"target {target.fingerprint[:12]}",
            expected=f"{fingerprint[:12]}, for which the draft was trained",
            fix="Correct target.path.",
        )
    repository, _, revision = (revision_of(target.path) or "").partition("@")
    return TargetFacts(
        name=repository.rpartition("/")[2] or target.path.resolve().name,
        architecture=target.architecture,
        repository=repository or None,
        revision=revision or None,
        fingerprint=fingerprint,
        tokenizer=target.tokenizer_checksum,
        template=target.template_checksum,
    )


def _read_trackers(run: DraftRun) -> dict[str, dict[str, str]]:
    """Return id and address of the run at its trackers; paths of this machine stay here."""
    trackers = read_identity(run.folder)["trackers"]
    found = {
        name: {
            key: value for key in ("run_id", "url") if (value := str(facts.get(key) or "")) and _is_public(key, value)
        }
        for name, facts in trackers.items()
    }
    return {name: facts for name, facts in found.items() if facts}


def _is_public(key: str, value: str) -> bool:
    return key != "url" or value.startswith("http")


def _describe_training(
    run: DraftRun, state: Mapping[str, Any], descriptor: Descriptor, recipe: Recipe
) -> TrainingFacts:
    summary = state["summary"]
    return TrainingFacts(
        checkpoint=str(descriptor.weights).partition("/")[0],
        weights=str(descriptor.sha256),
        objective=str(recipe.training().draft.objective),
        steps=summary["steps"],
        loss=summary["loss"],
        seconds=state["seconds"],
        init_from={key: value for key, value in state["inputs"].items() if key.startswith("init_from")},
        trackers=_read_trackers(run),
        environment=state.get("environment", {}),
    )


def _make_commands(exported: Exported, target: Target) -> Commands:
    """Return the shortest commands that serve the draft with its own number of draft tokens."""
    descriptor, k = exported.descriptor, exported.config.num_draft_tokens
    repository = (revision_of(target.path) or "").partition("@")[0] or "<target>"
    speculation = {**descriptor.speculative, "model": THIS_FOLDER, "num_speculative_tokens": k}
    vllm = f"vllm serve {repository} --speculative-config '{json.dumps(speculation)}'"
    config = read_json(exported.folder / "config.json", "the config of the export")
    try:
        flags = METHODS[descriptor.method].sglang_flags(exported.folder, config, k)
    except UserError as error:  # SGLang does not serve this method, or not in this layout
        why = str(error).removeprefix(f"{exported.folder}: ").removeprefix(f"{exported.folder}/")
        return Commands(vllm=vllm, sglang=why, has_sglang=False)
    words = shlex.join(to_flags(flags))
    sglang = f"python -m sglang.launch_server --model-path {repository} --speculative-draft-model-path '{THIS_FOLDER}' "
    return Commands(vllm=vllm, sglang=sglang + words, has_sglang=True)
