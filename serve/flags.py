"""vLLM's flags as the recipe layers them, and checks of flags that would spoil a stage's output.

A flag is a name without dashes in front; true stands for `--name`, false for `--no-name`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from common.errors import UserError
from recipe.check import check_block_size, check_kv_dtype
from recipe.recipe import Recipe
from recipe.serve import Purpose, PurposeSection, ServeSection, VariantSection
from serve.hardware import find_node
from target.target import Target


@dataclass(frozen=True)
class Sizes:
    """Tokens in and out of a request, and requests at a time, for which a server is sized."""

    isl: int | None = None
    osl: int | None = None
    concurrency: int | None = None


SGLANG_ALIASES = {
    "tp-size": "tp",
    "tensor-parallel-size": "tp",
    "pp": "pp-size",
    "pipeline-parallel-size": "pp-size",
    "dp": "dp-size",
    "data-parallel-size": "dp-size",
}
"""SGLang's other names of its flags for parallelism. worker.sh counts GPUs by the names on the right."""


def uses_sglang(section: ServeSection, purpose: Purpose | None) -> bool:
    """Return whether SGLang serves for a purpose. `serve.backend` is that of synthesis; all else needs vLLM."""
    return section.backend == "sglang" and purpose in (None, "synth")


def find_variant(section: ServeSection) -> VariantSection | None:
    """Return the variant that the recipe names, if any. Raises UserError for an unknown one."""
    name, variants = section.variant, section.variants
    if name is None:
        return None
    if name not in variants:
        known = ", ".join(variants) or "none: the recipe has no serve.variants"
        raise UserError("--variant", found=name, expected=f"one of {known}", fix="Correct it.")
    return variants[name]


def find_purpose(section: ServeSection, purpose: Purpose | None) -> PurposeSection:
    """Return what the recipe adds for a purpose, which may be nothing."""
    return section.purposes.get(purpose, PurposeSection()) if purpose else PurposeSection()


def layer_flags(recipe: Recipe, purpose: Purpose | None) -> dict[str, Any]:
    """Return the flags of the recipe's backend that are in force for a purpose.

    Layers, of which the last one wins: `serve.args`; the node's GPUs; `serve.variants`; `serve.purposes`; for a dump
    `dump.args`. SGLang has the GPUs and `serve.sglang_args` alone.
    """
    section, variant = recipe.serve, find_variant(recipe.serve)
    num_gpus = find_node(section.hardware).num_gpus if section.hardware else None
    if uses_sglang(section, purpose):
        num_gpus = num_gpus or int(normalize(section.args).get("tensor-parallel-size", 1))
        return {"tp": num_gpus, **normalize_sglang(section.sglang_args)}
    return {
        **normalize(section.args),
        **({"tensor-parallel-size": num_gpus} if num_gpus else {}),
        **normalize(variant.args if variant else {}),
        **normalize(find_purpose(section, purpose).args),
        **normalize(recipe.dump.args if purpose == "dump" else {}),
    }


def speculative_overrides(section: ServeSection) -> dict[str, Any]:
    """Return what the recipe adds to the speculative config of every draft; a variant's keys win."""
    variant = find_variant(section)
    return {**section.speculative, **(variant.speculative if variant else {})}


def normalize(flags: Mapping[str, Any]) -> dict[str, Any]:
    """Return flags under vLLM's names, so that layers meet: dashes, and `no-x: true` as `x: false`."""
    normal: dict[str, Any] = {}
    for name, value in flags.items():
        name = name.replace("_", "-")
        if isinstance(value, bool) and name.startswith("no-"):
            name, value = name.removeprefix("no-"), not value
        normal[name] = value
    return normal


def normalize_sglang(flags: Mapping[str, Any]) -> dict[str, Any]:
    """Return SGLang's flags under one name each."""
    return {SGLANG_ALIASES.get(name, name): value for name, value in normalize(flags).items()}


def size_flags(sizes: Sizes, num_draft_tokens: int) -> dict[str, int]:
    """Flags for a load: a context of ISL + OSL + 256, 2 * ISL batched tokens, CUDA graphs for all that run at a time.

    The capture size is the next power of two from concurrency * (1 + draft tokens) on, from 4 to 2048.
    """
    flags = {}
    if sizes.isl is not None and sizes.osl is not None:
        flags["max-model-len"] = sizes.isl + sizes.osl + 256
        flags["max-num-batched-tokens"] = 2 * sizes.isl
    if sizes.concurrency is not None:
        wanted = sizes.concurrency * (1 + num_draft_tokens)
        flags["max-cudagraph-capture-size"] = min(2048, max(4, 1 << (wanted - 1).bit_length()))
    return flags


def check_flags(flags: Mapping[str, Any], target: Target, purpose: str | None) -> None:
    """Raise UserError for flags that would spoil what comes out."""
    check_block_size("", flags, target)
    if purpose == "dump":
        check_kv_dtype(str(flags.get("kv-cache-dtype", "auto")))
    check_parsers(flags, purpose)
    if purpose == "synth" and flags.get("exclude-tools-when-tool-choice-none") is True:
        raise UserError(
            "exclude-tools-when-tool-choice-none",
            found="true",
            expected="false for synth: prompts would lack their tools",
            fix="Set it in serve.purposes.production.args.",
        )


def check_parsers(flags: Mapping[str, Any], purpose: str | None) -> None:
    """Raise UserError for parsers that take tokens out of the replies of a synthesis; both engines name them so."""
    if purpose in ("synth", "dump"):
        for flag in ("reasoning-parser", "tool-call-parser"):
            if flag in flags:
                raise UserError(
                    flag,
                    found=str(flags[flag]),
                    expected=f"none for {purpose}: it takes tokens out of the reply's text",
                    fix="Set it in serve.purposes.production.args.",
                )


def parse_flags(words: Sequence[str]) -> dict[str, str | bool]:
    """vLLM's own words (`--name value`, `--name=value`, `--name`) as flags. Raises UserError for a word of no flag."""
    flags: dict[str, str | bool] = {}
    name = None
    for word in words:
        if word.startswith("--"):
            name, separator, value = word[2:].partition("=")
            flags[name] = value if separator else True
            name = None if separator else name
        elif name is None:
            raise UserError("vLLM's flags", found=repr(word), expected="--name value", fix="Quote values with spaces.")
        else:
            flags[name], name = word, None
    return flags


def to_flags(values: Mapping[str, Any]) -> list[str]:
    """vLLM flags: true becomes `--name`, false `--no-name`, anything else `--name value`."""
    flags: list[str] = []
    for name, value in values.items():
        if isinstance(value, bool):
            flags.append(f"--{name}" if value else f"--no-{name}")
        else:
            flags += [f"--{name}", str(value)]
    return flags


def count_gpus(flags: Mapping[str, Any]) -> int:
    """Return the GPUs that a server with these flags takes."""
    names = ("tensor-parallel-size", "pipeline-parallel-size", "data-parallel-size")
    return math.prod(int(flags.get(name, 1)) for name in names)
