"""Draftline's exceptions, and the common entry point and error handling of all commands.

A mistake of the user is reported in one line, *where: found, expected. What to do.*, with exit code 2 and no traceback.
A run that cannot account for its rows, or that has filled a disk, exits with 1. Any other exception is a bug and keeps
its traceback.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
from collections.abc import Callable
from typing import NoReturn

INTERRUPTED = 130  # typer's exit code after SIGINT, as shells have it


class DraftlineError(Exception):
    """Base class of our exceptions; never raised itself."""

    exit_code = 1


class UserError(DraftlineError):
    """A mistake that the user can correct: in a recipe, a path, a port, a store."""

    exit_code = 2

    def __init__(self, where: object, *, found: str, expected: str, fix: str) -> None:
        super().__init__(f"{where}: found {found}, expected {expected}. {fix}")


class IncompleteError(DraftlineError):
    """A stage ended with rows unaccounted for or with too many failures. Finished rows are kept."""


def raise_known(group: BaseExceptionGroup[BaseException]) -> NoReturn:
    """Raise the first of our errors in a task group's errors, or the whole group if there is none."""
    known = group.subgroup(DraftlineError)
    while isinstance(known, BaseExceptionGroup):
        known = known.exceptions[0]  # type: ignore[assignment]
    raise known or group from None


def run_app(app: Callable[[], object]) -> None:
    """Run a typer app; our errors become one line on stderr and their exit code."""
    # Without a terminal, rich assumes 80 columns and breaks paths in the middle.
    if not sys.stdout.isatty():
        os.environ.setdefault("COLUMNS", "120")
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        app()
    except DraftlineError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        where = error.filename or "a disk"
        print(
            f"error: {where}: found no space left, expected some. Make room, then run again to go on.", file=sys.stderr
        )
        raise SystemExit(1) from None
    except SystemExit as end:
        if end.code == INTERRUPTED:
            print("stopped: what was finished is kept; run the same command again to go on", file=sys.stderr)
        raise


def _interrupt(*_: object) -> None:
    """Handle SIGTERM, as schedulers send it, like Ctrl-C: servers are stopped and files closed."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as in a shell's background jobs
        signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.raise_signal(signal.SIGINT)
