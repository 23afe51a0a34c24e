"""The vLLM releases that Draftline works with, and everything that differs between releases.

Code that depends on a release asks this module. docs/vllm-versions.md shows what was tested on each release.
"""

from __future__ import annotations

import re
import sys
from functools import cache
from typing import Any

from common.errors import UserError
from serve.engine import engine_name

Release = tuple[int, int]

PROVEN = ("0.30.0", "0.31.0", "0.32.0")
"""Releases that pass `make test-vllm VERSION=...`. pyproject's `gpu` extra is their range."""

BROKEN: tuple[tuple[Release, str], ...] = (
    ((0, 20), "no DFlash drafts"),
    ((0, 22), "no lock files beside hidden states, so `dump` cannot tell when a file is complete"),
)
"""What breaks in all releases before the first number."""

WITHOUT_DRAFT_KERNELS: tuple[Release, ...] = ((0, 30),)
"""Releases whose CPU build does not use its own kernels of drafts; serve/vllm_cpu/draft_kernels.py makes it."""

CAPTURES_BEFORE_REDUCTION = frozenset({(0, 30), (0, 31), (0, 32)})
"""Releases whose NVIDIA MiniMax-M3 captures a layer before its all-reduce (docs/tensor-parallel.md).

Another release may capture after it, and must not be reduced a second time.
"""


def check_release() -> None:
    """Check the installed vLLM; call it before an engine starts.

    Prints one line if the release was not tested, once per process. Raises UserError if it is known not to work.
    """
    name, version = engine_name()
    for before, reason in BROKEN:
        if parse_release(version) < before:
            raise UserError(
                f"{name} {version}",
                found=reason,
                expected=f"one of {name} {', '.join(PROVEN)}",
                fix=f"Install another release: pip install '{name}=={PROVEN[-1]}' (docs/vllm-versions.md).",
            )
    _tell_untested(name, version)


def lacks_draft_kernels() -> bool:
    """Return whether the installed CPU build needs `use_draft_kernels`."""
    return parse_release(engine_name()[1]) in WITHOUT_DRAFT_KERNELS


def parse_release(version: str) -> Release:
    """Return major and minor number of a version such as "0.32.1.dev5+cu130"."""
    found = re.match(r"(\d+)\.(\d+)", version)
    assert found, version
    return int(found[1]), int(found[2])


@cache
def _tell_untested(name: str, version: str) -> None:
    if version.partition("+")[0] not in PROVEN:  # builds are named as in 0.32.0+cu130
        print(
            f"{name} {version} is not one of the tested releases ({', '.join(PROVEN)}); it may work. "
            f"To find out: make test-vllm VERSION={version}",
            file=sys.stderr,
        )


def find_draft_model(runner: Any) -> Any:
    """Return the draft's module in a worker's model runner; None without a draft.

    The attribute is `drafter` in V1 and `speculator` in V2.
    """
    return getattr(getattr(runner, "drafter", None) or getattr(runner, "speculator", None), "model", None)
