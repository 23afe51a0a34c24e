"""The vLLM command of a recipe's target, with or without a draft.

Reads: the recipe's `target` and `serve` sections; of a draft, its `config.json` and `draftline.json`.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from contracts.errors import UserError
from contracts.files import read_json
from contracts.recipe import Recipe
from contracts.target import Target
from serve.engine import engine_env, is_cpu_engine

MODEL_NAME = "target"


@dataclass(frozen=True)
class ServeCommand:
    """What starts a server: vLLM's arguments after `vllm`, the environment additions, and where it listens."""

    args: list[str]
    env: dict[str, str]
    host: str
    port: int

    @property
    def argv(self) -> list[str]:
        """The command as our own processes start it."""
        return [sys.executable, "-m", "serve.vllm_main", *self.args]

    def to_shell(self) -> str:
        """The command for a person to paste, environment first."""
        program = ["python", "-m", "serve.vllm_main"] if is_cpu_engine() else ["vllm"]
        env = [f"{key}={shlex.quote(value)}" for key, value in sorted(self.env.items())]
        return " ".join([*env, shlex.join([*program, *self.args])])


def build_command(
    recipe: Recipe,
    target: Target,
    *,
    port: int,
    draft: Path | None = None,
    extra_args: Mapping[str, str | int | float | bool] | None = None,
) -> ServeCommand:
    """The command that serves `target` on `port`, drafting with `draft` where one is given.

    Raises UserError when the draft was not made for this target.
    """
    flags: dict[str, str | int | float | bool] = {
        "served-model-name": MODEL_NAME,
        "host": recipe.serve.host,
        "port": port,
        "max-model-len": recipe.target.max_model_len,
        **recipe.serve.args,
        **(extra_args or {}),
    }
    if draft is not None:
        flags["speculative-config"] = json.dumps(speculative_config(draft, target))
    args = ["serve", str(target.path), *to_flags(flags)]
    return ServeCommand(args, engine_env(recipe.serve.env), recipe.serve.host, port)


def to_flags(values: Mapping[str, str | int | float | bool]) -> list[str]:
    """vLLM flags: true becomes `--name`, false `--no-name`, anything else `--name value`."""
    flags: list[str] = []
    for name, value in values.items():
        if isinstance(value, bool):
            flags.append(f"--{name}" if value else f"--no-{name}")
        else:
            flags += [f"--{name}", str(value)]
    return flags


def speculative_config(draft: Path, target: Target) -> dict[str, str | int]:
    """vLLM's speculative config of an exported draft: block_size - 1 draft tokens, as the block includes its anchor.

    Raises UserError when hidden size, vocabulary, layers or fingerprint are not the target's.
    """
    config: dict[str, Any] = read_json(draft / "config.json", "a draft exported by `train export`")
    method = config.get("speculators_model_type") or (
        "eagle3" if config.get("architectures") == ["LlamaForCausalLMEagle3"] else "dflash"
    )
    config = {**config, **config.get("transformer_layer_config", {})}  # speculators' format
    ours = draft / "draftline.json"
    expected = {
        "hidden_size": target.hidden_size,
        "vocab_size": target.vocab_size,
        "num_target_layers": target.num_layers,
    }
    for key, value in expected.items():
        if config.get(key) != value:
            raise UserError(
                draft / "config.json",
                found=f"{key} = {config.get(key)}",
                expected=f"{value} as in {target.path}",
                fix="Serve the draft with the target it was trained for.",
            )
    if ours.exists():
        fingerprint = read_json(ours, "the draft's origin")["target_fingerprint"]
        if fingerprint != target.fingerprint:
            raise UserError(
                ours,
                found=f"a draft for target {fingerprint[:12]}",
                expected=f"one for {target.fingerprint[:12]} ({target.path})",
                fix="Train a draft for this target, or serve the other one.",
            )
    proposals = config.get("speculators_config", {}).get("proposal_methods")
    num_draft_tokens = proposals[0]["speculative_tokens"] if proposals else config["block_size"] - 1
    return {"method": method, "model": str(draft), "num_speculative_tokens": num_draft_tokens}
