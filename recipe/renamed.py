"""Renamed keys of older recipes: refuse them with their new names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from common.errors import UserError
from drafts import METHODS

_DRAFT = (
    "method", "block_size", "objective", "slot_weights", "dpace_smoothing", "loss_decay", "num_layers", "num_anchors",
    "num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size", "draft_vocab_size",
)  # fmt: skip

RENAMED: Mapping[str, str] = {
    "dump.requests_in_flight": "dump.concurrency",
    **{f"train.{key}": f"train.draft.{key}" for key in _DRAFT},
    "train.ttt_steps": "train.draft.ttt_length",
    "train.ttt_decay": "train.draft.ttt_step_loss_decay",
    "train.schedule": "train.lr_schedule",
    "train.accumulate": "train.gradient_accumulation_steps",
    "train.batch_samples": "train.global_batch_size (times the accumulated batches)",
    "train.threads": "train.num_threads",
    "synth.loop_tokens": "synth.min_loop_tokens",
}


def refuse_renamed(where: str, keys: set[str], method: str | None) -> None:
    """Raise one UserError that lists all renamed keys among the dotted `keys`, with their new names.

    `method` is the recipe's draft method, if it names one: not every method has every key.
    """
    if old := sorted(keys & RENAMED.keys()):
        raise UserError(
            where,
            found=f"keys of an earlier version: {', '.join(old)}",
            expected="their new names",
            fix="; ".join(_advise(key, method) for key in old) + ".",
        )


def _advise(key: str, method: str | None) -> str:
    new, name = RENAMED[key], key.removeprefix("train.")
    if method is None or name not in _DRAFT or name in METHODS[method].section.model_fields:
        return f"rename {key} to {new}"
    own = METHODS[method].renamed.get(name)
    return f"rename {key} to train.draft.{own}" if own else f"remove {key}, which {method} does not have"


def dotted_keys(values: Mapping[str, Any]) -> set[str]:
    """Return `section.key` of every key of every section."""
    return {f"{section}.{key}" for section, keys in values.items() if isinstance(keys, Mapping) for key in keys}
