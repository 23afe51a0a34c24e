"""The vLLM releases that Draftline works with, and everything that differs between releases.

Code that depends on a release asks this module. docs/vllm-versions.md shows what was tested on each release.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
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

EXTRACTS_ON_RANKS: Release = (0, 31)
"""First release whose hidden-state connector works with tensor parallelism.

Before it, the scheduler waits for a notice from every rank that a request's states are written. Only rank 0 writes, so
no request is freed (`get_finished_count` of ExampleHiddenStatesConnector).
"""


def check_release(args: Mapping[str, Any]) -> None:
    """Check the installed vLLM before an engine starts with `args` (engine arguments or flags, without dashes).

    Prints one line if the release was not tested, once per process. Raises UserError if it is known not to work, at
    all or with these arguments.
    """
    name, version = engine_name()
    release = parse_release(version)
    reasons = [reason for before, reason in BROKEN if release < before]
    names = {key.replace("_", "-"): value for key, value in args.items()}
    ranks = int(names.get("tensor-parallel-size", 1))
    if ranks > 1 and "kv-transfer-config" in names and release < EXTRACTS_ON_RANKS:
        reasons.append(f"tensor-parallel-size {ranks} while it extracts hidden states; it never frees their requests")
    if reasons:
        raise UserError(
            f"{name} {version}",
            found=reasons[0],
            expected=f"one of {name} {', '.join(PROVEN)}",
            fix=f"Install another release: pip install '{name}=={PROVEN[-1]}' (docs/vllm-versions.md).",
        )
    _tell_untested(name, version)


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
    """Return the draft's module in a worker's model runner. The attribute is `drafter` in V1 and `speculator` in V2."""
    return (getattr(runner, "drafter", None) or runner.speculator).model
