"""Report a watched server: lines of text, a JSON file, Prometheus metrics in a file or on a port.

Writes: the JSON file and the metrics' file, each to a temporary name first. The metrics are Prometheus' text format
        (https://prometheus.io/docs/instrumenting/exposition_formats/), as node_exporter's textfile collector reads it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from prometheus_client import CollectorRegistry, generate_latest, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric

from bench.counters import CannotSayError
from bench.drift import Comparison, Tested
from bench.probe import Group, Probe
from bench.windows import AS_CARD, CANNOT_SAY, DRIFTED, Watcher, Window
from common.errors import UserError
from common.files import write_atomic, write_json

PREFIX = "draftline_watch"


@dataclass(frozen=True)
class Report:
    """Where a watch is reported beside its lines: a JSON file, a file of metrics, and an address that serves them."""

    json: Path | None = None
    prometheus: Path | None = None
    listen: tuple[str, int] | None = None

    @contextmanager
    def open(self, watcher: Watcher) -> Iterator[int | None]:
        """Serve the metrics during the block; yields the port. Raises UserError if it cannot be listened on."""
        if self.listen is None:
            yield None
            return
        host, port = self.listen
        try:
            server, thread = start_http_server(port, host, make_registry(watcher))
        except OSError as error:
            raise UserError(
                f"--listen {host}:{port}",
                found=(error.strerror or "an unusable address").lower(),
                expected="a free port of this machine",
                fix="Choose another one.",
            ) from None
        try:
            yield server.server_port
        finally:
            server.shutdown()
            server.server_close()
            thread.join()

    def write(self, watcher: Watcher) -> None:
        """Write the files anew. Raises UserError for a wrong path, CannotSayError for any other failure.

        A full disk must not end with the exit code of a drift.
        """
        try:
            if self.json is not None:
                write_json(self.json, watcher.to_json())
            if self.prometheus is not None:
                write_atomic(self.prometheus, generate_latest(make_registry(watcher)))
        except OSError as error:
            where = error.filename or self.json or self.prometheus
            raise CannotSayError(f"{where}: found {(error.strerror or 'an error').lower()}, expected a file") from None


def parse_address(text: str) -> tuple[str, int]:
    """Parse HOST:PORT. Raises UserError for anything else."""
    host, _, port = text.rpartition(":")
    if host and port.isdecimal() and int(port) < 1 << 16:
        return host.strip("[]"), int(port)
    raise UserError("--listen", found=text, expected="HOST:PORT, as in 127.0.0.1:9109", fix="Correct it.")


def describe_window(window: Window, why_not: str) -> str:
    """Return a window's line."""
    counts = window.counts
    requests = "" if counts.requests is None else f" of {counts.requests} requests"
    text = (
        f"{_clock(window.end)}  {window.end - window.begin:.0f} s, {counts.steps} drafts{requests}: acceptance length "
        f"{counts.acceptance_length:.3f}, by position {_shares(counts.shares)}"
    )
    if window.comparison is None:
        return f"{text}; not compared: {why_not}"
    smallest, largest = counts.draft_tokens
    if smallest < largest and counts.drafted is not None:
        drafted = counts.drafted / counts.steps
        text += f"; {drafted:.2f} of {largest} tokens drafted a step, so only position 1 is compared"
    text += f"; {_describe(window.comparison)}"
    if window.recent is not None:
        text += f"; {window.num_recent} windows together: {_describe(window.recent)}"
    return text


def describe_probe(probe: Probe) -> str:
    """Return the lines of the requests that were sent."""
    return "\n".join(
        [
            *(f"requests: {_describe_group(group)}; {_describe_test(group.tested)}" for group in probe.by_mode),
            *(f"requests: category {_describe_group(group)}" for group in probe.by_category),
        ]
    )


def describe_verdict(watcher: Watcher) -> str:
    """Return what the run found, in a line."""
    if watcher.verdict == CANNOT_SAY:
        return f"{CANNOT_SAY}: {watcher.unanswered or watcher.why_not}"
    probed = watcher.probe if watcher.probe is not None and watcher.probe.is_tested else None
    num_tests = len(watcher.tested) + (probed is not None)
    chance = f"by chance at most {min(1.0, num_tests * watcher.rate):g} of such runs are reported as drifted"
    windows = [_count(len(watcher.tested))] if watcher.tested else []
    compared = " and ".join([*windows, *(["the requests sent"] if probed else [])])
    if watcher.verdict == AS_CARD:
        return f"{AS_CARD} in {compared}; {chance}"
    outside = [window for window in watcher.tested if window.is_outside]
    found = (
        [f"{len(outside)} of {_count(len(watcher.tested))}, the first at {_clock(outside[0].end)}"] if outside else []
    )
    found += [f"requests of {group.name}" for group in probed.outside] if probed else []
    return f"{DRIFTED}: {'; '.join(found)}; {chance}"


def make_registry(watcher: Watcher) -> CollectorRegistry:
    """Return a registry whose metrics are always those of the watcher now."""
    registry = CollectorRegistry()
    registry.register(Metrics(watcher))
    return registry


class Metrics:
    """Prometheus metrics of a watcher; `collect` is called for each scrape."""

    def __init__(self, watcher: Watcher) -> None:
        self._watcher = watcher

    def collect(self) -> Iterator[Metric]:
        """Yield all metrics. Those of a window are of the last one that ended."""
        watcher = self._watcher
        card = {"draft": watcher.card.name, "digest": watcher.card.digest, "source": watcher.card.source}
        yield InfoMetricFamily(f"{PREFIX}_card", "The card that is compared with.", value=card)
        verdict = GaugeMetricFamily(f"{PREFIX}_verdict", "1 for what the last window says.", labels=["verdict"])
        for name in (AS_CARD, DRIFTED, CANNOT_SAY):
            verdict.add_metric([name.replace(" ", "_")], float(name == watcher.last_verdict))
        yield verdict
        up = float(watcher.last is not None and not watcher.unanswered)
        yield GaugeMetricFamily(f"{PREFIX}_server_up", "Whether the server answered the last read.", value=up)
        if watcher.last is not None:
            seconds = watcher.last.time
            yield GaugeMetricFamily(f"{PREFIX}_last_read_seconds", "Time of the last answer.", value=seconds)
        tested = watcher.tested
        outside = sum(window.is_outside for window in tested)
        yield CounterMetricFamily(f"{PREFIX}_windows", "Windows that were compared.", value=len(tested))
        yield CounterMetricFamily(f"{PREFIX}_windows_outside", "Windows outside of the card.", value=outside)
        if watcher.windows:
            yield from _window_metrics(watcher.windows[-1])


def _window_metrics(window: Window) -> Iterator[Metric]:
    counts = window.counts
    yield GaugeMetricFamily(f"{PREFIX}_drafts", "Drafts in the last window.", value=counts.steps)
    seconds = window.end - window.begin
    yield GaugeMetricFamily(f"{PREFIX}_window_seconds", "Length of the last window.", value=seconds)
    length = GaugeMetricFamily(
        f"{PREFIX}_acceptance_length", "Tokens per step in the last window; low and high: as the card.", labels=["of"]
    )
    length.add_metric(["window"], counts.acceptance_length)
    share = GaugeMetricFamily(
        f"{PREFIX}_acceptance_share",
        "Share of steps that accepted at least this many draft tokens; low and high: as the card.",
        labels=["position", "of"],
    )
    for place, value in enumerate(counts.shares, start=1):
        share.add_metric([str(place), "window"], value)
    if window.comparison is not None:
        length.add_metric(["low"], window.comparison.length.low)
        length.add_metric(["high"], window.comparison.length.high)
        for place, tested in enumerate(window.comparison.positions, start=1):
            if tested is not None:
                share.add_metric([str(place), "low"], tested.low)
                share.add_metric([str(place), "high"], tested.high)
    yield length
    yield share


def _describe(comparison: Comparison) -> str:
    if not comparison.outside:
        return f"as the card, {_range(comparison.length)}"
    return ", ".join(
        f"{f'position {place}' if place else 'length'} {tested.value:.3f} is {tested.side.upper()} {_range(tested)}"
        for place, tested in comparison.outside
    )


def _describe_group(group: Group) -> str:
    low, high = group.interval
    return (
        f"{group.name}: {group.n} conversations, acceptance length {group.acceptance.acceptance_length:.3f} "
        f"[{low:.3f}, {high:.3f}], by position {_shares(group.acceptance.per_position)}"
    )


def _describe_test(tested: Tested | None) -> str:
    if tested is None:
        return "not compared: too few conversations, or no such row with an interval on the card"
    return f"{tested.side.upper() or 'as the card,'} {_range(tested)}"


def _range(tested: Tested) -> str:
    return f"{tested.low:.3f} to {tested.high:.3f}"


def _shares(shares: list[float]) -> str:
    return " ".join(f"{share:.3f}" for share in shares)


def _count(windows: int) -> str:
    return f"{windows} window{'s' * (windows != 1)}"


def _clock(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))
