"""Merge the layers of vLLM's flags in a recipe, and refuse flags that would corrupt a stage's output.

A flag is a name without leading dashes; true stands for `--name`, false for `--no-name`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from common.errors import UserError
from contracts.schedule import SCHEDULE_KEY, max_draft_tokens
from recipe.check import check_block_size, check_kv_dtype
from recipe.hardware import find_node
from recipe.recipe import Recipe
from recipe.serve import Purpose, PurposeSection, ServeSection, VariantSection
from target.target import Target


@dataclass(frozen=True)
class Sizes:
    """Input and output tokens per request and concurrent requests, which size a server."""

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
"""SGLang's aliases of its parallelism flags. worker.sh counts GPUs by the names on the right."""


ONE_NUMBER = frozenset({"medusa", "ngram_gpu", "suffix"})
"""vLLM's methods that draft the same number of tokens in every step (vllm/v1/spec_decode, 0.32)."""


def uses_sglang(section: ServeSection, purpose: Purpose | None) -> bool:
    """Return whether SGLang serves a purpose. `serve.backend` applies to synthesis; all else needs vLLM."""
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
    """Return the recipe's flags and environment for a purpose, which may be empty."""
    return section.purposes.get(purpose, PurposeSection()) if purpose else PurposeSection()


def layer_flags(recipe: Recipe, purpose: Purpose | None) -> dict[str, Any]:
    """Return the flags of the recipe's backend for a purpose.

    Later layers override earlier ones: `serve.args`; the node's GPUs; `serve.variants`; `serve.purposes`; for a dump
    `dump.args`. SGLang has only the GPUs and `serve.sglang_args`.
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
    """Return the recipe's additions to every draft's speculative config; the variant's keys win."""
    variant = find_variant(section)
    return {**section.speculative, **(variant.speculative if variant else {})}


def with_speculation(recipe: Recipe, **changes: Any) -> Recipe:
    """Return the recipe with keys of every draft's speculative config changed, or removed if None; variants, too."""

    def change(values: Mapping[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in {**values, **changes}.items() if value is not None}

    section = recipe.serve
    variants = {
        name: variant.model_copy(update={"speculative": change(variant.speculative)})
        for name, variant in section.variants.items()
    }
    update = {"speculative": change(section.speculative), "variants": variants}
    return recipe.model_copy(update={"serve": section.model_copy(update=update)})


def check_speculation(speculative: Mapping[str, Any], flags: Mapping[str, Any]) -> None:
    """Raise UserError for a schedule of draft tokens that vLLM would ignore, or break with.

    Read in vLLM 0.30 to 0.32: data parallelism disables a schedule with a warning (vllm/config/vllm.py,
    `_maybe_disable_dynamic_sd_for_data_parallel`). With `parallel_drafting`, the proposer of V1 drafts
    `num_speculative_tokens` per request whatever the schedule says, and takes the tokens for those of other requests
    (vllm/v1/spec_decode/llm_base_proposer.py, `propose`); V2 has none. Methods that draft a block at once by themselves
    do not set it, and take a schedule. The proposers of `ONE_NUMBER` assert num_speculative_tokens.
    """
    if SCHEDULE_KEY not in speculative:
        return
    most, limit = max_draft_tokens(speculative[SCHEDULE_KEY]), int(speculative["num_speculative_tokens"])
    if most > limit:
        raise UserError(
            f"speculative.{SCHEDULE_KEY}",
            found=f"{most} draft tokens",
            expected=f"at most num_speculative_tokens ({limit}), to which vLLM cuts them",
            fix="Correct one of the two.",
        )
    replicas = int(flags.get("data-parallel-size", 1))
    if replicas > 1:
        raise UserError(
            f"speculative.{SCHEDULE_KEY}",
            found=f"a schedule with data-parallel-size {replicas}",
            expected="1: vLLM says 'Dynamic speculative decoding is not supported with data parallelism', and drafts a "
            "fixed number",
            fix="Remove the schedule, or serve replicas of one process each.",
        )
    if speculative.get("method") in ONE_NUMBER:
        raise UserError(
            f"speculative.{SCHEDULE_KEY}",
            found=f"a schedule for method {speculative['method']}",
            expected="another method: vLLM's proposer asserts num_speculative_tokens in every step",
            fix="Remove the schedule.",
        )
    if speculative.get("parallel_drafting"):
        raise UserError(
            f"speculative.{SCHEDULE_KEY}",
            found="a schedule for a draft with parallel_drafting",
            expected="another method: vLLM's V1 runner drafts all tokens there, whatever the schedule says, and its V2 "
            "runner says 'does not yet support: parallel drafting for EAGLE speculative decoding'",
            fix="Remove the schedule and set num_speculative_tokens.",
        )


def normalize(flags: Mapping[str, Any]) -> dict[str, Any]:
    """Rename flags so that layers override each other: dashes, and `no-x: true` becomes `x: false`."""
    normal: dict[str, Any] = {}
    for name, value in flags.items():
        name = name.replace("_", "-")
        if isinstance(value, bool) and name.startswith("no-"):
            name, value = name.removeprefix("no-"), not value
        normal[name] = value
    return normal


def normalize_sglang(flags: Mapping[str, Any]) -> dict[str, Any]:
    """Rename SGLang's flags so that each has one name."""
    return {SGLANG_ALIASES.get(name, name): value for name, value in normalize(flags).items()}


def size_flags(sizes: Sizes, num_draft_tokens: int) -> dict[str, int]:
    """Return the flags for a load: a context of ISL + OSL + 256, 2 * ISL batched tokens, CUDA graphs.

    The capture size is the smallest power of two that is at least concurrency * (1 + draft tokens), within 4 to 2048.
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
    """Raise UserError for flags that would corrupt a stage's output."""
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
    """Raise UserError for parsers that strip tokens from replies in synth and dump, with any engine."""
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
    """Parse `--name value`, `--name=value` and `--name`. Raises UserError for a value without a flag."""
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
    """Convert flags to arguments: true becomes `--name`, false `--no-name`, anything else `--name value`."""
    flags: list[str] = []
    for name, value in values.items():
        if isinstance(value, bool):
            flags.append(f"--{name}" if value else f"--no-{name}")
        else:
            flags += [f"--{name}", str(value)]
    return flags


def count_gpus(flags: Mapping[str, Any]) -> int:
    """Return the number of GPUs of a server with these flags."""
    names = ("tensor-parallel-size", "pipeline-parallel-size", "data-parallel-size")
    return math.prod(int(flags.get(name, 1)) for name in names)
