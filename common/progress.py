"""Show the progress of a long loop: a bar on a terminal, a plain line about once a minute where there is none."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

from tqdm import tqdm

LINE_INTERVAL_S = 60.0
BAR_INTERVAL_S = 1.0
LINE_FORMAT = "{desc}: {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"

Item = TypeVar("Item")


class Progress:
    """Count `total` items on stderr; use it as a context manager and call `update`.

    `total` None means unknown. `initial` items were done before this process began; they do not count for the rate.
    """

    def __init__(
        self, total: int | None, desc: str, unit: str, initial: int = 0, line_interval_s: float | None = None
    ) -> None:
        self.done = initial
        self._total, self._desc, self._unit, self._initial = total, desc, unit, initial
        self._interval_s = LINE_INTERVAL_S if line_interval_s is None else line_interval_s
        self._note = ""
        self._num_lines = 0

    def __enter__(self) -> Progress:
        self._started = self._line_at = time.monotonic()
        self._bar = tqdm(
            total=self._total,
            desc=self._desc,
            unit=self._unit,
            initial=self._initial,
            mininterval=BAR_INTERVAL_S,
            disable=not sys.stderr.isatty(),
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()
        if self._num_lines:
            self._print_line()

    def update(self, n: int = 1) -> None:
        """Count `n` more items as done."""
        self.done += n
        self._bar.update(n)
        if self._bar.disable and time.monotonic() - self._line_at >= self._interval_s:
            self._print_line()

    def set_note(self, note: str) -> None:
        """Show `note` behind the rate, from the next update on."""
        self._note = note
        self._bar.set_postfix_str(note, refresh=False)

    def _print_line(self) -> None:
        self._line_at = time.monotonic()
        self._num_lines += 1
        line = tqdm.format_meter(
            self.done,
            self._total,  # type: ignore[arg-type]  # tqdm takes None
            self._line_at - self._started,
            prefix=self._desc,
            unit=self._unit,
            initial=self._initial,
            postfix=self._note,
            bar_format=LINE_FORMAT,
        )
        print(line, file=sys.stderr, flush=True)


def track(
    iterable: Iterable[Item], desc: str, unit: str, total: int | None = None, line_interval_s: float | None = None
) -> Iterator[Item]:
    """Yield the items of `iterable` and show the progress through them. `total` defaults to its length, if it has one.

    An item counts as done when the next one is asked for.
    """
    if total is None and isinstance(iterable, Sized):
        total = len(iterable)
    with Progress(total, desc, unit, line_interval_s=line_interval_s) as progress:
        for item in iterable:
            yield item
            progress.update()


def wait_for(process: subprocess.Popen[bytes], what: str) -> int:
    """Wait for a process that shows no progress itself, and return its exit code; kill it if this is interrupted.

    Prints `what` and the seconds so far about once a minute.
    """
    started = time.monotonic()
    try:
        while True:
            try:
                return process.wait(LINE_INTERVAL_S)
            except subprocess.TimeoutExpired:
                print(f"{what}: {time.monotonic() - started:.0f} s so far", file=sys.stderr, flush=True)
    finally:
        process.kill()
        process.wait()
