"""Exported and published drafts: the descriptor of a folder, and the draft in it, in whatever layout."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.files import read_json
from common.hub import fetch_snapshot, parse_reference
from contracts.draft import DESCRIPTOR_FILE, Descriptor, DraftConfig, DraftRun
from drafts import METHODS
from drafts.method import DraftMethod
from drafts.reading import DraftFolder, Published, zero_based
from target.target import find_folder, is_hub_name

NO_FACTS = {"method", "layer_ids", "target_fingerprint", "store"}
"""Fields of a config that a new training sets."""


def read_config(run: DraftRun) -> DraftConfig:
    """Return the config of a training run's draft. Raises UserError for an unknown method."""
    values = read_json(run.config_path, "a training run's draft.json")
    method = METHODS.get(str(values.get("method")))
    if method is None:
        raise UserError(
            run.config_path,
            found=f"method {values.get('method')!r}",
            expected=f"one of {', '.join(METHODS)}",
            fix="Train the draft with this version of Draftline.",
        )
    return method.config.model_validate(values)


def read_descriptor(folder: Path) -> Descriptor:
    """Return the descriptor of a draft's folder. Raises UserError if no method recognizes the folder."""
    path = folder / DESCRIPTOR_FILE
    ours = read_json(path, "a draft's descriptor") if path.exists() else {}
    if "speculative" in ours:
        return Descriptor.model_validate(ours)
    described = describe_config(folder)  # a published draft, or an export that has no descriptor yet
    return described.model_copy(update={"target_fingerprint": ours.get("target_fingerprint")})


def describe_config(folder: Path) -> Descriptor:
    """Return the descriptor of a draft's config.json. Raises UserError if it is of no known method."""
    return _recognize(folder)[1]


def _recognize(folder: Path) -> tuple[DraftMethod, Descriptor, dict[str, Any]]:
    """Return a draft's method, descriptor and config.json."""
    path = folder / "config.json"
    config = read_json(path, "a draft exported by `train export`")
    for method in METHODS.values():
        if (found := method.describe(config)) is not None:
            return method, found, config
    raise UserError(
        path,
        found=f"architectures {config.get('architectures')}",
        expected=f"a draft of one of the methods {', '.join(METHODS)}",
        fix="Give a draft of one of these methods. To only serve another one, list it in serve.heads with its method.",
    )


def find_draft(draft: Path | str) -> Path:
    """Return the folder of a draft; the only place that resolves `org/name@revision`, to a snapshot of one commit.

    A folder here comes first. A name of serve.heads stays as it is. Commands call this once, so that one commit is used
    from the first server to the last. A hub name without a revision is only looked up in the local cache: a mistyped
    path must not download somebody's repository. Raises UserError for a revision that is neither on the hub nor in the
    cache.
    """
    path = Path(draft)
    if path.exists():
        return path
    reference = parse_reference(str(draft))
    return fetch_snapshot(reference) if reference else find_folder(path)


def read_draft(folder: Path, num_target_layers: int) -> tuple[DraftMethod, Published]:
    """Return the method and the draft of a training run, of one of its checkpoints, or of a published folder.

    `folder` may be a name on the hub (`find_draft`). Raises UserError for a folder of no known method, and for what the
    method's module does not implement.
    """
    from drafts.weights import read_tensors

    found = find_draft(folder)
    for run in (DraftRun(found), DraftRun(found.parent)):
        if run.config_path.exists():
            return _read_checkpoint(run, run.chosen_weights().parent if run.folder == found else found)
    if not (found / "config.json").exists():
        of_hub = is_hub_name(folder)
        raise UserError(
            folder,
            found="no config.json" + (" in the hub's cache" if of_hub else ""),
            expected="a folder of `train offline`, one of its checkpoints, an export, or a published draft",
            fix=f"Download it: hf download {folder}. Or give {folder}@main." if of_hub else "Correct the path.",
        )
    method, _, config = _recognize(found)
    draft = method.read_published(DraftFolder(found, config, read_tensors(found), num_target_layers))
    path = found / DESCRIPTOR_FILE
    made_for = read_json(path, "a draft's descriptor").get("target_fingerprint") if path.exists() else None
    return method, replace(draft, target_fingerprint=made_for)


def _read_checkpoint(run: DraftRun, checkpoint: Path) -> tuple[DraftMethod, Published]:
    """Return the method and the draft of a training run's checkpoint."""
    from drafts.weights import read_tensors

    config = read_config(run)
    facts = {key: getattr(config, key) for key in type(config).model_fields if key not in NO_FACTS}
    return METHODS[config.method], Published(
        checkpoint,
        zero_based(f"{run.config_path}: layer_ids", config.layer_ids),
        facts,
        read_tensors(checkpoint),
        target_fingerprint=config.target_fingerprint,
        is_checkpoint=True,
    )


def num_speculative_tokens(descriptor: Descriptor, folder: Path) -> int:
    """Return the number of draft tokens per step. Raises UserError if the descriptor has none."""
    if descriptor.num_speculative_tokens is None:
        raise UserError(
            folder / "config.json",
            found="no number of draft tokens",
            expected="one to serve the draft with",
            fix="List the draft in serve.heads with num_speculative_tokens.",
        )
    return descriptor.num_speculative_tokens
