"""Show the progress of a run: a bar on a terminal, else a line of JSON every minute; all lines go to metrics.jsonl.

Line: seconds of this process, finished rows and their total, tokens, rates since the last line, concurrency, the
servers' running and waiting requests, retries, counts by status, estimated seconds left.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from contracts.run import Run
from serve.endpoints import Endpoints
from synth.output import Output
from synth.pace import POLL_INTERVAL_S, Pace

LINE_INTERVAL_S = 60.0


class Watch:
    """The progress display of one run; `poll` must keep running."""

    def __init__(self, folder: Path, out: Output, num_expected: int) -> None:
        self.in_flight = 0
        self._out = out
        self._path = folder / "metrics.jsonl"
        self._gauges: tuple[float, float] | None = None
        self._started = self._line_at = time.monotonic()
        self._first_rows = self._line_rows = out.counts.total()
        self._first_tokens = self._line_tokens = out.tokens
        self._expected = num_expected
        self._bar = tqdm(
            total=num_expected,
            initial=self._first_rows,
            desc="synth",
            unit="conv",
            mininterval=1,
            disable=None,  # no bar without a terminal
        )

    async def poll(self, endpoints: Endpoints, pace: Pace, run: Run) -> None:
        """Read the servers' gauges, adjust the pace, update the display and save the time, every two seconds."""
        while True:
            await asyncio.to_thread(run.tick)
            self._gauges = await endpoints.read_load()
            if self._gauges is not None and not pace.fixed:
                pace.observe(self.in_flight, *self._gauges)
            self._show(pace)
            if time.monotonic() - self._line_at >= LINE_INTERVAL_S:
                self.write_line(endpoints, pace)
            await asyncio.sleep(POLL_INTERVAL_S)

    def _show(self, pace: Pace) -> None:
        self._bar.n = self._out.counts.total()
        rate = (self._out.tokens - self._first_tokens) / max(time.monotonic() - self._started, 1e-3)
        failed = self._out.counts["failed"]
        server = "" if self._gauges is None else f"running {self._gauges[0]:.0f}, waiting {self._gauges[1]:.0f}, "
        self._bar.set_postfix_str(
            f"{rate:.0f} tok/s, {server}in flight {self.in_flight}/{pace.limit}, {failed} failed", refresh=True
        )

    def write_line(self, endpoints: Endpoints, pace: Pace) -> None:
        """Append a line to metrics.jsonl."""
        now, rows, tokens = time.monotonic(), self._out.counts.total(), self._out.tokens
        seconds = max(now - self._line_at, 1e-3)
        rows_per_s = (rows - self._first_rows) / max(now - self._started, 1e-3)
        line: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "seconds": round(now - self._started, 1),
            "rows": rows,
            "rows_expected": self._expected,
            "rows_per_s": round((rows - self._line_rows) / seconds, 2),
            "tokens": tokens,
            "tokens_per_s": round((tokens - self._line_tokens) / seconds, 1),
            "in_flight": self.in_flight,
            "concurrency": pace.limit,
            "running": self._gauges[0] if self._gauges else None,
            "waiting": self._gauges[1] if self._gauges else None,
            "retries": endpoints.num_retries,
            **{status: self._out.counts[status] for status in ("done", "truncated", "filtered", "failed")},
            "seconds_left": round((self._expected - rows) / rows_per_s) if rows_per_s else None,
        }
        self._line_at, self._line_rows, self._line_tokens = now, rows, tokens
        text = json.dumps(line)
        with self._path.open("a") as file:
            file.write(text + "\n")
        if self._bar.disable:
            print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        self._bar.n = self._out.counts.total()
        self._bar.close()
