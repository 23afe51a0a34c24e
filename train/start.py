"""Start from a draft that exists: read it, check it against target and recipe, load its weights, say what was taken.

Reads: a run's folder, one of its checkpoints, a published draft's folder, or `org/name@revision` on the hub
       (`train.init_from`, `train eval --draft`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch

from common.errors import UserError
from common.hub import revision_of
from contracts.draft import DraftConfig
from drafts import METHODS
from drafts.draft import Draft
from drafts.method import DraftMethod
from drafts.published import read_draft
from drafts.reading import Published, explain_extra
from drafts.weights import hash_weights
from recipe.recipe import Recipe
from recipe.train import TrainSection
from target.head import TargetHead
from target.target import Target

OF_SERVING = ("yarn", "max_position_embeddings")
"""Fields that an export may set differently from training; no weight depends on them."""
OF_WEIGHTS = ("rope_theta", "rms_norm_eps")
"""Fields that no key of the recipe sets: a draft's weights are of use only with its own."""
ROWS = 8192


@dataclass(frozen=True)
class Start:
    """A draft to start from."""

    folder: Path
    method: DraftMethod
    draft: Published

    @property
    def checksum(self) -> str:
        """The hash of its weights."""
        return hash_weights(self.draft.path)

    def inputs(self, name: str) -> dict[str, str]:
        """Return the inputs of a run that uses it: its checksum, and the repository and commit if it is of the hub."""
        revision = revision_of(self.draft.path)
        return {name: self.checksum, **({f"{name}_revision": revision} if revision else {})}


def open_start(folder: Path, recipe: Recipe, target: Target, *, to_train: bool = False) -> Start:
    """Read a draft, or, `to_train`, one of another method whose weights the recipe's method can take over.

    Raises UserError if it is of another method than the recipe's or does not fit the target.
    """
    method, draft = read_draft(folder, target.num_layers)
    named = recipe.training().draft.method
    if to_train and method.name in METHODS[named].starts_from:
        draft = METHODS[named].adapt(method.name, draft)
        method = METHODS[named]
    if named != method.name:
        raise UserError(
            "train.draft.method",
            found=named,
            expected=f"{method.name}, as {folder} is",
            fix=f"Set it: --set train.draft.method={method.name}.",
        )
    wanted = {
        "hidden_size": target.hidden_size,
        "vocab_size": target.vocab_size,
        "num_target_layers": target.num_layers,
    }
    for key, value in wanted.items():
        if draft.facts.get(key, value) != value:
            raise UserError(
                folder,
                found=f"{key} {draft.facts[key]}",
                expected=f"{value} as in {target.path}",
                fix="Give a draft of this target.",
            )
    return Start(folder, method, draft)


def own_config(start: Start, config: DraftConfig) -> DraftConfig:
    """Return the config of the draft itself; fields that its folder does not have are those of `config`."""
    values = {**config.model_dump(), **start.draft.facts, "layer_ids": start.draft.layers.ids}
    return type(config).model_validate(values)


def start_config(start: Start, config: DraftConfig, section: TrainSection) -> DraftConfig:
    """Return the config to train with, the recipe's with the draft's rope and epsilon.

    Raises UserError for a dimension or a mask token of the recipe that is not the draft's.
    """
    free = {*OF_SERVING, *OF_WEIGHTS, *start.method.adjustable}
    own = own_config(start, config)
    for key in start.draft.facts:
        found, value = getattr(config, key), getattr(own, key)
        is_new = value is None and key in type(section.draft).model_fields  # a part that the draft does not have
        if key in free or found == value or is_new:
            continue
        _refuse_field(start, key, found, section)
    return config.model_copy(update={key: getattr(own, key) for key in OF_WEIGHTS})


def _refuse_field(start: Start, key: str, found: object, section: TrainSection) -> NoReturn:
    """Raise UserError for a field of the config that is not the draft's; name the recipe's key, if it has one."""
    value = start.draft.facts[key]
    name = f"target.{key}" if key == "mask_token_id" else f"train.draft.{key}"
    if key not in ("mask_token_id", *type(section.draft).model_fields):
        raise UserError(
            start.folder,
            found=f"{key} {value}",
            expected=f"{found}, the only one of {start.method.name} drafts as trained here",
            fix="Give another draft, or leave out train.init_from.",
        )
    raise UserError(
        name,
        found=_short(found),
        expected=f"{_short(value)}, as in the draft {start.folder}",
        fix=f"Set it: --set {name}={'null' if value is None else value}. Or leave out train.init_from.",
    )


def list_changes(start: Start, config: DraftConfig) -> list[str]:
    """Return a line for each thing in which the training differs from the draft that it starts from."""
    own = own_config(start, config)
    changes = [
        f"{key}: the draft has {_short(getattr(own, key))}, this training {_short(getattr(config, key))}"
        for key in ("yarn", *start.method.adjustable)
        if getattr(own, key) != getattr(config, key)
    ]
    made_for = start.draft.target_fingerprint
    if made_for is not None and made_for != config.target_fingerprint:
        changes.append(
            f"target: the draft was trained for {made_for[:12]}, this one is {config.target_fingerprint[:12]}"
        )
    return changes


def _short(value: Any) -> str:
    return "none" if value is None else str(value)


def load_start(start: Start, draft: Draft, head: TargetHead) -> list[str]:
    """Load the weights into `draft`; return lines that say what became of every tensor.

    Raises UserError for tensors that the module has no place for, for missing ones, for other shapes, and for an
    embedding or lm_head other than the target's.
    """
    _check_shared(start, head)
    weights, expected = start.draft.weights, draft.state_dict()
    missing = sorted(set(expected) - set(weights))
    if extra := sorted(set(weights) - set(expected)):
        raise UserError(
            start.folder,
            found=f"{explain_extra(extra[0])} ({_names(extra)})",
            expected=f"tensors of a {start.method.name} draft as trained here",
            fix="Give another draft: without these tensors it would be a different one.",
        )
    if lost := [name for name in missing if name not in start.method.optional_tensors]:
        raise UserError(start.folder, found=f"no {_names(lost)}", expected="all weights", fix="Copy the folder again.")
    for name, tensor in weights.items():
        if tensor.shape != expected[name].shape:
            raise UserError(
                f"{start.folder} ({start.draft.renamed.get(name, name)})",
                found=f"shape {tuple(tensor.shape)}",
                expected=f"{tuple(expected[name].shape)}",
                fix="Check the dimensions in its config.json.",
            )
    draft.load_state_dict(weights, strict=False)
    return _describe(start, missing)


def _check_shared(start: Start, head: TargetHead) -> None:
    """Raise UserError if the folder's embedding or lm_head is not the target's, in the folder's precision."""
    ours = {"embed_tokens.weight": head.embedding, "lm_head.weight": head.lm_head}
    for name, theirs in start.draft.shared.items():
        target = ours[name]
        rows = range(0, len(target), ROWS)
        if theirs.shape[1] != target.shape[1] or not all(
            torch.equal(theirs[at : at + ROWS], target[at : at + ROWS].to(theirs.device, theirs.dtype)) for at in rows
        ):
            raise UserError(
                f"{start.folder} ({name})",
                found="other values than the target's",
                expected="the target's, which a draft shares here",
                fix="Check that the draft is of this target. A draft with its own embedding or full lm_head can be "
                "served, but neither evaluated nor trained here.",
            )


def _describe(start: Start, missing: Sequence[str]) -> list[str]:
    draft, shared = start.draft, sorted(start.draft.shared)
    as_they_are = sorted(set(draft.weights) - set(draft.renamed))
    moved = sorted(f"{theirs} -> {ours}" for ours, theirs in draft.renamed.items())
    rows = {
        "taken": as_they_are,
        "renamed": moved,
        "dropped, equal to the target's": shared,
        "dropped, unused": sorted(draft.unused),
        "newly initialized": missing,
    }
    return [
        f"{what:32}{len(names):4}  {_names(names, 3 if what in ('taken', 'renamed') else 20)}".rstrip()
        for what, names in rows.items()
    ]


def _names(names: Iterable[str], shown: int = 3) -> str:
    listed = list(names)
    return ", ".join(listed[:shown]) + (f" and {len(listed) - shown} more" if len(listed) > shown else "")
