"""Check a recipe, its template and its target before anything starts.

Reads: the recipe; `target.training_template`; the target's config, tokenizer and chat template if they are on this
machine, else `target.facts`. Rules that need a missing file are skipped; the stage that reads the file applies them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from common.errors import UserError
from common.files import hash_bytes
from drafts import METHODS
from recipe.mask import mask_token_of
from recipe.recipe import Recipe
from target.layers import can_be_captured, captured_layers
from target.mask_token import find_mask_token, used_token_ids
from target.target import Target
from target.templates import TAG, check_training_template, variables_of


def check_recipe(recipe: Recipe) -> None:
    """Raise the UserError of the first rule that the recipe breaks."""
    for problem in _problems(recipe):
        raise problem


def check_kv_dtype(name: str) -> None:
    """Raise UserError for a quantized KV cache in a dump: the captured states pass through it."""
    if name not in ("auto", "bfloat16", "float16", "float32"):
        raise UserError(
            "kv-cache-dtype",
            found=name,
            expected="a KV cache of the model's own precision: the captured states pass through it",
            fix="Set dump.args.kv-cache-dtype to auto.",
        )


def check_block_size(where: str, args: Mapping[str, Any], target: Target) -> None:
    """Raise UserError for a KV cache block size other than the target's sparse attention needs."""
    size, wanted = args.get("block-size"), target.sparse_block_size
    if wanted and size != wanted:
        raise UserError(
            f"{where}block-size",
            found=str(size),
            expected=f"{wanted}, the block of the target's sparse attention",
            fix=f"Set serve.args.block-size to {wanted}.",
        )


DEFERRING = {
    "MiniMaxM3SparseForCausalLM": True,
    "MiniMaxM3SparseForConditionalGeneration": True,
    "DeepseekV32ForCausalLM": False,
}
"""Architectures whose layers vLLM captures before their all-reduce, and whether our plugin completes it."""


def note_ranks(target: Target, flags: Mapping[str, Any]) -> str:
    """Return what tensor parallelism does to the captured states of the target; "" if nothing.

    `flags`: those of a server, with dashes. Source: docs/tensor-parallel.md.
    """
    ranks = int(flags.get("tensor-parallel-size", 1))
    if ranks == 1 or target.architecture not in DEFERRING:
        return ""
    if DEFERRING[target.architecture]:
        mend = (
            "Draftline's plugin completes them in vLLM 0.30 to 0.32 on every machine where Draftline is installed; "
            "without it a dump holds partial sums and a draft is accepted less"
        )
    else:
        mend = "use a tensor-parallel size of 1"
    return (
        f"vLLM captures the layers of {target.architecture} before their all-reduce over {ranks} tensor-parallel ranks "
        f"(NVIDIA): {mend}. The preflight compares the ranks (docs/tensor-parallel.md)."
    )


def _problems(recipe: Recipe) -> Iterator[UserError]:
    section = recipe.target
    yield from _check_yarn(recipe)
    yield from _check_final_states(recipe)
    template = section.training_template
    if template is not None:
        if not template.exists():
            yield UserError(
                "target.training_template", found=f"no {template}", expected="a template", fix="Correct the path."
            )
        text = template.read_text(encoding="utf-8")
        checksum = hash_bytes(text.encode())
        if section.training_template_sha256 not in (None, checksum):
            yield UserError(
                "target.training_template_sha256",
                found=str(section.training_template_sha256)[:12],
                expected=f"{checksum[:12]}, the checksum of {template}",
                fix="Check why the template changed; then set its new checksum.",
            )
        if not TAG.search(text):
            yield UserError(
                f"target.training_template ({template})",
                found="no {% generation %} tags",
                expected="tags around the assistant's turns",
                fix="Add them: they mark the supervised tokens.",
            )
    try:
        target = Target.of(section)
    except UserError:
        if section.path.exists():
            raise
        return  # an earlier step creates the target, as in Tiny-DFlash
    yield from _check_facts(recipe, target)
    yield from _check_layers(recipe, target)
    if recipe.train is not None:
        METHODS[recipe.train.draft.method].check(recipe.train.draft, target)
    _check_mask_token(recipe, target)
    _check_engine(recipe, target)
    yield from _check_thinking(recipe, target)


def _check_final_states(recipe: Recipe) -> Iterator[UserError]:
    """Yield a UserError if the dump would leave out what the objective learns from."""
    if recipe.train is None or not recipe.train.draft.needs_final_states:
        return
    dump, lacking = recipe.dump, "the target's distribution, which train.draft learns from"
    if dump.final_states == "top-k":
        lacking = recipe.train.draft.lacks_of(dump.top_k)
    if dump.final_states != "keep" and lacking:
        found = dump.final_states if dump.final_states == "drop" else f"top-k with dump.top_k {dump.top_k}"
        yield UserError(
            "dump.final_states", found=found, expected=lacking, fix="Set it to keep, or change train.draft.objective."
        )


def _check_yarn(recipe: Recipe) -> Iterator[UserError]:
    yarn, length = recipe.export.yarn, recipe.export.max_position_embeddings or recipe.target.max_model_len
    if yarn is None:
        return
    window = yarn.factor * yarn.original_max_position_embeddings
    if window != length:
        yield UserError(
            "export.yarn",
            found=f"{yarn.original_max_position_embeddings} x {yarn.factor:g} = {window:g} positions",
            expected=f"export.max_position_embeddings (default: target.max_model_len) = {length}",
            fix="Choose a factor or a length that give it.",
        )


def _check_facts(recipe: Recipe, target: Target) -> Iterator[UserError]:
    facts = recipe.target.facts
    if facts is None or not target.has_config:
        return
    found = {
        "architecture": next(iter(target.config.get("architectures") or [None])),
        "hidden_size": target.hidden_size,
        "num_hidden_layers": target.num_layers,
        "vocab_size": target.vocab_size,
        "rope_theta": target.rope_theta,
        "final_norm": target.final_norm,
        "sparse_block_size": target.sparse_block_size,
    }
    if target.is_here:
        found["highest_token_id"] = max(used_token_ids(target))
    if facts.final_norm is None:
        del found["final_norm"]
    for name, value in found.items():
        if getattr(facts, name) != value:
            override = ", or set target.final_norm where its config is read wrongly" if name == "final_norm" else ""
            yield UserError(
                f"target.facts.{name}",
                found=str(getattr(facts, name)),
                expected=f"{value}, as in {target.path}",
                fix=f"Correct the recipe, or target.path{override}.",
            )


def _check_mask_token(recipe: Recipe, target: Target) -> None:
    if not (target.is_here or target.facts):
        return
    if mask_token_of(recipe, target) is None and recipe.target.mask_token_id is not None:
        find_mask_token(recipe.target, target)  # synthesis filters it, whatever the draft method


def _check_layers(recipe: Recipe, target: Target) -> Iterator[UserError]:
    layer_ids = captured_layers(recipe.target, target)
    if not can_be_captured(layer_ids, target.num_layers):
        yield UserError(
            "target.aux_layers",
            found=str(layer_ids),
            expected=f"sorted, unique layers from 0 to {target.num_layers - 2}",
            fix="Correct them; the last layer's output is the final state, which is stored anyway.",
        )


def _check_engine(recipe: Recipe, target: Target) -> None:
    of_dump = {**recipe.serve.args, **recipe.dump.args}
    check_block_size("serve.args.", recipe.serve.args, target)
    check_block_size("dump.args.", of_dump, target)
    check_kv_dtype(str(of_dump.get("kv-cache-dtype", "auto")))
    if recipe.dump.engines > 1 and recipe.dump.backend != "vllm":
        raise UserError(
            "dump.engines",
            found=f"{recipe.dump.engines} engines with dump.backend: {recipe.dump.backend}",
            expected="1",
            fix="Use dump.backend: vllm, or list several servers in dump.endpoints.",
        )


def _check_thinking(recipe: Recipe, target: Target) -> Iterator[UserError]:
    section = recipe.target
    if recipe.synth.thinking_modes:
        own = target.find_chat_template()
        ours = section.training_template
        texts = [own] if own else [ours.read_text(encoding="utf-8")] if ours else []
        if texts and section.thinking_mode_name not in variables_of(texts[0]):
            yield UserError(
                "target.thinking_mode_name",
                found=section.thinking_mode_name,
                expected="a variable of the chat template; otherwise the mode has no effect",
                fix="Look it up in the template, or set synth.thinking_modes to [].",
            )
    check_training_template(section, target)
