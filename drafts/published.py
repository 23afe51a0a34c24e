"""The descriptor of an exported or published draft: from its draftline.json, or from its config.json."""

from __future__ import annotations

from pathlib import Path

from common.errors import UserError
from common.files import read_json
from contracts.draft import DESCRIPTOR_FILE, Descriptor, DraftConfig, DraftRun
from drafts import METHODS


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
    path = folder / "config.json"
    config = read_json(path, "a draft exported by `train export`")
    for method in METHODS.values():
        if (found := method.describe(config)) is not None:
            return found
    raise UserError(
        path,
        found=f"architectures {config.get('architectures')}",
        expected=f"a draft of one of the methods {', '.join(METHODS)}",
        fix="Give an export of `train export`, or list the draft in serve.heads with its method.",
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
