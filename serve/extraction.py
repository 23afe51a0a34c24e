"""vLLM's arguments for hidden-state extraction: its `extract_hidden_states` method and a connector that writes files.

They are the same for an engine in this process and for a server. A client cannot choose a path: the engine writes to
`staging`.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common.errors import IncompleteError
from recipe.check import check_kv_dtype
from recipe.recipe import Recipe
from serve.engine import engine_env, engine_name, is_cpu_engine
from target.layers import to_vllm_layer_ids
from target.target import Target

JSON_ARGS = ("speculative_config", "kv_transfer_config", "hf_overrides")
NUM_EXPERTS_KEYS = ("num_experts", "num_local_experts", "n_routed_experts")


def longest_sample(recipe: Recipe, target: Target) -> int:
    """Return the most tokens of a sample; one position is left for the token that the engine generates."""
    positions = target.config.get("max_position_embeddings")
    limit = recipe.target.max_model_len
    return min(limit, int(positions) - 1) if positions else limit


def extraction_args(
    recipe: Recipe, target: Target, layer_ids: Sequence[int], staging: Path, *, on_cpu: bool | None = None
) -> dict[str, Any]:
    """Return engine arguments (with underscores): `dump.args` over `serve.args` over extraction's.

    `on_cpu`: whether the engine is the CPU build; default: that of the installed engine.
    Raises UserError for a quantized KV cache: the states pass through it and would be quantized too.
    """
    args: dict[str, Any] = {
        key.replace("-", "_"): value for key, value in {**recipe.serve.args, **recipe.dump.args}.items()
    }
    check_kv_dtype(str(args.get("kv_cache_dtype", "auto")))
    name, module = "HiddenStatesConnector", "serve.vllm_plugins.hidden_states_connector"
    if is_cpu_engine() if on_cpu is None else on_cpu:
        name, module = "CPUHiddenStatesConnector", "serve.vllm_cpu.hidden_states_connector"
    layers = {"eagle_aux_hidden_state_layer_ids": to_vllm_layer_ids(layer_ids, target.num_layers)}
    if args.get("model_impl") == "transformers":
        args |= {"model_impl": "auto", "hf_overrides": {"architectures": [_transformers_class(target)]}}
    return {
        "max_model_len": longest_sample(recipe, target) + 1,
        "enable_prefix_caching": False,  # states of cached tokens are not computed
        "speculative_config": {
            "method": "extract_hidden_states",
            "num_speculative_tokens": 1,
            "draft_model_config": {"hf_config": layers},
        },
        "kv_transfer_config": {
            "kv_connector": name,
            "kv_connector_module_path": module,
            "kv_role": "kv_producer",
            "kv_connector_extra_config": {"shared_storage_path": str(staging)},
        },
        **args,
    }


def _transformers_class(target: Target) -> str:
    """Return vLLM's class that runs a text model with the code of transformers.

    With `model_impl: transformers` vLLM looks for its own extraction module in transformers, too, and does not start.
    """
    has_experts = any(target.config.get(key) for key in NUM_EXPERTS_KEYS)
    return f"Transformers{'MoE' if has_experts else ''}ForCausalLM"


def identify_engine(recipe: Recipe, args: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the states of an engine in this process depend on: vLLM's release, its arguments and environment."""
    kept = {key: value for key, value in args.items() if key != "kv_transfer_config"}  # it has the staging folder
    return {"engine": engine_name(), "args": kept, "env": engine_env({**recipe.serve.env, **recipe.dump.env})}


def to_server_args(args: Mapping[str, Any]) -> dict[str, str | int | float | bool]:
    """Convert engine arguments to flags of `vllm serve`: dashes, and JSON for nested values."""
    return {key.replace("_", "-"): json.dumps(value) if key in JSON_ARGS else value for key, value in args.items()}


def prove_extraction(recipe: Path, overrides: Sequence[str], url: str, staging: Path) -> None:
    """Run `dump preflight` on a server with extraction on, at `url` (ending in /v1), that writes to `staging`.

    Raises IncompleteError if it finds a defect; its message is printed.
    """
    own = ("dump.backend=server", f"dump.endpoints=[{url}]", f"dump.server_staging_dir={staging}")
    words = [word for value in (*overrides, *own) for word in ("--set", value)]
    command = [str(Path(sys.executable).with_name("dump")), "preflight", "--recipe", str(recipe), *words]
    if code := subprocess.run(command, check=False).returncode:
        raise IncompleteError(
            f"`dump preflight` of {url}: found exit code {code}, expected 0. Its message is above; the server is "
            "stopped. Mend the engine, or start it with --no-preflight."
        )
