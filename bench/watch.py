"""Watch a running server's acceptance and say when it has drifted from the draft's card.

Reads:  GET /metrics of a vLLM server, every so often; certificate.json of the draft; conversations or prompts to send.
Writes: a JSON file and a file of Prometheus metrics after each read; serves the same metrics (bench/watch_report.py).

An earlier JSON file of the same server and card is continued: its last read begins the first window. So a job that runs
`--once --json FILE` every hour compares the whole hour and need not stay.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from bench.card import Filters, describe_row, read_card
from bench.counters import CannotSayError, read_server
from bench.probe import Requests, send_requests, summarize
from bench.requests import Served
from bench.watch_report import Report, describe_probe, describe_verdict, describe_window
from bench.windows import EXIT_CODES, Watcher
from common.errors import UserError
from serve.client import AnswerError, ask


@dataclass(frozen=True)
class Settings:
    """What to watch and how: see the options of `bench watch`."""

    endpoint: str
    card: Path
    filters: Filters
    every_s: float
    once: bool
    rate: float
    min_drafts: int
    requests_per_conversation: float = 1.0
    requests: Requests | None = None


def watch(settings: Settings, report: Report) -> int:
    """Watch until Ctrl-C, or once; print a line for each window and return the exit code.

    Raises UserError for an unusable card, JSON file or port, and for a server that is none of vLLM or does not draft.
    """
    card = read_card(settings.card, settings.filters)
    watcher = Watcher(settings.endpoint, card, settings.rate, settings.min_drafts, settings.requests_per_conversation)
    if report.json is not None and report.json.exists():
        watcher.restore(report.json)
    rows = "; ".join(sorted({describe_row(row) for row in card.rows}))
    print(f"watch: {card.name} ({card.digest[:12]}), {card.source}: {rows}")
    with report.open(watcher) as port:
        if port is not None:
            print(f"watch: metrics on port {port}")
        try:
            _run(watcher, settings, report)
        except KeyboardInterrupt:
            print()
    print(f"watch: {describe_verdict(watcher)}", flush=True)
    return EXIT_CODES[watcher.verdict]


def _run(watcher: Watcher, settings: Settings, report: Report) -> None:
    """Read and compare. With `once`, return after the requests were sent or a window was read."""
    continued = watcher.last is not None
    answered = _step(watcher, report)
    if settings.requests is not None and answered:
        _probe(watcher, settings.requests)
        report.write(watcher)
    if settings.once and (continued or not answered or settings.requests is not None):
        return
    while True:
        time.sleep(settings.every_s)
        _step(watcher, report)
        if settings.once:
            return


def _step(watcher: Watcher, report: Report) -> bool:
    """Read the server once and report; return whether it answered."""
    try:
        read = read_server(watcher.endpoint)
    except CannotSayError as error:
        watcher.unanswered = str(error)
        print(f"watch: {error}", flush=True)
        report.write(watcher)
        return False
    was_first = watcher.last is None
    window = watcher.observe(read)
    for note in watcher.notes:
        print(f"watch: {note}")
    watcher.notes.clear()
    if window is not None:
        print(describe_window(window, watcher.why_not), flush=True)
    elif not was_first:
        print(f"watch: too little yet: {watcher.why_not}", flush=True)
    report.write(watcher)
    return True


def _probe(watcher: Watcher, requests: Requests) -> None:
    """Send the requests, one more test at a window's rate, and leave what they add to the counters out of the windows.

    Raises UserError: see `send_requests`. If the server stops answering, the watch goes on without these figures.
    """
    assert watcher.last is not None
    try:
        server = Served(watcher.endpoint.rstrip("/").removesuffix("/v1"), _ask_model(watcher.endpoint))
        answered = send_requests(server, requests, watcher.card)
        read = read_server(watcher.endpoint)
        if read.restarted_since(watcher.last):
            raise CannotSayError(f"{watcher.endpoint}: found a restart while requests were sent, expected none")
        draft_tokens = read.since(watcher.last).draft_tokens
        watcher.probe = summarize(answered, watcher.card, draft_tokens, watcher.rate)
        print(describe_probe(watcher.probe), flush=True)
        if not watcher.probe.is_tested:
            watcher.why_not = "the requests sent tell no drop: too few of a mode, or a card without such figures"
        watcher.skip(read)
    except CannotSayError as error:
        watcher.unanswered = str(error)
        print(f"watch: {error}", flush=True)


def _ask_model(endpoint: str) -> str:
    try:
        return ask(lambda client: client.read_model(endpoint))
    except AnswerError as error:
        if 400 <= error.status < 500:
            raise UserError(
                endpoint,
                found=str(error),
                expected="the name of its model",
                fix="Set OPENAI_API_KEY to the server's key.",
            ) from None
        raise CannotSayError(f"{endpoint}: found no answer ({error}), expected the name of its model") from None
