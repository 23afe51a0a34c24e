"""Check that vLLM's model of a target hands out the hidden states of its layers, which `dump` and all drafts read.

vLLM looks at that after it has loaded the weights, and then raises an error in the engine's process.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common.errors import UserError
from drafts import METHODS
from serve.engine import engine_name
from target.target import Target

MODEL_IMPL, HF_OVERRIDES = "model-impl", "hf-overrides"
SPECULATIVE_CONFIG = "speculative-config"


def check_captures(target: Target, args: Mapping[str, Any]) -> None:
    """Raise UserError if vLLM cannot load its model of the target, or the model hands out no states.

    `args`: the engine's arguments, with dashes or underscores. It imports vLLM and the model's module; call it in a
    process that starts an engine. Models that vLLM does not have run with the code of transformers, as all do with
    `model-impl: transformers`; these hand out states.
    """
    from vllm.model_executor.models.interfaces import supports_eagle3
    from vllm.model_executor.models.registry import ModelRegistry

    chosen = {key.replace("_", "-"): value for key, value in args.items()}
    registered = ModelRegistry.models.get(target.architecture)
    if registered is None or chosen.get(MODEL_IMPL) == "transformers" or HF_OVERRIDES in chosen:
        return
    where = f"{target.path} in {' '.join(engine_name())}"
    try:
        model = registered.load_model_cls()
    except ImportError as error:
        raise UserError(
            where,
            found=f"no model for {target.architecture}: {error}",
            expected="one that this build of vLLM can import",
            fix="Capture with dump.backend=hf; serve it with a build of vLLM that has what is missing.",
        ) from None
    if not supports_eagle3(model):
        raise UserError(
            where,
            found=f"a {target.architecture} that hands out no hidden states of its layers",
            expected="one that does, for the dump and for drafts",
            fix="Set serve.args.model-impl to transformers, which does, or capture with dump.backend=hf "
            "(docs/families.md).",
        )


def check_server(words: Sequence[str]) -> None:
    """`check_captures` for the words of `vllm serve`, if their speculative config reads states.

    Raises UserError as that does.
    """
    if list(words[:1]) != ["serve"] or f"--{SPECULATIVE_CONFIG}" not in words:
        return
    method = json.loads(_value(words, SPECULATIVE_CONFIG)).get("method")
    if method == "extract_hidden_states" or method in METHODS:
        args = {flag: _value(words, flag) for flag in (MODEL_IMPL, HF_OVERRIDES) if f"--{flag}" in words}
        check_captures(Target.read(Path(words[1])), args)


def _value(words: Sequence[str], flag: str) -> str:
    return words[list(words).index(f"--{flag}") + 1]
