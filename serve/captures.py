"""Check that vLLM's model of a target gives a draft, or a dump, what it reads: hidden states and plain embeddings.

vLLM looks for the states after it has loaded the weights, and then raises an error in the engine's process. Embeddings
that are scaled raise none: the draft only proposes worse tokens.
"""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common.errors import UserError
from drafts import METHODS
from serve.engine import engine_name, is_cpu_engine
from target.target import Target

MODEL_IMPL, HF_OVERRIDES, SPECULATIVE_CONFIG = "model-impl", "hf-overrides", "speculative-config"
MLA_DISABLE = "VLLM_MLA_DISABLE"
EXTRACTION = "extract_hidden_states"
NORMALIZING = [name for name, method in METHODS.items() if method.normalizes_embeddings]


def check_captures(target: Target, args: Mapping[str, Any], method: str = EXTRACTION) -> None:
    """Raise UserError if vLLM cannot load its model of the target, or the model does not give what `method` reads.

    `args`: the engine's arguments, with dashes or underscores. `method`: EXTRACTION or a draft method. Models that vLLM
    does not have run with the code of transformers, as all do with `model-impl: transformers`; these hand out states.
    It imports vLLM and the model's module: call it in a process that starts an engine, with the engine's environment.
    """
    from vllm.model_executor.models.interfaces import supports_eagle3
    from vllm.model_executor.models.registry import ModelRegistry

    chosen = {key.replace("_", "-"): value for key, value in args.items()}
    architecture = _architecture(target, chosen)
    registered = ModelRegistry.models.get(architecture)
    where = f"{target.path} in {' '.join(engine_name())}"
    if registered is None or chosen.get(MODEL_IMPL) == "transformers":
        if method in METHODS and not METHODS[method].normalizes_embeddings and _scales_embeddings(target):
            raise UserError(
                where,
                found=f"embeddings of {target.architecture} that the code of transformers scales",
                expected="plain ones: the draft shares them and was trained without the factor",
                fix=f"Use a draft that normalizes them ({', '.join(NORMALIZING)}).",
            )
        return
    try:
        model = registered.load_model_cls()
    except ImportError as error:
        raise UserError(
            where,
            found=f"no model for {architecture}: {error}",
            expected="one that this build of vLLM can import",
            fix="Capture with dump.backend=hf; serve it with a build of vLLM that has what is missing.",
        ) from None
    if not supports_eagle3(model):
        raise UserError(
            where,
            found=f"a {architecture} that hands out no hidden states of its layers",
            expected="one that does, for the dump and for drafts",
            fix="Set serve.args.model-impl to transformers, which does, or capture with dump.backend=hf "
            "(docs/families.md).",
        )
    latent = target.config.get("kv_lora_rank") and os.environ.get(MLA_DISABLE, "0") == "0"
    if latent and method in METHODS and is_cpu_engine():
        raise UserError(
            where,
            found="latent attention, whose KV cache has no block size in common with the draft's on CPUs",
            expected="attention with keys and values",
            fix=f"Set serve.env.{MLA_DISABLE} to '1'.",
        )


def _architecture(target: Target, args: Mapping[str, Any]) -> str:
    """Return the architecture that vLLM is told to load."""
    overrides = args.get(HF_OVERRIDES) or {}
    overrides = json.loads(overrides) if isinstance(overrides, str) else overrides
    return next(iter(overrides.get("architectures") or [target.architecture]))


def _scales_embeddings(target: Target) -> bool:
    """Whether the embedding of the model in transformers multiplies its rows by a factor, as Gemma's does."""
    import transformers

    model = getattr(transformers, target.architecture, None)
    names = vars(importlib.import_module(model.__module__)) if model is not None else ()
    return any(name.endswith("ScaledWordEmbedding") for name in names)


def check_server(words: Sequence[str]) -> None:
    """`check_captures` for the words of `vllm serve`, if their speculative config reads states.

    Raises UserError as that does.
    """
    if list(words[:1]) != ["serve"] or f"--{SPECULATIVE_CONFIG}" not in words:
        return
    method = json.loads(_value(words, SPECULATIVE_CONFIG)).get("method")
    if method == EXTRACTION or method in METHODS:
        args = {flag: _value(words, flag) for flag in (MODEL_IMPL, HF_OVERRIDES) if f"--{flag}" in words}
        check_captures(Target.read(Path(words[1])), args, method)


def _value(words: Sequence[str], flag: str) -> str:
    return words[list(words).index(f"--{flag}") + 1]
